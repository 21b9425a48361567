"""Fuzzed argument lists over all commands: whatever is written, a command ends as it should.

    python tests/attacks/fuzz.py --count 3000             # in this process, about half an hour
    python tests/attacks/fuzz.py --count 100 --processes  # as real processes

A list begins as one that works, on a model of few layers, and up to four of its options are put
in, left out, doubled or given odd values. Exit codes are 0, 2 or 130, and there is no traceback.
Prints each list that breaks this, and how many there were of each end.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "mige")]

ENDS = (0, 2, 130)
PATIENCE = 120  # seconds for one list

NUMBERS = [
    "0", "1", "2", "-1", "3", "1.5", "1e3", "1e300", "1e-300", "nan", "inf", "-inf", "None", "",
    " 2 ", "2_0", "0x10", "٣", "2" * 30, "9" * 400, "10**9", "1e999", "-0", "+1", "1,5", "1 2",
]  # fmt: skip
TEXTS = [
    "", " ", ".", "..", "/", "./", "toys", "all", "none", "toybox", "-x", "--", "a/b", "../../etc",
    "x" * 300, "x" * 9000, "é", "名前", "\udcff", "a\nb", "a\tb", "%s%n", "{}", "$HOME", "~", "*",
    "<asset0>", "<asset9>", "a photo of <asset0>", "a photo of <asset1> and <asset0>",
    "(<asset0>:1.3)", "<lora:x:1>", "[[cat]]", "!", "a " * 200, "nobody/nothing", "con", "nul.json",
    "model.ckpt", "model.safetensors", "/dev/null", "/proc/self/mem", "README.md",
]  # fmt: skip
SHAPES = [
    "[[4]]", "[[4],[6]]", "[]", "[[]]", "[[0]]", "[[-1]]", "[[4,4]]", "[" * 3000, "[[1e9]]", "{}",
    "null", "[[0.1,0.2,0.5,0.6]]", "[[0,0,1,1]]", "[[1,1,0,0]]", "[[0.1,0.2,0.5]]", "0,0,1,1",
    '{"xmin":0,"ymin":0,"xmax":1,"ymax":1}', '[{"bbox_2d":[0,0,64,64]}]', "<asset0>=0,0,1,1",
    "<asset0>=0.1,0.1,0.1,0.1", "<asset5>=0,0,.5,.5", "<asset0>=0px,0px,9px,9px", "50%,50%,99%,99%",
    "NaN,0,1,1", "<asset0>", "=", "=0,0,1,1", "[[1e400,0,1,1]]", "[[0,0,1.0001,1]]",
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command: its script or module, and an argument list that works."""

    script: str
    argv: tuple[str, ...]

    def main(self, argv: Sequence[str]) -> None:
        """Run it in this process."""
        import_module(self.script).main(list(argv))

    def actions(self) -> list[argparse.Action]:
        """Its options, as argparse knows them."""
        found: list[argparse.Action] = []
        parse = argparse.ArgumentParser.parse_args

        def caught(parser, *args, **more):
            found.extend(parser._actions)
            return parse(parser, *args, **more)

        argparse.ArgumentParser.parse_args = caught
        try:
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
                self.main(["--help"])
        finally:
            argparse.ArgumentParser.parse_args = parse
        left_out = ("help", "debug")  # --debug asks for tracebacks
        return [each for each in found if each.option_strings and each.dest not in left_out]


def prepare(work: Path) -> list[Command]:
    """A folder with a model of few layers, a photo with masks, and what was learned of it."""
    import numpy as np
    from PIL import Image
    from thin import GOLDEN, thin_pipeline, thin_scheduler, thin_unet

    import semantic_learning

    tokenizer = GOLDEN / "tiny_sd" / "tokenizer"
    thin_pipeline(tokenizer, thin_unet(3), thin_scheduler()).save_pretrained(work / "model")
    folder = work / "example" / "toys"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((128, 128)).save(folder / "img.jpg")
    for index, left in enumerate((8, 72)):
        mask = np.zeros((128, 128), np.uint8)
        mask[32:96, left : left + 48] = 255
        Image.fromarray(mask).save(folder / f"mask{index}.png")
    shared = ["--device", "cpu", "--mixed_precision", "no", "--offline"]
    learning = [
        "--folder_path", "example", "--instance", "toys", "--model_path", "model", *shared,
        "--train_steps", "1", "--reward_steps", "0", "--finetune_steps", "1", "--lora_rank", "2",
        "--num_class_images", "1",
    ]  # fmt: skip
    semantic_learning.main([*learning, "--seed", "0", "--output_dir", "learned"])
    painting = ["--models_dir", "learned", "--model_id", "toys", "--num_inference_steps", "1",
                "--guidance_steps", "1", *shared]  # fmt: skip
    prompt = ["--prompt", "a photo of <asset0> and <asset1>"]
    return [
        Command("semantic_learning", (*learning, "--output_dir", "new", "--dry_run")),
        Command("semantic_learning", (*learning, "--output_dir", "new", "--overwrite")),
        Command("semantic_synthesis", (*painting, *prompt, "--output_path", "pictures")),
        Command(
            "semantic_evaluation",
            (*painting, *prompt, "--output_path", "evaluation", "--num_images", "1",
             "--features", "toybox"),
        ),
        Command(
            "semantic_export",
            ("--models_dir", "learned", "--model_id", "toys", "--output_path", "exports",
             "--format", "kohya", "--offline", "--overwrite"),
        ),
        Command("visual_box_mask", ("--top_left", "8", "8", "--bottom_right", "64", "64")),
        *prepare_mige(work),
    ]  # fmt: skip


