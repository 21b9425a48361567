"""mige.train as a command: end to end, stopped and gone on with, and what it refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from thin import contents
from tiny_bench import save_bench
from training_data import RECORDS, save_data, usual

import imagelab.io.tensors
from imagelab.errors import UserError
from imagelab.training.checkpoint import read_checkpoint, write_checkpoint
from imagelab.training.loop import Trainer
from mige import benchmark, edit, features, generate
from mige.train import main
from mige.training import run
from mige.training.config import TrainingConfig
from mige.training.plan import CHECKPOINT, make_plan
from mige.training.sheets import SamplePainter

ROOT = Path(__file__).parents[2]
STEPS = [
    "--steps", "4", "--batch_size", "2", "--dropout", "0.1", "--ema", "0.9",
    "--checkpoint_steps", "2",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def curves():
    """Figures take longer than the updates here; one test has them drawn."""
    with pytest.MonkeyPatch.context() as patched:
        drawn = run.plot_losses
        patched.setattr(run, "plot_losses", lambda path, _: path.write_bytes(b"curves"))
        yield drawn


@pytest.fixture(scope="module")
def data(model, tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data") / "data", model)


@pytest.fixture(scope="module")
def whole(data, model) -> Path:
    """The output of an uninterrupted run of STEPS; tests only read it."""
    before = Path.cwd()
    os.chdir(data)
    try:
        main(usual(model, "whole", *STEPS))
    finally:
        os.chdir(before)
    return data / "whole"


@pytest.fixture
def work(data, tmp_path, monkeypatch) -> Path:
    """A working directory with the data alone."""
    for name in ("d.json", "F", "x"):
        source = data / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def before_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Within, something is done before a step of training, by its number."""
    update = Trainer.update

    def struck(self, stage, step):
        if step == number:
            act()
        return update(self, stage, step)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "update", struck)
        yield


def check_same(one: Path, other: Path) -> None:
    """Two outputs are the same: weights, moments, curves, average, and the model to the byte."""
    ours, theirs = (load_file(each / CHECKPOINT) for each in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(-1), theirs[name].nan_to_num(-1)), name
    assert contents(one / "model") == contents(other / "model")


# ----------------------------------------------------------------------------------------------
# end to end

KILLED = """
import os, signal, sys
from imagelab.training.loop import Trainer
from mige import train

update = Trainer.update

def killed(self, stage, step):
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, stage, step)

Trainer.update = killed
train.main(sys.argv[2:])
"""


