"""The pipeline: saved and loaded, alone and in batches, seeds, sizes, precisions."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import picture
from golden_mige import close
from PIL import Image
from tiny_mige import PREFIXES, tiny_pipeline, tiny_tokenizer

from imagelab.errors import UserError
from imagelab.io.images import read_image
from imagelab.io.tensors import UMASK
from imagelab.training.seeds import generator_for
from mige.config import Guidance
from mige.folder import model_digest
from mige.latents import Size
from mige.method.encoder import embed_instruction
from mige.pictures import crop, letterbox, to_pixels, to_vision
from mige.pipeline import MigePipeline
from mige.request import make_request

DOG, CAT, SOURCE = picture(0, 40, 30), picture(1, 20, 50), picture(2, 32, 32)
FEW = Guidance(3, 5.0, 1.5)


@pytest.fixture(scope="module")
def pipeline() -> MigePipeline:
    return tiny_pipeline()


def requests():
    """Subjects with one and two references, of other sizes; an edit; an edit with a subject."""
    return {
        "one": make_request("a <image> on the beach", (DOG,), name=0),
        "two": make_request("a <image> beside a <image>", (CAT, DOG), name=1),
        "edit": make_request("make it snow", source=SOURCE, name=2),
        "put": make_request("replace <image> with <image>", (CAT,), source=DOG, name=3),
        "put_first": make_request(
            "put <image> into <image>", (CAT,), source=DOG, source_place=1, name=4
        ),
    }


# ----------------------------------------------------------------------------------------------
# folders


def test_a_saved_pipeline_is_the_same(pipeline, model, tmp_path):
    loaded = MigePipeline.from_pretrained(model)
    assert loaded.config.slots == 4
    assert loaded.config.prefixes == PREFIXES
    assert loaded.config.round_timesteps is False
    for name in ("transformer", "vae", "text_encoder", "vision_encoder", "qformer", "fusion"):
        ours, theirs = (getattr(each, name).state_dict() for each in (pipeline, loaded))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert loaded.vision_encoder.post_layernorm.eps == 1e-5
    text = "a dog beside xyz , red: snow"
    ids = [each.tokenizer(text, add_special_tokens=False).input_ids for each in (pipeline, loaded)]
    assert ids[0] == ids[1] == tiny_tokenizer()(text, add_special_tokens=False).input_ids
    arguments = ("a <image> on the beach", [DOG])
    first, second = (np.array(each(*arguments, steps=2).images[0]) for each in (pipeline, loaded))
    assert np.array_equal(first, second)
    (tmp_path / "again/private").mkdir(parents=True)
    private = tmp_path / "again/private/own.safetensors"
    private.touch(0o600)
    loaded.save_pretrained(tmp_path / "again")
    assert private.stat().st_mode & 0o777 == 0o600
    private.unlink()
    files = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~UMASK}
    assert model_digest(tmp_path / "again") == model_digest(model)


def test_a_model_whose_vocabulary_is_that_of_t5(model, tmp_path):
    """32,128 pieces are more than any width of these parts."""
    folder = shutil.copytree(model, tmp_path / "large")
    pipeline = MigePipeline.from_pretrained(model)
    pipeline.text_encoder.resize_token_embeddings(32_128, mean_resizing=False)
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    assert MigePipeline.from_pretrained(folder).text_encoder.config.vocab_size == 32_128
    assert model_digest(folder) != model_digest(model)


def test_a_saved_model_in_shards(model, tmp_path):
    pipeline = MigePipeline.from_pretrained(model)
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded/text_encoder").glob("*.safetensors"))) > 1
    loaded = MigePipeline.from_pretrained(tmp_path / "sharded")
    theirs = loaded.text_encoder.state_dict()
    for key, tensor in pipeline.text_encoder.state_dict().items():
        assert torch.equal(tensor, theirs[key])


def edit(path, **changes):
    facts = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            facts.pop(key)
        else:
            facts[key] = value
    path.write_text(json.dumps(facts))


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


BAD_FOLDERS = {
    "no vae": (lambda m: remove(m / "vae"), "has no folder 'vae'"),
    "no weights": (
        lambda m: remove(m / "fusion/diffusion_pytorch_model.safetensors"),
        "there is no .*fusion/diffusion_pytorch_model.safetensors",
    ),
    "no index": (lambda m: remove(m / "model_index.json"), "is no model folder"),
    "no config": (lambda m: remove(m / "qformer/config.json"), "there is no file"),
    "no vocabulary": (lambda m: remove(m / "tokenizer/tokenizer.json"), "there is no file"),
    "another class": (
        lambda m: edit(m / "model_index.json", vae=["os", "system"]),
        "says that vae is os.system, and this program knows diffusers.AutoencoderKL",
    ),
    "no slots": (lambda m: edit(m / "model_index.json", slots=0), "slots is 0, and may be 1 to"),
    "slots in words": (lambda m: edit(m / "model_index.json", slots="4"), "slots is '4' and not"),
    "a mark in a prefix": (
        lambda m: edit(m / "model_index.json", prefixes=PREFIXES | {"edit": "an <imagehere>"}),
        "the prefix of edit holds a mark, <imagehere>",
    ),
    "half a letter": (
        lambda m: edit(m / "model_index.json", prefixes=PREFIXES | {"edit": "\ud800"}),
        "the prefix of edit is not UTF-8 text",
    ),
    "no prefixes": (lambda m: edit(m / "model_index.json", prefixes={}), "has no 'subject'"),
    "guidance in words": (
        lambda m: edit(m / "model_index.json", guidance="much"),
        "guidance is 'much' and not an object",
    ),
    "guidance of nothing known": (
        lambda m: edit(m / "model_index.json", guidance={"draw": {}}),
        "guidance is of 'draw', and tasks are subject, edit, subject_edit",
    ),
    "another number of guidance": (
        lambda m: edit(m / "model_index.json", guidance={"edit": {"cfg": 2}}),
        "guidance.edit has 'cfg', not steps, text_scale, image_scale",
    ),
    "half a step": (
        lambda m: edit(m / "model_index.json", guidance={"edit": {"steps": 2.5}}),
        "guidance.edit.steps is 2.5 and not a whole number",
    ),
    "endless steps": (
        lambda m: edit(m / "model_index.json", guidance={"edit": {"steps": 10**9}}),
        "guidance.edit.steps is 1000000000; give a whole number from 1 to 1000",
    ),
    "another width": (
        lambda m: edit(m / "fusion/config.json", text_width=44),
        "fusion's text_width is 44, and text_encoder's d_model is 40",
    ),
    "another trunk": (
        lambda m: edit(m / "transformer/config.json", in_channels=4),
        "transformer's in_channels is 4, and twice vae's latent_channels is 8",
    ),
    "a damaged file": (
        lambda m: (m / "text_encoder/model.safetensors").write_bytes(b"no"),
        "cannot be read as safetensors",
    ),
    "another depth": (
        lambda m: edit(m / "text_encoder/config.json", num_layers=3),
        "could not be loaded",
    ),
    "pieces": (
        lambda m: edit(m / "tokenizer/tokenizer.json", model={"type": "Unigram", "vocab": [[1]]}),
        "has a piece that is no text and its score",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_is_none(name, model, tmp_path):
    spoil, told = BAD_FOLDERS[name]
    copy = shutil.copytree(model, tmp_path / "model")
    spoil(copy)
    with pytest.raises(UserError, match=told):
        MigePipeline.from_pretrained(copy)


# ----------------------------------------------------------------------------------------------
# pictures as the encoders read them


def test_crops_are_of_the_middle_scaled_to_cover():
    """60×40 for 30×30: 45×30, of which 8 to 37 (7.5 rounds to even)."""
    wide = Image.new("RGB", (60, 40))
    wide.paste((255, 255, 255), (0, 0, 15, 40))
    found = np.asarray(crop(wide, 30, 30))
    assert found.shape == (30, 30, 3)
    assert (found[:, :3] > 128).all() and (found[:, 5:] < 128).all()
    # a tall one of 31×100 for 20×20: 20×64 (64.5 is rounded down), from row 22 on
    rows = np.zeros((100, 31, 3), np.uint8)
    rows[:] = np.arange(100)[:, None, None]
    found = np.asarray(crop(Image.fromarray(rows), 20, 20)).astype(int)
    assert found.shape == (20, 20, 3)
    expected = (22 + np.arange(20) + 0.5) * 100 / 64 - 0.5
    assert abs(found[:, 10, 0] - expected).max() <= 1
    assert crop(wide, 60, 40).tobytes() == wide.tobytes()


def test_letterboxes_are_black_around():
    found = np.asarray(letterbox(Image.new("RGB", (10, 4), "white"), 32, 32))
    assert (found[10:22] == 255).all()  # 32×12, since 12.8 is rounded down
    assert not found[:10].any() and not found[22:].any()


@pytest.mark.parametrize("side", [49, 392, 850])
def test_the_longer_side_of_a_letterbox_fills_it(side):
    """49 · (32 / 49) is a little below 32 in floating point; the other side is rounded down."""
    white = Image.new("RGB", (side, side * 2 // 3), "white")
    assert letterbox(white, 512, 512).getbbox()[::2] == (0, 512)
    assert letterbox(white.transpose(Image.Transpose.ROTATE_90), 512, 512).getbbox()[1::2] == (
        0, 512,
    )  # fmt: skip


def test_values_of_pixels():
    grey = Image.new("RGB", (50, 30), (0, 51, 255))
    assert torch.equal(to_pixels(grey)[:, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    seen = to_vision(grey, 14)
    assert seen.shape == (3, 14, 14)
    wanted = [
        (0 - 0.48145466) / 0.26862954,
        (0.2 - 0.4578275) / 0.26130258,
        (1 - 0.40821073) / 0.27577711,
    ]
    assert seen[:, 7, 7].tolist() == pytest.approx(wanted, abs=1e-6)


def test_which_picture_is_fed_how(pipeline, monkeypatch):
    """Subjects are letterboxed, pictures of edits cropped; a plain edit's source is drawn once."""
    seen = []
    monkeypatch.setattr(
        type(pipeline), "_posterior",
        lambda self, image: seen.append(image) or original(self, image),
    )  # fmt: skip
    all_requests = requests()
    pipeline.encode(all_requests["one"], 0)
    assert seen.pop().tobytes() == letterbox(DOG, 32, 32).tobytes()
    references, source = pipeline._latents(all_requests["edit"], 0, Size(32, 32))
    assert seen.pop().tobytes() == crop(SOURCE, 32, 32).tobytes()
    assert torch.equal(references[0] * pipeline.vae.config.scaling_factor, source)
    references, source = pipeline._latents(all_requests["put_first"], 0, Size(32, 32))
    assert [each.tobytes() for each in seen] == [crop(p, 32, 32).tobytes() for p in (CAT, DOG)]
    with torch.no_grad():
        posterior = original(pipeline, crop(DOG, 32, 32))
    draws = [
        posterior.sample(generator_for(0, *labels))
        for labels in (("reference", 4, 1), ("source", 4))
    ]
    assert torch.equal(references[1], draws[0])
    assert torch.equal(source, draws[1] * pipeline.vae.config.scaling_factor)
    assert not torch.equal(draws[0], draws[1])


