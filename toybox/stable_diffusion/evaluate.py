"""Measure a toybox model: its autoencoder, what it draws for prompts, where its words look.

Prints a Markdown table and writes ``evaluation.json`` and ``samples.png`` (wrong pictures have a
red text). Kinds and hues are read by ``toybox.classifier``; "renders through the
autoencoder" says how often it is right about pictures that show what they should. It chooses
among all kinds there are; "of the kinds asked for", among those that prompts name.

Axes: b batch, n pixels of a map, t tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from imagelab.attention import Recorder, attention_layers, pixel_grids, processors
from imagelab.cli import HelpFormatter, Parser, report_errors
from imagelab.errors import UserError
from imagelab.io.atomic import write_json
from imagelab.io.folders import check_writable
from imagelab.io.pictures import Tile, contact_sheet
from imagelab.models.device import choose_device
from imagelab.models.sources import check_folder
from imagelab.models.stable_diffusion import quiet_libraries
from toybox.classifier.network import (
    SCENE,
    Classifier,
    Reading,
    hue_names,
    load_classifier,
    to_input,
    to_tensor,
)
from toybox.scenes.scenes import KINDS, Look, caption, distinct_kinds, draw_scene, render
from toybox.stable_diffusion import FOLDER
from toybox.stable_diffusion.architecture import ToyboxConfig, trained_kinds
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.train import psnr

STEPS, GUIDANCE, NOISED_TO, BATCH = 25, 5.0, 300, 32
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


class Prompt(NamedTuple):
    """A caption that names every toy's hue, and the toys."""

    text: str
    looks: tuple[Look, ...]


def draw_prompts(seed: int, images: int, toys: int, kinds: Sequence[str] = KINDS) -> list[Prompt]:
    """Captions of invented scenes of ``toys`` toys of different kinds."""
    prompts = []
    rng = np.random.default_rng((seed, 999, toys))
    while len(prompts) < images:
        scene = draw_scene(rng, toys, kinds)
        looks = tuple(placed.look for placed in scene.toys)
        text = caption(scene, rng).text
        coloured = all(look.colour in text.split() for look in looks)
        if coloured and len({look.kind for look in looks}) == toys:
            prompts.append(Prompt(text, looks))
    return prompts


def load_pipeline(folder: Path):
    """Plain diffusers' pipeline, in float32 on the CPU."""
    quiet_libraries()
    check_folder(folder)
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


def sample(pipeline, prompts: list[Prompt], seed: int, name: str) -> list[Image.Image]:
    """A picture for each prompt; picture i starts from the noise of ``seed + i``."""
    pictures = []
    for start in tqdm(range(0, len(prompts), BATCH), name):
        texts = [prompt.text for prompt in prompts[start : start + BATCH]]
        draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
        made = pipeline(texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=draws)
        pictures += made.images
    return pictures


# ----------------------------------------------------------------------------------------------
# what a picture shows


def judge_one(seen: Reading, prompts: list[Prompt]) -> dict[str, list[bool]]:
    """Is the kind that covers most, and is the toys' hue, the one asked for?"""
    kinds, named = seen.kind().tolist(), hue_names(seen.hue)
    looks = [prompt.looks[0] for prompt in prompts]
    return {
        "kind": [KINDS[k] == look.kind for k, look in zip(kinds, looks, strict=True)],
        "hue": [name == look.colour for name, look in zip(named, looks, strict=True)],
    }


def judge_two(seen: Reading, prompts: list[Prompt]) -> dict[str, list[bool]]:
    """Are both kinds there, and is each of its own hue?"""
    present = seen.present(2)
    kinds = [
        found == {look.kind for look in prompt.looks}
        for found, prompt in zip(present, prompts, strict=True)
    ]
    hues = []
    for row, right, prompt in zip(seen.hues, kinds, prompts, strict=True):
        named = hue_names(row[[KINDS.index(look.kind) for look in prompt.looks]])
        hues.append(right and named == [look.colour for look in prompt.looks])
    return {"kinds": kinds, "hues": hues}


def shares(judged: dict[str, list[bool]]) -> dict[str, float]:
    return {key: sum(right) / len(right) for key, right in judged.items()}


def shares_by_kind(right: list[bool], prompts: list[Prompt]) -> dict[str, float]:
    """Share of right pictures of each kind asked for."""
    groups = defaultdict(list)
    for one, prompt in zip(right, prompts, strict=True):
        groups[prompt.looks[0].kind].append(one)
    return {kind: sum(group) / len(group) for kind, group in sorted(groups.items())}