def test_features_to_benchmark(model, tmp_path, monkeypatch, capsys, curves):
    """Features are made, a training is killed and goes on; its model paints, and is measured."""
    save_data(tmp_path, model)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("F")
    features.main(["--data", "d.json", "--model", str(model), "--output", "F", "--device", "cpu"])

    def argv(output: str, *more: str) -> list[str]:
        return usual(model, output, *STEPS, "--steps", "20", "--checkpoint_steps", "5", *more)

    step = random.randrange(6, 20)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'lora-master'}"
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(step), *argv("O", "--workers", "1")],
        env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    main(argv("whole"))  # meanwhile
    told = killed.communicate()[1]
    assert killed.returncode == -signal.SIGKILL, told
    saved = load_file(f"O/{CHECKPOINT}")["curves.loss"]
    assert len(saved) == (step // 5) * 5, step
    assert not Path("O/model").exists()
    capsys.readouterr()
    monkeypatch.setattr(run, "plot_losses", curves)
    main(argv("O", "--resume"))
    assert capsys.readouterr().out.splitlines()[-1] == "O/model"
    check_same(Path("O"), Path("whole"))
    assert [path.name for path in Path("O").iterdir() if path.name[0] == "."] == []
    losses = load_file(f"O/{CHECKPOINT}")["curves.loss"]
    assert len(losses) == 20 and losses.isfinite().all()
    assert losses[-5:].mean() < losses[:5].mean()
    assert set(os.listdir("O")) == {CHECKPOINT, "curves.png", "model"}
    with Image.open("O/curves.png") as image:
        assert min(image.size) > 100

    painting = ["--model", "O/model", "--steps", "2", "--seed", "3", "--device", "cpu"]
    given = ["--prompt", "a <image> on the beach", "--images", RECORDS[0]["entity_path"][0]]
    generate.main([*painting, *given, "--output_path", "painted"])
    with Image.open("painted/0000.png") as image:
        assert image.size == (32, 32)
    bench = ["--bench", str(save_bench(Path("bench")))]
    benchmark.main([*bench, "--write_items", "items.json"])
    edit.main([*painting, "--items", "items.json", "--output_path", "edits"])
    benchmark.main([*bench, "--outputs", "edits", "--report", "report", "--device", "cpu"])
    report = json.loads(Path("report/report.json").read_text())
    assert len(report["rows"]) == 4
    assert all(0 < row["values"]["L1"] < 1 for row in report["rows"])


# ----------------------------------------------------------------------------------------------
# stopped, and gone on with


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_resumed(signum, code, model, work, whole, fails, interruptible):
    with before_step(2, lambda: signal.raise_signal(signum)):
        told = fails(main, usual(model, "O", *STEPS), code=code).err
    assert "stopped after step 3 of training" in told
    assert len(load_file(f"O/{CHECKPOINT}")["curves.loss"]) == 3
    main(usual(model, "O", *STEPS, "--resume"))
    check_same(Path("O"), whole)


def test_a_finished_run_goes_on_with_more_steps(model, work, whole):
    main(usual(model, "O", *STEPS, "--steps", "2"))
    shutil.rmtree("O/model")
    main(usual(model, "O", *STEPS, "--resume"))
    check_same(Path("O"), whole)
    shutil.rmtree("O/model")  # it can be made again
    main(usual(model, "O", *STEPS, "--resume"))
    check_same(Path("O"), whole)


def test_a_moved_training_goes_on(model, work, whole):
    """What it reads has to be the same, not where it lies; nor how it is carried out."""
    main(usual(model, "O", *STEPS, "--steps", "2"))
    shutil.move("O", "moved")
    shutil.move("F", "G")
    base = Path(shutil.copytree(model, "base"))
    more = ("--resume", "--features", "G", "--workers", "1", "--checkpoint_steps", "1")
    main(usual(base, "moved", *STEPS, *more))
    ours, theirs = (load_file(each / CHECKPOINT) for each in (Path("moved"), whole))
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(-1), theirs[name].nan_to_num(-1)), name


