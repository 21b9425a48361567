"""Items painted in batches and saved; a list goes on where it was stopped."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock, sweep, write_json, write_new, written_aside
from imagelab.io.folders import check_unused
from imagelab.io.images import read_image
from imagelab.io.pictures import Tile, encode_png, next_number, save_picture, sheet_of_lines
from imagelab.io.tensors import read_json
from imagelab.processes import Processes
from mige.config import Guidance, PaintingConfig
from mige.items import Item, naming_item
from mige.latents import Size
from mige.method.wording import readable
from mige.pipeline import Condition, MigePipeline
from mige.request import Request

RUN = "run.json"
RUN_FORM, ADVICE = {"seed": int, "sha256": str}, "give another --output_path"
SHEET_ITEMS, SHEET_SIDE = 24, 256


@dataclass(frozen=True)
class Job:
    """Items, and all that their pictures depend on.

    Attributes:
        model: the model's folder.
        digest: sha256 of its weights and settings.
        pictures: sha256 of the pictures' files.
    """

    pipeline: MigePipeline
    model: str
    digest: str
    items: Sequence[Item]
    config: PaintingConfig
    pictures: Mapping[Path, str]

    @property
    def size(self) -> Size:
        """Of the pictures."""
        own, asked = self.pipeline.size, self.config
        return Size(asked.width or own.width, asked.height or own.height)

    def guidance(self, task: str) -> Guidance:
        """How a task is sampled."""
        return self.config.guidance(self.pipeline.guidance(task))

    def facts(self, item: Item, index: int) -> dict:
        """Everything, for JSON, that picture ``index`` of an item depends on."""
        task = item.task
        how = self.guidance(task)
        return {
            "task": task,
            "text": item.text,
            "pictures": [str(path) for path in item.paths],
            "pictures_sha256": [self.pictures[path] for path in item.paths],
            "source": item.source,
            "is_global": item.is_global,
            "item": item.name,
            "seed": self.config.seed + index,
            "first_seed": self.config.seed,
            **asdict(how),
            **asdict(self.size),
            "model": {"folder": self.model, "sha256": self.digest},
            "precision": str(self.pipeline.transformer.dtype).removeprefix("torch."),
        }


def prepare(job: Job, device: str, offload: bool) -> None:
    """Put the model where it is to work."""
    job.pipeline.set_progress_bar_config(disable=True)
    if offload:
        job.pipeline.enable_model_cpu_offload(device=device)
    else:
        job.pipeline.to(device)


def paint_once(job: Job, folder: Path, processes: Processes) -> list[Path]:
    """Paint the one item of a job; the paths of its pictures, then of its sheet.

    Numbers go on from those in the folder, and no file is ever replaced. Processes share the
    pictures; the first returns all paths, the others none.
    """
    (item,) = job.items
    folder.mkdir(parents=True, exist_ok=True)
    first, saved = processes.agree(next_number(folder)), {}

    def save(item: Item, index: int, picture: Image.Image) -> None:
        facts = job.facts(item, index)
        saved[index] = save_picture(folder, first + index, picture, facts, words_of(facts))

    mine = processes.share(range(job.config.num_images))
    _paint(job, [(item, index) for index in mine], save, processes.is_first)
    everyone = {i: path for part in processes.gather(saved) for i, path in part.items()}
    if not processes.is_first:
        return []
    paths = [everyone[index] for index in sorted(everyone)]
    sheet = sheet_of([item], [paths])
    stem = f"sheet_{paths[0].stem}-{paths[-1].stem}"
    written = write_new(folder, lambda n: f"{stem}{f'_{n}' if n else ''}.png", encode_png(sheet))
    return [*paths, written]


def paint_list(job: Job, folder: Path, processes: Processes) -> list[Path]:
    """Paint a list into a folder of its own; the paths of its pictures, then of its sheets.

    Picture j of item i has the number i · num_images + j. What is there already is not painted
    anew. Processes share the items; the first returns all paths, the others none.

    Raises:
        UserError: the folder holds other work, or another process paints there.
    """
    with folder_lock(folder, "--output_path") if processes.is_first else nullcontext():
        with processes.first_alone():
            if processes.is_first:
                _claim(job, folder)
        count = job.config.num_images
        paths = {
            (item.name, index): folder / f"{count * place + index:04d}.png"
            for place, item in enumerate(job.items)
            for index in range(count)
        }

        def save(item: Item, index: int, picture: Image.Image) -> None:
            path, facts = paths[item.name, index], job.facts(item, index)
            write_json(path.with_suffix(".json"), facts)
            with written_aside(path) as aside:
                aside.write_bytes(encode_png(picture, words_of(facts)))

        mine = [(item, index) for item in processes.share(job.items) for index in range(count)]
        todo = [(item, index) for item, index in mine if not _is_whole(paths[item.name, index])]
        _paint(job, todo, save, processes.is_first)
        processes.gather(None)  # all wait here for each other
        if not processes.is_first:
            return []
        return [*paths.values(), *_write_sheets(job, list(paths.values()), folder)]


def kept_seed(folder: Path) -> int | None:
    """The seed of the list whose pictures a folder holds; None where there is none."""
    path = folder / RUN
    return read_json(path, RUN_FORM, ADVICE)["seed"] if path.is_file() else None


def check_place(folder: Path, is_list: bool) -> None:
    """Raises UserError for a list in a folder of other files, and for anything else in a list's."""
    has_list = (folder / RUN).is_file()
    if not is_list and has_list:
        raise UserError(f"{folder} holds the pictures of a list; give another --output_path")
    if is_list and not has_list:
        check_unused(folder, "output_path")


