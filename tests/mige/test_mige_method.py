"""Wording, requests, guidance and instructions, by hand-worked cases."""

import numpy as np
import pytest
import torch
from golden_mige import WordTokenizer, arrays
from PIL import Image

from imagelab.errors import UserError
from mige.method.fusion import InstructionFusion
from mige.method.guidance import Branch, branches, guide
from mige.method.instruction import interleave, length_of, segment_ids
from mige.method.loss import Diffusion
from mige.method.sampler import ContinuousDPMSolver
from mige.method.schedule import make_betas
from mige.method.wording import WRITTEN, clean, name_source, prompt_for
from mige.request import make_request, written_marks

PREFIXES = {
    "subject": "Paint the Subjects: \n",
    "subject_inference": "Paint; these: \n",
    "edit": "Edit it: \n",
    "subject_edit": "Put it in: \n",
}
RED = Image.new("RGB", (4, 4), "red")
BLUE = Image.new("RGB", (4, 4), "blue")


# ----------------------------------------------------------------------------------------------
# prompts


@pytest.mark.parametrize(
    ("task", "for_training", "wanted"),
    [
        ("subject", True, "Paint the Subjects: \na<imagehere>on the beach"),
        ("subject", False, "paint; these a<imagehere>on the beach"),
        ("edit", True, "Edit it: \na<imagehere>on the beach"),
        ("edit", False, "Edit it: \na<imagehere>on the beach"),
        ("subject_edit", True, "Put it in: \na<imagehere>on the beach"),
        ("subject_edit", False, "put it in a<imagehere>on the beach"),
    ],
)
def test_prefixes(task, for_training, wanted):
    """Only those of inference are cleaned; a semicolon goes, as all cleaning has it."""
    found = prompt_for(task, "A<imagehere>on the Beach.", PREFIXES, for_training)
    assert found == wanted.replace("paint;", "paint")


def test_a_cleaned_prefix_spends_words():
    text = " ".join(f"w{number}" for number in range(88))
    assert clean(text) == text
    assert prompt_for("edit", text, PREFIXES) == PREFIXES["edit"] + text
    found = prompt_for("subject", text, PREFIXES)
    assert found.split(" ")[:3] == ["paint", "these", "w0"] and found.endswith(" w85")


def test_a_single_newline_stays_within_a_word():
    assert clean("a\nb") == "a\nb"
    assert clean("a \nb") == "a b"
    assert len(clean("a\nb " * 88).split(" ")) == 88


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a <image> on the beach", "a<imagehere>on the beach"),
        ("a <Image Here>  and\n< image >.", "a<imagehere>and<imagehere>."),
        ("a <imagehere> on it", "a <imagehere> on it"),  # in the release's own way
        ("a <image> and <imagehere>.", "a<imagehere>and <imagehere>."),
        ("x \n <image>  <image> y", "x<imagehere><imagehere>y"),
        ("a dog", "a dog"),
    ],
)
def test_marks(text, wanted):
    assert written_marks(text) == wanted


def test_long_runs_of_blanks_are_read_at_once():
    """Tried from each of their places, these would take minutes."""
    blanks = " " * 100_000
    assert name_source(f"make{blanks}it") == f"make{blanks}it in<imagehere>"
    assert name_source(f"make{blanks}the image{blanks}red") == "make <imagehere> red"
    assert WRITTEN.sub("-", f"a{blanks}b{blanks}<image>{blanks}c") == f"a{blanks}b-c"


# ----------------------------------------------------------------------------------------------
# requests


def test_tasks_follow_from_what_is_given():
    subject = make_request("a <image>", (RED,))
    assert (subject.task, subject.source) == ("subject", None)
    edit = make_request("make it snow", source=RED)
    assert (edit.task, edit.source, edit.pictures) == ("edit", 0, (RED,))
    assert edit.prompt(PREFIXES) == "Edit it: \nmake it snow in<imagehere>"
    whole = make_request("make it snow.", source=RED, is_global=True)
    assert whole.prompt(PREFIXES) == "Edit it: \nmake it snow of<imagehere>"
    named = make_request("make <image> red", source=RED)
    assert named.prompt(PREFIXES) == "Edit it: \nmake<imagehere>red"
    again = make_request("make the photo red, keep the photo sharp", source=RED)
    assert (again.task, again.marks, again.pictures) == ("edit", 2, (RED,))
    assert again.prompt(PREFIXES) == "Edit it: \nmake <imagehere> red, keep <imagehere> sharp"
    put = make_request("put <image> into <image>", (RED,), BLUE, 1)
    assert (put.task, put.source, put.pictures) == ("subject_edit", 1, (RED, BLUE))
    assert put.prompt(PREFIXES) == "put it in put<imagehere>into<imagehere>"


