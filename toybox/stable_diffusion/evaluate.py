"""Measure a toybox model: its autoencoder, what it draws for prompts, where its words look.

Prints a Markdown table and writes ``evaluation.json`` and ``samples.png`` (wrong pictures have a
red text). Kinds and hues are read by ``toybox.classifier``; "renders through the
autoencoder" says how often it is right about pictures that show what they should. It chooses
among all kinds there are; "of the kinds asked for", among those that prompts name.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.io.atomic import write_json
from imagelab.io.folders import check_writable
from imagelab.io.pictures import Tile, contact_sheet
from imagelab.models.device import choose_device
from imagelab.settings import check_within
from imagelab.training.seeds import check_seed
from toybox.classifier.network import SCENE, Classifier, load_classifier, to_input
from toybox.scenes.scenes import distinct_kinds
from toybox.scenes.toys import KINDS
from toybox.stable_diffusion import FOLDER
from toybox.stable_diffusion.architecture import ToyboxConfig, trained_kinds
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.measures import (
    GUIDANCE,
    NOISED_TO,
    STEPS,
    Prompt,
    draw_prompts,
    grounding,
    judge_one,
    judge_renders,
    judge_two,
    load_pipeline,
    psnr,
    sample,
    shares,
    shares_by_kind,
)

#: (section, key) of each measure, what it is, and the aim.
MEASURES = {
    ("autoencoder", "psnr_db"): ("autoencoder, held-out scenes: PSNR in dB", 28),
    ("one", "kind"): ("one object: right kind", 0.90),
    ("one", "hue"): ("one object: right hue", 0.85),
    ("two", "kinds"): ("two objects: both kinds right", 0.60),
    ("two", "hues"): ("two objects: both kinds right, each in its hue", None),
    ("one_of_asked", "kind"): ("of the kinds asked for, one object: right kind", None),
    ("two_of_asked", "kinds"): ("of the kinds asked for, two objects: both kinds right", None),
    ("two_of_asked", "hues"): ("of the kinds asked for, two objects: each in its hue", None),
    ("grounding", "auc"): ("grounding, object words at decoder-1: AUC", 0.90),
    ("grounding", "auc_alike"): ("grounding, toys of one kind in a scene: AUC", None),
    ("renders", "kind"): ("renders through the autoencoder, one object: right kind", None),
    ("renders", "hue"): ("renders through the autoencoder, one object: right hue", None),
    ("renders", "kinds"): ("renders through the autoencoder, two objects: both kinds", None),
    ("renders", "hues"): ("renders through the autoencoder, two objects: each in its hue", None),
}
BOUNDS = {"images": (1, 1_000_000)}


def sample_tiles(rows: list[tuple[Prompt, Image.Image, bool]]) -> list[Tile]:
    """Pictures over their prompts, red where they are wrong."""
    return [
        Tile(picture, prompt.text, "black" if right else "red") for prompt, picture, right in rows
    ]


def table(result: dict) -> str:
    """The measures as a Markdown table."""
    lines = ["| measure | found | aim |", "|---|---|---|"]
    for (section, key), (name, aim) in MEASURES.items():
        if key in result[section]:
            value = result[section][key]
            form = "{:.1f}" if key == "psnr_db" else "{:.3f}" if "auc" in key else "{:.1%}"
            wanted = "" if aim is None else "≥ " + form.format(aim)
            lines.append(f"| {name} | {form.format(value)} | {wanted} |")
    return "\n".join(lines)


def evaluate(
    pipeline, classifier: Classifier, images: int, seed: int, kinds: Sequence[str], device: str
):
    """All measures by section, and the rows of a contact sheet.

    ``pipeline`` comes on the CPU and is left on ``device``.
    """
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    shape = ToyboxConfig(resolution=size)
    quality = psnr(pipeline.vae, TrainConfig(kinds=tuple(kinds)), shape)
    pipeline.to(device)
    result = {
        "autoencoder": {"psnr_db": quality},
        "renders": judge_renders(pipeline, classifier, size, seed, images, kinds),
        "grounding": grounding(pipeline, size, seed, images, kinds),
    }
    rows = []
    for section, toys, judge in (("one", 1, judge_one), ("two", 2, judge_two)):
        prompts = draw_prompts(seed, images, toys, kinds)
        pictures = sample(pipeline, prompts, seed, f"{section}-object prompts")
        seen = classifier.read(to_input(pictures, SCENE))
        judged = judge(seen, prompts)
        right = [all(row) for row in zip(*judged.values(), strict=True)]
        result[section] = shares(judged)
        result[f"{section}_of_asked"] = shares(judge(seen.among(kinds), prompts))
        if toys == 1:
            result[section]["kind_by_kind"] = shares_by_kind(judged["kind"], prompts)
        rows += list(zip(prompts, pictures, right, strict=True))[:32]
    return result, rows


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m toybox.stable_diffusion.evaluate",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=FOLDER, help="pipeline folder")
    parser.add_argument("--images", type=int, default=512, help="pictures a measure")
    parser.add_argument("--seed", type=int, default=0, help="fixes prompts, scenes and noise")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND",
        help="kinds to ask for (default: those that the model was trained on)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument(
        "--output", type=Path, default=Path("output/toybox"), help="folder of what is written"
    )
    args = parser.parse_args(argv)
    with report_errors(parser):
        check_seed(args.seed)
        check_within(vars(args), BOUNDS)
        check_writable(args.output, "output")
        kinds = distinct_kinds(args.kinds or trained_kinds(args.model))
        device = choose_device(args.device)
        classifier = load_classifier()
        pipeline = load_pipeline(args.model)
        result, rows = evaluate(pipeline, classifier, args.images, args.seed, kinds, device)
        result["settings"] = {
            "model": "toybox" if args.model == FOLDER else str(args.model),
            "images": args.images, "seed": args.seed, "kinds": list(kinds),
            "steps": STEPS, "guidance": GUIDANCE, "timestep": NOISED_TO,
        }  # fmt: skip
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "evaluation.json", result)
        contact_sheet(sample_tiles(rows), columns=8, gap=0).save(args.output / "samples.png")
        print(table(result))


if __name__ == "__main__":
    main()
