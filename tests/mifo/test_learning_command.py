"""semantic_learning.py end to end, on a thin random model of 128 px pictures."""

import errno
import gc
import json
import os
import re
import shutil
import signal
import weakref
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save
from thin import contents

import imagelab.figures
import mifo
from imagelab.models.stable_diffusion import load_base
from imagelab.prompts import encode_ids
from imagelab.training.checkpoint import read_checkpoint, read_facts, write_checkpoint
from imagelab.training.loop import Trainer
from mifo.learned import LORA, portable, read_learned_folder
from mifo.learning import checks, priors, stages
from mifo.learning.config import CHOICES, LearningConfig
from mifo.learning.estimate import estimate_bytes
from mifo.learning.plan import make_plan
from mifo.learning.session import Session
from mifo_lora import read_lora
from semantic_learning import main

ROOT = Path(__file__).parents[2]
RESULTS, TINY_SD = ROOT / "benchmarks" / "results", ROOT / "tests" / "golden" / "tiny_sd"
PROMPT = "a photo of <asset0> and <asset1>"
FILES = {"asset0.safetensors", "asset1.safetensors", "manifest.json"}
PICTURES = {"learning.png", "attention.png", "masks.png"}
FIGURES = {name: getattr(imagelab.figures, name) for name in ("plot_losses", "plot_attention")}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own; class images take two steps, figures are empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(priors, "STEPS", 2)
    for name in FIGURES:
        monkeypatch.setattr(imagelab.figures, name, lambda path, *args: path.touch())
    return tmp_path


@pytest.fixture
def learn(learn_argv, folder):
    """Run the command with more options; returns the learned folder."""

    def run(*more):
        main([*learn_argv, "--output_dir", "out", *map(str, more)])
        return folder / "out" / "toys"

    return run


@pytest.fixture
def fails(learn, capsys, caplog):
    """Run the command, which must fail with an exit code; returns what it told."""

    def run(code, *more):
        caplog.clear()
        with pytest.raises(SystemExit) as stop:
            learn(*more)
        told = caplog.text + capsys.readouterr().err
        assert stop.value.code == code, told
        assert "Traceback" not in told
        return told

    return run


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@torch.no_grad()
def outputs(base):
    """What a model computes of the prompt and of fixed latents."""
    text = base.text_encoder(encode_ids(base.tokenizer, PROMPT)[None]).last_hidden_state
    size = base.unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    return text, base.unet(latents, torch.tensor([500]), text).sample


def differ(a, b):
    return max((x - y).abs().max().item() for x, y in zip(outputs(a), outputs(b), strict=True))


# ----------------------------------------------------------------------------------------------
# what a run writes


