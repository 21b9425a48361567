"""Two to four processes at once on one instance, one output folder, one cache, one export.

    python tests/attacks/together.py --rounds 200    # about half an hour on one core

In a third of the rounds all processes have the process id 1, as those of several containers on one
volume have. Each round ends with a look at every file: it is what one of the processes writes when
it is alone, nothing that was finished is replaced without --overwrite, nothing is lost, and each
process ended with 0, or with 2 and a sentence. Prints each round that breaks this, and how many
processes there were of each kind and end.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forks import Ended, alone, finished, fork, run_command

OPTIONS = ["--device", "cpu", "--mixed_precision", "no", "--offline"]
INSTANCES = ("toys", "toys1", "toys2", "toys3")


class Broken(AssertionError):
    """A round left what it must not."""


def check(holds: object, told: str) -> None:
    if not holds:
        raise Broken(told)


@dataclass
class Start:
    """One process of a round: its command, and what it was given."""

    script: str
    argv: list[str]
    key: object = None  # what its result alone is known by
    may_replace: bool = False
    ended: Ended | None = None

    def main(self, argv: list[str]) -> None:
        __import__(self.script).main(argv)

    @property
    def is_done(self) -> bool:
        return self.ended.code == 0


@dataclass
class World:
    """The folder of all rounds, and what commands write when they are alone."""

    work: Path
    known: dict = field(default_factory=dict)

    def __post_init__(self):
        from tqdm import tqdm

        import imagelab.figures
        from mifo.learning import priors

        for name in ("plot_losses", "plot_attention"):  # which take longer than all the rest
            setattr(imagelab.figures, name, lambda path, *args: Path(path).write_bytes(b"a figure"))
        priors.STEPS = 2
        tqdm.monitor_interval = 0  # a thread, which a fork would not have
        os.chdir(self.work)
        from fuzz import prepare

        prepare(self.work)
        example = self.work / "example"
        for name in INSTANCES[1:]:
            shutil.copytree(example / "toys", example / name)

    def learning(self, instance: str, seed: int, finetune: str = "lora") -> list[str]:
        """The options of a learning run of a few steps."""
        return [
            "--folder_path", str(self.work / "example"), "--instance", instance,
            "--model_path", str(self.work / "model"), *OPTIONS, "--train_steps", "3",
            "--reward_steps", "1", "--finetune_steps", "2", "--lora_rank", "2", "--prior_weight",
            "0", "--checkpoint_steps", "1", "--seed", str(seed), "--finetune", finetune,
            "--output_dir", "out",
        ]  # fmt: skip

    def painting(self, seed: int, count: int) -> list[str]:
        """The options of painting and evaluating."""
        return [
            "--models_dir", str(self.work / "learned"), "--model_id", "toys", *OPTIONS,
            "--num_inference_steps", "1", "--guidance_steps", "0", "--seed", str(seed),
            "--num_images", str(count), "--prompt", "a photo of <asset0> and <asset1>",
            "--model_path", str(self.work / "model"),
        ]  # fmt: skip

    def exporting(self, models: str) -> list[str]:
        """The options of an export; ``models``: learned, or others, where toys is another one."""
        if not (self.work / models).is_dir():
            self.alone(self.learning("toys", 1, "none"), Path("other"))
            os.rename(self.work / "other/out", self.work / models)
        return [
            "--models_dir", str(self.work / models), "--model_id", "toys", "--offline",
            "--output_path", "exports", "--format", "embeddings",
            "--model_path", str(self.work / "model"),
        ]  # fmt: skip

    def alone(self, argv: list[str], where: Path, script: str = "semantic_learning") -> Path:
        """Run a command in a folder of its own, while nothing else runs; that folder."""
        (self.work / where).mkdir(parents=True, exist_ok=True)
        here = Path.cwd()
        os.chdir(self.work / where)
        try:
            ended = alone(__import__(script).main, argv, Path("alone.log"))
        finally:
            os.chdir(here)
        check(ended.code == 0, f"alone: {ended.told[-2000:]}")
        (self.work / where / "alone.log").unlink()
        return self.work / where

    def result(self, start: Start, part: str) -> dict[str, bytes]:
        """All files that a command writes below ``part`` when it is alone."""
        key = (start.script, start.key)
        if key not in self.known:
            argv = [word for word in start.argv if word not in ("--overwrite", "--resume")]
            where = self.alone(argv, Path(f"alone{len(self.known)}"), start.script)
            self.known[key] = files(where / part)
        return self.known[key]


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their path in it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


# ----------------------------------------------------------------------------------------------
# the kinds of rounds: each prepares the current folder, and returns the processes and a look at
# what they left


Look = Callable[[Sequence[Start]], None]


def result_of_one(
    world: World, starts: Sequence[Start], folder: Path, before: dict, part: str
) -> None:
    """A folder is whole: one process wrote all of it, or it is as it was."""
    after, done = files(folder), [each for each in starts if each.is_done]
    if before and not any(each.may_replace for each in starts):
        check(after == before, f"{folder} was replaced without --overwrite")
    if not done:
        check(after == before, f"{folder} changed, and no process says that it wrote it")
        return
    check(any(after == world.result(each, part) for each in done), f"{folder} is of no process")
    if not before:
        plain = [each for each in done if not each.may_replace]
        check(len(plain) <= 1, f"{len(plain)} processes wrote {folder}, none may replace another's")


def learning(world: World, rng: random.Random, count: int) -> tuple[list[Start], Look]:
    """One instance, with what was there before; other seeds give other results."""
    begun = rng.choice(("nothing", "a result", "an unfinished run"))
    if begun == "a result":
        world.result(Start("semantic_learning", world.learning("toys", 9), 9), "out/toys")
        for name, content in world.known["semantic_learning", 9].items():
            Path("out/toys", name).parent.mkdir(parents=True, exist_ok=True)
            Path("out/toys", name).write_bytes(content)
    elif begun == "an unfinished run":
        shutil.copytree(unfinished(world), "out")
    starts = []
    for _ in range(count):
        seed = rng.choice((0, 1))
        plain = 3 if begun == "nothing" else 1  # of whom one alone may learn
        flag = rng.choice([[]] * plain + [["--overwrite"], ["--resume"]])
        starts.append(
            Start("semantic_learning", [*world.learning("toys", seed), *flag], seed, bool(flag))
        )
    before = files(Path("out/toys"))

    def look(ended: Sequence[Start]) -> None:
        replacing = [each for each in ended if "--overwrite" in each.argv]
        folder = Path("out/toys")
        if before and not replacing:
            check(files(folder) == before, "a result was replaced without --overwrite")
        result_of_one(world, ended, folder, before, "out/toys")
        able = ended if begun == "nothing" else replacing
        if begun == "an unfinished run":
            able = [each for each in ended if each.key == 0 and "--resume" in each.argv] + able
        if begun == "nothing":
            able = [each for each in ended if "--resume" not in each.argv]
        check(not able or any(each.is_done for each in able), "nobody learned")
        left = {path.name for path in Path("out").iterdir()} if Path("out").is_dir() else set()
        kept = set() if any(each.is_done for each in ended) else {".toys.work"}
        check(left <= {"toys"} | kept, f"left behind: {left}")

    return starts, look


def unfinished(world: World) -> Path:
    """An output folder with a run of seed 0 that was stopped in its second stage."""
    path = world.work / "unfinished"
    if path.is_dir():
        return path / "out"
    from imagelab.training.loop import Trainer

    argv, update = world.learning("toys", 0), Trainer.update

    def stopped(trainer, stage, step):
        if stage.name == "stage 2":
            signal.raise_signal(signal.SIGINT)
        return update(trainer, stage, step)

    def work() -> int:
        Trainer.update = stopped
        return run_command(__import__("semantic_learning").main, argv)

    path.mkdir()
    here = Path.cwd()
    os.chdir(path)
    ended = finished(fork(work, Path("log")), Path("log"))
    os.chdir(here)
    check(ended.code == 130, ended.told)
    return path / "out"


def class_images(world: World, rng: random.Random, count: int) -> tuple[list[Start], Look]:
    """Several instances that share class images; each needs another number of them."""
    starts = []
    for instance in rng.sample(INSTANCES, count):
        images = rng.choice((4, 8, 12))  # whole batches, which round alike
        argv = [*world.learning(instance, 0), "--prior_weight", "1"]
        argv += ["--num_class_images", str(images)]
        starts.append(Start("semantic_learning", argv, (instance, images)))

    def look(ended: Sequence[Start]) -> None:
        from imagelab.io.tensors import read_tensors

        for each in ended:
            check(each.is_done, f"{each.key} was not learned")
            name = each.key[0]
            alone = world.result(each, f"out/{name}")
            check(files(Path("out", name)) == alone, f"{name} differs from the one learned alone")
        (cache,) = Path("out/.class_images").iterdir()
        kept = read_tensors(cache, "")[0]["latents"]
        check(len(kept) in [each.key[1] for each in ended], f"{len(kept)} class images are kept")

    return starts, look


def pictures(world: World, rng: random.Random, count: int) -> tuple[list[Start], Look]:
    """One folder of numbered pictures, some of them from before."""
    for number in range(rng.choice((0, 0, 3))):
        Path("out/toys").mkdir(parents=True, exist_ok=True)
        Path(f"out/toys/{number:04d}.png").write_bytes(b"of before")
    before = files(Path("out"))
    starts = []
    for _ in range(count):
        seed, images = rng.randrange(6), rng.choice((1, 2, 3))
        argv = [*world.painting(seed, images), "--output_path", "out"]
        starts.append(Start("semantic_synthesis", argv, range(seed, seed + images)))

    def look(ended: Sequence[Start]) -> None:
        for name, content in before.items():
            check(Path("out", name).read_bytes() == content, f"{name} was replaced")
        told: list[str] = []
        for each in ended:
            check(each.is_done, "not painted")
            paths = re.findall(r"out/toys/\S+\.png", each.ended.told)
            check(len(paths) == len(each.key) + 1, f"told of {paths}")
            read_picture(paths[-1])
            for path, seed in zip(paths, each.key, strict=False):
                check(seed_of(path) == seed, f"{path} is not of seed {seed}")
                check(read_picture(path) == painted(world, seed), f"{path} is not seed {seed}'s")
            told += paths
        check(len(told) == len(set(told)), "two processes tell of one file")
        found = {f"out/{name}" for name in files(Path("out"))} - {f"out/{name}" for name in before}
        facts = {path.replace(".png", ".json") for path in told if "sheet" not in path}
        check(found == set(told) | facts, f"the files are not those told of: {found ^ set(told)}")

    return starts, look


def seed_of(path: str) -> int:
    """The seed that a picture and the facts beside it say, which must be one."""
    from PIL import Image

    beside = json.loads(Path(path).with_suffix(".json").read_text())["settings"]["seed"]
    with Image.open(path) as picture:
        within = json.loads(picture.info["mifo"])["settings"]["seed"]
    check(beside == within, f"{path} is of seed {within}, its facts of {beside}")
    return within


def read_picture(path: str | Path) -> bytes:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def painted(world: World, seed: int) -> bytes:
    """The pixels of a seed, painted alone."""
    key = ("pixels", seed)
    if key not in world.known:
        argv = [*world.painting(seed, 1), "--output_path", "out"]
        where = world.alone(argv, Path(f"alone{len(world.known)}"), "semantic_synthesis")
        world.known[key] = read_picture(where / "out/toys/0000.png")
    return world.known[key]


def exports(world: World, rng: random.Random, count: int) -> tuple[list[Start], Look]:
    """One folder of exports, of two learned folders of one name."""
    if rng.random() < 0.5:
        first = Start("semantic_export", world.exporting("learned"), "learned")
        for name, content in world.result(first, "exports/toys").items():
            Path("exports/toys", name).parent.mkdir(parents=True, exist_ok=True)
            Path("exports/toys", name).write_bytes(content)
    starts = []
    for _ in range(count):
        models, flag = rng.choice(("learned", "others")), rng.choice(([], ["--overwrite"]))
        argv = [*world.exporting(models), *flag]
        starts.append(Start("semantic_export", argv, models, bool(flag)))
    before = files(Path("exports/toys"))

    def look(ended: Sequence[Start]) -> None:
        result_of_one(world, ended, Path("exports/toys"), before, "exports/toys")
        able = [each for each in ended if each.may_replace or not before]
        check(not able or any(each.is_done for each in able), "nobody exported")
        check([path.name for path in Path("exports").iterdir()] == ["toys"], "left behind")

    return starts, look


def evaluations(world: World, rng: random.Random, count: int) -> tuple[list[Start], Look]:
    """One folder of records, pictures and reports, of seeds that overlap."""
    starts = []
    for _ in range(count):
        seed, images = rng.randrange(2), rng.choice((1, 2))
        argv = [*world.painting(seed, images), "--features", "toybox", "--output_path", "out"]
        argv += ["--folder_path", str(world.work / "example")]
        starts.append(Start("semantic_evaluation", argv, (seed, images)))

    def look(ended: Sequence[Start]) -> None:
        lines = Path("out/records.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        wanted = set()
        for each in ended:
            check(each.is_done, "not evaluated")
            wanted |= set(range(each.key[0], sum(each.key)))
        seeds = sorted(record["seed"] for record in records)
        check(seeds == sorted(wanted), f"there are records of seeds {seeds}, not of {wanted}")
        for record in records:
            pixels = read_picture(Path("out/pictures", record["picture"]))
            check(pixels == painted(world, record["seed"]), f"{record['picture']} is another's")
        names = {path.name for path in Path("out/pictures").iterdir()}
        check(names == {record["picture"] for record in records}, f"the pictures are {names}")
        report = {name: data for name, data in files(Path("out")).items() if "/" not in name}
        del report["records.jsonl"]
        every = [world.result(each, "out") for each in ended]
        whole = any(all(one[name] == data for name, data in report.items()) for one in every)
        check(whole and len(report) == 4, "the report is mixed from two")

    return starts, look


def previews(world: World, rng: random.Random, count: int) -> tuple[list[Start], Look]:
    """One file of a drawn mask."""
    starts = []
    for _ in range(count):
        left = rng.choice((0.1, 0.2, 0.3))
        argv = ["--box", f"{left},0,.5,.5", "--size", "64", "--output", "out/mask.png"]
        starts.append(Start("visual_box_mask", argv, left, True))
    return starts, lambda ended: result_of_one(world, ended, Path("out"), {}, "out")


def saved_instances(world: World, rng: random.Random, count: int) -> tuple[list[Start], Look]:
    """One instance folder that several pages save."""
    import page_saves

    known = {red: page_saves.content(red) for red in (0, 99, 200)}
    if rng.random() < 0.5:
        page_saves.main(["0", "--overwrite"])
    starts = []
    for _ in range(count):
        red, flag = rng.choice((99, 200)), rng.choice(([], ["--overwrite"]))
        starts.append(Start("page_saves", [str(red), *flag], red, bool(flag)))
    before = files(Path("toys"))

    def look(ended: Sequence[Start]) -> None:
        after, done = files(Path("toys")), [each.key for each in ended if each.is_done]
        if before and not any(each.may_replace for each in ended):
            check(after == before, "an instance was replaced")
        check(after in [known[red] for red in done] if done else after == before, "mixed instances")

    return starts, look


KINDS = (learning, class_images, pictures, exports, evaluations, previews, saved_instances)
#: How often each kind has its turn: those with the most to go wrong more often.
WEIGHTS = (5, 3, 5, 3, 4, 1, 1)


# ----------------------------------------------------------------------------------------------
# running


def run_together(starts: Sequence[Start], rng: random.Random, same_id: bool) -> None:
    """Run all processes at once, each a little later than the others."""
    wait, go = os.pipe()
    children = []
    for number, start in enumerate(starts):
        late = rng.choice((0, 0, 0.02, 0.2)) * rng.random()

        def work(start: Start = start, late: float = late) -> int:
            if same_id:
                os.getpid = lambda: 1
            time.sleep(late)
            return run_command(start.main, start.argv)

        def begin(work: Callable = work) -> int:
            os.close(go)
            os.read(wait, 1)
            return work()

        children.append(fork(begin, Path(f"log{number}")))
    os.close(go)
    for number, (child, start) in enumerate(zip(children, starts, strict=True)):
        start.ended = finished(child, Path(f"log{number}"))
        Path(f"log{number}").unlink()
    os.close(wait)


def check_end(start: Start) -> None:
    """A process ended with 0, or with 2 and a sentence."""
    ended = start.ended
    check(ended.code in (0, 2) and ended.is_told, f"exit code {ended.code}")
    if ended.code == 2:
        check(": error: " in ended.sentence, f"no sentence: {ended.sentence}")


def together(
    work: Path, rounds: int, seed: int, kinds: Sequence[str] = ()
) -> tuple[Counter, list[str]]:
    """Run rounds; counts of kinds and ends, and a text for each round that broke something.

    kinds: the names of those to run; empty for all.
    """
    import torch

    torch.set_num_threads(1)
    here = Path.cwd()
    work = work.resolve()
    counts, broken = Counter(), []
    try:
        world = World(work)
        turns = [kind for kind, weight in zip(KINDS, WEIGHTS, strict=True) for _ in range(weight)]
        random.Random(seed).shuffle(turns)
        turns = [each for each in (*KINDS, *turns) if not kinds or each.__name__ in kinds]
        for number in range(rounds):
            rng = random.Random(f"{seed} {number}")
            kind, same_id = turns[number % len(turns)], rng.random() < 1 / 3
            folder = work / f"round{number}"
            folder.mkdir()
            os.chdir(folder)
            starts, look = kind(world, rng, rng.choice((2, 3, 4)))
            run_together(starts, rng, same_id)
            try:
                for start in starts:
                    counts[f"{kind.__name__}: exit code {start.ended.code}"] += 1
                    check_end(start)
                look(starts)
                parts = list(folder.rglob(".*.part"))
                check(not parts, f"left behind: {parts}")
            except Exception as error:
                lines = [f"round {number}, {kind.__name__}: {type(error).__name__} {error}"]
                for start in starts:
                    told = start.ended.told.strip().splitlines()[-8:]
                    lines += [f"  {start.script} {start.argv[-6:]}: {start.ended.code}", *told]
                broken.append("\n".join(lines))
                print(broken[-1], flush=True)
            counts["rounds"] += 1
            os.chdir(work)
            shutil.rmtree(folder)
    finally:
        os.chdir(here)
    return counts, broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    names = [kind.__name__ for kind in KINDS]
    parser.add_argument("--kinds", nargs="+", default=[], choices=names, help="none: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="together_") as work:
        counts, broken = together(Path(work), options.rounds, options.seed, options.kinds)
    print(json.dumps({"counts": dict(sorted(counts.items())), "broken": len(broken)}))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
