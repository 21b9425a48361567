"""A study: folders that are learned in several ways, and what is painted of each, in rows.

Rows are lines of rows.jsonl, which several processes share; a stopped study goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from experiments.judge import judge_facts
from experiments.learning import learn_folder
from experiments.tasks import Task, TaskPainter
from imagelab.errors import FAILURES, memory_errors, sentence
from imagelab.evaluation.runner import Records
from imagelab.models.stable_diffusion import load_base
from imagelab.processes import Processes
from mifo.defaults import read_own
from mifo.learned import read_manifest
from mifo.learning.config import LearningConfig
from mifo.learning.places import target_folder
from mifo.learning.resume import kept_settings
from toybox.classifier.network import load_classifier
from toybox.scenes.toys import Look

ROWS = "rows.jsonl"
PICTURES = "pictures"


@dataclass(frozen=True, eq=False)
class Job:
    """One folder, learned in one way, and what is painted of it.

    Attributes:
        way: the name of the way; pictures go into ``pictures/{way}/{folder}``, those of each row
            into a folder of their own.
        looks: of the folder's instances.
        about: what the rows say of the way, for tables.
        painting: settings of synthesis, by name, in place of its defaults.
    """

    way: str
    config: LearningConfig
    looks: tuple[Look, ...]
    tasks: tuple[Task, ...]
    about: Mapping[str, object] = field(default_factory=dict)
    painting: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a message calls it."""
        return f"{self.way}, {self.config.instance}"

    def key(self, task: Task) -> str:
        """A hash of all that a row depends on but the photo."""
        looks = [asdict(look) for look in self.looks]
        settings, base = kept_settings(self.config), base_facts(self.config.model_path)
        facts = [self.way, settings, asdict(task), dict(self.painting), looks, base, judge_facts()]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def base_facts(model_path: str) -> list:
    """What a base model is, for keys: its weights, its configs, and the numbers that it brings."""
    model, own = load_base(model_path, offline=True), read_own(model_path, offline=True)
    return [model.digest, model.configs, asdict(own.defaults)]


def run_study(jobs: Sequence[Job], work: Path, processes: Processes) -> dict[str, str]:
    """Learn and paint what has no row yet, or none with its pictures, shared over processes.

    Of two rows with one key the later one counts. A failure of one job does not keep the others
    from running. Returns sentences about what failed, by the job's name.
    """
    records, classifier = read_records(work), load_classifier()
    failures: dict[str, str] = {}
    mine = processes.share(jobs)
    for number, job in enumerate(mine, 1):
        started = time.monotonic()
        try:
            with memory_errors():
                _run(job, work, records, classifier, processes.device)
            outcome = f"{time.monotonic() - started:.0f} s"
        except FAILURES as error:
            outcome = failures[job.name] = sentence(error)
        print(f"[{number}/{len(mine)}] {job.name}: {outcome}", flush=True)
    return {name: why for part in processes.gather(failures) for name, why in part.items()}


def _run(job: Job, work: Path, records: Records, classifier, device: str) -> None:
    missing = [task for task in job.tasks if job.key(task) not in records.found]
    if not missing:
        return
    learn_folder(work, job.config, device)
    folder = target_folder(job.config)
    separation = read_manifest(folder)["separation"]
    painter = TaskPainter(folder, job.looks, classifier, device, dict(job.painting))
    for task in missing:
        key = job.key(task)
        output = pictures_folder(work, job.way, job.config.instance) / f"{task.name}-{key}"
        found = painter.run(task, output)
        about = {"way": job.way, **job.about, "folder": job.config.instance}
        records.add({"key": key, **about, "separation": separation, **found})


def pictures_folder(work: Path, way: str, folder: str) -> Path:
    """Where the pictures of a learned folder go; the paths in rows are below it."""
    return work / PICTURES / way / folder


def read_records(work: Path) -> Records:
    """The rows of a study that have all pictures which they were judged on."""

    def is_gone(row: dict) -> bool:
        folder = pictures_folder(work, row["way"], row["folder"])
        return not all((folder / name).is_file() for name in row["pictures"])

    records = Records(work / ROWS)
    records.forget(is_gone)
    return records


def rows_of(jobs: Sequence[Job], work: Path) -> list[dict]:
    """The rows of jobs that are there with their pictures, by the order of jobs and tasks."""
    found = read_records(work).found
    keys = [job.key(task) for job in jobs for task in job.tasks]
    return [found[key] for key in keys if key in found]