def test_files_and_manifest(learned_dir, small_sd):
    folder = learned_dir / "toys"
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES | {LORA}
    assert tree(learned_dir)[0] == "toys"  # no checkpoint is left
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokens"] == ["<asset0>", "<asset1>"]
    assert manifest["base_model"]["source"] == str(small_sd)
    assert manifest["settings"]["seed"] == 1
    assert manifest["versions"] == {
        "mifo": mifo.__version__, "torch": torch.__version__,
        "diffusers": diffusers.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    assert manifest["size"] == [128, 128]
    assert len(manifest["mask_sha256"]) == len(manifest["separation"]) == 2
    assert all(np.isfinite(manifest["final_losses"][key]) for key in ("loss", "reconstruction"))
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            assert len(picture.convert("L").getcolors(1 << 20)) > 20
    for index in range(2):
        tensors, metadata = read_lora(folder / f"asset{index}.safetensors")
        assert {key: row.shape for key, row in tensors.items()} == {f"<asset{index}>": (1, 32)}
        assert json.loads(metadata["mifo"]) == portable(manifest)


def test_diffusers_reads_lora_and_embeddings(learned_dir, small_sd):
    learned = read_learned_folder(learned_dir / "toys")
    ours, _ = learned.load()
    pipeline = StableDiffusionPipeline.from_pretrained(small_sd, safety_checker=None)
    for index in range(2):
        pipeline.load_textual_inversion(learned.folder / f"asset{index}.safetensors")
    assert differ(ours, pipeline) > 1e-3  # the LoRA does something
    pipeline.load_lora_weights(learned.folder)
    assert differ(ours, pipeline) <= 1e-5


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_saved_pipeline_is_the_learned_model(learn, precision):
    folder = learn("--save_pipeline", "--mixed_precision", precision)
    ours, ids = read_learned_folder(folder).load()
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    assert pipeline.tokenizer.convert_tokens_to_ids(["<asset0>", "<asset1>"]) == ids
    assert differ(ours, pipeline) <= 1e-5


def test_full_finetuning_writes_a_pipeline(learn, small_sd):
    folder = learn("--finetune", "full", "--class_prompt", "a toy", "--prior_weight", 1,
                   "--num_class_images", 1)  # fmt: skip
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES | {"pipeline"}
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    ours, ids = read_learned_folder(folder).load()
    assert differ(ours, pipeline) == 0
    for index, token in enumerate(ids):
        row = read_lora(folder / f"asset{index}.safetensors")[0][f"<asset{index}>"][0]
        assert torch.equal(ours.text_encoder.get_input_embeddings().weight[token], row)
    plain = StableDiffusionPipeline.from_pretrained(small_sd, safety_checker=None)
    changed = plain.unet.conv_in.weight - pipeline.unet.conv_in.weight
    assert changed.abs().max() > 1e-3


def test_tokens_alone(learn, learned_dir):
    folder = learn("--finetune", "none", "--attention_loss", "break_a_scene")
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES
    ours = read_lora(folder / "asset0.safetensors")[0]["<asset0>"]
    theirs = read_lora(learned_dir / "toys/asset0.safetensors")[0]["<asset0>"]
    assert not torch.allclose(ours, theirs)


def test_lora_without_steps_opens(learn, monkeypatch):
    for name, figure in FIGURES.items():  # without attention losses to draw
        monkeypatch.setattr(imagelab.figures, name, figure)
    folder = learn("--finetune_steps", 0, "--attention_loss", "none")
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES
    read_learned_folder(folder).load()


def test_initializer_tokens_and_gradient_checkpointing(learn, small_sd):
    options = ("--learning_rate", 0, "--finetune", "none", "--train_steps", 1)
    folder = learn("--initializer_tokens", "a", "photo", "--gradient_checkpointing", *options)
    base = load_base(str(small_sd))
    for index, word in enumerate(("a", "photo")):
        pieces = base.tokenizer(word, add_special_tokens=False).input_ids
        wanted = base.text_encoder.get_input_embeddings().weight[pieces].mean(0)
        row = read_lora(folder / f"asset{index}.safetensors")[0][f"<asset{index}>"][0]
        torch.testing.assert_close(row, wanted, atol=1e-6, rtol=0)


def test_gradient_checkpointing_learns_the_same(learn, learned_dir, monkeypatch):
    real, blocks = torch.utils.checkpoint.checkpoint, set()

    def checkpoint(block, *args, **options):
        blocks.add(block)
        return real(block, *args, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    folder = learn("--gradient_checkpointing")
    assert len(blocks) > 8
    ours = read_lora(folder / LORA)[0]
    for key, tensor in read_lora(learned_dir / "toys" / LORA)[0].items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-4, rtol=0)


def test_the_model_of_a_finished_run_is_freed(learn, monkeypatch):
    """Else every further instance would need the memory of one more model."""
    models, run = [], Session.__init__

    def begin(session, plan):
        models.append(weakref.ref(plan.model.unet))
        run(session, plan)

    monkeypatch.setattr(Session, "__init__", begin)
    for name, draw in FIGURES.items():
        monkeypatch.setattr(imagelab.figures, name, draw)
    gc.disable()  # else it depends on when it runs
    try:
        learn()
        assert models[0]() is None
    finally:
        gc.enable()


# ----------------------------------------------------------------------------------------------
# class images


def test_class_images_are_made_once(learn, monkeypatch):
    sampled = []
    denoise = priors.denoise
    monkeypatch.setattr(
        priors, "denoise", lambda *args: sampled.append(len(args[1])) or denoise(*args)
    )
    options = ("--prior_weight", 1, "--num_class_images", 2, "--train_steps", 0, "--overwrite")
    first = contents(learn(*options))
    assert sampled == [2]
    assert contents(learn(*options)) == first
    assert sampled == [2]
    learn(*options, "--class_prompt", "another thing")
    assert sampled == [2, 2]


def test_own_class_images(learn, folder, monkeypatch):
    monkeypatch.delattr(priors, "denoise")  # nothing is sampled
    (folder / "mine").mkdir()
    for name, size in (("a.png", (200, 90)), ("b.jpg", (64, 64))):
        Image.effect_noise(size, 80).save(folder / "mine" / name)
    learn("--class_images", "mine", "--prior_weight", 1)
    assert not (folder / "out/.class_images").exists()


def test_own_class_images_are_told_by_their_content(learn, fails, folder, ctrl_c):
    (folder / "mine").mkdir()
    Image.effect_noise((64, 64), 80).save(folder / "mine/a.png")
    options = ("--finetune_steps", 1, "--prior_weight", 1)
    with ctrl_c(1, 0):
        fails(130, *options, "--class_images", "mine")
    (folder / "mine").rename(folder / "moved")
    shutil.copytree(folder / "moved", folder / "others")
    Image.effect_noise((64, 64), 80).save(folder / "others/a.png")
    told = fails(2, *options, "--class_images", "others", "--resume")
    assert "the set of class images is not what" in told
    learn(*options, "--class_images", "moved", "--resume")


def test_transparent_class_images_have_a_white_ground(small_sd, folder):
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save("clear.png")
    Image.new("RGB", (64, 64), "white").save("white.png")
    base = load_base(str(small_sd))
    clear, white = (
        priors.encode_class_images(base, [folder / name], (8, 8))
        for name in ("clear.png", "white.png")
    )
    assert torch.equal(clear, white)


@pytest.fixture
def make_class_images(small_sd, folder, monkeypatch):
    """Make class images of fixed latents, so many of them."""
    base = load_base(str(small_sd))
    monkeypatch.setattr(priors, "denoise", lambda _, noise, *__: noise)

    def make(count, after_batch=None):
        cache = folder / "cache"
        return priors.class_latents(base, "a toy", count, (8, 8), 0, 1, cache, after_batch)

    return make


def test_the_longer_of_two_sets_of_class_images_is_kept(make_class_images):
    def other_process():
        nonlocal other
        if other is None:
            other = make_class_images(3)  # of the same set, meanwhile

    other = None
    made = make_class_images(2, other_process)
    assert torch.equal(made, other[:2])
    assert torch.equal(make_class_images(3), other)


@pytest.mark.parametrize("content", [b"half", save({"others": torch.zeros(1)})])
def test_damaged_class_images_are_to_be_deleted(make_class_images, folder, content):
    make_class_images(1)
    (path,) = (folder / "cache").iterdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} .*(read|no class images).*; delete {path}$"):
        make_class_images(1)