def _is_whole(path: Path) -> bool:
    """Whether a picture is there, and can be read."""
    try:
        with Image.open(path) as file:
            file.verify()
    except (OSError, SyntaxError):
        return False
    return True


def _claim(job: Job, folder: Path) -> None:
    """Make a list's folder its own; a UserError where it holds anything else."""
    path = folder / RUN
    # whatever a picture depends on, wherever the files are
    facts = [job.facts(item, 0) | {"pictures": [], "model": job.digest} for item in job.items]
    text = json.dumps([facts, job.config.num_images], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if path.is_file():
        if read_json(path, RUN_FORM, ADVICE)["sha256"] == digest:
            return
        raise UserError(
            f"{folder} holds pictures of another list, or of other settings; go on with those, or "
            "give another --output_path"
        )
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)  # what a killed writer left; the lock is held
    check_place(folder, True)
    write_json(path, {"items": len(job.items), "seed": job.config.seed, "sha256": digest})


# ----------------------------------------------------------------------------------------------
# batches


def _paint(
    job: Job,
    todo: Sequence[tuple[Item, int]],
    save: Callable[[Item, int, Image.Image], None],
    is_shown: bool,
) -> None:
    """Paint pictures of items in batches; each item is encoded once."""
    encoded: dict[str | int, tuple[Request, Condition]] = {}
    batches = list(_batches(job, todo))
    total = sum(job.guidance(batch[0][0].task).steps for batch in batches)
    with tqdm(total=total, desc="painting", unit="step", disable=not is_shown) as bar:
        for batch in batches:
            names = {item.name for item, _ in batch}
            encoded = {name: each for name, each in encoded.items() if name in names}
            for item, _ in batch:
                if item.name not in encoded:
                    with naming_item(item, len(job.items)):
                        request = item.read(job.pictures)
                    condition = job.pipeline.encode(request, job.config.seed, job.size)
                    encoded[item.name] = request, condition
            asked = [(*encoded[item.name], job.config.seed + index) for item, index in batch]
            guidance = job.guidance(batch[0][0].task)
            painted = job.pipeline.paint(asked, guidance, job.size, lambda *_: bar.update())
            for (item, index), picture in zip(batch, painted, strict=True):
                save(item, index, picture)


def _batches(job: Job, todo: Sequence[tuple[Item, int]]) -> Iterator[list[tuple[Item, int]]]:
    """Parts of at most a batch's size that are sampled in one way."""
    for _, group in groupby(todo, lambda each: job.guidance(each[0].task)):
        yield from in_parts(group, job.config.runtime.batch_size)


def in_parts(values: Iterable, size: int) -> Iterator[list]:
    """Lists of at most so many of the values, in order."""
    values = iter(values)
    while part := list(islice(values, size)):
        yield part


def words_of(facts: dict) -> dict[str, str]:
    """What a PNG itself says: its facts, without the folders of who made it."""
    pictures = [Path(path).name for path in facts["pictures"]]
    model = facts["model"] | {"folder": Path(facts["model"]["folder"]).name}
    own = facts | {"pictures": pictures, "model": model}
    return {"mige": json.dumps(own), "prompt": facts["text"]}


# ----------------------------------------------------------------------------------------------
# contact sheets


def sheet_of(items: Sequence[Item], pictures: Sequence[Sequence[Path]]) -> Image.Image:
    """A line for each item: its subjects, the picture to edit, and what was painted."""
    lines = []
    for item, painted in zip(items, pictures, strict=True):
        given = [
            Tile(_small(path), "to edit" if index == item.source else f"<image> {index + 1}")
            for index, path in enumerate(item.paths)
        ]
        text = readable(item.text)
        lines.append([*given, *(Tile(path, text) for path in painted)])
    return sheet_of_lines(lines, SHEET_SIDE)


def _small(path: Path) -> Image.Image:
    """A picture as large as a sheet shows it."""
    picture = read_image(path)
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return picture


def _write_sheets(job: Job, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Sheets of some items each."""
    count, sheets = job.config.num_images, []
    painted = list(in_parts(paths, count))
    for start in range(0, len(job.items), SHEET_ITEMS):
        items = job.items[start : start + SHEET_ITEMS]
        mine = painted[start : start + SHEET_ITEMS]
        path = folder / f"sheet_{mine[0][0].stem}-{mine[-1][-1].stem}.png"
        with written_aside(path) as aside:
            aside.write_bytes(encode_png(sheet_of(items, mine)))
        sheets.append(path)
    return sheets