def test_a_full_disk_at_a_checkpoint(model, work, whole, fails, caplog, monkeypatch):
    """The one before stands, and the run goes on from there."""
    save, calls = imagelab.io.tensors.save_file, []

    def full(*args, **named):
        calls.append(None)
        if len(calls) == 2:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save(*args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(imagelab.io.tensors, "save_file", full)
        told = fails(main, usual(model, "O", *STEPS)).err
    assert "the disk is full" in told
    assert "saved in O: go on with the same command and --resume" in caplog.text
    assert len(load_file(f"O/{CHECKPOINT}")["curves.loss"]) == 2
    assert set(os.listdir("O")) == {CHECKPOINT, "curves.png"}
    main(usual(model, "O", *STEPS, "--resume"))
    check_same(Path("O"), whole)


def test_a_picture_that_is_damaged_in_the_middle(model, work, fails, caplog):
    """It is named, and what was learned until then is not lost."""

    def damage():
        for path in Path("x").rglob("*.png"):
            path.write_bytes(b"no picture")

    with before_step(2, damage):
        told = fails(main, usual(model, "O", *STEPS)).err
    assert ".png" in told
    assert "saved in O: go on with the same command and --resume" in caplog.text
    assert len(load_file(f"O/{CHECKPOINT}")["curves.loss"]) == 2


def test_a_loss_that_is_not_finite(model, work, fails):
    """Exit code 1; no checkpoint holds what came of it."""
    base = Path(shutil.copytree(model, "base"))
    (file,) = (base / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.weight"] = torch.full_like(tensors["proj_out.weight"], 1e38)
    save_file(tensors, file, {"format": "pt"})
    told = fails(main, usual(base, "O"), code=1).err
    assert "not finite at step 0 of training" in told
    assert not Path("O", CHECKPOINT).exists() and not Path("O/model").exists()


# ----------------------------------------------------------------------------------------------
# samples


def test_painting_samples_changes_nothing(model, work, whole):
    main(usual(model, "O", *STEPS, "--sample_steps", "3", "--sample_items", "1"))
    check_same(Path("O"), whole)
    sheets = sorted(os.listdir("O/samples"))
    assert sheets == ["0000003.png", "0000004.png"]  # the last one is of the result
    one, two = (Path("O/samples", name).read_bytes() for name in sheets)
    assert one != two
    with Image.open(f"O/samples/{sheets[0]}") as image:
        # one row a task; painted, target, and at most two references
        assert image.width == 4 * (image.width // 4) and image.width > image.height


def test_what_cannot_be_painted_is_left_out_of_samples(model, work, monkeypatch):
    """Its wording for painting is too long, or its instruction has no picture."""
    base = Path(shutil.copytree(model, "base"))
    path = base / "model_index.json"
    index = json.loads(path.read_text())
    index["prefixes"]["subject_inference"] = "the beach the dog the cat the cup the snow " * 3
    path.write_text(json.dumps(index))
    records = json.loads(Path("d.json").read_text())
    records[1] |= {"entity_path": [], "multi_prompt": "make it red"}
    Path("d.json").write_text(json.dumps(records))
    chosen, paint = [], SamplePainter.paint

    def note(self, learned, done):
        chosen.extend(record.target for record in self.records)
        return paint(self, learned, done)

    monkeypatch.setattr(SamplePainter, "paint", note)
    main(usual(base, "O", "--sample_steps", "2", "--sample_items", "6"))
    assert sorted(chosen) == sorted(RECORDS[number]["image"] for number in (2, 3, 5))
    assert os.listdir("O/samples") == ["0000002.png"]


# ----------------------------------------------------------------------------------------------
# --dry_run, --overwrite


def test_dry_run(model, work, capsys, monkeypatch):
    """It tells the plan; nothing is written, and no weights are loaded."""

    def never(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mige.folder.load_module", never)
    before = contents(work)
    argv = usual(model, "O", "--dry_run", "--steps", "30", "--warmup_steps", "1000")
    main([*argv, "--learning_rate", "3.54e-6"])
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        "6 records",
        "30 steps of 4 samples (20 epochs), rate 3.54e-06 after 1,000 steps, of which it comes to "
        "1.03e-07: give fewer --warmup_steps",
        "seed 5, 1 × cpu in float32",
    ]
    assert told[3].startswith("195,504 of 225,016 weights learn; a process takes about 5.")
    assert len(told) == 4
    assert contents(work) == before and not Path("O").exists()


def test_records_that_are_too_wide_are_counted(model, work, capsys):
    records = json.loads(Path("d.json").read_text())
    records[0] |= {"width": 401, "height": 100}
    Path("d.json").write_text(json.dumps(records))
    main(usual(model, "O", "--dry_run"))
    assert capsys.readouterr().out.splitlines()[0] == "5 records, 1 are too wide"


def test_overwrite_leaves_the_former_result_until_the_new_one_is_there(
    model, work, whole, fails, caplog
):
    shutil.copytree(whole, "O")
    before = contents(Path("O"))
    argv = usual(model, "O", *STEPS, "--learning_rate", "0.002", "--overwrite")

    def stop():
        raise OSError(5, "Input/output error", "somewhere")

    with before_step(1, stop):
        fails(main, argv)
    assert contents(Path("O")) == before
    assert "--resume" not in caplog.text  # of this training nothing is saved
    main(argv)
    after = contents(Path("O"))
    assert after.keys() == before.keys()
    assert after[CHECKPOINT] != before[CHECKPOINT]
    name = "model/fusion/diffusion_pytorch_model.safetensors"
    assert after[name] != before[name]


# ----------------------------------------------------------------------------------------------
# what is refused, before any weights are loaded


def other_vae(model: Path, whole: Path) -> Path:
    """A model with another autoencoder."""
    base = Path(shutil.copytree(model, "base"))
    (file,) = (base / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["quant_conv.bias"] += 1
    save_file(tensors, file, {"format": "pt"})
    return base


def other_size(model: Path, whole: Path) -> Path:
    """A model of larger pictures."""
    base = Path(shutil.copytree(model, "base"))
    path = base / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 16}))
    return base


def half_a_shard(model: Path, whole: Path) -> Path:
    path = Path("F/00000.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    return model


def some_features(model: Path, whole: Path) -> Path:
    path = Path("F/00000.safetensors")
    tensors = load_file(path)
    del tensors[RECORDS[1]["image"]], tensors[RECORDS[2]["entity_path"][1]]
    save_file(tensors, path)
    return model


def no_features(model: Path, whole: Path) -> Path:
    shutil.rmtree("F")
    return model


def a_lost_picture(model: Path, whole: Path) -> Path:
    Path(RECORDS[2]["image"]).unlink()
    return model


def begun(model: Path, whole: Path) -> Path:
    shutil.copytree(whole, "O")
    return model


def finished_alone(model: Path, whole: Path) -> Path:
    """Its checkpoint, which is large, was removed."""
    begun(model, whole)
    Path("O", CHECKPOINT).unlink()
    return model


def notes_in_the_result(model: Path, whole: Path) -> Path:
    begun(model, whole)
    Path("O/model/notes.txt").touch()
    return model


def samples_alone(model: Path, whole: Path) -> Path:
    """Pictures that are kept of a training, or are anyone's."""
    Path("O/samples").mkdir(parents=True)
    Path("O/samples/0000010.png").touch()
    return model


def another_model(model: Path, whole: Path) -> Path:
    begun(model, whole)
    base = Path(shutil.copytree(model, "base"))
    path = base / "model_index.json"
    index = json.loads(path.read_text())
    index["prefixes"]["edit"] = "edits: \n"
    path.write_text(json.dumps(index))
    return base


def another_list(model: Path, whole: Path) -> Path:
    begun(model, whole)
    Path("d.json").write_text(json.dumps(RECORDS[::-1]))
    return model


def half_a_checkpoint(model: Path, whole: Path) -> Path:
    begun(model, whole)
    path = Path("O", CHECKPOINT)
    path.write_bytes(path.read_bytes()[:-1000])
    return model


def a_checkpoint_without_settings(model: Path, whole: Path) -> Path:
    begun(model, whole)
    path = Path("O", CHECKPOINT)
    saved = read_checkpoint(path)
    del saved.facts["settings"]
    write_checkpoint(path, saved)
    return model


def base_in_the_output(model: Path, whole: Path) -> Path:
    return Path(shutil.copytree(model, "O/model"))


def as_it_is(model: Path, whole: Path) -> Path:
    return model


@pytest.mark.parametrize(
    "change, options, sentence",
    [
        (other_vae, "", "F holds features of another model: its autoencoder is "),
        (other_size, "", "F holds features of another size: latents 4×8×8, and this model's are"),
        (half_a_shard, "", "F/00000.safetensors cannot be read as safetensors ("),
        (some_features, "", f"record 1: there are no features of {RECORDS[1]['image']}"),
        (some_features, "", "python -m mige.features"),
        (some_features, "", "the same --data, --root and --model"),
        (no_features, "", "there are no features in F; `python -m mige.features` makes them"),
        (a_lost_picture, "", "d.json has 1 problem, listed above; mend these records"),
        (begun, "", "O holds a training; go on with --resume, start anew with --overwrite, or"),
        (finished_alone, "", "O holds a trained model; replace it with --overwrite, or give"),
        (samples_alone, "", "O holds samples, as of a training; replace it with --overwrite, or"),
        (notes_in_the_result, "--overwrite", "O/model holds notes.txt, which would be removed"),
        (begun, "--resume --weight_decay 0.1", "had other settings (--weight_decay 0.03); go on"),
        (begun, "--resume --seed 6 --parts fusion", "had other settings (--seed 5, --parts ["),
        (begun, "--resume --overwrite", "--resume and --overwrite are both given; give one"),
        (begun, "--resume --dropout 0.3", "had other settings (--dropout 0.1); go on"),
        (
            begun,
            "--resume --conditioning_rate 0.1 --timestep_shift 2",
            "had other settings (no --conditioning_rate, --timestep_shift 1.0)",
        ),
        (begun, "--resume --optimizer muon", "had other settings (--optimizer adamw); go on"),
        (begun, "--resume --steps 1", "O has 4 steps already, and 1 are asked for; give more"),
        (
            begun,
            "--model O --output P",
            "O is no model folder: it has no model_index.json; give O/model",
        ),
        (as_it_is, "--output F/x", "--output F/x lies in --features F; give another"),
        (another_model, "--resume", "--model is not what the training in O had; put that back"),
        (another_list, "--resume", "--data is not what the training in O had; put that back"),
        (a_checkpoint_without_settings, "--resume", "has no 'settings'; start anew with --overwr"),
        (half_a_checkpoint, "--resume", f"O/{CHECKPOINT} cannot be read as safetensors ("),
        (as_it_is, "--resume", "O holds no checkpoint to go on from; leave out --resume"),
        (as_it_is, "--output .", ". holds other files ("),
        (as_it_is, "--output d.json/O", "d.json is a file, not a folder; give another --output"),
        (base_in_the_output, "--overwrite", "--model O/model lies where --output O is written"),
        (as_it_is, "--output F/.. --features F/../samples", "--features F/../samples lies where"),
        (as_it_is, "--model nowhere", "there is no model folder nowhere"),
        (as_it_is, "--data none.json", "there is no list none.json; give a JSON file of records"),
        (as_it_is, "--shard", "--shard needs several processes: start them with `accelerate lau"),
        (as_it_is, "--mixed_precision fp16", "--mixed_precision fp16 overflows in T5; give bf16"),
        (as_it_is, "--parts eyes", "argument --parts: invalid choice: 'eyes' (choose from "),
        (as_it_is, "--parts fusion --lora_rank 4", "--lora_rank is for transformer and text_enco"),
        (as_it_is, "--parts fusion qformer fusion", "--parts names fusion more than once; give"),
        (as_it_is, "--optimizer muon --parts fusion", "of the transformer: add it to --parts"),
        (as_it_is, "--optimizer muon --lora_rank 4", "of the transformer: leave --lora_rank out"),
        (as_it_is, "--optimizer muon --shard", "of the transformer: leave out --shard, and FSDP"),
        (as_it_is, "--steps 0", "--steps is 0; give a whole number from 1 to 100000000"),
        (as_it_is, "--batch_size 0", "--batch_size is 0; give a whole number from 1 to"),
        (as_it_is, "--learning_rate 0", "--learning_rate is 0, with which nothing is learned"),
        (as_it_is, "--learning_rate nan", "--learning_rate is nan; give a number from 0 to 1"),
        (as_it_is, "--ema 1", "--ema is 1.0; give a number from 0 to"),
        (as_it_is, "--dropout 1", "--dropout is 1.0; give a number from 0 to 0.9"),
        (as_it_is, "--seed -1", "the seed is -1; give a whole number from 0 to 2**63 - 1"),
        (as_it_is, "--device tpu", "--device tpu is not available here; available: cpu"),
    ],
)
def test_what_is_refused(change, options, sentence, model, work, whole, fails, monkeypatch, caplog):
    base = change(model, whole)
    before = contents(work)
    monkeypatch.setattr("mige.training.run.load_parts", None)  # it is not come to
    told = fails(main, usual(base, "O", *STEPS, *options.split())).err
    assert sentence in told + caplog.text  # where several things are wrong, they are listed
    assert contents(work) == before


def test_a_checkpoint_that_is_older_than_a_setting_goes_on(model, work, whole, fails):
    begun(model, whole)
    saved = read_checkpoint(Path("O", CHECKPOINT))
    del saved.facts["settings"]["optimizer"]
    write_checkpoint(Path("O", CHECKPOINT), saved)
    argv = usual(model, "O", *STEPS, "--resume", "--dry_run")
    main(argv)
    assert (
        "had other settings (--optimizer adamw)" in fails(main, [*argv, "--optimizer", "muon"]).err
    )


def test_fsdp_s_config_shards(model, work, fails, monkeypatch):
    """Of one process there is nothing to split."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    assert "--shard needs several processes" in fails(main, usual(model, "O")).err


def test_a_batch_that_cannot_be_shared(model, work):
    config = TrainingConfig(data="d.json", root=".", features="F", model=str(model), output="O")
    with pytest.raises(UserError) as told:
        make_plan(config, SimpleNamespace(count=3, index=0, device="cpu"))
    assert str(told.value) == (
        "--batch_size 32 cannot be shared over 3 processes; give a multiple of 3"
    )


def test_two_trainings_of_one_output(model, work, fails, monkeypatch):
    """The second one is told, and disturbs nothing."""
    told = []

    def meanwhile(*args):
        told.append(fails(main, usual(model, "O")).err)
        raise UserError("that is enough")

    monkeypatch.setattr(run, "_run", meanwhile)
    fails(main, usual(model, "O"))
    assert "O is being written by another process; wait for it or give another --output" in told[0]