# ----------------------------------------------------------------------------------------------
# nothing is lost


def test_dry_run_writes_the_masks_alone(learn, folder, capsys):
    learn("--dry_run")
    assert tree(folder) == ["out", "out/toys.masks.png"]
    plan = capsys.readouterr().out
    for words in (
        "stage 1      3 steps, rate 0.005 (default)",
        "stage 2      2 steps, rate 0.02 (as given)",
        "GiB",
        "minutes",
        "2 masks",
        "out/toys",
    ):
        assert words in plan


def test_one_seed_one_result(learn, folder):
    first = contents(learn())
    assert contents(learn("--overwrite")) == first
    assert first.keys() >= FILES | PICTURES | {LORA}


def test_too_many_masks_for_the_text_are_told_at_once(fails, folder, examples):
    (folder / "mine/many").mkdir(parents=True)
    shutil.copy(examples / "toys/img.jpg", folder / "mine/many")
    for index in range(40):  # "a photo of", 40 tokens, 39 "and"
        mask = np.zeros((128, 128), np.uint8)
        mask[2 * index : 2 * index + 40, 8:48] = 255
        Image.fromarray(mask).save(folder / f"mine/many/mask{index}.png")
    told = fails(2, "--folder_path", folder / "mine", "--instance", "many", "--dry_run")
    assert "mine/many has 40 masks, and a prompt of this model can name 36 at most; take" in told
    assert "a photo of" not in told  # which nobody wrote


def test_existing_result_is_kept(learn, fails):
    folder = learn("--finetune", "none")
    before = contents(folder)
    assert "is there already; give --overwrite" in fails(2)
    assert contents(folder) == before