@pytest.mark.parametrize(
    ("text", "pictures", "source", "told"),
    [
        ("a <image>", (), None, "has 1 mark <image> and there are no pictures"),
        ("a <image> <image>", (RED,), None, "has 2 marks <image> and there is 1 picture;"),
        (
            "a dog",
            (RED, BLUE),
            None,
            "there are 2 pictures and the instruction 'a dog' has no mark",
        ),
        ("put <image> in", (RED,), BLUE, "there are 2 pictures and .* has 1 mark <image>; write"),
        ("make <image> like <image>", (), RED, "has 2 marks <image> and there is 1 picture"),
        ("  ", (), RED, "has no words"),
        ("<image>", (RED,), None, "has no words"),
    ],
)
def test_marks_without_pictures_and_the_reverse(text, pictures, source, told):
    with pytest.raises(UserError, match=told):
        make_request(text, pictures, source)


def test_what_would_be_cut_is_refused():
    make_request("w " * 85 + "w", ()).prompt(PREFIXES)
    with pytest.raises(UserError, match="has 90 words with those .* and 88 are read; shorten it"):
        make_request("w " * 87 + "w", ()).prompt(PREFIXES)


# ----------------------------------------------------------------------------------------------
# guidance


def test_branches_in_their_order():
    nothing, source, both = Branch(False, False), Branch(False, True), Branch(True, True)
    assert branches(False) == (nothing, Branch(True, False))
    assert branches(False, 3.0) == branches(False)
    assert branches(True, 1.5) == (nothing, source, both)
    assert branches(True) == (source, both)


def test_guidance_in_numbers():
    """Of 1, 3 and 10: 1 + 1.5 (3 − 1) + 5 (10 − 3) = 39; of 3 and 10: 3 + 5 (10 − 3) = 38."""
    noise = torch.tensor([1.0, 3.0, 10.0]).reshape(3, 1, 1, 1, 1)
    assert guide(noise, 5.0, 1.5).item() == 39.0
    assert guide(noise[1:], 5.0).item() == 38.0
    assert guide(noise[1:], 5.0, 1.5).item() == 38.0


# ----------------------------------------------------------------------------------------------
# instructions


def test_a_sequence_by_hand():
    """Words are 10 times their id, pictures 1 and 2: [70] 1 1 [80 90] 2 2 [10] and padding."""
    table = 10 * torch.arange(10.0)[:, None]
    pictures = torch.tensor([[[1.0]] * 2, [[2.0]] * 2])
    found = interleave([[[7], [8, 9], []]], [pictures], table, 10, 1, 0)
    assert found.embeddings[0, :, 0].tolist() == [70, 1, 1, 80, 90, 2, 2, 10, 0, 0]
    assert found.mask[0].tolist() == [1] * 8 + [0] * 2
    assert length_of([[7], [8, 9], []], 2) == 8
    cut = interleave([[[7], [8, 9], []]], [pictures], table, 7, 1, 0)
    assert cut.embeddings[0, :, 0].tolist() == [70, 1, 1, 80, 90, 2, 2]
    assert cut.mask[0].tolist() == [1] * 7


def test_surplus_marks_lose_the_words_between_as_in_the_release():
    table = 10 * torch.arange(10.0)[:, None]
    pictures = torch.tensor([[[1.0]]])
    found = interleave([[[7], [8], [9]]], [pictures], table, 5, 1, 0)
    assert found.embeddings[0, :, 0].tolist() == [70, 1, 90, 10, 0]


def one_by_one(segments, pictures, table, length):
    """[k, d] and how many count, put together piece by piece; end 1, padding 0."""
    rows = []
    for ids, picture in zip(segments[:-1], pictures, strict=False):
        rows += [*table[ids], *picture]
    rows += [*table[segments[-1]], table[1]]
    whole = torch.stack([*rows[:length], *[table[0]] * (length - len(rows))])
    return whole, min(length, len(rows))