original = MigePipeline._posterior


# ----------------------------------------------------------------------------------------------
# batches, seeds, sizes


def test_a_batch_of_two_is_two_of_one(pipeline):
    """One and two references, pictures of other sizes."""
    both = [requests()[name] for name in ("one", "two")]
    conditions = [pipeline.encode(each, 7) for each in both]
    noise = torch.stack([pipeline.noise(each, 7) for each in both])
    together = pipeline.denoise(conditions, noise, FEW)
    for index in range(2):
        alone = pipeline.denoise(conditions[index : index + 1], noise[index : index + 1], FEW)
        close(together[index : index + 1], alone, np.inf, 1e-5)


def test_noise_is_of_the_seed_and_the_item(pipeline):
    one, two = requests()["one"], requests()["two"]
    noise = pipeline.noise(one, 7)
    assert torch.equal(noise, torch.randn(4, 8, 8, generator=generator_for(7, "noise", 0)))
    assert not torch.equal(noise, pipeline.noise(one, 8))
    assert not torch.equal(noise, pipeline.noise(two, 7))
    assert pipeline.noise(one, 7, Size(48, 16)).shape == (4, 4, 12)


def test_several_pictures_have_seeds_of_their_own(pipeline):
    three = pipeline("make it snow", source=SOURCE, steps=2, num_images=3, seed=5).images
    encoded = pipeline.encode(make_request("make it snow", source=SOURCE), 5)
    again = pipeline.paint(
        [(make_request("make it snow", source=SOURCE), encoded, 7)], Guidance(2, 5.0)
    )
    assert np.array_equal(three[2], again[0])
    assert not np.array_equal(three[0], three[1])