def test_files_of_the_users_are_never_replaced(learn, fails, folder):
    learned = learn("--finetune", "none")
    (learned / "notes.txt").write_text("years")
    told = fails(2, "--finetune", "none", "--overwrite")
    assert "toys holds notes.txt, which would be removed with the folder; move it elsewhere" in told
    assert (learned / "notes.txt").read_text() == "years"
    (learned / "notes.txt").rename(folder / "notes.txt")
    (learned / ".DS_Store").touch()
    learn("--finetune", "none", "--overwrite")


@pytest.mark.parametrize("name", ["pipeline/notes.txt", "asset0 best of March.safetensors"])
def test_files_among_those_of_a_learned_folder_are_never_replaced(fails, folder, learned_dir, name):
    mine = shutil.copytree(learned_dir / "toys", folder / "out/toys") / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("years")
    told = fails(2, "--overwrite")
    assert f"{mine.parent.name} holds {mine.name}, which would be removed with the folder" in told
    assert mine.read_text() == "years" and os.listdir(folder / "out") == ["toys"]


def test_a_file_that_is_put_into_the_former_result_meanwhile_stays(
    learn, fails, folder, learned_dir, monkeypatch
):
    former = shutil.copytree(learned_dir / "toys", folder / "out/toys")
    before, update = contents(former), Trainer.update
    notes = former / "pipeline/notes.txt"
    notes.parent.mkdir()

    def put(*at):
        notes.write_bytes(b"years")
        return update(*at)

    options = ("--finetune", "none", "--train_steps", 1, "--seed", 2, "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", put)
        told = fails(2, *options)
    assert "pipeline holds notes.txt, which would be removed with the folder; move it" in told
    assert "go on with the same command and --resume" in told
    assert contents(former) == before | {"pipeline/notes.txt": b"years"}
    assert tree(folder / "out/.toys.work") == ["checkpoint.safetensors"]
    notes.rename(folder / "notes.txt")
    monkeypatch.delattr(Trainer, "update")  # every step is done
    manifest = json.loads((learn(*options, "--resume") / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 2
    assert os.listdir(folder / "out") == ["toys"]


def test_full_disk_at_the_end_loses_nothing(learn, fails, folder, monkeypatch):
    before = contents(learn("--finetune", "none"))
    with monkeypatch.context() as patch:
        patch.setattr(imagelab.figures, "plot_attention", full_disk)
        told = fails(2, "--overwrite", "--seed", 2)
    assert "the disk is full" in told
    assert "--resume" in told
    assert contents(folder / "out/toys") == before
    assert tree(folder / "out") == sorted(
        [".toys.work", ".toys.work/checkpoint.safetensors", "toys", *(f"toys/{n}" for n in before)]
    )
    learn("--resume", "--seed", 2)
    assert json.loads((folder / "out/toys/manifest.json").read_text())["settings"]["seed"] == 2
    assert tree(folder / "out")[0] == "toys"


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_interrupted_rename_brings_the_earlier_result_back(learn, fails, folder, monkeypatch):
    before = contents(learn("--finetune", "none"))
    replace = os.replace

    def interrupted(source, target):
        if re.search(r"/\.toys\.[0-9a-f]+\.new$", str(source)):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        fails(130, "--overwrite", "--seed", 2)
    assert contents(folder / "out/toys") == before


def test_killed_between_the_renames(learn, fails, folder):
    before = contents(learn("--finetune", "none"))
    (folder / "out/toys").rename(folder / "out/.toys.old")
    assert "is there already" in fails(2)
    assert contents(folder / "out/.toys.old") == before  # who only looks renames nothing
    assert contents(learn("--finetune", "none", "--overwrite")).keys() == before.keys()
    assert os.listdir(folder / "out") == ["toys"]


def test_infinite_loss_leaves_nothing(fails, folder, monkeypatch):
    learning_loss = stages.learning_loss

    def broken(*args):
        loss = learning_loss(*args)
        loss.total = loss.total * float("nan")
        return loss

    monkeypatch.setattr(stages, "learning_loss", broken)
    assert "not finite at step 0 of stage 1" in fails(1)
    assert tree(folder) == ["out"]


@pytest.mark.parametrize("name", CHOICES)
def test_words_that_no_setting_knows(name):
    config = LearningConfig.from_settings(seed=0, **{name: "LoRA"})
    with pytest.raises(ValueError, match=f"--{name} is 'LoRA'; give {', '.join(CHOICES[name])}"):
        make_plan(config)


def test_the_instance_is_looked_at_before_a_model_is_fetched(folder, fails, monkeypatch):
    for name in ("read_own", "read_sizes"):
        monkeypatch.setattr(
            f"mifo.learning.plan.{name}", lambda *_: pytest.fail("a model is fetched")
        )
    assert "there is no instance folder" in fails(2, "--instance", "tyo_car")


def test_a_folder_that_is_not_a_learned_one_is_never_replaced(fails, folder, examples):
    shutil.copytree(examples, folder / "out")
    before = contents(folder)
    assert "is no learned folder" in fails(2, "--overwrite")
    assert contents(folder) == before


@pytest.mark.parametrize(("results", "model"), [("cpu", TINY_SD), ("cpu_toybox", "toybox")])
def test_the_estimate_of_memory_is_near_what_was_measured(results, model):
    facts = json.loads((RESULTS / f"{results}.json").read_text())
    measured = {row["what"]: row["ours"]["bytes"] for row in facts["rows"]}
    settings = {"folder_path": str(ROOT / "example"), "model_path": str(model), "seed": 0}
    for finetune, stage in (("none", "stage1"), ("lora", "stage2")):
        settings |= {"mixed_precision": "no", "finetune": finetune}
        estimate = estimate_bytes(make_plan(LearningConfig.from_settings(**settings)))
        assert 0.7 < estimate / measured[stage] < 1.4


# ----------------------------------------------------------------------------------------------
# interrupted and resumed


@pytest.fixture
def ctrl_c(monkeypatch, interruptible):
    """Press Ctrl-C in the middle of a step, so many times."""

    update = Trainer.update

    @contextmanager
    def press(stage, step, times=1):
        def interrupted(trainer, at_stage, at_step):
            if (at_stage.name, at_step) == (f"stage {stage}", step):
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return update(trainer, at_stage, at_step)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "update", interrupted)
            yield

    return press


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_resumed_equals_uninterrupted(learn, fails, folder, ctrl_c, finetune):
    options = ("--finetune", finetune, "--prior_weight", 1, "--num_class_images", 1)
    whole = contents(learn(*options))
    for stage, step in ((1, 0), (1, 2), (2, 0)):  # (1, 2) is the last of its stage
        shutil.rmtree(folder / "out/toys")
        with ctrl_c(stage, step):
            told = fails(130, *options)
        assert f"stopped after step {step + 1} of stage {stage}" in told
        assert "go on with the same command and --resume" in told
        assert tree(folder / "out/.toys.work") == ["checkpoint.safetensors"]
        assert contents(learn(*options, "--resume")) == whole


def test_second_ctrl_c_stops_at_once(learn, fails, folder, ctrl_c):
    options = ("--checkpoint_steps", 2)
    whole = contents(learn(*options))
    shutil.rmtree(folder / "out/toys")
    with ctrl_c(1, 2, times=2):
        told = fails(130, *options)
    assert "press Ctrl-C again" in told and "--resume" in told
    assert read_checkpoint(folder / "out/.toys.work/checkpoint.safetensors").step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert contents(learn(*options, "--resume")) == whole


def test_ctrl_c_while_own_class_images_are_encoded(
    learn, fails, folder, monkeypatch, interruptible
):
    options = ("--prior_weight", 1, "--class_images", folder / "classes")
    (folder / "classes").mkdir()
    for shade in range(3):
        Image.new("RGB", (128, 128), (90 * shade, 0, 0)).save(folder / f"classes/{shade}.png")
    read, encoded = priors.ImageOps.fit, []

    def interrupted(picture, size):
        encoded.append(picture)
        if len(encoded) == 2:
            signal.raise_signal(signal.SIGINT)
        return read(picture, size)

    with monkeypatch.context() as patch:
        patch.setattr(priors.ImageOps, "fit", interrupted)
        assert "stopped before stage 2" in fails(130, *options)
    assert len(encoded) == 2
    assert (learn(*options, "--resume") / "manifest.json").is_file()


def test_ctrl_c_while_class_images_are_made(learn, fails, folder, monkeypatch, interruptible):
    options = ("--prior_weight", 1, "--num_class_images", 5)
    denoise = priors.denoise

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return denoise(*args)

    with monkeypatch.context() as patch:
        patch.setattr(priors, "denoise", interrupted)
        assert "stopped before stage 2" in fails(130, *options)
    made = []
    monkeypatch.setattr(
        priors, "denoise", lambda *args: made.append(len(args[1])) or denoise(*args)
    )
    learn(*options, "--resume")
    assert made == [1]  # the first batch of four was kept


def test_resume_refuses_what_has_changed(learn, fails, folder, examples, ctrl_c):
    shutil.copytree(examples, folder / "mine")
    own = ("--folder_path", folder / "mine")
    with ctrl_c(1, 1):
        fails(130, *own)
    work = contents(folder / "out/.toys.work")
    assert "other settings (--seed 1)" in fails(2, *own, "--resume", "--seed", 2)
    assert "other settings (--seed 1)" in fails(2, *own, "--resume", "--seed", 2, "--dry_run")
    assert "holds an unfinished run" in fails(2, *own)
    with Image.open(folder / "mine/toys/mask1.png") as mask:
        mask.transpose(Image.Transpose.FLIP_TOP_BOTTOM).crop((0, 1, 128, 129)).save(
            folder / "mine/toys/mask1.png"
        )
    assert "the set of masks is not what" in fails(2, *own, "--resume")
    assert contents(folder / "out/.toys.work") == work
    (folder / "out/.toys.work/checkpoint.safetensors").write_bytes(b"half")
    assert "cannot be read" in fails(2, *own, "--resume")


RUN = {
    "initializer_scale": 0.5, "learning_rate": 0.25, "finetune_learning_rate": 0.02,
    "num_class_images": 2, "class_prompt": "a toy",
}  # fmt: skip


def options_of(settings: dict) -> list:
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def test_a_resumed_run_takes_its_own_values_for_what_is_open(
    learn, fails, folder, examples, learn_argv, ctrl_c
):
    """Whatever the model and the instance folder say by now."""
    at = learn_argv.index("--finetune_learning_rate")
    del (argv := list(learn_argv))[at : at + 2]
    model = shutil.copytree(argv[argv.index("--model_path") + 1], folder / "model")
    shutil.copytree(examples, folder / "mine")
    options = ("--folder_path", "mine", "--model_path", "model", "--prior_weight", 1)
    whole = contents(learn(*options, *options_of(RUN)))
    shutil.rmtree(folder / "out/toys")
    with ctrl_c(1, 1):
        fails(130, *options, *options_of(RUN))
    own = {
        "initializer_scale": 2, "learning_rate": 0.5, "lora_learning_rate": 0.5,
        "num_class_images": 3,
    }  # fmt: skip
    (model / "mifo_config.json").write_text(json.dumps(own))
    (folder / "mine/toys/instance.json").write_text('{"class": "car"}')
    for name, other in (("learning_rate", 0.5), ("num_class_images", 3), ("class_prompt", "car")):
        told = fails(2, *options, f"--{name}", other, "--resume")
        assert f"the unfinished run had other settings (--{name} {RUN[name]})" in told
    main([*argv, "--output_dir", "out", *map(str, options), "--resume"])
    assert contents(folder / "out/toys") == whole
    settings = json.loads(whole["manifest.json"])["settings"]
    assert {name: settings[name] for name in RUN} == RUN


def test_a_run_that_itself_left_numbers_open_goes_on(learn, fails, folder, ctrl_c):
    """As runs did before models brought their numbers."""
    with ctrl_c(1, 1):
        fails(130)
    path = folder / "out/.toys.work/checkpoint.safetensors"
    saved = read_checkpoint(path)
    saved.facts["settings"]["finetune_learning_rate"] = None
    write_checkpoint(path, saved)
    assert "other settings (--lora_rank" in fails(2, "--resume", "--lora_rank", 5)
    assert (learn("--resume") / "manifest.json").is_file()


@pytest.fixture
def unfinished(fails, folder, ctrl_c):
    """Changes the facts in the checkpoint of a run that was stopped in stage 1."""
    with ctrl_c(1, 1):
        fails(130)
    path = folder / "out/.toys.work/checkpoint.safetensors"

    def change(by) -> Path:
        saved = read_checkpoint(path)
        by(saved.facts)
        write_checkpoint(path, saved)
        return path

    return change


def test_a_run_that_is_older_than_a_setting_had_it_as_it_is_by_default(learn, fails, unfinished):
    def forget(facts):  # one that may be left open, and one that has a default
        del facts["settings"]["initializer_scale"], facts["settings"]["weight_decay"]

    unfinished(forget)
    told = fails(2, "--resume", "--weight_decay", 0.5)
    assert "the unfinished run had other settings (--weight_decay 0.01)" in told
    assert (learn("--resume", "--weight_decay", 0.01) / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda facts: facts.pop("settings"), "facts has no 'settings'"),
        (lambda facts: facts.update(settings=[]), "facts.settings is a list and not an object"),
        (lambda facts: facts["settings"].pop("seed"), "facts.settings has no 'seed'"),
        (lambda facts: facts.pop("inputs"), "facts has no 'inputs'"),
        (lambda facts: facts["inputs"].pop("picture"), "facts.inputs has no 'picture'"),
        (lambda facts: facts["inputs"].update({"set of dogs": 1}), "the set of dogs is not what"),
        (lambda facts: facts["curves"].append("joy"), "has no curve 'joy'"),
    ],
)
def test_a_checkpoint_with_parts_missing_is_told(fails, unfinished, change, told):
    path = unfinished(change)
    found = fails(2, "--resume")
    assert told in found and "start anew with --overwrite" in found
    assert path.is_file()


