"""Which noise levels and which layers decide what a box shows: assets are exchanged there.

Paints the first two assets of folders that experiments.comparison has learned, in the preset boxes.
At some noise levels, or in some cross-attention layers, the UNet is given the states of the prompt
that names the two assets the other way round; boxes and subject tokens stay. Counts the boxes that
show their own asset, and those that show the one that was exchanged for it. Writes exchange.jsonl,
and from it exchange.md, into {work}. The same command goes on where it was stopped:

    python -m experiments.exchange --work comparison --way toybox-random-mifo
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.comparison.folders import painting_settings
from experiments.comparison.settings import Settings, add_options, folder_seed
from experiments.judge import judge, judge_facts
from experiments.study import pictures_folder
from experiments.tables import Row, markdown, right_boxes
from experiments.tasks import Task, TaskPainter
from imagelab.attention import attention_layers
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.evaluation.runner import Records
from imagelab.io.atomic import written_aside
from mifo.learned import MANIFEST
from mifo.synthesis.paint import prepare
from mifo.tokens import view_prompt
from toybox.classifier.boxes import Seen
from toybox.classifier.network import load_classifier
from toybox.scenes.instances import read_looks
from toybox.scenes.toys import Look

LEVELS = 5  # parts into which the noise levels are cut
ASSETS = (0, 1)
OPTIONS = ("pictures", "num_inference_steps", "guidance_steps", "device")


@dataclass(frozen=True)
class Part:
    """Where assets are exchanged: noise levels low <= t / 1000 < high, in a block."""

    low: float = 0.0
    high: float = 1.0
    block: str | None = None  # of the UNet; None: all

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.high <= self.low:
            return "nowhere"
        if self.block is not None:
            return self.block
        if (self.low, self.high) == (0, 1):
            return "everywhere"
        return f"t from {1000 * self.high:.0f} to {1000 * self.low:.0f}"


def parts_of(unet) -> list[Part]:
    """Nowhere, everywhere; each range of noise levels, and all from pure noise down to it; blocks.

    A block is what the module names of cross-attention layers begin with, ``up_blocks.1`` or
    ``mid_block``.
    """
    edges = [level / LEVELS for level in range(LEVELS + 1)]
    windows = [Part(*pair) for pair in pairwise(edges)][::-1]
    begun = [Part(low, 1.0) for low in edges[-3:0:-1]]
    names = [name.partition(".attentions")[0] for name in attention_layers(unet, "cross")]
    blocks = [Part(block=name) for name in sorted(set(names))]  # down, mid, up
    return [Part(0, 0), Part(), *windows, *begun, *blocks]


@contextmanager
def exchanged(unet, part: Part, own: Tensor, other: Tensor) -> Iterator[None]:
    """Within, cross-attention layers read ``other`` in place of ``own`` in a part of the calls.

    Args:
        own, other: [1, k, d], states of two prompts. Samples of other states, such as those of the
            empty prompt, stay.

    Raises:
        RuntimeError: at the end, if nothing was exchanged in a part that has noise levels.
    """
    is_chosen, count = False, 0

    def note_level(_, inputs, keywords) -> None:
        nonlocal is_chosen
        timestep = keywords["timestep"] if "timestep" in keywords else inputs[1]
        is_chosen = part.low <= float(timestep) / 1000 < part.high

    def exchange(_, inputs, keywords):
        nonlocal count
        if not is_chosen:
            return None
        states = keywords["encoder_hidden_states"]  # b k d
        is_own = (states == own.to(states)).flatten(1).all(1)
        count += int(is_own.sum())
        keywords["encoder_hidden_states"] = torch.where(
            is_own[:, None, None], other.to(states), states
        )
        return inputs, keywords

    with ExitStack() as stack:
        hooks = [unet.register_forward_pre_hook(note_level, with_kwargs=True)]
        for name, layer in attention_layers(unet, "cross").items():
            if part.block is None or name.startswith(f"{part.block}."):
                hooks.append(layer.register_forward_pre_hook(exchange, with_kwargs=True))
        for hook in hooks:
            stack.callback(hook.remove)
        yield
    if part.high > part.low and not count:
        raise RuntimeError(f"nothing was exchanged {part.name}: no sample had the own states")


def shows_other(judged: dict, box: int, looks: Sequence[Look]) -> bool:
    """Whether box ``box`` of the two shows the asset of the other one; ``judged``: see Judged."""
    seen = Seen(judged["kind"], judged["cover"], judged["hue"])
    return judge(seen, ASSETS[1 - box], looks).is_right


def exchange_folder(
    work: Path, way: str, name: str, settings: Settings, records: Records, classifier, bar
) -> list[Row]:
    """Paint a folder with assets exchanged in each part, unless its row is there; its rows."""
    folder = work / "learned" / way / name
    looks = read_looks(work / "folders" / name)
    painting = painting_settings(settings)
    painter = TaskPainter(folder, looks, classifier, settings.device, painting)
    task = Task("exchange", ASSETS, True, settings.pictures, folder_seed(settings.seed, name))
    scene = painter.scene(task)
    base, text = scene.base, prepare(scene)  # which merges the LoRA: that changes states a little
    own = text[1:]
    with torch.no_grad():
        other = base.encode_text([view_prompt(ASSETS[::-1])]).to(own)
    learned = (folder / MANIFEST).read_text(encoding="utf-8")
    rows = []
    for part in parts_of(base.unet):
        facts = [way, learned, asdict(part), asdict(task), painting, judge_facts()]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        if key not in records.found:
            output = pictures_folder(work, way, name) / f"exchange {part.name}-{key}"
            with exchanged(base.unet, part, own, other):
                row = painter.run(task, output)
            shown = [
                [shows_other(each, box, looks) for box, each in enumerate(picture)]
                for picture in row["judged"]
            ]
            about = {"way": way, "folder": name, "part": part.name}
            records.add({"key": key, **about, **row, "exchanged": shown})
        rows.append(records.found[key])
        bar.update(1)
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line for each part: boxes that show their own asset, the exchanged one, or neither."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        own = [value for row in mine for value in right_boxes(row)]
        other = sum(value for row in mine for picture in row["exchanged"] for value in picture)
        lines.append([part, sum(own), other, len(own) - sum(own) - other])
    return markdown(["exchanged", "own", "the exchanged one", "neither"], lines)


# ----------------------------------------------------------------------------------------------
# the command


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = Parser(
        prog="python -m experiments.exchange", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("comparison"), help="of experiments.comparison"
    )
    parser.add_argument(
        "--way", default="toybox-random-mifo", help="base, tokens and loss, a folder of learned/"
    )
    add_options(parser, OPTIONS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, options = parse_args(argv)
    with report_errors(parser, options.debug):
        from imagelab.models.device import choose_device

        chosen = {name: getattr(options, name) for name in OPTIONS}
        settings = Settings(**chosen | {"device": choose_device(options.device)})
        if settings.pictures < 1:
            raise UserError(f"--pictures is {settings.pictures}; give a whole number from 1 on")
        work, way = options.work, options.way
        names = sorted(path.parent.name for path in (work / "learned" / way).glob(f"*/{MANIFEST}"))
        if not names:
            raise UserError(
                f"{work / 'learned' / way} holds nothing that was learned; give --work and --way "
                "of a comparison"
            )
        records, classifier = Records(work / "exchange.jsonl", "--work"), load_classifier()
        rows = []
        try:
            with tqdm(unit="part") as bar:
                for name in names:
                    bar.set_description(name)
                    rows += exchange_folder(work, way, name, settings, records, classifier, bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the very same command goes on from here") from None
        text = table(rows)
        with written_aside(work / "exchange.md") as path:
            path.write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