def test_several_instructions_are_put_together_at_once():
    """Two pictures, none, a cut, one picture too many, one mark too many; their gradients, too."""
    segments = [[[7], [8, 9], []], [[3]], [[2] * 6, [4]], [[5], [6]], [[2], [3], [4]]]
    counts, table = (2, 0, 1, 2, 1), torch.randn(10, 3, requires_grad=True)
    pictures = torch.randn(6, 2, 3, requires_grad=True)
    given, weights = pictures.split(counts), torch.randn(5, 7, 3)
    found = interleave(segments, given, table, 7, 1, 0)
    alone = [one_by_one(mine, its, table, 7) for mine, its in zip(segments, given, strict=True)]
    wanted = torch.stack([each for each, _ in alone])
    assert torch.equal(found.embeddings, wanted)
    assert found.mask.sum(1).tolist() == [count for _, count in alone] == [7, 2, 7, 5, 5]
    assert found.mask.equal(found.mask.sort(1, descending=True).values)
    gradients = [
        torch.autograd.grad((each * weights).sum(), (pictures, table))
        for each in (found.embeddings, wanted)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert (gradients[0][0] != 0).any(2).tolist() == [
        [True, True], [True, True], [True, False], [True, True], [False, False], [True, True],
    ]  # fmt: skip


def test_pictures_that_are_cut_off_stay_in_the_graph():
    """Processes that share weights go back through the same parts, whatever they have read."""
    pictures = torch.randn(1, 2, 3, requires_grad=True)
    found = interleave([[[2] * 6, [4]]], [pictures], torch.randn(10, 3), 6, 1, 0)
    found.embeddings.sum().backward()
    assert pictures.grad.equal(torch.zeros_like(pictures))


def test_empty_segments_have_no_tokens():
    assert segment_ids(WordTokenizer(), "<imagehere><imagehere>a") == [[], [], [25]]


# ----------------------------------------------------------------------------------------------
# the sampler


def test_solving_again_begins_anew():
    """A scheduler that was used gives what a new one gives."""
    given = arrays("sample_analytic_6")
    used, new = ContinuousDPMSolver(), ContinuousDPMSolver()
    used.set_timesteps(4)
    used.step(given["eps"][0], used.timesteps[0], given["z"])
    found = []
    for solver in (used, new):
        solver.set_timesteps(6)
        latents = given["z"]
        for step, time in enumerate(solver.timesteps):
            latents = solver.step(given["eps"][step], time, latents).prev_sample
        found.append(latents)
    assert torch.equal(*found)


def test_a_solver_is_saved_with_its_betas(tmp_path):
    ContinuousDPMSolver(beta_start=2e-4, beta_end=0.01).save_pretrained(tmp_path)
    loaded = ContinuousDPMSolver.from_pretrained(tmp_path)
    alpha, _ = loaded.schedule(np.array([1e-3]))
    assert alpha[0] == pytest.approx((1 - 2e-4) ** 0.5)


# ----------------------------------------------------------------------------------------------
# other schedules


def test_betas_whose_roots_are_in_equal_steps():
    """From 0.01 to 0.09 the roots go 0.1, 0.2, 0.3."""
    assert make_betas("scaled_linear", 0.01, 0.09, 3) == pytest.approx([0.01, 0.04, 0.09])
    assert make_betas("linear", 0.01, 0.09, 3) == pytest.approx([0.01, 0.05, 0.09])


def test_noise_out_of_a_predicted_velocity():
    """v = α n − σ x₀ with α² = ᾱ; then α v + σ (α x₀ + σ n) is n."""
    process = Diffusion(4, 0.1, 0.4, "scaled_linear", "v_prediction")
    clean, noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 1, 3])
    product = np.cumprod(1 - np.linspace(0.1**0.5, 0.4**0.5, 4) ** 2)[timesteps]
    alpha, sigma = (
        torch.from_numpy(each).float()[:, None, None, None]
        for each in (product**0.5, (1 - product) ** 0.5)
    )
    velocity = alpha * noise - sigma * clean
    found = process.noise_in(process.noised(clean, noise, timesteps), timesteps, velocity)
    assert torch.allclose(found, noise, atol=1e-6)
    plain = Diffusion(4, 0.1, 0.4, "scaled_linear")
    assert plain.noise_in(clean, timesteps, velocity) is velocity
    # and the loss is that of the velocity, its bound that of the noise which the velocity means
    terms = process.loss(clean, noise, timesteps, velocity + 0.5, torch.zeros_like(clean))
    assert terms.mse.tolist() == pytest.approx([0.25] * 3, rel=1e-5)
    wanted = plain.loss(clean, noise, timesteps, noise + 0.5 * alpha, torch.zeros_like(clean))
    assert torch.allclose(terms.bound, wanted.bound, rtol=1e-4)
    assert torch.allclose(wanted.mse, 0.25 * alpha.flatten() ** 2, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_either_prediction_is_sampled_alike(schedule):
    """The exact prediction of N(m, s²): the same latents from the noise as from v."""
    mean, deviation, found = 0.4, 0.5, {}
    for kind in ("epsilon", "v_prediction"):
        solver = ContinuousDPMSolver(1000, 1e-4, 0.02, schedule, kind)
        solver.set_timesteps(6)
        latents = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1))
        for timestep in solver.timesteps:
            alpha, sigma = solver.schedule(np.array([(timestep.item() + 1) / 1000]))
            alpha, sigma = float(alpha[0]), float(sigma[0])
            total = (alpha * deviation) ** 2 + sigma**2
            noise = sigma * (latents - alpha * mean) / total
            clean = (latents - sigma * noise) / alpha
            predicted = noise if kind == "epsilon" else alpha * noise - sigma * clean
            latents = solver.step(predicted, timestep, latents).prev_sample
        found[kind] = latents
    assert torch.allclose(found["epsilon"], found["v_prediction"], atol=1e-4)
    assert (found["epsilon"] - mean).abs().max() < 4 * deviation


def test_a_fusion_that_reads_no_latents():
    """What pictures show changes nothing; the rest is the projection of LN(c)."""
    fusion = InstructionFusion(2, 8, 2, 6, 5, 4, reads_latents=False)
    torch.nn.init.normal_(fusion.features.mix.weight)
    meaning, patches, others = torch.randn(1, 2, 8), torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    found = fusion(meaning, patches)
    assert torch.equal(found, fusion(meaning, others))
    centred = meaning - meaning.mean(-1, keepdim=True)
    norm = centred / (meaning.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(found, fusion.projection(norm), atol=1e-5)