def test_8_bit_moments_learn_nearly_the_same_and_are_resumed(learn, fails, folder, ctrl_c):
    """The LoRA's matrices are too small for 8 bits here; the whole UNet's weights are not."""
    options = ("--finetune", "full", "--mixed_precision", "no")
    losses = json.loads((learn(*options) / "manifest.json").read_text())["final_losses"]
    options += ("--optimizer", "adamw8bit")
    whole = contents(learn(*options, "--overwrite"))
    found = json.loads(whole["manifest.json"])["final_losses"]
    assert found == pytest.approx(losses, rel=1e-2)
    shutil.rmtree(folder / "out")
    with ctrl_c(2, 0):
        fails(130, *options)
    tensors = read_checkpoint(folder / "out/.toys.work/checkpoint.safetensors").tensors
    assert any(t.dtype == torch.uint8 for name, t in tensors.items() if name.endswith("state1"))
    assert contents(learn(*options, "--resume")) == whole


def test_8_bit_moments_want_bitsandbytes(fails, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert "needs bitsandbytes: pip install" in fails(2, "--optimizer", "adamw8bit")


def test_resume_with_less_memory_and_another_precision(learn, fails, folder, ctrl_c):
    """What the errors advise is allowed: the run goes on, nearly as it would have."""
    whole = learn("--mixed_precision", "no")
    losses = json.loads((whole / "manifest.json").read_text())["final_losses"]
    shutil.rmtree(whole)
    with ctrl_c(2, 0):
        fails(130, "--mixed_precision", "no")
    learn("--resume", "--mixed_precision", "bf16", "--gradient_checkpointing")
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["precision"] == "bfloat16"
    assert manifest["final_losses"] == pytest.approx(losses, rel=0.05)


# ----------------------------------------------------------------------------------------------
# several instances


def test_all_instances_learn_though_one_fails(learn, folder, examples, capsys):
    shutil.copytree(examples, folder / "mine")
    shutil.copytree(examples / "toys", folder / "mine/bad")
    Image.new("L", (128, 128)).save(folder / "mine/bad/mask1.png")
    with pytest.raises(SystemExit) as stop:
        learn("--folder_path", folder / "mine", "--instance", "all", "--finetune", "none")
    assert stop.value.code == 2
    summary = capsys.readouterr().out.splitlines()[-2:]
    assert summary[0].startswith("bad: ") and "mask1.png is empty" in summary[0]
    assert summary[1] == "toys: learned"
    assert {path.name for path in (folder / "out").iterdir()} == {"toys"}


@pytest.fixture
def twins(folder, examples):
    """The options of a short learning of two instances, a and b."""
    for name in ("a", "b"):
        shutil.copytree(examples / "toys", folder / "mine" / name)
    return ("--folder_path", folder / "mine", "--instance", "all", "--finetune", "none")


def summary(capsys):
    return capsys.readouterr().out.splitlines()[-2:]


def test_all_instances_have_one_seed(learn, folder, twins, capsys):
    learn(*twins, "--seed", "None", "--dry_run")
    out = capsys.readouterr().out
    assert len(set(re.findall(r"seed +(\d+)", out))) == 1
    assert out.splitlines()[-2:] == ["a: checked", "b: checked"]
    assert tree(folder / "out") == ["a.masks.png", "b.masks.png"]


def test_all_instances_are_resumed_by_one_command(learn, fails, folder, twins, capsys, ctrl_c):
    learn(*twins, "--instance", "a")
    before = contents(folder / "out/a")
    shutil.copytree(folder / "mine/b", folder / "mine/c")
    with ctrl_c(1, 0):
        fails(130, *twins, "--instance", "b", "--seed", "None")
    seed = read_facts(folder / "out/.b.work/checkpoint.safetensors")["settings"]["seed"]
    learn(*twins, "--seed", "None", "--resume")
    told = capsys.readouterr().out.splitlines()[-3:]
    assert told == ["a: learned already", "b: learned", "c: learned"]
    learn(*twins, "--seed", "None", "--resume", "--train_steps", 4)
    told = capsys.readouterr().out.splitlines()[-3:]
    assert all("learned already, with --train_steps 3; " in line for line in told)
    assert all("add --overwrite to learn it anew" in line for line in told)
    shutil.copy(folder / "mine/c/mask0.png", folder / "aside.png")
    shutil.copy(folder / "mine/c/mask1.png", folder / "mine/c/mask0.png")
    shutil.move(folder / "aside.png", folder / "mine/c/mask1.png")
    learn(*twins, "--seed", "None", "--resume")
    told = capsys.readouterr().out.splitlines()[-3:]
    assert told[1] == "b: learned already"
    assert told[2].startswith("c: learned already, from another photo or other masks; ")
    learn(*twins, "--seed", "None", "--resume", "--overwrite")
    told = capsys.readouterr().out.splitlines()[-3:]
    assert told == ["a: learned already", "b: learned already", "c: learned"]
    assert contents(folder / "out/a") == before
    learn(*twins, "--seed", "None", "--resume", "--model_path", "toybox")
    told = capsys.readouterr().out.splitlines()[-3:]
    assert all("learned already, with --model_path " in line for line in told)
    manifest = json.loads((folder / "out/b/manifest.json").read_text())
    assert manifest["settings"]["seed"] == seed
    assert not list((folder / "out").glob(".*"))


def test_what_is_left_open_is_learned_already_whatever_it_was(learn, folder, twins, capsys):
    options = ("--class_prompt", "a toy", "--num_class_images", 3, "--seed", 5)
    learn(*twins, *options, "--learning_rate", 0.25)
    before = contents(folder / "out")
    for again in (
        (),
        ("--seed", "None"),
        ("--learning_rate", 0.25, "--class_prompt", "a toy"),
    ):
        learn(*twins, "--seed", 5, *again, "--resume", "--overwrite")
        assert summary(capsys) == ["a: learned already", "b: learned already"]
    learn(*twins, "--seed", 5, "--resume", "--learning_rate", 0.5)
    told = summary(capsys)
    assert all("learned already, with --learning_rate 0.25; add" in line for line in told)
    learn(*twins, "--seed", 5, "--resume", "--class_prompt", "a car", "--num_class_images", 4)
    differences = "with --class_prompt a toy, --num_class_images 3; add"
    assert all(differences in line for line in summary(capsys))
    assert contents(folder / "out") == before


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_out_of_memory_in_one_instance(learn, folder, twins, capsys, caplog, monkeypatch, error):
    update = Trainer.update

    def step(trainer, stage, step):
        if trainer.path.parent.name == ".a.work" and step == 2:
            raise error
        return update(trainer, stage, step)

    monkeypatch.setattr(Trainer, "update", step)
    with pytest.raises(SystemExit):
        learn(*twins, "--checkpoint_steps", 2)
    told = summary(capsys)
    assert "there is not enough memory" in told[0] and told[1] == "b: learned"
    assert "go on with the same command and --resume" in caplog.text
