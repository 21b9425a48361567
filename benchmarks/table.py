"""Options and the table of a benchmark whose sides take turns."""

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.measure import CLOCKS, seconds
from benchmarks.run import RESULTS, machine


def add_measuring_options(parser: argparse.ArgumentParser, repeats: int, name: str) -> None:
    """--repeats, --threads, --device, --clock and --name, with defaults of this machine."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--clock", choices=CLOCKS, default="wall" if found == "cuda" else "cpu")
    parser.add_argument("--name", default=name, help="of the file in results/")


def parse_measuring_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """The options, checked and set; ``command`` is how they were given."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is not available here; give --device cpu")
    if min(args.repeats, args.threads) < 1:
        parser.error("numbers of repeats and threads start at 1")
    torch.set_num_threads(args.threads)
    args.command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
    return args


def medians(sides: Mapping[str, Callable], args: argparse.Namespace) -> dict[str, float]:
    """Seconds that each side takes, the median of its turns. They have run once before."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, work in sides.items():
            times[name].append(seconds(work, args.device, args.clock))
    return {name: statistics.median(each) for name, each in times.items()}


def write_table(
    args: argparse.Namespace, text: str, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Write a table below what was measured and where, and print it."""
    lines = [
        f"Made by `{args.command}` on {machine(args)}.",
        "",
        text,
        "",
        "| " + " | ".join(headings) + " |",
        "|---" + "|---:" * (len(headings) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{args.name}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