@pytest.mark.parametrize("name", ["one", "edit", "put"])
def test_other_sizes(pipeline, name):
    request = requests()[name]
    size = Size(48, 24)
    condition = pipeline.encode(request, 0, size)
    assert condition.source.shape == (4, 6, 12)
    assert bool(condition.source.any()) == (name != "one")
    (painted,) = pipeline.paint([(request, condition, 0)], FEW, size)
    assert painted.size == (48, 24)


@pytest.mark.parametrize(("width", "told"), [(33, "give 32 or 40"), (4, "give 8 or 16")])
def test_sizes_that_no_patches_fill(pipeline, width, told):
    with pytest.raises(UserError, match=f"--width is {width}, .* multiples of 8: {told}"):
        pipeline("make it snow", source=SOURCE, width=width)


def test_more_pictures_than_slots(pipeline):
    many = make_request("<image> " * 5 + "on the beach", (DOG,) * 5)
    with pytest.raises(UserError, match="there are 5 pictures, and this model takes 4"):
        pipeline.encode(many, 0)


def test_an_edit_that_names_its_picture_again(pipeline, monkeypatch):
    """Its picture stands at each of its names; more than the model has places for are refused."""
    given = []
    monkeypatch.setattr(
        "mige.pipeline.embed_instruction",
        lambda *of: given.append(of) or embed_instruction(*of),
    )
    pipeline.encode(make_request("make the image red", source=SOURCE), 0)
    twice = make_request("make the image red, the image big", source=SOURCE)
    pipeline.encode(twice, 0)
    (_, _, first, once, *_), (_, _, second, both, *_) = given
    assert (len(first), len(second)) == (2, 3)
    assert torch.equal(both, once.expand(2, -1, -1))
    many = make_request("the image, " * 5 + "in red", source=SOURCE)
    with pytest.raises(UserError, match="names its picture 5 times, and this model takes 4 pict"):
        pipeline.encode(many, 0)


