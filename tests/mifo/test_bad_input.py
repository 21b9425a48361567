"""Bad input to the real commands: one clear sentence, exit code 2, nothing made and nothing lost.

What can be told without the model is told without it: only the cases of *_LOADED may load it.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

import semantic_learning
import semantic_synthesis
from mifo import learned
from mifo.learning import plan

TOYS, LEARNED, MODEL = Path("examples/toys"), Path("learned/toys"), Path("model")
IMAGE, MASK0, MASK1 = (TOYS / name for name in ("img.jpg", "mask0.png", "mask1.png"))
CLASS, NUMBERS = TOYS / "instance.json", MODEL / "mifo_config.json"
MANIFEST, ROW = LEARNED / "manifest.json", LEARNED / "asset1.safetensors"
LORA = LEARNED / "pytorch_lora_weights.safetensors"
UNET, TOKENIZER = MODEL / "unet/diffusion_pytorch_model.safetensors", MODEL / "tokenizer"
LONG = "word" * 30  # more than 75 tokens of the thin tokenizer


# ----------------------------------------------------------------------------------------------
# ways to break things


def remove(path):
    return lambda: shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(path, content=b"not what it should be"):
    return lambda: (path.parent.mkdir(exist_ok=True), path.write_bytes(content))


def cut(path):
    """Keep the first half of a file."""
    return lambda: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def paint(path, size=(128, 128), level=0, **more):
    return lambda: Image.new("L", size, level).save(path, **more)


def copy(source, target):
    return lambda: shutil.copy(source, target)


def folder(path):
    return lambda: (path.unlink(missing_ok=True), path.mkdir())


def rotated():
    """A picture whose masks are right for how it is stored, not for how viewers show it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.effect_noise((160, 128), 50).save(IMAGE, exif=exif)
    for path in (MASK0, MASK1):
        with Image.open(path) as mask:
            mask.resize((160, 128)).save(path)


def two_pictures():
    IMAGE.rename(TOYS / "img.jpeg")
    Image.new("RGB", (128, 128)).save(TOYS / "img.png")


def tensors(path, change):
    """Change every tensor of a safetensors file; None leaves a tensor out."""

    def apply():
        state = {key: change(key, tensor) for key, tensor in load_file(path).items()}
        save_file({k: v.contiguous() for k, v in state.items() if v is not None}, path)

    return apply


def told(**changes):
    """Change the manifest of the learned folder."""
    return lambda: MANIFEST.write_text(json.dumps(json.loads(MANIFEST.read_text()) | changes))


def know_assets():
    """As the result of a learning does, whose table has a row for each token."""
    text_encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder")
    text_encoder.resize_token_embeddings(text_encoder.config.vocab_size + 1)
    text_encoder.save_pretrained(MODEL / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["<asset0>"])
    tokenizer.save_pretrained(TOKENIZER)


# ----------------------------------------------------------------------------------------------
# (options added to a command that works, what its sentence says, what is broken before)

