"""Triplets as files: lists in the release's format for training, and in MIGEBench's for tests.

Parts appear whole, a folder of pictures with its records, and a list when all its parts are there:
who starts again goes on behind the last part.
"""

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from imagelab.errors import UserError
from imagelab.io.atomic import folder_lock, replacing, sweep, write_json, written_aside
from imagelab.io.folders import check_unused, check_writable
from toybox.scenes.layouts import CUT_OUT
from toybox.scenes.triplets import SIDE, Triplet, check_choice, cut_out, draw_triplet
from toybox.scenes.wording import TASKS, coloured, noun

VERSION = 1  # of what is drawn: another draws other triplets from the same seed
PART = 250  # triplets of a folder
RUN, LIST, RECORDS = "run.json", "triplets.json", "records.json"
MOST = 10_000_000


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Attributes:
        count: of triplets; of a bench, of each of its lists.
        tasks: in turn; none: drawn, each as often.
        bench: MIGEBench's lists in place of one for training.
    """

    seed: int = 0
    split: str = "train"
    count: int = 512
    tasks: tuple[str, ...] = ()
    bench: bool = False

    def __post_init__(self):
        for task in self.tasks or (None,):
            check_choice(self.seed, self.split, task)
        if not 1 <= self.count <= MOST:
            raise UserError(f"--count {self.count} makes no list; give 1 to {MOST}")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"--tasks {' '.join(self.tasks)} names one twice; give each once")
        if self.bench and self.split != "test":
            raise UserError("--bench is of the split test, which no training sees; leave out train")


def write(job: Job, folder: Path, workers: int = 0) -> list[Path]:
    """Write a job's lists into a folder of its own, or go on with them; their paths.

    Args:
        workers: processes that share the parts of a list for training; 0: this one alone. They
            change nothing of what is written.

    Raises:
        UserError: the folder holds anything else.
    """
    check_writable(folder, "output")
    with folder_lock(folder, "--output"):
        _claim(job, folder)
        return _write_bench(job, folder) if job.bench else [_write_list(job, folder, workers)]


def _claim(job: Job, folder: Path) -> None:
    """Make a folder the job's own."""
    facts = {"version": VERSION, "side": SIDE, **asdict(job), "tasks": list(job.tasks)}
    run = folder / RUN
    if run.is_file():
        try:
            found = json.loads(run.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found == facts:
            return
        raise UserError(f"{folder} holds triplets of other options; give another --output")
    check_unused(folder, "output")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)  # what a killed writer left; the lock is held
    write_json(run, facts)


# ----------------------------------------------------------------------------------------------
# a list for training


