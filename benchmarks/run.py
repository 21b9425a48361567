"""Measure MIFO beside the plain path: `python -m benchmarks.run` writes a table and a plot.

Both sides run in one process, alternating; a time is the median of the repeats after one run to
warm up. See benchmarks/README.md.
"""

import argparse
import itertools
import platform
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.cases import LEARNING, MODELS, PRECISIONS, SYNTHESIS, Row, make_work
from benchmarks.measure import CLOCKS, operations, peak_bytes, peak_rate, seconds, weight_bytes
from benchmarks.report import write_report
from imagelab.cli import HelpFormatter

RESULTS = Path(__file__).parent / "results"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["tiny_sd", "toybox"])
    parser.add_argument(
        "--what", nargs="+", choices=(*LEARNING, *SYNTHESIS), default=[*LEARNING, *SYNTHESIS]
    )
    parser.add_argument("--subjects", nargs="+", type=int, default=[2])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images at once")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="of MIFO's UNet"
    )
    parser.add_argument(
        "--without_plain", action="store_true", help="MIFO alone, to compare its rows"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=10, help="of a whole synthesis, and of each stage of learning"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="None: cuda first")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine"
    )
    parser.add_argument("--name", default="latest", help="of the files in results/")
    args = parser.parse_args(argv)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = args.device or found
    if args.device == "cuda" and found == "cpu":
        parser.error("--device cuda is not available here; give --device cpu")
    if "sd21" in args.model and args.device == "cpu":
        parser.error("--model sd21 needs a CUDA device; give tiny_sd or toybox")
    if min(*args.subjects, *args.batch, args.repeats, args.steps, args.threads) < 1:
        parser.error("numbers of subjects, images, repeats, steps and threads start at 1")
    return args


def rows(args: argparse.Namespace) -> list[Row]:
    """Learning has batches of its own: one row for all of ``--batch``."""
    combined = itertools.product(args.model, args.what, args.subjects, args.batch, args.precision)
    return list(
        dict.fromkeys(
            Row(model, what, subjects, batch if what in SYNTHESIS else 1, precision)
            for model, what, subjects, batch, precision in combined
        )
    )


def measure(row: Row, args: argparse.Namespace, rate: float) -> dict:
    """All numbers of a row."""
    device, clock = args.device, args.clock
    names = ("ours",) if args.without_plain else ("plain", "ours")
    sides = {side: make_work(row, side == "plain", device, args.steps) for side in names}
    result: dict = asdict(row)
    for side, (base, work) in sides.items():  # the run whose memory is measured warms up
        result[side] = {"bytes": weight_bytes(base) + peak_bytes(work, device), "times": []}
    for _ in range(args.repeats):
        for side, (_, work) in sides.items():
            result[side]["times"].append(seconds(work, device, clock))
    for side in sides:
        result[side]["seconds"] = statistics.median(result[side]["times"])
    result["ours"]["operations"] = operations(sides["ours"][1])
    result["floor"] = result["ours"]["operations"] / rate
    return result


def machine(args: argparse.Namespace) -> str:
    """Where the numbers come from, in words."""
    if args.device == "cuda":
        unit = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo")
        model = platform.processor() or platform.machine()
        if lines.is_file():
            found = [x for x in lines.read_text().splitlines() if x.startswith("model name")]
            model = found[0].partition(":")[2].strip() if found else model
        capability = torch.backends.cpu.get_cpu_capability()
        unit = f"CPU {model} ({capability}), {args.threads} thread(s)"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{unit}; {platform.system()}, {versions}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    rates = {name: peak_rate(PRECISIONS[name], args.device, args.clock) for name in args.precision}
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.run", *(argv or sys.argv[1:])]),
        "machine": machine(args),
        "clock": args.clock,
        "steps": args.steps,
        "repeats": args.repeats,
        "rates": rates,
    }
    results = []
    for row in (progress := tqdm(rows(args), unit="row")):
        progress.set_description(f"{row.model} {row.what}")
        results.append(measure(row, args, rates[row.precision]))
        write_report(RESULTS / args.name, facts, results)
    print((RESULTS / f"{args.name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
