"""semantic_synthesis.py from a LoRA file and token files: the pictures of the learned folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import semantic_export
import semantic_synthesis
from imagelab.models.stable_diffusion import load_base
from mifo import learned
from mifo.learned_files import read_learned_files
from mifo.synthesis import paint as synthesis
from mifo_lora import read_lora, save_lora

KOHYA = Path("exports/toys/toys.safetensors")
DIFFUSERS = Path("exports/toys/pytorch_lora_weights.safetensors")
TOKENS = Path("exports/toys/embeddings")
TOKEN0, TOKEN1 = TOKENS / "asset0.safetensors", TOKENS / "asset1.safetensors"
FILES = ("--lora", KOHYA, "--tokens", TOKEN0, TOKEN1)
OPTIONS = """--seed 7 --num_inference_steps 2 --guidance_steps 1 --guidance_iterations 1
    --refine_every 0 --device cpu --mixed_precision no"""
PROMPT = "a photo of <asset0> and <asset1>"
MODULE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
STEM = f"lora_unet_{MODULE.replace('.', '_')}"
UP, DOWN, ALPHA = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight", f"{STEM}.alpha"


@pytest.fixture(scope="module")
def exports(learned_dir, tmp_path_factory):
    """What semantic_export.py writes of the learned folder."""
    folder = tmp_path_factory.mktemp("exports")
    semantic_export.main(
        ["--models_dir", str(learned_dir), "--model_id", "toys", "--output_path", str(folder),
         "--format", "kohya", "diffusers", "embeddings"]
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def wanted(learned_dir, tmp_path_factory):
    """Pixels and latents of the learned folder."""
    folder = tmp_path_factory.mktemp("wanted")
    return paint(folder, "--model_id", "toys", "--models_dir", learned_dir)


@pytest.fixture(scope="module")
def learned_lora(exports, small_sd):
    """What the exported LoRA adds to the weights."""
    return added(read_learned_files(str(exports / "toys/toys.safetensors"), []), small_sd)


@pytest.fixture(autouse=True)
def workplace(exports, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exports, "exports")


def paint(folder, *more, prompt=PROMPT):
    """Run the command; returns the pixels of its picture, and its latents before decoding."""
    decode, seen = synthesis.decode, []
    argv = [*OPTIONS.split(), "--output_path", str(folder), "--prompt", prompt, *map(str, more)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "decode", lambda base, z: seen.append(z) or decode(base, z))
        semantic_synthesis.main(argv)
    (path,) = Path(folder).glob("*/0000.png")
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int), *seen


@pytest.fixture
def refusal(fails):
    """Run the command, which must refuse; returns its sentence."""

    def run(*options):
        out, err = fails(paint, "refused", *options)
        assert out == "" and len(err.splitlines()) == 1
        assert not Path("refused").exists()
        return err

    return run


def change(path, key, value):
    """Set a tensor of a file, or leave it out with None."""
    tensors, metadata = read_lora(path)
    tensors[key] = value
    save_lora(path, {k: v for k, v in tensors.items() if v is not None}, metadata)


def added(files, model):
    """What the LoRA of files adds to the weights, by part and module; nothing where that is 0."""
    plain, base = load_base(str(model)), files.load(str(model))[0]
    differences = {
        f"{part}.{name.removesuffix('.weight')}": weight - plain_weight
        for part in ("unet", "text_encoder")
        for (name, weight), plain_weight in zip(
            getattr(base, part).named_parameters(), getattr(plain, part).parameters(), strict=True
        )
    }
    return {name: difference for name, difference in differences.items() if difference.any()}


# ----------------------------------------------------------------------------------------------
# what export writes


@pytest.mark.parametrize("lora", [KOHYA, DIFFUSERS])
def test_the_pictures_of_the_learned_folder(lora, wanted, small_sd, capsys):
    options = ("--model_id", "mine", "--lora", lora, "--tokens", TOKEN1, TOKEN0)
    pixels, latents = paint("pictures", *options)
    assert np.abs(pixels - wanted[0]).max() <= 1
    assert (latents - wanted[1]).abs().max() <= 1e-4
    assert f"seed 7, {small_sd} on cpu" in capsys.readouterr().out  # as the manifest says
    settings = json.loads(Path("pictures/mine/0000.json").read_text())["settings"]
    assert (settings["lora"], settings["tokens"]) == (str(lora), [str(TOKEN1), str(TOKEN0)])


def test_files_that_are_renamed(wanted):
    """Assets need not begin at 0; one that is in no file is not known."""
    shutil.copy(TOKEN0, "asset5.safetensors")
    shutil.copy(TOKEN1, "asset3.safetensors")
    tokens = ("--tokens", "asset3.safetensors", "asset5.safetensors")
    _, latents = paint("a", "--lora", KOHYA, *tokens, prompt="a photo of <asset5> and <asset3>")
    assert (latents - wanted[1]).abs().max() <= 1e-4


def test_a_lora_alone_and_tokens_alone():
    prompt = "a photo of dog and car"
    positions = ("--subject_token_indices", "[[4],[6]]")
    _, tokens = paint("a", "--tokens", TOKEN0, *positions, prompt=prompt)
    _, lora = paint("b", "--lora", KOHYA, *positions, prompt=prompt)
    assert (lora - tokens).abs().max() > 1e-3
    _, none = paint("c", "--lora", KOHYA, "--lora_scale", 0, *positions, prompt=prompt)
    assert torch.equal(none, tokens)
    [facts] = Path("c").glob("*/0000.json")
    assert json.loads(facts.read_text())["settings"]["lora_scale"] == 0


# ----------------------------------------------------------------------------------------------
# what others write


def test_without_alphas_the_ranks_are_taken_and_metadata_are_not_needed(learned_lora, small_sd):
    tensors = {k: v for k, v in load_file(KOHYA).items() if not k.endswith(".alpha")}
    assert load_file(KOHYA)[ALPHA] == len(tensors[DOWN])
    save_file(tensors, "bare.safetensors")
    found = added(read_learned_files("bare.safetensors", [], str(small_sd)), small_sd)
    assert found.keys() == learned_lora.keys()
    assert all(torch.equal(found[name], learned_lora[name]) for name in found)


def test_a_layer_may_have_a_rank_and_an_alpha_of_its_own(learned_lora, small_sd):
    tensors = load_file(KOHYA)
    change(KOHYA, UP, torch.cat(3 * [tensors[UP]], dim=1))
    change(KOHYA, DOWN, torch.cat(3 * [tensors[DOWN]]))
    change(KOHYA, ALPHA, torch.tensor(1.0))
    found = added(read_learned_files(str(KOHYA), []), small_sd)
    name = f"unet.{MODULE}"
    assert learned_lora[name].abs().max() > 0
    # alpha 1 of rank 6, where it was 2 of 2, and three times B A
    torch.testing.assert_close(found.pop(name), 3 * (1 / 6) * learned_lora[name])
    assert all(torch.equal(found[other], learned_lora[other]) for other in found)


def test_half_precision_and_one_part_alone(learned_lora, small_sd):
    tensors = {k: v.bfloat16() for k, v in load_file(KOHYA).items() if k.startswith("lora_te_")}
    save_file(tensors, "text.safetensors")
    found = added(read_learned_files("text.safetensors", [], str(small_sd)), small_sd)
    assert found.keys() == {name for name in learned_lora if name.startswith("text_encoder.")}
    for name, delta in found.items():
        limit = 0.02 * learned_lora[name].abs().max()
        assert limit > 0 and (delta - learned_lora[name]).abs().max() <= limit


@pytest.mark.parametrize(
    ("name", "key", "asset"),
    [
        ("asset0", "emb_params", 0),  # A1111's own
        ("asset12", "<asset0>", 12),  # renamed on purpose
        ("asset0 (1)", "<asset0>", 0),  # renamed by a browser
        ("toy car", "asset4", 4),
    ],
)
@pytest.mark.parametrize("shape", [(1, 32), (32,)])
def test_names_of_tokens(name, key, asset, shape):
    row = torch.arange(32.0)
    save_file({key: row.reshape(shape).half()}, f"{name}.safetensors")
    files = read_learned_files(None, [f"{name}.safetensors"], "model")
    assert files.tokens == [f"<asset{asset}>"] and files.assets == [asset]
    assert torch.equal(files.rows[asset], row)


def test_a_base_model_of_the_same_shape_is_told(small_sd, caplog):
    shutil.copytree(small_sd, "other")
    weights = Path("other/unet/diffusion_pytorch_model.safetensors")
    change(weights, "conv_out.bias", load_file(weights)["conv_out.bias"] + 1)
    files = read_learned_files(str(KOHYA), [str(TOKEN0)], "other")
    files.load("other")
    assert f"{KOHYA} was learned with {small_sd} (sha256 " in caplog.text
    assert "other is another model" in caplog.text
    caplog.clear()
    files.load(str(small_sd))
    assert caplog.text == ""


# ----------------------------------------------------------------------------------------------
# bad input: what can be told without the base model, and what cannot


def tell(path, **manifest):
    """Put another manifest into the metadata of a file."""
    return lambda: save_lora(path, load_file(path), {"mifo": json.dumps(manifest)})


def put(path, **tensors):
    return lambda: save_file(tensors, path)


def write(path, content=b"PK\x03\x04 a pickle of torch"):
    return lambda: Path(path).write_bytes(content)


ONE = torch.ones(1, 32)
CAT = Path("cat.safetensors")
BARE = Path("asset0.safetensors")
CASES = [
    (["--lora", "no.safetensors"], "no file no.safetensors; give --lora a .safetensors file"),
    (["--tokens", "no.safetensors"], "no file no.safetensors; give --tokens a .safetensors file"),
    (["--lora", ""], "there is no file .; give --lora"),
    (["--lora", "exports"], "there is no file exports; give --lora"),
    (["--lora", KOHYA, "--tokens"], "argument --tokens: expected at least one argument"),
    (
        ["--lora", "a.ckpt"],
        "a.ckpt is a pickle, which can run code, and is never opened; give",
        write("a.ckpt"),
    ),
    (["--tokens", "asset0.pt"], "asset0.pt is a pickle", write("asset0.pt")),
    (FILES, "toys.safetensors cannot be read as safetensors", write(KOHYA, b"")),
    (FILES, "toys.safetensors is empty; give --lora another file", put(KOHYA)),
    (FILES, "holds 2 tensors, the first is 'clip_g'", put(TOKEN1, clip_l=ONE, clip_g=2 * ONE)),
    (["--tokens", KOHYA], "toys.safetensors is a LoRA; give it with --lora, and --tokens its"),
    (
        ["--lora", TOKEN0],
        "asset0.safetensors holds '<asset0>' alone, as a token file does; give it with --tokens",
    ),
    (FILES, "of shape [4, 32], and an asset is one vector", put(TOKEN1, x=torch.ones(4, 32))),
    (FILES, "of shape [1, 1, 32], and an asset is one", put(TOKEN1, x=ONE[None])),
    (FILES, "asset1.safetensors holds NaN or infinity", put(TOKEN1, x=ONE / 0)),
    (["--tokens", CAT], "cat.safetensors holds '*', and neither that nor", put(CAT, **{"*": ONE})),
    (
        ["--tokens", TOKEN0, CAT],
        "cat.safetensors both hold <asset0>; leave one out, or rename it",
        put(CAT, **{"<asset0>": ONE}),
    ),
    (["--lora", KOHYA, "--tokens", TOKEN1], "<asset0>, which --tokens does not hold; it holds"),
    (
        ["--lora", KOHYA],
        "the prompt names <asset0>, and only --lora is given; give its token file, too, such as "
        "--tokens asset0.safetensors",
    ),
    ([*FILES, "--prompt", "a photo"], "the prompt names no asset"),
    (["--tokens", BARE], "does not say which base model it was made for", put(BARE, x=ONE)),
    (FILES, "the manifest in the metadata of exports/toys/toys", tell(KOHYA, base_model="toybox")),
    (FILES, "asset0.safetensors: it has no 'base_model'; export it again", tell(TOKEN0)),
    ([*FILES, "--lora_scale", "100.5"], "--lora_scale is 100.5; give a number from -100 to 100"),
    ([*FILES, "--lora_scale", "nan"], "--lora_scale is nan; give a number from -100 to 100"),
    (
        ["--tokens", TOKEN0, TOKEN1, "--lora_scale", "-0.5"],
        "--lora_scale is -0.5, and it is for the file of --lora alone; give that, or leave",
    ),
    ([*FILES, "--boxes", "[[0,0,1,1]]"], "there are 1 boxes and 2 assets in the prompt"),
]


@pytest.mark.parametrize(
    ("options", "says", "prepare"),
    [(options, says, *(rest or [lambda: None])) for options, says, *rest in CASES],
    ids=[says for _, says, *_ in CASES],
)
def test_bad_input(options, says, prepare, refusal, monkeypatch):
    def loaded(*args):
        raise AssertionError("the base model was loaded before the input was checked")

    monkeypatch.setattr(learned, "load_base", loaded)
    prepare()
    assert says in refusal(*options)


CASES_LOADED = [
    (f"is '{UP}' of shape [3, 2]; give", lambda: change(KOHYA, UP, torch.ones(3, 2))),
    ("attn2.to_k.lora_B' are missing", lambda: change(KOHYA, UP, None)),
    ("1 of its 1 keys fit no Linear", put(KOHYA, **{"lora_unet_x.lora_up.weight": ONE})),
    ("asset1.safetensors holds 16 numbers, and a token of", put(TOKEN1, x=torch.ones(16))),
    ("there is no model at ./nowhere", tell(KOHYA, base_model=dict(source="./nowhere", sha256=""))),
]


@pytest.mark.parametrize(("says", "prepare"), CASES_LOADED, ids=[says for says, _ in CASES_LOADED])
def test_bad_input_with_the_model(says, prepare, refusal):
    prepare()
    assert says in refusal(*FILES)


def test_every_key_that_does_not_fit_is_counted(small_sd, refusal):
    tensors, metadata = read_lora(KOHYA)
    moved = {key.replace("attn2_to_k", "attn9_to_k"): v for key, v in tensors.items()}
    count = len(moved.keys() - tensors.keys())
    assert count > 3
    save_lora(KOHYA, moved, metadata)
    told = f"{KOHYA} on {small_sd}: {count} of its {len(tensors)} keys fit no Linear or Conv2d "
    told += "module of unet"
    assert told in refusal(*FILES)


def test_a_base_model_that_has_changed_since(refusal):
    """The manifest names a folder whose model is another one now, and nobody chose that."""
    manifest = json.loads(read_lora(KOHYA)[1]["mifo"])
    manifest["base_model"]["sha256"] = "0" * 64
    tell(KOHYA, **manifest)()
    said = refusal(*FILES)
    assert "(sha256 000000000000…)" in said and "is another model" in said
    assert "give its own base model with --model_path" in said
