"""Equal to the authors' code, by the golden arrays (tests/golden/mige/INDEX.md).

Tolerances are of float32 on one thread; the largest differences that were found are a third to two
thirds of them.
"""

from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from golden_mige import (
    PROMPTS,
    WordTokenizer,
    arrays,
    build_parts,
    close,
    facts,
    golden_parts,
    release,
)
from PIL import Image

from mige.config import Guidance
from mige.method.encoder import embed_instruction, embed_patches, encode_text, see
from mige.method.guidance import branches, guide
from mige.method.instruction import Embedded, interleave, segment_ids
from mige.method.prediction import predict
from mige.method.sampler import ContinuousDPMSolver
from mige.method.wording import clean, name_source, safe_name
from mige.pictures import letterbox
from mige.pipeline import Condition, MigePipeline

LENGTH, END, PAD = 24, 1, 0


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts():
    return SimpleNamespace(**golden_parts())


@pytest.fixture(scope="module")
def pipeline():
    """With the golden parts; pictures and decoding are not asked of it here."""
    return MigePipeline(
        **golden_parts(), vae=None, tokenizer=WordTokenizer(), scheduler=ContinuousDPMSolver()
    )


# ----------------------------------------------------------------------------------------------
# the encoders


def test_fusion(parts):
    given = arrays("ffm")
    close(parts.fusion.features(given["clip"], given["vae"]), given["out"], 5e-6, 2e-6)


def test_vision_encoder_and_qformer(parts):
    given = arrays("vit_qformer")
    seen = parts.vision_encoder(given["images"], output_hidden_states=True)
    close(seen.hidden_states[-1], given["vit"], 5e-6, 2e-6)
    close(seen.last_hidden_state, given["ln_vision"], 5e-6, 2e-6)
    found = see(parts.vision_encoder, parts.qformer, parts.fusion, given["images"])
    close(found, given["qformer"], 5e-6, 2e-6)


@pytest.mark.parametrize("index", range(6))
def test_words_and_pictures_interleave(parts, index):
    """Exactly; five marks, an overlong prompt, none, and marks at the ends are among them."""
    given, told = arrays("interleave"), facts("interleave")
    segments = segment_ids(WordTokenizer(), told["prompts"][index])
    assert segments == told["segment_ids"][index]
    table = parts.text_encoder.get_input_embeddings().weight
    whole = interleave([segments], [given["image_vectors"][index]], table, LENGTH, END, PAD)
    found = Embedded(whole.embeddings[0], whole.mask[0])
    assert torch.equal(found.embeddings, given["embeds"][index])
    assert torch.equal(found.mask, given["mask"][index])
    close(encode_text(parts.text_encoder, found), given["t5_out"][index], 1e-5, 5e-6)


