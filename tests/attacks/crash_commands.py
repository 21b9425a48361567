"""The commands that crashes.py crashes: what each may leave, and how each has to end."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from thin import contents

OUT = Path("out")
SHARED = ["--device", "cpu", "--mixed_precision", "no", "--offline"]
PROMPT = ["--prompt", "a photo of <asset0> and <asset1>"]
PAINT = ["--models_dir", "../learned", "--model_id", "toys", *PROMPT, "--num_inference_steps", "3",
         "--guidance_steps", "1", "--seed", "7", "--model_path", "../model", *SHARED]  # fmt: skip
LEARN = [
    "--folder_path", "../example", "--instance", "toys", "--model_path", "../model", *SHARED,
    "--output_dir", "out", "--seed", "2", "--train_steps", "4", "--reward_steps", "2",
    "--finetune_steps", "10", "--lora_rank", "2", "--num_class_images", "5",
    "--checkpoint_steps", "1",
]  # fmt: skip


class Broken(Exception):
    """Something that a crash has damaged, or left."""


def need(holds: object, text: str) -> None:
    """Raises Broken with a text unless something holds."""
    if not holds:
        raise Broken(text)


class Command:
    """A command in a folder of its own, that writes to ``out`` there.

    Attributes:
        earlier: what ``out`` holds before; whole: what it holds in the end; both by path.
    """

    script: str
    argv: Sequence[str]
    earlier: Path | None = None

    def __init__(self, work: Path):
        self.work = work
        self.before: dict[str, bytes] = {}
        self.whole: dict[str, bytes] = {}

    @classmethod
    def prepare(cls, work: Path) -> None:
        """Make ``earlier``, beside the current folder, which is in ``work``."""

    @classmethod
    def main(cls, argv: Sequence[str]) -> None:
        """Run it in this process, from the current folder."""
        __import__(cls.script).main(list(argv))

    def folder(self, label: str) -> Path:
        """One of its folders, which are side by side: the options name what is beside them."""
        return self.work / f"{type(self).__name__}-{label}"

    def enter(self, label: str) -> None:
        """Go to a new folder with what was there before."""
        self.folder(label).mkdir()
        os.chdir(self.folder(label))
        if self.earlier:
            shutil.copytree(self.earlier, OUT)

    def first(self) -> bool:
        """Is the first file of this run there?"""
        raise NotImplementedError

    def check(self) -> str:
        """Raises Broken for damage; returns, in words, how far the run came."""
        raise NotImplementedError

    def again(self) -> list[str]:
        """The arguments with which a user goes on after a crash."""
        return [*self.argv]

    def check_end(self) -> None:
        """Raises Broken unless all is there, once the command has run again."""
        need(contents(OUT) == self.whole, f"other files in the end: {differing(self.whole)}")


def differing(whole: dict[str, bytes]) -> str:
    """Paths in ``out`` that are not as they are in a whole run."""
    found = contents(OUT)
    return ", ".join(sorted(p for p in found | whole if found.get(p) != whole.get(p)))


def below(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """The files of a folder, by their path in it."""
    return {p.removeprefix(f"{folder}/"): c for p, c in files.items() if p.startswith(f"{folder}/")}


class Learning(Command):
    """Both stages, class images and the final write, over a finished folder."""

    script, argv = "semantic_learning", [*LEARN, "--overwrite"]
    earlier = Path("../learned")
    checkpoint = OUT / ".toys.work" / "checkpoint.safetensors"

    def first(self) -> bool:
        return self.checkpoint.is_file()

    def check(self) -> str:
        from imagelab.io.atomic import readable
        from mifo.learned import read_learned_folder, read_manifest

        former, later = (below(files, "toys") for files in (self.before, self.whole))
        place = OUT / "toys"
        found = contents(readable(place)) if readable(place).exists() else {}
        need(found in (former, later), "the result is neither the former nor the new one")
        if found:
            read_manifest(place)
            read_learned_folder(place)
        if found == later:
            return "new result"
        return f"checkpoint of {self.progress()}" if self.first() else "no checkpoint"

    def progress(self) -> str:
        """The stage and the steps of the checkpoint."""
        from imagelab.training.checkpoint import read_checkpoint

        saved = read_checkpoint(self.checkpoint)
        return f"{saved.stage}, step {saved.step}"

    def again(self) -> list[str]:
        return [*LEARN, "--resume"] if self.first() else [*LEARN, "--overwrite"]

    def check_end(self) -> None:
        super().check_end()
        need(sorted(os.listdir(OUT)) == [".class_images", "toys"], f"left: {os.listdir(OUT)}")


class FirstLearning(Learning):
    """The same where nothing was learned before."""

    earlier = None
    argv = LEARN

    def again(self) -> list[str]:
        return [*LEARN, *["--resume"] * self.first(), *["--overwrite"] * (OUT / "toys").exists()]


class Synthesis(Command):
    """Four pictures, one by one, beside an earlier one."""

    script, argv = "semantic_synthesis", [*PAINT, "--output_path", "out", "--num_images", "4",
                                          "--batch_size", "1"]  # fmt: skip
    earlier = Path("../painted")

    @classmethod
    def prepare(cls, work: Path) -> None:
        cls.main([*PAINT, "--output_path", "../painted", "--num_images", "1"])
        for path in (work / "painted" / "toys").glob("sheet*"):
            path.unlink()

    def first(self) -> bool:
        return (OUT / "toys" / "0001.png").is_file()

    def check(self) -> str:
        from PIL import Image

        folder = OUT / "toys"
        for path, content in self.before.items():
            need(contents(OUT).get(path) == content, f"{path} is not what it was")
        pictures = [path for path in folder.glob("*.png") if path.stem.isdecimal()]
        for path in folder.glob("*.png"):
            with Image.open(path) as file:
                file.load()
                told = json.loads(file.info.get("mifo", "{}"))
            facts = path.with_suffix(".json")
            if facts.is_file():
                seed = json.loads(facts.read_text())["settings"]["seed"]
                need(seed == told["settings"]["seed"], f"{facts} is of another picture")
        alone = {path.stem for path in folder.glob("*.json")} - {path.stem for path in pictures}
        need(not alone, f"facts without their picture: {sorted(alone)}")
        return f"{len(pictures) - 1} pictures"

    def check_end(self) -> None:
        self.check()
        pictures = [path for path in (OUT / "toys").glob("*.png") if path.stem.isdecimal()]
        last = sorted(pictures)[-4:]
        wanted = [self.whole[f"toys/{number:04d}.png"] for number in range(1, 5)]
        need([path.read_bytes() for path in last] == wanted, "other pictures than of a whole run")
        need(all(path.with_suffix(".json").is_file() for path in last), "pictures without facts")
        hidden = [path for path in contents(OUT) if "/." in path]
        need(not hidden, f"left: {hidden}")


class Export(Command):
    """Three formats, over exports of another learned folder."""

    script, argv = "semantic_export", [
        "--models_dir", "../learned", "--model_id", "toys", "--output_path", "out", "--format",
        "kohya", "embeddings", "pipeline", "--offline", "--overwrite", "--model_path", "../model",
    ]  # fmt: skip
    earlier = Path("../exported")

    @classmethod
    def prepare(cls, work: Path) -> None:
        from imagelab.io.tensors import read_tensors, write_tensors

        other = Path(shutil.copytree(work / "learned", work / "other"))
        row = other / "toys" / "asset0.safetensors"
        tensors, metadata = read_tensors(row, "")
        write_tensors(row, {name: 2 * value for name, value in tensors.items()}, metadata)
        lora = other / "toys" / "pytorch_lora_weights.safetensors"
        tensors, metadata = read_tensors(lora, "")
        write_tensors(lora, {name: 2 * value for name, value in tensors.items()}, metadata)
        cls.main([*cls.argv, "--models_dir", "../other", "--output_path", "../exported"])

    def first(self) -> bool:
        path = "toys/toys.safetensors"
        return (OUT / path).read_bytes() != self.before[path]

    def check(self) -> str:
        from imagelab.io.atomic import readable

        ends = []
        for name in ("toys.safetensors", "embeddings", "pipeline"):
            place = readable(OUT / "toys" / name)
            path = f"toys/{name}"
            if name == "toys.safetensors":
                found = {"": place.read_bytes()} if place.is_file() else {}
                former, later = ({"": files[path]} for files in (self.before, self.whole))
            else:
                found = contents(place)
                former, later = (below(files, path) for files in (self.before, self.whole))
            need(found in (former, later), f"{path} is neither the former nor the new one")
            ends.append(found == later)
        return f"{sum(ends)} of {len(ends)} exports"

    def check_end(self) -> None:
        super().check_end()
        need(os.listdir(OUT) == ["toys"], f"left: {os.listdir(OUT)}")


class Evaluation(Command):
    """Three pictures, their records and the report."""

    script, argv = "semantic_evaluation", [*PAINT, "--output_path", "out", "--num_images", "3",
                                           "--batch_size", "1", "--features", "toybox",
                                           "--folder_path", "../example"]  # fmt: skip

    def first(self) -> bool:
        return (OUT / "records.jsonl").is_file() and (OUT / "records.jsonl").stat().st_size > 0

    def check(self) -> str:
        from PIL import Image

        records = OUT / "records.jsonl"
        lines = records.read_bytes().split(b"\n") if records.is_file() else [b""]
        for line in lines[:-1]:
            path = OUT / "pictures" / json.loads(line)["picture"]
            need(path.is_file(), f"a record of {path.name}, which is not there")
            with Image.open(path) as file:
                file.load()
        for path in OUT.glob("*.json"):
            json.loads(path.read_text())
        return f"{len(lines) - 1} records"


COMMANDS = {
    "learning": Learning, "first": FirstLearning, "synthesis": Synthesis, "export": Export,
    "evaluation": Evaluation,
}  # fmt: skip
