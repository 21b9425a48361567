"""A full disk and a read-only one: one clear sentence, and what was there before is as it was.

Each test mounts a small disk of its own, which takes root on Linux.
"""

import os
import shutil
import subprocess

import pytest
from thin import contents

import semantic_export
import semantic_learning
import semantic_synthesis
import visual_box_mask
from imagelab.training.checkpoint import read_checkpoint
from mifo.learned import read_manifest

SIZE = 4 << 20  # bytes
EARLIER = (
    "exports/toys/toys.safetensors",
    "exports/toys/embeddings/asset0.safetensors",
    "exports/toys/pipeline/model_index.json",
    "pictures/toys/0000.png",
    "mask.png",
)
PAINT = """--model_id toys --seed 7 --num_inference_steps 1 --guidance_steps 0 --device cpu
    --mixed_precision no --prompt"""
PROMPT = "a photo of <asset0> and <asset1>"


@pytest.fixture
def disk(tmp_path):
    """An empty disk of SIZE bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command to make a small disk with")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(disk, free):
    """Fill a disk but for some bytes."""
    status = os.statvfs(disk)
    size = status.f_bavail * status.f_frsize - free
    assert size > 0
    (disk / "filler").write_bytes(bytes(size))


def protect(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


@pytest.fixture
def commands(disk, learned_dir, learn_argv):
    """By name: a command that writes to the disk, and its arguments; with earlier results there."""
    shutil.copytree(learned_dir / "toys", disk / "out/toys")
    for name in EARLIER:
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_bytes(b"an earlier result")
    models = ("--models_dir", learned_dir)
    export = ("--model_id", "toys", *models, "--output_path", disk / "exports", "--overwrite")
    commands = {
        "learning": (semantic_learning, *learn_argv, "--output_dir", disk / "out", "--overwrite"),
        "synthesis": (
            semantic_synthesis, *PAINT.split(), PROMPT, *models, "--output_path", disk / "pictures"
        ),
        "export": (semantic_export, *export, "--format", "kohya", "embeddings"),
        "export of a pipeline": (semantic_export, *export, "--format", "pipeline"),
        "preview": (visual_box_mask, "--box", "0,0,.5,.5", "--output", disk / "mask.png"),
    }  # fmt: skip
    return {name: (script.main, [*map(str, argv)]) for name, (script, *argv) in commands.items()}


# ----------------------------------------------------------------------------------------------
# full


FULL = "the disk is full; nothing that was there before has been changed: free some space"


@pytest.mark.parametrize(
    ("free", "stage"),
    [
        (0, None),
        (64 << 10, "stage 1"),
        (320 << 10, "stage 2"),
    ],  # the last has no room left for the figures
)
def test_learning(free, stage, disk, commands, fails):
    """``stage``: of the checkpoint that there was room for."""
    leave(disk, free)
    before = contents(disk)
    learn, argv = commands["learning"]
    assert FULL in fails(learn, argv).err.splitlines()[-1]
    after = contents(disk)
    checkpoint = disk / "out/.toys.work/checkpoint.safetensors"
    if stage is not None:
        assert read_checkpoint(checkpoint).stage == stage
        del after[checkpoint.relative_to(disk).as_posix()]
    assert after == before
    if stage is not None:
        (disk / "filler").unlink()
        learn([*argv, "--resume"])
        assert not checkpoint.exists()
        settings = read_manifest(disk / "out/toys")["settings"]
        assert settings["output_dir"] == str(disk / "out")  # not the earlier result's


@pytest.mark.parametrize(
    ("name", "free", "says"),
    [
        ("synthesis", 0, FULL),
        ("synthesis", 32 << 10, FULL),  # half a picture
        ("export", 0, FULL),
        ("export", 32 << 10, FULL),
        ("export of a pipeline", 32 << 10, FULL),
        ("preview", 0, "mask.png cannot be written (No space left on device); name another file"),
    ],
)
def test_other_commands(name, free, says, disk, commands, fails):
    leave(disk, free)
    before = contents(disk)
    assert says in fails(*commands[name]).err.splitlines()[-1]
    assert contents(disk) == before


# ----------------------------------------------------------------------------------------------
# read-only


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("learning", "out cannot be written to; give another --output_dir"),
        ("synthesis", "toys cannot be written to; give another --output_path"),
        ("export", "toys cannot be written to; give another --output_path"),
        ("preview", "mask.png cannot be written (Read-only file system); name another file"),
    ],
)
def test_read_only(name, says, disk, commands, fails):
    protect(disk)
    before = contents(disk)
    assert says in fails(*commands[name]).err.splitlines()[-1]
    assert contents(disk) == before