def encoded(parts, given: dict, prompts=PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states and masks of the golden prompts, from pixels and latents."""
    found = []
    for index, prompt in enumerate(prompts):
        pictures, latents = given["ref_clip"][index], given["ref_vae"][index]
        meaning = see(parts.vision_encoder, parts.qformer, parts.fusion, pictures)
        vectors = parts.fusion(meaning, embed_patches(parts.transformer, latents))
        segments = segment_ids(WordTokenizer(), prompt)
        embedded = embed_instruction(parts.fusion, parts.text_encoder, segments, vectors, END)
        found.append((encode_text(parts.text_encoder, embedded), embedded.mask))
    return tuple(torch.stack(each) for each in zip(*found, strict=True))


# ----------------------------------------------------------------------------------------------
# the transformer


@pytest.mark.parametrize("index", range(4))
def test_transformer(parts, index):
    given = arrays("trunk")
    found = predict(
        parts.transformer, given["x"], given["source"], given["t"][index], given["y"],
        given["mask"],
    )  # fmt: skip
    close(torch.cat(found, dim=1), given["out"][index], 5e-6, 2e-6)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("forward_subject", [(False, False), (True, False)]),
        ("forward_edit", [(False, False), (False, True), (True, True)]),
    ],
)
def test_every_branch_from_pixels(parts, name, seen):
    given = arrays(name)
    assert list(branches(name == "forward_edit", image_scale=1.5)) == seen
    text, mask = encoded(parts, given)
    close(text, given["t5_out"], 1e-5, 5e-6)
    assert torch.equal(mask, given["mask"])
    null = parts.fusion.null_text.expand_as(text)
    for branch, (has_text, has_source) in enumerate(seen):
        found = predict(
            parts.transformer,
            given["x"],
            given["source"] if has_source else torch.zeros_like(given["source"]),
            given["t"][:2],
            text if has_text else null,
            mask,
        )
        close(torch.cat(found, dim=1), given["out"][2 * branch : 2 * branch + 2], 5e-6, 2e-6)


def test_without_pictures_marks_are_zeros(parts):
    """The prompts' ids are the golden arrays' own: one has no mark, one has one."""
    given = arrays("forward_noimage")
    found = [
        embed_instruction(parts.fusion, parts.text_encoder, segments, None, END)
        for segments in ([[6, 22]], [[], [48]])
    ]
    text = torch.stack([encode_text(parts.text_encoder, each) for each in found])
    close(text, given["t5_out"], 1e-5, 5e-6)
    mask = torch.stack([each.mask for each in found])
    out = predict(parts.transformer, given["x"], given["source"], given["t"], text, mask)
    close(torch.cat(out, dim=1), given["out"], 5e-6, 2e-6)


def test_positions(parts):
    given = arrays("pos_embed")
    assert torch.equal(parts.transformer.pos_embed.pos_embed, given["tiny"])
    assert torch.equal(release()["pos_embed"], given["tiny"])
    with torch.device("cpu"):
        from diffusers.models.embeddings import PatchEmbed

        full = PatchEmbed(64, 64, 2, 8, 1152, interpolation_scale=1).pos_embed[0]
    assert torch.equal(full[[0, 1, 32, 1023]], given["full_rows_0_1_32_1023"])


def test_times_as_the_transformer_embeds_them(parts):
    given = arrays("timestep_embedding")
    close(parts.transformer.adaln_single.emb.time_proj(given["t"]), given["emb"], 0)


def test_times_in_bfloat16_are_those_of_the_release(parts):
    given = arrays("timestep_bf16")
    for name, rounded in (("t", "rounded"), ("t60", "t60_rounded")):
        assert torch.equal(given[name].bfloat16().float(), given[rounded])
    seen = []
    hook = parts.transformer.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["timestep"].float()), with_kwargs=True
    )
    trunk = arrays("trunk")
    try:
        for switch in (False, True):
            predict(
                parts.transformer, trunk["x"], trunk["source"], torch.tensor([982.35, 999.0]),
                trunk["y"], trunk["mask"], switch,
            )  # fmt: skip
    finally:
        hook.remove()
    assert torch.equal(seen[0], torch.tensor([982.35, 999.0]))
    assert seen[1].tolist() == [984.0, 1000.0]


# ----------------------------------------------------------------------------------------------
# sampling


@pytest.mark.parametrize("steps", [50, 60])
def test_schedule(steps):
    given = arrays(f"schedule_{steps}")
    times = np.linspace(1, 1e-3, steps + 1)
    solver = ContinuousDPMSolver()
    alpha, sigma = solver.schedule(times)
    close(torch.from_numpy(alpha), given["alpha"], 2e-7)
    close(torch.from_numpy(sigma), given["sigma"], 2e-6)
    close(torch.from_numpy(np.log(alpha / sigma)), given["lam"], 2e-4)
    solver.set_timesteps(steps)
    close(solver.timesteps, given["model_t"][:-1], 1.3e-4)
    assert len(solver.sigmas) == steps + 1


@pytest.mark.parametrize("steps", [6, 9, 12, 20])
def test_sampling_with_the_exact_noise_of_a_normal_distribution(steps):
    """Branch j is of N(0.4 j, 0.5²), whose noise is known in closed form."""
    given = arrays(f"sample_analytic_{steps}")
    solver = ContinuousDPMSolver()
    solver.set_timesteps(steps)
    alpha, sigma = solver.schedule(np.linspace(1, 1e-3, steps + 1))
    latents, scales = given["z"], given["scales"].tolist()
    assert torch.equal(latents, given["latents"][0])
    for step, time in enumerate(solver.timesteps):
        a, s = alpha[step], sigma[step]
        exact = [s * (latents.double() - a * 0.4 * j) / (a**2 * 0.25 + s**2) for j in range(3)]
        guided = guide(torch.stack(exact).float(), *scales)
        close(guided, given["eps"][step], 5e-5, 1e-5)
        latents = solver.step(guided, time, latents).prev_sample
        close(latents, given["latents"][step + 1], 5e-5, 1e-5)


@pytest.mark.parametrize("name", ["sample_edit_6", "sample_subject_6"])
def test_sampling_with_the_model(pipeline, parts, name):
    """The pipeline's own loop, step by step; values reach 1000, so compared relatively."""
    given = arrays(name)
    text, mask = encoded(parts, given)
    is_edit = "source" in given
    source = given.get("source", torch.zeros_like(given["z"]))
    conditions = [Condition(*each, is_edit) for each in zip(text, mask, source, strict=True)]
    text_scale, image_scale = given["scales"].tolist()
    found = []
    pipeline.denoise(
        conditions, given["z"], Guidance(6, text_scale, image_scale if is_edit else 1.0),
        lambda step, noise, latents: found.append((noise, latents)),
    )  # fmt: skip
    assert len(found) == 6
    for step, (noise, latents) in enumerate(found):
        close(noise, given["eps"][step], np.inf, 1e-5)
        close(latents, given["latents"][step + 1], np.inf, 1e-5)


def test_a_branch_that_cancels_is_not_asked_for(pipeline, parts):
    """At an image scale of 1 two branches give what three do."""
    given = arrays("sample_edit_6")
    text, mask = encoded(parts, given)
    conditions = [Condition(*each, True) for each in zip(text, mask, given["source"], strict=True)]
    sizes = []
    hook = parts.transformer.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    try:
        two = pipeline.denoise(conditions, given["z"], Guidance(3, 5.0, 1.0))
        three = pipeline.denoise(conditions, given["z"], Guidance(3, 5.0, 1.0 + 1e-9))
    finally:
        hook.remove()
    assert sizes == [4] * 3 + [6] * 3
    close(two, three, np.inf, 1e-5)


# ----------------------------------------------------------------------------------------------
# words and pictures, to the letter


@pytest.mark.parametrize(("text", "wanted"), facts("text")["caption"])
def test_cleaning(text, wanted):
    assert clean(text) == wanted


@pytest.mark.parametrize(("text", "task", "wanted", "cleaned"), facts("text")["edit_instruction"])
def test_naming_the_source(text, task, wanted, cleaned):
    assert name_source(text, task == "global") == wanted
    assert clean(wanted) == cleaned


@pytest.mark.parametrize(("text", "wanted"), facts("text")["safe_filename"])
def test_file_names(text, wanted):
    assert safe_name(text) == wanted


@pytest.mark.parametrize("index", range(3))
def test_letterbox(index):
    given = arrays("letterbox32")
    picture = Image.fromarray(given[f"in{index}"].numpy())
    found = torch.from_numpy(np.array(letterbox(picture, 32, 32)))
    # older versions of Pillow round tall pictures otherwise
    close(found, given[f"out{index}"], 0 if int(PIL.__version__.split(".")[0]) >= 13 else 8)


# ----------------------------------------------------------------------------------------------
# sizes


def test_a_release_s_tensors_all_have_a_place():
    parts = build_parts()
    assert sum(len(part.state_dict()) for part in parts.values()) > len(release())
