"""The README's plain commands over many seeds: is the right toy in each box?

Learns every folder of example/ from tokens that begin at random, with the settings that toybox
brings, once for each seed. Paints two and three assets in the preset boxes, and each asset alone
without boxes. Writes rows.jsonl, and from it plain.md and a contact sheet of each folder, into
{work}. The same command goes on where it was stopped. Processes share the learnings:

    torchrun --nproc_per_node 2 -m experiments.plain
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.settings import add_options
from experiments.study import Job, rows_of, run_study
from experiments.tables import (
    Row,
    markdown,
    marked,
    mean_separation,
    mean_share,
    of_task,
    other_there,
    own_there,
    right_boxes,
    right_kinds,
)
from experiments.tasks import Task
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.io.atomic import written_aside
from imagelab.io.folders import check_writable
from imagelab.io.pictures import Tile, sheet_of_lines
from mifo.learning.config import LearningConfig
from mifo.learning.instance import list_instances
from toybox.scenes.instances import read_looks

PICTURES = 4  # of each number of boxes
ALONE = 2  # of each asset alone
SHEET_SIDE = 96  # pixels of a picture
NAMES = {2: "two", 3: "three"}  # of tasks, by their boxes
ALONE_MEASURES = (own_there, other_there)


def make_jobs(
    folder_path: Path,
    work: Path,
    seeds: int,
    mixed_precision: str = "auto",
    settings: dict | None = None,
) -> list[Job]:
    """A job for each seed and instance folder, seeds outermost.

    Args:
        mixed_precision: of learning and painting; what is learned in another than ``auto`` is a way
            of its own.
        settings: of learning, by name, in place of what the plain command takes.
    """
    given = {} if mixed_precision == "auto" else {"mixed_precision": mixed_precision}
    names = list_instances(folder_path)
    if not names:
        raise UserError(f"{folder_path} holds no instance folder; give another --folder_path")
    jobs = []
    for seed in range(seeds):
        way = "-".join([f"seed{seed}", *given.values()])
        for name in names:
            looks = tuple(read_looks(folder_path / name))
            if len(looks) not in NAMES:
                raise UserError(
                    f"{folder_path / name} has {len(looks)} toys; give folders of 2 or 3 with "
                    "--folder_path"
                )
            config = LearningConfig.from_settings(
                instance=name, folder_path=str(folder_path), model_path="toybox", seed=seed,
                output_dir=str(work / "learned" / way), **given | (settings or {}),
            )  # fmt: skip
            tasks = [
                Task(NAMES[count], tuple(range(count)), True, PICTURES, 1000 * seed)
                for count in sorted({2, len(looks)})
            ]
            tasks += [
                Task(f"alone {asset}", (asset,), False, ALONE, 1000 * seed)
                for asset in range(len(looks))
            ]
            jobs.append(Job(way, config, looks, tuple(tasks), {"learning_seed": seed}, given))
    return jobs


# ----------------------------------------------------------------------------------------------
# what is written


def write_findings(jobs: Sequence[Job], work: Path, failures: dict[str, str]) -> str:
    """Write plain.md and the sheets; returns the tables."""
    rows = rows_of(jobs, work)
    kinds = {job.config.instance: [look.kind for look in job.looks] for job in jobs}
    text = tables(rows, kinds)
    text += "".join(f"\n\n{name} failed: {why}" for name, why in failures.items())
    with written_aside(work / "plain.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    for name in kinds:
        mine = [row for row in rows if row["folder"] == name and row["boxes"]]
        if mine:
            with written_aside(work / f"{name}.jpg") as path:
                folder_sheet(mine, work).save(path, "JPEG", quality=88)
    return text


def tables(rows: Sequence[Row], kinds: dict[str, list[str]]) -> str:
    """Boxes by folder and in all; then assets alone."""

    def of(task: str, folder: str | None) -> list[Row]:
        return [row for row in of_task(rows, task) if folder in (None, row["folder"])]

    def counted(values: list[bool]) -> str | None:
        return f"{sum(values)} of {len(values)}" if values else None

    def boxes_line(name: str, folder: str | None) -> list:
        cells = []
        for task in NAMES.values():
            found = of(task, folder)
            cells.append(counted([value for row in found for value in right_boxes(row)]))
            cells.append(counted([v for r in found for v in right_kinds(r, kinds[r["folder"]])]))
        return [name, *cells, mean_separation([r for r in rows if folder in (None, r["folder"])])]

    def alone_line(name: str, folder: str | None) -> list:
        found = of("alone", folder)
        counts = [counted([v for row in found for v in measure(row)]) for measure in ALONE_MEASURES]
        return [name, *counts]

    parts = [
        markdown(
            ["folder", "two boxes: right", "kind right", "three boxes: right", "kind right",
             "attention on the own instance"],
            [boxes_line(name, name) for name in kinds] + [boxes_line("all", None)],
        ),
        "\n".join(
            f"Right boxes of {task}, over learnings: "
            f"{mean_share(of(task, None), right_boxes, ['way', 'folder'])}"
            for task in NAMES.values()
            if of(task, None)
        ),
        markdown(
            ["folder", "one asset, no boxes: it is there", "another one is there"],
            [alone_line(name, name) for name in kinds] + [alone_line("all", None)],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts)


def folder_sheet(rows: Sequence[Row], work: Path):
    """A line for each learning: its pictures, wrong boxes in thick red."""
    lines: dict[int, list[Tile]] = {}
    for row in rows:
        line = lines.setdefault(row["learning_seed"], [])
        for index in range(len(row["pictures"])):
            wrong = sum(not each["is_right"] for each in row["judged"][index])
            line.append(Tile(marked(row, index, work), f"{wrong} wrong" if wrong else "", "red"))
    return sheet_of_lines([line for _, line in sorted(lines.items())], SHEET_SIDE)


# ----------------------------------------------------------------------------------------------
# the command


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m experiments.plain", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("plain"), help="where everything goes")
    parser.add_argument("--folder_path", type=Path, default=Path("example"), help="what is learned")
    parser.add_argument("--seeds", type=int, default=10, help="learnings of each folder")
    parser.add_argument(
        "--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps or cpu"
    )
    add_options(parser, ["mixed_precision"])
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        if options.seeds < 1:
            raise UserError(f"--seeds is {options.seeds}; give a whole number from 1 on")
        check_writable(options.work, "work")
        from imagelab.models.device import choose_device, choose_precision
        from imagelab.processes import Processes

        device = choose_device(options.device)
        choose_precision(options.mixed_precision, device)  # fails before anything is learned
        processes = Processes(device)
        jobs = make_jobs(options.folder_path, options.work, options.seeds, options.mixed_precision)
        try:
            failures = run_study(jobs, options.work, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        if processes.is_first:
            print(write_findings(jobs, options.work, failures))
        processes.end(2 if failures else 0)


if __name__ == "__main__":
    main()
