"""Measure MIGE beside the plain order of work: `python -m benchmarks.mige` writes a table.

Both sides share one random model and paint the same pictures, in turn; a time is the median of the
repeats after one run to warm up. Before that, their latents have to be equal (in float32, within
1e-5). What the plain order is: benchmarks/mige_plain.py.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import CLOCK_NAMES, CLOCKS, peak_bytes, seconds
from benchmarks.mige_cases import (
    MODELS,
    SLOTS,
    TASKS,
    Row,
    count_operations,
    load_model,
    make_work,
    weight_bytes,
)
from benchmarks.run import RESULTS, machine
from imagelab.cli import HelpFormatter

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: How far the latents of the two sides may be apart in float32, of the largest value.
TOLERANCE = 1e-5
HEADINGS = (
    "work", "references",
    "plain, s", "MIGE, s", "times faster",
    "plain, MB", "MIGE, MB", "times smaller",
    "plain, GFLOP", "MIGE, GFLOP", "times fewer",
    "latents apart",
)  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mige", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="mid", help="full: on CUDA alone")
    parser.add_argument("--what", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument(
        "--references", nargs="+", type=int, default=[1, 2, 4], help="pictures of a subject's rows"
    )
    parser.add_argument("--steps", type=int, default=8, help="of a picture")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=None, help="None: bf16 on CUDA, else fp32"
    )
    parser.add_argument(
        "--offload", action="store_true", help="parts come to the GPU in turn; MIGE alone"
    )
    parser.add_argument("--without_plain", action="store_true", help="MIGE alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="None: cuda first")
    parser.add_argument(
        "--clock", choices=CLOCKS, default=None, help="None: wall on CUDA, else processor time"
    )
    parser.add_argument("--name", default="latest", help="of the files in results/")
    args = parser.parse_args(argv)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = args.device or found
    on_cuda = args.device == "cuda"
    args.precision = args.precision or ("bf16" if on_cuda else "fp32")
    args.clock = args.clock or ("wall" if on_cuda else "cpu")
    args.without_plain |= args.offload
    if on_cuda and found == "cpu":
        parser.error("--device cuda is not available here; give --device cpu")
    if not on_cuda and args.model == "full":
        parser.error("--model full needs a CUDA device; give mid or tiny")
    if not on_cuda and args.offload:
        parser.error("--offload needs a CUDA device; leave it out")
    if not 1 <= min(args.references) <= max(args.references) <= SLOTS:
        parser.error(f"--references has {args.references}; give numbers from 1 to {SLOTS}")
    if min(args.steps, args.repeats, args.threads) < 1:
        parser.error("numbers of steps, repeats and threads start at 1")
    return args


def rows(tasks: Sequence[str], references: Sequence[int]) -> list[Row]:
    """An edit has its source alone: one row for all of ``references``."""
    found = [Row(task, 1 if task == "edit" else n) for task in tasks for n in references]
    return list(dict.fromkeys(found))


def measure(row: Row, args: argparse.Namespace, pipeline) -> dict:
    """All numbers of a row.

    Raises:
        AssertionError: the two sides' latents are not equal, in float32.
    """
    device, painted = args.device, {}

    def keeping(side: str):
        work = make_work(pipeline, row, args.steps, side == "plain")
        return lambda: painted.__setitem__(side, work())

    sides = {s: keeping(s) for s in (("ours",) if args.without_plain else ("plain", "ours"))}
    counted = count_operations(MODELS[args.model], row, args.steps)
    resident = 0 if args.offload else weight_bytes(pipeline)
    result: dict = asdict(row)
    for side, work in sides.items():  # the run whose memory is measured warms up
        peak = peak_bytes(work, device)
        result[side] = {"bytes": resident + peak, "operations": counted[side], "times": []}
    if "plain" in painted:
        result["apart"] = apart(painted["ours"], painted["plain"])
        if args.precision == "fp32" and not result["apart"] <= TOLERANCE:
            raise AssertionError(f"the latents of {row} are {result['apart']:.2g} apart")
    for _ in range(args.repeats):
        for side, work in sides.items():
            result[side]["times"].append(seconds(work, device, args.clock))
    for side in sides:
        result[side]["seconds"] = statistics.median(result[side]["times"])
    return result


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest value; infinite for pictures of nothing."""
    largest = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / largest if largest else float("inf")


# ----------------------------------------------------------------------------------------------
# report


def write_report(stem: Path, facts: dict, results: list[dict]) -> None:
    """Write ``stem``.md and .json."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts | {"rows": results}, indent=1) + "\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(facts, results), encoding="utf-8")


def markdown(facts: dict, results: list[dict]) -> str:
    clock = CLOCK_NAMES[facts["clock"]]
    side = facts["pixels"]
    weights = f"{facts['weights'] / 2**20:.0f} MB of weights"
    where = "fetched from the CPU in turn" if facts["offload"] else "in both sides' memory"
    lines = [
        f"Made by `{facts['command']}` on {facts['machine']}.",
        "",
        f"A whole picture of {side}×{side} pixels, {facts['steps']} steps, in "
        f"{facts['precision']}; median {clock} of {facts['repeats']} alternating repeats; "
        f"{weights}, {where}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---" + "|---:" * (len(HEADINGS) - 1) + "|",
        *(f"| {' | '.join(cells(result))} |" for result in results),
    ]
    return "\n".join(lines) + "\n"


def cells(result: dict) -> list[str]:
    """A row of the table; a dash for what the plain order, left out, would say."""
    found = [result["task"], str(result["references"])]
    ours, plain = result["ours"], result.get("plain")
    for key, scale, digits in (("seconds", 1, 2), ("bytes", 2**-20, 0), ("operations", 1e-9, 1)):
        mine = f"{scale * ours[key]:.{digits}f}"
        if plain is None:
            found += ["–", mine, "–"]
        else:
            theirs = f"{scale * plain[key]:.{digits}f}"
            found += [theirs, mine, f"{plain[key] / ours[key]:.2f}"]
    return [*found, f"{result['apart']:.1e}" if plain else "–"]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    pipeline = load_model(args.model, args.device, PRECISIONS[args.precision], args.offload)
    words = sys.argv[1:] if argv is None else argv
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.mige", *words]),
        "machine": machine(args),
        "model": args.model,
        "pixels": MODELS[args.model].pixels,
        "weights": weight_bytes(pipeline),
        **{key: getattr(args, key) for key in ("clock", "steps", "repeats", "precision")},
        "offload": args.offload,
    }
    results = []
    for row in (progress := tqdm(rows(args.what, args.references), unit="row")):
        progress.set_description(f"{row.task} of {row.references}")
        results.append(measure(row, args, pipeline))
        write_report(RESULTS / args.name, facts, results)
    print((RESULTS / f"{args.name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