def test_an_instruction_that_does_not_fit(pipeline):
    """24 positions: the prefix takes six, a picture four, the end one."""
    request = make_request("red " * 14 + "<image>", (DOG,))
    pipeline.segments(make_request("red " * 13 + "<image>", (DOG,)))
    with pytest.raises(UserError, match="takes 25 tokens with its pictures, .* reads 24; shorten"):
        pipeline.segments(request)


def test_bfloat16_is_finite(model):
    pipeline = MigePipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32
    condition = pipeline.encode(requests()["put"], 0)
    assert condition.text.dtype == torch.bfloat16
    latents = pipeline.denoise([condition], pipeline.noise(requests()["put"], 0)[None], FEW)
    assert latents.dtype == torch.float32 and latents.isfinite().all()


def test_float16_is_refused_with_the_reason(model):
    with pytest.raises(UserError, match="float16 overflows in T5"):
        MigePipeline.from_pretrained(model, torch_dtype=torch.float16)


@pytest.mark.parametrize("kind", ["turned", "transparent", "palette", "grey"])
def test_photos_are_read_as_the_commands_read_them(pipeline, tmp_path, kind):
    photo, path = picture(5, 30, 20), tmp_path / "photo.png"
    if kind == "turned":
        path = tmp_path / "photo.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        photo.save(path, exif=exif)
    elif kind == "transparent":
        photo.putalpha(picture(6, 30, 20).convert("L"))
        photo.save(path)
    else:
        photo.convert("P" if kind == "palette" else "L").save(path)
    with Image.open(path) as opened:
        found = pipeline("make it snow", source=opened, steps=1).images[0]
    wanted = pipeline("make it snow", source=read_image(path), steps=1).images[0]
    assert np.array_equal(found, wanted)
    for given in (path, str(path)):
        found = pipeline("make it snow", source=given, steps=1).images[0]
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, "--steps is 0; give a whole number from 1"),
        ({"text_scale": -1.0}, "--text_scale is -1.0"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": None}, "the seed is None"),
        ({"num_images": -1}, "--num_images is -1"),
        ({"source": 3}, "a int was given for a picture; give one of Pillow's, or a path"),
        ({"images": "nowhere.png"}, "there is no picture nowhere.png"),
        (
            {"images": [DOG], "source_place": 5},
            "the source's place is 5; give a number from 0 to 1",
        ),
    ],
)
def test_settings_from_python_are_checked(pipeline, settings, told):
    with pytest.raises(UserError, match=re.escape(told)):
        pipeline("make it snow", **({"images": (), "source": SOURCE} | settings))