def _write_list(job: Job, folder: Path, workers: int) -> Path:
    """The parts that are not there yet, then the list of all."""
    parts = {
        folder / "pictures" / f"{start // PART:05d}": range(start, min(start + PART, job.count))
        for start in range(0, job.count, PART)
    }
    todo = {part: indices for part, indices in parts.items() if not part.is_dir()}
    done = job.count - sum(map(len, todo.values()))
    with tqdm(total=job.count, initial=done, desc="triplets", unit=" triplets") as bar:
        if workers:
            with ProcessPoolExecutor(workers, initializer=_leave_interrupts) as pool:
                try:
                    given = [pool.submit(_write_nth, job, *each) for each in todo.items()]
                    for each in as_completed(given):
                        bar.update(each.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # those that are begun come to their end
                    raise
        else:
            for part, indices in todo.items():
                _write_nth(job, part, indices, bar.update)
    if not (folder / LIST).is_file():
        records = (part / RECORDS for part in parts)
        _write_records(folder / LIST, (each for path in records for each in _read(path)))
    return folder / LIST


def _write_nth(
    job: Job, part: Path, indices: range, tell: Callable[[], object] = lambda: None
) -> int:
    """Write one part of a list; how many triplets it has."""
    triplets = ((index, _nth(job, index)) for index in indices)
    _write_part(part, f"pictures/{part.name}", triplets, _record, tell)
    return len(indices)


def _leave_interrupts() -> None:
    """Ctrl-C is for the process that gave out the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _nth(job: Job, index: int) -> Triplet:
    task = job.tasks[index % len(job.tasks)] if job.tasks else None
    return draw_triplet(job.seed, job.split, index, task)


def _write_part(
    folder: Path,
    name: str,
    triplets: Iterable[tuple[int, Triplet]],
    record: Callable[[Path, str, int, Triplet], dict],
    tell: Callable[[], object],
) -> None:
    """A folder of triplets' pictures and records, whole or not at all.

    Args:
        name: what paths in the list begin with.
        record: writes the pictures of one and returns its record.
    """
    folder.parent.mkdir(exist_ok=True)
    with folder_lock(folder, "--output"), replacing(folder) as aside:  # clears what was left
        records = []
        for index, triplet in triplets:
            records.append(record(aside, name, index, triplet))
            tell()
        _write_records(aside / RECORDS, records)


def _record(folder: Path, name: str, index: int, triplet: Triplet) -> dict:
    """One triplet in the release's format; its pictures are written."""

    def put(what: str, picture: Image.Image) -> str:
        return _put(folder, name, f"{index:06d}_{what}.png", picture)

    entities = [
        put("source" if at == triplet.source else f"entity{at}", picture)
        for at, picture in enumerate(triplet.entities)
    ]
    mask = [] if triplet.mask is None else [put("mask", _picture(triplet.mask))]
    return {
        "task": triplet.task,
        "image": put("target", triplet.target),
        "width": SIDE,
        "height": SIDE,
        "source_path": [] if triplet.source is None else [entities[triplet.source]],
        "entity_path": entities,
        "multi_prompt": triplet.prompt,
        "mask_path": mask,
        "facts": triplet.facts(),
    }


def _put(folder: Path, name: str, file: str, picture: Image.Image) -> str:
    """Write a picture; its path in a list."""
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    picture.save(path, "PNG")
    return f"{name}/{file}"


def _picture(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def _write_records(path: Path, records: Iterable[dict]) -> None:
    """A JSON array with a record a line."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        for at, record in enumerate(records):
            file.write((",\n" if at else "[\n") + json.dumps(record))
        file.write("\n]\n")


def _read(path: Path) -> Iterator[dict]:
    yield from json.loads(path.read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------
# a bench


def _write_bench(job: Job, folder: Path) -> list[Path]:
    """A list of subjects, one of edits, and MIGEBench's two of edits with subjects."""
    written = []
    for task, op, name, file in (
        ("subject", None, "subjects", "subjects.json"),
        ("edit", None, "edits", "edits.json"),
        ("subject_edit", "add", "add", "add_bench.json"),
        ("subject_edit", "replace", "replace", "replace_bench.json"),
    ):
        if task not in (job.tasks or TASKS):
            continue
        written.append(folder / file)
        if written[-1].is_file():
            continue
        with tqdm(total=job.count, desc=file, unit=" items") as bar:
            drawn = (
                (at, draw_triplet(job.seed, "test", at, task, op, bench=True))
                for at in range(job.count)
            )
            record = _bench_record if op else _record
            _write_part(folder / name, name, drawn, record, bar.update)
        _write_records(written[-1], _read(folder / name / RECORDS))
    return written


def _bench_record(folder: Path, name: str, index: int, triplet: Triplet) -> dict:
    """One edit with a subject in MIGEBench's format; the subject is cut out, on black."""
    made = next(toy for toy in triplet.toys if toy.is_new)
    black, white = (cut_out(made.look, colour) for colour in CUT_OUT)

    def put(what: str, ending: str, picture: Image.Image) -> str:
        return _put(folder, name, f"{name}_{what}/{index}_{ending}.png", picture)

    source = put("source", "source", triplet.entities[triplet.source])
    entity = put("entity", "entity_black", black)
    entities = [entity, entity]
    entities[triplet.source] = source
    return {
        "task": triplet.task,
        "image": put("target", "target", triplet.target),
        "source_path": [source],
        "entity_path": entities,
        "entity_path_white": [put("entity", "entity_white", white)],
        "mask_path": [put("mask", "mask", _picture(triplet.mask))],
        "caption": triplet.captions[0],
        "multi_prompt": triplet.prompt,
        "target_caption": triplet.captions[1],
        "object": coloured(made.look) if made.look.colour else noun(made.look.kind),
        "width": SIDE,
        "height": SIDE,
        "idx": index,
        # scores of the release's own choice of photos, which there is none of here
        "entity_dino": None,
        "aesthetic": None,
        "clip_t": None,
        "crop": "",
        "facts": replace(triplet, entities=()).facts(),
    }
