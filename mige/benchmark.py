"""Measure what MIGE painted against a bench: python -m mige.benchmark.

    python -m mige.benchmark --bench MIGEBench --write_items bench.json
    python -m mige.edit --model M --items bench.json --output_path painted
    python -m mige.benchmark --bench MIGEBench --outputs painted --report report \\
        --clip openai/clip-vit-base-patch32 --dino facebook/dino-vits16

A bench is a folder of MIGEBench, or a JSON list; see docs/mige_measuring.md. Outputs are numbered
as mige.generate and mige.edit paint lists, or named as the release does. Report.md has a table for
each task, with 95% intervals and how each number was taken; report.json has every picture's
numbers. The same command goes on where it was stopped.
"""

import argparse
import json
import sys
from pathlib import Path

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError, shorten
from imagelab.io.folders import check_writable

FORMATS = ("migebench", "dreambench", "magicbrush", "emu", "items")
MODELS = {
    "clip": "CLIP for CLIP-I, CLIP-T and CLIP-dir: folder or hub id",
    "dino": "DINO's ViT: folder or hub id",
    "detector": "GroundingDINO, which finds entities: folder or hub id",
    "sam": "SAM, which cuts them out: folder or hub id",
}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m mige.benchmark", description=__doc__, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--bench", required=True, type=Path, help="folder of MIGEBench, or a JSON list")
    add(
        "--format",
        choices=FORMATS,
        help="of the bench; None: migebench or emu where its names say so, else items",
    )
    add("--root", type=Path, help="where the bench's paths start; None: the list's folder")
    add("--task", nargs="+", default=[], metavar="TASK", help="measure these tasks alone")
    add(
        "--split",
        choices=("test", "validation", "any"),
        help="of Emu Edit, that the list has to be of (default: test)",
    )
    add("--no_mask", action="store_true", help="measure whole pictures alone")
    add("--outputs", type=Path, metavar="DIR", help="what was painted")
    add("--allow_missing", action="store_true", help="measure the outputs that are there")
    add("--report", type=Path, metavar="DIR", help="where the report goes")
    add(
        "--write_items",
        type=Path,
        metavar="FILE",
        help="write the bench as a list for mige.generate or mige.edit, and measure nothing",
    )
    group = parser.add_argument_group("models; what is not given is not measured")
    for name, text in MODELS.items():
        group.add_argument(f"--{name}", metavar="MODEL", help=text)
    group = parser.add_argument_group("running")
    group.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps or cpu")
    group.add_argument("--offline", action="store_true", help="never ask the hub for anything")
    group.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        check_options(options)
        from mige.evaluation.lists import read_bench
        from mige.evaluation.outputs import painted_count

        items, notes = read_bench(
            options.bench, options.format, options.root, options.task, options.split
        )
        is_part = options.task and options.outputs
        if is_part and painted_count(options.outputs) not in (None, len(items)):
            items, notes = read_bench(  # all that was painted
                options.bench, options.format, options.root, [], options.split
            )
        known = dict.fromkeys(item.task for item in items)
        if unknown := [task for task in options.task if task not in known]:
            raise UserError(
                f"{options.bench} has no task {shorten(unknown[0])!r}; its tasks are "
                f"{shorten(', '.join(known), 200)}"
            )
        if options.write_items:
            write_items(items, options)
        else:
            try:
                print(measure(items, notes, options))
            except KeyboardInterrupt:
                more = "; the very same command goes on from here"
                raise KeyboardInterrupt(f"stopped{more}") from None


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if options.write_items:
        if options.outputs or options.report:
            raise UserError("--write_items measures nothing; leave out --outputs and --report")
        return
    if options.outputs is None or options.report is None:
        raise UserError("give --outputs and --report, or --write_items")
    if bool(options.detector) != bool(options.sam):
        raise UserError("--detector finds entities and --sam cuts them out; give both or neither")
    if options.detector and not (options.clip or options.dino):
        raise UserError("entities are measured by --clip or --dino; give one of them")
    check_writable(options.report, "report")
    check_report(options)


def check_report(options: argparse.Namespace) -> None:
    """Raises UserError where a report would take the place of something else."""
    bench, report = options.bench.resolve(), options.report.resolve()
    own = bench if bench.is_dir() else bench.parent
    for folder, name in ((options.outputs.resolve(), "that of --outputs"), (own, "the bench's")):
        if report == folder:
            raise UserError(f"the folder {options.report} is {name}; give another --report")
    from mige.evaluation.report import FACTS, read_bench_of

    if (report / FACTS).exists() and read_bench_of(report) != bench:
        raise UserError(f"{options.report} holds a report of another bench; give another --report")


def write_items(items: list, options: argparse.Namespace) -> None:
    """Write a bench as a list that is painted; of a folder of MIGEBench both tasks, if asked."""
    from imagelab.io.atomic import written_aside
    from mige.evaluation.lists import written_items

    path = options.write_items
    chosen = [item for item in items if not options.task or item.task in options.task]
    if len(chosen) < len(items):
        raise UserError(
            "--task picks out of a list whose numbers would be others; write the whole list, and "
            "give --task when it is measured"
        )
    check_writable(path.parent, "write_items")
    text = json.dumps(written_items(items, path.parent), indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
        return print(path)
    if path.exists():
        raise UserError(f"{path} is there already; give another --write_items")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    print(path)


def measure(items: list, notes: list[str], options: argparse.Namespace) -> str:
    """Measure outputs, once everything is checked; the report."""
    from imagelab.evaluation.runner import RECORDS
    from imagelab.models.device import choose_device
    from mige.evaluation.measuring import Judges, measure_all, read_bench_pictures
    from mige.evaluation.models import find
    from mige.evaluation.outputs import find_outputs
    from mige.evaluation.report import Findings, not_measured, write_report

    device = choose_device(options.device)
    given = {name: getattr(options, name) for name in MODELS if getattr(options, name)}
    if not given and all(item.against == "references" for item in items):
        raise UserError("subjects are measured by --clip and --dino; give one of them")
    weights = {name: find(name, source, options.offline) for name, source in given.items()}
    bench = read_bench_pictures(items, not options.no_mask, options.format == "magicbrush")
    outputs = find_outputs(items, options.outputs, bench.digests, options.task)
    missing = [output for output in outputs if output.reason]
    there = [output for output in outputs if not output.reason]
    if missing and not (options.allow_missing and there):
        for each in missing:
            print(f"{each.path}: {each.reason}", file=sys.stderr)
        raise UserError(
            f"{len(missing)} of {len(outputs)} outputs are missing or cannot be read, "
            f"{missing[0].path} first; paint them, or give --allow_missing to measure the rest"
        )
    judges = Judges(weights, device)
    for name in ("clip", "dino", "extractor"):
        getattr(judges, name)  # loaded now, so that wrong weights are told before any work
    records = measure_all(bench, there, judges, options.report / RECORDS)
    protocols = {
        name: judge.protocol
        for name, judge in (
            ("clip", judges.clip),
            ("dino", judges.dino),
            ("entity", judges.extractor),
        )
        if judge
    }
    found = Findings(
        {"bench": str(options.bench), "painted": str(options.outputs)}, bench,
        list(zip(there, records, strict=True)), missing, protocols,
        [*notes, *not_measured(list(given), items)],
    )  # fmt: skip
    return write_report(found, options.report)


if __name__ == "__main__":
    main()