LEARNING = [
    ("--instance cars", "no instance folder examples/cars; the instances in examples are: toys"),
    ("--folder_path nowhere", "there is no folder nowhere"),
    ("--folder_path nowhere --instance all", "there is no folder nowhere"),
    ("--folder_path learned --instance all", "learned holds no instance folder"),
    ("--instance ../examples/toys", "'../examples/toys' is not the plain name of a folder"),
    ("--instance . --overwrite", "'.' is not the plain name of a folder"),
    # the picture
    ("", "holds no img.jpg", remove(IMAGE)),
    ("", "holds several pictures", two_pictures),
    ("", "img.jpg cannot be read as a picture (unknown format)", write(IMAGE)),
    ("", "img.jpg cannot be read as a picture", cut(IMAGE)),
    ("", "img.jpg is 1 x 1 pixels, which is too small", paint(IMAGE, (1, 1))),
    ("", "img.jpg is 20000 x 64 pixels, which is too large", paint(IMAGE, (20000, 64))),
    ("", "mask0.png is 128 x 128 pixels, img.jpg is 64 x 64", paint(IMAGE, (64, 64))),
    ("", "has an EXIF rotation", rotated),
    # the masks
    ("", "holds no mask", lambda: (MASK0.unlink(), MASK1.unlink())),
    ("", "mask0.png is missing although there is a mask1.png", remove(MASK0)),
    ("", "mask0.png is missing although there is a mask1.png", folder(MASK0)),
    ("", "mask1.png cannot be read as a picture", write(MASK1)),
    ("", "mask1.png cannot be read as a picture", write(MASK1, b"")),
    ("", "mask1.png cannot be read as a picture", cut(MASK1)),
    ("", "mask1.png is empty", paint(MASK1)),
    ("", "mask1.png is empty", paint(MASK1, format="JPEG")),
    ("", "mask1.png is 64 x 64 pixels", paint(MASK1, (64, 64), 255)),
    ("", "mask2.jpg is not a .png", paint(TOYS / "mask2.jpg")),
    ("", "mark the same pixels", copy(MASK0, MASK1)),
    ("", "two masks of number 1", copy(MASK1, TOYS / "mask01.png")),
    # the class
    ("", "instance.json is not valid JSON", write(CLASS)),
    ("", "instance.json is not UTF-8 text; write it as", write(CLASS, b"\xff")),
    ("", "instance.json: it is a list and not an object", write(CLASS, b"[]")),
    ("", "instance.json: it has no 'class'; write it as", write(CLASS, b"{}")),
    ("", "has no 'class'; write it as", write(CLASS, b'{"size": 512, "instances": []}')),
    ("", "instance.json has a 'hue', which nothing", write(CLASS, b'{"class": "a", "hue": 3}')),
    ("", "class is 3 and not text; write it as", write(CLASS, b'{"class": 3}')),
    ("", "class is None and not text; write", write(CLASS, b'{"class": null}')),
    ("", "class[1] is 3 and not text; write it as", write(CLASS, b'{"class": ["cat", 3]}')),
    ("", "instance.json writes '[cat]', and weights are not", write(CLASS, b'{"class": "[cat]"}')),
    (
        "--initialize_from_class",
        'says no class; write examples/toys/instance.json, such as {"class',
    ),
    ("", "instance.json: '' is no class; write it as", write(CLASS, b'{"class": []}')),
    ("", "instance.json: '' is no class; write it as", write(CLASS, b'{"class": " "}')),
    ("", "instance.json: '' is no class", write(CLASS, b'{"class": ["cat", ""]}')),
    ("", "'a <asset0>' is no class", write(CLASS, b'{"class": "a <asset0>"}')),
    ("", "has 3 classes for 2 masks; write it as", write(CLASS, b'{"class": ["a", "b", "c"]}')),
    ("", "no file examples/toys/instance.json; write it as", folder(CLASS)),
    (
        "--initialize_from_class --initializer_tokens car",
        "--initialize_from_class and --initializer_tokens are both given; give one of them",
    ),
    # options
    ("--train_steps -1", "--train_steps is -1; give a whole number from 0 to 1000000"),
    ("--train_steps few", "argument --train_steps: invalid int value: 'few'"),
    ("--train_steps 0 --finetune none", "there is nothing to learn"),
    ("--learning_rate nan", "--learning_rate is nan; give a number from 0 to 1"),
    ("--finetune_learning_rate -1", "--finetune_learning_rate is -1.0"),
    ("--weight_decay inf", "--weight_decay is inf"),
    ("--prior_weight -1", "--prior_weight is -1.0"),
    ("--attention_weight -1", "--attention_weight is -1.0"),
    ("--max_grad_norm 0", "--max_grad_norm is 0.0; give a number above 0"),
    ("--lora_rank 0", "--lora_rank is 0; give a whole number from 1 to 1024"),
    ("--num_class_images 0", "--num_class_images is 0"),
    ("--checkpoint_steps 0", "--checkpoint_steps is 0"),
    ("--finetune half", "argument --finetune: invalid choice: 'half'"),
    ("--seed 1.5", "'1.5' is no seed; give a whole number or None"),
    ("--seed -1", "the seed is -1; give a whole number from 0 to 2**63 - 1"),
    ("--stepps 3", "unrecognized arguments: --stepps 3"),
    ("--device tpu", "--device tpu is not available here; available:"),
    ("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU; use bf16 or no on the CPU"),
    ("--class_prompt <asset0>", "names an asset, which the base model does not know"),
    ("--class_images nowhere", "nowhere holds no pictures"),
    ("--class_images mine", "mine/a.png cannot be read as a picture", write(Path("mine/a.png"))),
    ("--resume", "there is no unfinished run at"),
    # where it writes
    ("--output_dir learned", "learned/toys is there already; give --overwrite"),
    ("--output_dir examples --overwrite", "examples/toys is there and is no learned folder"),
    ("--output_dir examples/toys/img.jpg", "img.jpg is a file, not a folder"),
    ("--output_dir locked/new", "locked cannot be written to; give another --output_dir"),
    # the base model
    (
        "--model_path model",
        "mifo_config.json: learning_rate is -1 and not a number from 0 on; mend the file, or take",
        write(NUMBERS, b'{"learning_rate": -1}'),
    ),
    ("--model_path model", "mifo_config.json is not valid JSON", write(NUMBERS)),
    ("--model_path ./nowhere", "no model at ./nowhere; fetch Stable Diffusion 2.1 base with"),
    ("--model_path nobody/nothing --offline", "nobody/nothing is not in the local cache"),
    ("--model_path m.ckpt", "m.ckpt is a pickle, which can run code", write(Path("m.ckpt"))),
    ("--model_path examples", "examples is no diffusers model: it has no model_index.json"),
    ("--model_path model", "has no folder 'vae'", remove(MODEL / "vae")),
    ("--model_path model", "has no unet/diffusion_pytorch_model.safetensors", remove(UNET)),
    (
        "--model_path model",
        "model/vae/config.json is not valid JSON",
        write(MODEL / "vae/config.json"),
    ),
]
LEARNING_LOADED = [
    ("--model_path model", f"{UNET} cannot be read as safetensors", cut(UNET)),
    ("--model_path model", "weights that are not finite (unet", tensors(UNET, lambda k, v: v / 0)),
    (
        "--model_path model",
        "its weights lack conv_in.bias",
        tensors(UNET, lambda k, v: None if k == "conv_in.bias" else v),
    ),
    (
        "--model_path model",
        "tokenizer holds neither vocab.json nor tokenizer.json",
        remove(TOKENIZER / "vocab.json"),
    ),
    (
        "--model_path model",
        "there is no file model/scheduler/scheduler_config.json; fetch the model again",
        remove(MODEL / "scheduler/scheduler_config.json"),
    ),
    ("--model_path model", "already has the token <asset0>", know_assets),
    (
        "--model_path m.safetensors",
        "m.safetensors cannot be read as safetensors",
        write(Path("m.safetensors")),
    ),
    (f"--class_prompt {LONG}", "tokens, and the model reads 75: shorten"),
    ("--initializer_tokens a b c", "has 3 entries for 2 instances; give one for all"),
    ("--initializer_tokens ''", "'' is empty; give a word"),
]
BOTH = "--box <asset0>=0,0,.5,.5 --box <asset1>=.5,.5,1,1"
SYNTHESIS = [
    # the learned folder
    ("--model_id cars", "no learned folder learned/cars; learned so far: toys"),
    ("--model_id ../learned/toys", "is not the plain name of a folder"),
    ("", "no file learned/toys/manifest.json; learn the instance again", remove(MANIFEST)),
    ("", "manifest.json is not valid JSON", cut(MANIFEST)),
    ("", "manifest.json: it is a list and not an object", write(MANIFEST, b"[1]")),
    ("", "manifest.json: settings has no 'instance'", told(settings={})),
    ("", "manifest.json: tokens is ['<asset1>']; learn", told(tokens=["<asset1>"])),
    ("", "manifest.json: base_model is 'toybox' and not an", told(base_model="toybox")),
    ("", "learned/toys has no asset1.safetensors", remove(ROW)),
    ("", "learned/toys has no pytorch_lora_weights.safetensors", remove(LORA)),
    # prompt and boxes
    ("--prompt 'a photo'", "the prompt names no asset; name one, such as <asset0>"),
    (
        "--prompt <asset7>",
        "<asset7>, which learned/toys does not hold; it holds <asset0>, <asset1>",
    ),
    (
        "--negative_prompt '<asset7> and <asset1>'",
        "the negative prompt names <asset7>, which learned/toys does not hold; it holds <asset0>, "
        "<asset1>",
    ),
    (
        "--negative_prompt 'a <Asset1>'",
        "the negative prompt writes '<Asset1>'; write <asset1> for an asset",
    ),
    (
        "--boxes [[0,0,0.01,0.01],[0,0,1,1]]",
        "box 1 (<asset0>) (0.0, 0.0, 0.01, 0.01) covers nothing of a grid of 4 columns and 4 rows",
    ),
    (
        "--width 512 --height 128 --boxes [[0,0,1,1],[0.41,0,0.43,1]]",
        "box 2 (<asset1>) (0.41, 0.0, 0.43, 1.0) covers nothing of a grid of 16 columns and 4 rows",
    ),
    ("--boxes [[0,0,1,1]]", "there are 1 boxes and 2 assets in the prompt"),
    ("--boxes [[0,0,1,1],[0,0,1,1],[0,0,1,1]]", "there are 3 boxes and 2 assets in the prompt"),
    ("--boxes [[0,0,1,1]", "are not valid JSON"),
    ("--boxes ''", "are not valid JSON"),
    ("--boxes []", "are not a list with boxes in it"),
    ("--boxes 7", "are not a list with boxes in it"),
    ("--boxes [[0,0,1],[0,0,1,1]]", "does not hold four numbers"),
    ("--boxes [[0.5,0,0.1,1],[0,0,1,1]]", "has its left edge (0.5) beyond its right edge (0.1)"),
    ("--boxes [[0,0,1.5,1],[0,0,1,1]]", "holds 1.5, which is more than the whole picture"),
    ("--boxes [[-0.1,0,1,1],[0,0,1,1]]", "has its left edge at -0.1 of the picture"),
    ("--boxes [[0,0.3,1,0.3],[0,0,1,1]]", "has its top edge (0.3) at its bottom edge (0.3)"),
    ("--boxes [[NaN,0,1,1],[0,0,1,1]]", "holds 'nan', which is not a number"),
    ("--box <asset0>=0,0,64,64px", "is in pixels, but the size of the picture is not known"),
    ("--box 0,0,1,1", "does not name its asset"),
    ("--box <asset0>=0,0,1,1", "--box gives no box for <asset1>"),
    (f"{BOTH} --box <asset0>=0,0,1,1", "--box gives 2 boxes for <asset0>"),
    (f"{BOTH} --box <asset5>=0,0,1,1", "--box names <asset5>, which the prompt does not"),
    (f"{BOTH} --boxes [[0,0,1,1]]", "--boxes and --box are both given; give one of them"),
    (f"{BOTH} --no_box_control", "--box and --no_box_control are both given"),
    (
        "--no_box_control --subject_token_indices [[4]]",
        "--subject_token_indices and --no_box_control are both given",
    ),
    ("--subject_token_indices 4", "'4' is no list of lists of positions; write it as [[4]]"),
    ("--subject_token_indices [[]]", "is no list of lists of positions"),
    # options
    ("--batch_size 0", "--batch_size is 0; give a whole number from 1 to 10000"),
    ("--num_images -1", "--num_images is -1"),
    ("--num_inference_steps 0", "--num_inference_steps is 0"),
    (
        "--num_inference_steps 1000",
        "give a whole number from 1 to 999",
    ),
    ("--guidance_scale nan", "--guidance_scale is nan; give a number from 0 to 1000000"),
    ("--lora_scale 0.5", "--lora_scale is 0.5, and it is for the file of --lora alone; give that"),
    ("--step_size inf", "--step_size is inf"),
    ("--step_scale -1", "--step_scale is -1.0; give a number from 0 to 1000000"),
    ("--step_scale half", "argument --step_scale: invalid float value: 'half'"),
    (
        "--model_path model",
        "mifo_config.json: step_scale is half and not a number from 0 on",
        write(NUMBERS, b'{"step_scale": "half"}'),
    ),
    ("--guidance_steps -1", "--guidance_steps is -1"),
    ("--seed one", "'one' is no seed"),
    ("--device tpu", "--device tpu is not available here"),
    ("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU"),
    ("--output_path examples/toys/img.jpg", "img.jpg is a file, not a folder"),
    ("--output_path locked", "locked cannot be written to; give another --output_path"),
]
SYNTHESIS_LOADED = [
    ("", "asset1.safetensors cannot be read as safetensors", cut(ROW)),
    ("", "asset1.safetensors holds NaN or infinity", tensors(ROW, lambda k, v: v / 0)),
    ("", "holds 31 numbers, and a token of ", tensors(ROW, lambda k, v: v[:, 1:])),
    ("", "holds no embedding of <asset1>", copy(LEARNED / "asset0.safetensors", ROW)),
    ("", "cannot be read as safetensors", write(LORA)),
    (
        "",
        "and the model it was made for",
        tensors(LORA, lambda k, v: v[:, 1:] if "lora_A" in k else v),
    ),
    ("", "holds NaN or infinity in", tensors(LORA, lambda k, v: v / 0)),
    (
        "--model_path model",
        "model is another model",
        tensors(UNET, lambda k, v: v + 1 if k == "conv_in.bias" else v),
    ),
    ("--model_path nowhere/at/all", "there is no model at nowhere/at/all"),
    (f"--prompt '<asset0> {LONG}' --boxes [[0,0,1,1]]", "tokens, and the model reads 75"),
    (f"--negative_prompt {LONG}", "tokens, and the model reads 75"),
    ("--subject_token_indices [[1],[99]]", "names position 99; the prompt's tokens have"),
    ("--subject_token_indices [[0],[1]]", "names position 0"),
    (
        "--subject_token_indices [[1]] --boxes [[0,0,1,1],[0,0,1,1]]",
        "there are 2 boxes and 1 assets",
    ),
    ("--width 100", "--width is 100; give a multiple of 64 from 128 to 512, such as 128"),
    ("--height 0", "--height is 0; give a whole number from 1 to 16384"),
    ("--height -128", "--height is -128; give a whole number from 1 to 16384"),
    ("--width 1000000", "--width is 1000000; give a whole number from 1 to 16384"),
]


# ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def workplace(options, tmp_path, monkeypatch, examples, learned_dir, small_sd):
    """A folder with examples, a learned folder, and a write-protected folder.

    And with a base model, where the options of the case name it.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(examples, "examples")
    shutil.copytree(learned_dir, "learned")
    if f"--model_path {MODEL}" in options:
        shutil.copytree(small_sd, MODEL)
    Path("locked").mkdir()
    access = os.access  # of no use to root, who may write anywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode)
    )


@pytest.fixture
def without_model(monkeypatch):
    """No base model may be loaded."""

    def loaded(*args):
        raise AssertionError("the base model was loaded before the input was checked")

    for module in (plan, learned):
        monkeypatch.setattr(module, "load_base", loaded)


def contents():
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.fixture
def check(fails, caplog):
    """Run a command with what is broken: it says so in one line, and changes nothing."""

    def run(main, options, says, prepare):
        prepare()
        before = contents()
        out, err = fails(main, shlex.split(options))
        assert ": error: " in err and says in err
        assert len(err.splitlines()) == 1
        assert out == caplog.text == ""
        assert contents() == before

    return run


def table(cases):
    """Parameters options, says, prepare; a case is known by its options and what it says."""
    return pytest.mark.parametrize(
        "options, says, prepare",
        [
            pytest.param(options, says, *(rest or [lambda: None]), id=f"{options} {says}")
            for options, says, *rest in cases
        ],
    )


LEARN = """--folder_path examples --instance toys --model_path {model} --output_dir new --seed 1
    --train_steps 1 --finetune_steps 1 --device cpu --mixed_precision no """
PAINT = """--models_dir learned --model_id toys --output_path new --seed 1 --device cpu
    --mixed_precision no --num_inference_steps 1 --prompt '<asset0> and <asset1>' """


@table(LEARNING)
def test_learning(options, says, prepare, check, small_sd, without_model):
    options = LEARN.format(model=small_sd) + options
    check(semantic_learning.main, options, says, prepare)


@table(LEARNING_LOADED)
def test_learning_with_the_model(options, says, prepare, check, small_sd):
    options = LEARN.format(model=small_sd) + options
    check(semantic_learning.main, options, says, prepare)


@table(SYNTHESIS)
def test_synthesis(options, says, prepare, check, without_model):
    check(semantic_synthesis.main, PAINT + options, says, prepare)


@table(SYNTHESIS_LOADED)
def test_synthesis_with_the_model(options, says, prepare, check):
    check(semantic_synthesis.main, PAINT + options, says, prepare)