def prepare_mige(work: Path) -> list[Command]:
    """The commands of MIGE, with a model of few layers and a list."""
    from tiny_mige import save_tiny

    save_tiny(work / "mige_model")
    record = {"entity_path": ["example/toys/img.jpg"], "multi_prompt": "a<imagehere>on it"}
    (work / "list.json").write_text(json.dumps([record]))
    painting = ("--model", "mige_model", "--steps", "1", "--device", "cpu", "--mixed_precision",
                "no", "--output_path", "pictures")  # fmt: skip
    photo = "example/toys/img.jpg"
    one = ("--prompt", "a <image> on it", "--images", photo)
    return [
        Command("mige.generate", (*one, *painting)),
        Command("mige.generate", ("--items", "list.json", *painting)),
        Command("mige.edit", ("--source", photo, "--instruction", "make it red", *painting)),
    ]


def fuzzed(rng: random.Random, command: Command, actions: Sequence[argparse.Action]) -> list[str]:
    """The command's argument list with up to four changes."""
    argv = list(command.argv)
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))):
        kind = rng.random()
        if kind < 0.1 and argv:
            del argv[rng.randrange(len(argv))]
        elif kind < 0.15:
            argv.insert(rng.randrange(len(argv) + 1), rng.choice(TEXTS))
        else:
            argv += written(rng, rng.choice(actions))
    return argv


def written(rng: random.Random, action: argparse.Action) -> list[str]:
    """An option with values that suit it more often than not."""
    name = rng.choice(action.option_strings)
    if action.nargs == 0:
        return [name]
    count = action.nargs if isinstance(action.nargs, int) else 1
    if action.nargs in ("+", "*"):
        count = rng.choice((1, 1, 2, 3))
    values = [value_for(rng, action) for _ in range(count)]
    return [f"{name}={values[0]}"] if len(values) == 1 and rng.random() < 0.5 else [name, *values]


def value_for(rng: random.Random, action: argparse.Action) -> str:
    """A value for an option, by its choices, type and default."""
    if action.choices and rng.random() < 0.8:
        return str(rng.choice(list(action.choices)))
    if action.dest in ("boxes", "box", "subject_token_indices", "top_left", "bottom_right"):
        return rng.choice(SHAPES + NUMBERS)
    is_number = action.type in (int, float) or action.dest in ("seed", "size")
    if is_number:
        # small numbers mostly: a command that works should be quick
        return rng.choice(NUMBERS[:5]) if rng.random() < 0.6 else rng.choice(NUMBERS + TEXTS)
    if action.default and rng.random() < 0.2:
        default = action.default
        return str(default[0] if isinstance(default, list | tuple) else default)
    return rng.choice(TEXTS)


# ----------------------------------------------------------------------------------------------
# running


@dataclass(frozen=True)
class Ended:
    """How a list ended: its exit code (None: it did not), whether it parsed, what it told."""

    code: int | None
    parsed: bool
    told: str

    @property
    def is_well(self) -> bool:
        """As it should be?"""
        return self.code in ENDS and "Traceback" not in self.told


def run_here(command: Command, argv: Sequence[str]) -> Ended:
    """Run a command in this process."""
    parse, parsed = argparse.ArgumentParser.parse_args, []

    def watched(parser, *args, **more):
        options = parse(parser, *args, **more)
        parsed.append(True)
        return options

    def late(*_):
        raise TimeoutError(f"not done after {PATIENCE} s")

    told = io.StringIO()
    argparse.ArgumentParser.parse_args = watched
    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            command.main(argv)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        code = None
        told.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        argparse.ArgumentParser.parse_args = parse
    return Ended(code, bool(parsed), told.getvalue())


def run_apart(command: Command, argv: Sequence[str]) -> Ended:
    """Run a command as a process of its own."""
    name = command.script
    script = ["-m", name] if "." in name else [str(ROOT / f"{name}.py")]
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            [sys.executable, *script, *(os.fsencode(word) for word in argv)],
            capture_output=True, text=True, errors="replace", timeout=PATIENCE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        )  # fmt: skip
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return Ended(None, True, f"Traceback: {error}")
    told = done.stdout + done.stderr
    return Ended(done.returncode, ": error: argument" not in told, told)


def fuzz(work: Path, count: int, seed: int, apart: bool = False) -> tuple[Counter, list[str]]:
    """Run lists; counts of ends and of lists that parsed, and a text for each that ended badly."""
    here = Path.cwd()
    os.chdir(work)
    counts, broken = Counter(), []
    try:
        commands = prepare(work)
        actions = [command.actions() for command in commands]
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            which = rng.randrange(len(commands))
            argv = fuzzed(rng, commands[which], actions[which])
            ended = (run_apart if apart else run_here)(commands[which], argv)
            counts[f"exit code {ended.code}"] += 1
            counts["parsed"] += ended.parsed
            if not ended.is_well:
                lines = ended.told.strip().splitlines()[-12:]
                broken.append(
                    "\n".join([f"{number}: {commands[which].script} {argv!r:.400}", *lines])
                )
                print(broken[-1], flush=True)
            for leftover in ("new", "pictures", "evaluation", "exports"):
                shutil.rmtree(work / leftover, ignore_errors=True)
    finally:
        os.chdir(here)
    return counts, broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        counts, broken = fuzz(Path(work), options.count, options.seed, options.processes)
    print(dict(counts))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