def test_a_model_brings_its_numbers(model, tmp_path, monkeypatch):
    """What it says nothing of is the paper's; what is given wins over both; saving keeps them."""
    own = {"subject": {"steps": 2, "text_scale": 3}, "edit": {"image_scale": 1.5}}
    copy = shutil.copytree(model, tmp_path / "model")
    edit(copy / "model_index.json", guidance=own)
    assert model_digest(copy) == model_digest(model)
    pipeline = MigePipeline.from_pretrained(copy)
    assert pipeline.guidance("subject") == Guidance(2, 3, 1.0)
    assert pipeline.guidance("edit") == Guidance(60, 5.0, 1.5)
    assert pipeline.guidance("subject_edit") == Guidance(60, 5.0, 1.0)
    assert type(pipeline.guidance("subject").text_scale) is float  # as a command's own would be
    seen = []
    monkeypatch.setattr(MigePipeline, "paint", lambda self, _, how, size: seen.append(how) or [])
    pipeline("a <image>", DOG)
    pipeline("a <image>", DOG, text_scale=4.0)
    assert seen == [Guidance(2, 3, 1.0), Guidance(2, 4.0, 1.0)]
    pipeline.save_pretrained(tmp_path / "again")
    assert MigePipeline.from_pretrained(tmp_path / "again").config.guidance == own
    assert MigePipeline.from_pretrained(model).guidance("subject") == Guidance(50, 7.0, 1.0)


def test_guidance_from_python_is_checked(pipeline):
    with pytest.raises(UserError, match="guidance.edit.steps is -3; give a whole number from 1"):
        MigePipeline(**pipeline.components, guidance={"edit": {"steps": -3}})


def test_a_single_picture_needs_no_list(pipeline):
    one, two = (pipeline("a <image>", each, steps=1).images[0] for each in (DOG, [DOG]))
    assert np.array_equal(one, two)


def test_encoders_run_once_an_item(pipeline, monkeypatch):
    calls = dict.fromkeys(("vision_encoder", "qformer", "text_encoder"), 0)
    hooks = []
    for name in calls:

        def count(*_, name=name):
            calls[name] += 1

        hooks.append(getattr(pipeline, name).register_forward_pre_hook(count))
    try:
        pipeline("a <image> beside a <image>", [DOG, CAT], steps=4, num_images=2)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == dict.fromkeys(calls, 1)