def judge_renders(
    pipeline, classifier: Classifier, size: int, seed: int, images: int, kinds: Sequence[str]
) -> dict[str, float]:
    """The classifier's right answers on rendered scenes that went through the autoencoder."""
    result = {}
    for toys, judge in ((1, judge_one), (2, judge_two)):
        rng = np.random.default_rng((seed, 999, 10 + toys))
        prompts, pictures = [], []
        while len(prompts) < images:
            scene = draw_scene(rng, toys, kinds)
            prompt = Prompt("", tuple(placed.look for placed in scene.toys))
            if len({look.kind for look in prompt.looks}) == toys:
                prompts.append(prompt)
                pictures.append(render(scene, size)[0])
        restored = []
        for start in range(0, images, BATCH):
            pixels = to_tensor(pictures[start : start + BATCH]).to(pipeline.device)
            with torch.inference_mode():
                latents = pipeline.vae.encode(pixels).latent_dist.mean
                decoded = pipeline.vae.decode(latents).sample
            restored += pipeline.image_processor.postprocess(decoded, output_type="pil")
        result |= shares(judge(classifier.read(to_input(restored, SCENE)), prompts))
    return result


# ----------------------------------------------------------------------------------------------
# grounding


def auc(scores: Tensor, inside: Tensor) -> float:
    """Probability that a pixel inside scores higher than one outside (ties count half).

    ``scores`` and ``inside`` (bool) are [n].
    """
    within, without = scores[inside], scores[~inside].sort().values
    below = torch.searchsorted(without, within, right=False)
    not_above = torch.searchsorted(without, within, right=True)
    return ((below + not_above) / (2 * len(without))).mean().item()


def word_maps(pipeline, pictures: list[Image.Image], texts: list[str], seed: int) -> Tensor:
    """Cross-attention at decoder-1 of noised pictures, [b, t, h, w] at the pictures' size.

    Mean over layers and heads; timestep 300.
    """
    unet, scheduler, device = pipeline.unet, pipeline.scheduler, pipeline.device
    recorder = Recorder()
    watched = [name for name in attention_layers(unet, "cross") if name.startswith("up_blocks.1.")]
    pixels = to_tensor(pictures).to(device)
    with torch.inference_mode(), processors(unet, {n: recorder.processor(n) for n in watched}):
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        steps = torch.full((len(pictures),), NOISED_TO, device=device)
        noisy = scheduler.add_noise(latents, noise.to(device), steps)
        ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        unet(noisy, steps, pipeline.text_encoder(ids.to(device)).last_hidden_state)
    maps = torch.stack([recorder.maps[name] for name in watched]).mean(0)  # [b, n, t]
    grid = pixel_grids(unet, latents.shape[-2:])[maps.shape[1]]
    maps = maps.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, pixels.shape[-2:], mode="bilinear").cpu()


def noun_token(tokenizer, text: str, word: int) -> int:
    """Position of the last token of a text's word."""
    return len(tokenizer(" ".join(text.split()[: word + 1])).input_ids) - 2  # the end token


def grounding(
    pipeline, size: int, seed: int, scenes: int, kinds: Sequence[str]
) -> dict[str, float]:
    """Mean AUC of each named toy's map against its mask; look-alikes of one kind apart."""
    rng = np.random.default_rng((seed, 999, 20))
    found = {"auc": [], "auc_alike": []}
    for start in tqdm(range(0, scenes, BATCH), "grounding"):
        drawn = [draw_scene(rng, None, kinds) for _ in range(min(BATCH, scenes - start))]
        told = [caption(scene, rng) for scene in drawn]
        pictures, masks = zip(*(render(scene, size) for scene in drawn), strict=True)
        texts = [one.text for one in told]
        maps = word_maps(pipeline, list(pictures), texts, seed + start)
        for scene, one, mask, rows in zip(drawn, told, masks, maps, strict=True):
            shown = [placed.look.kind for placed in scene.toys]
            for toy, word in zip(one.toys, one.nouns, strict=True):
                token = noun_token(pipeline.tokenizer, one.text, word)
                key = "auc" if shown.count(shown[toy]) == 1 else "auc_alike"
                inside = torch.from_numpy(mask[toy]).flatten()
                found[key].append(auc(rows[token].flatten(), inside))
    return {key: float(np.mean(values)) for key, values in found.items() if values}


# ----------------------------------------------------------------------------------------------
# the command


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
        if args.images < 1:
            raise UserError(f"--images {args.images} leaves nothing to measure; use 1 or more")
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
