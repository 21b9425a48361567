"""The entity in an output: found by GroundingDINO, cut out by SAM, as MIGEBench's entities are.

Boxes are (left, top, right, bottom) in pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagelab.errors import UserError, shorten
from imagelab.io.tensors import misfit, read_json
from mige.evaluation.measures import cut_out, normalised
from mige.evaluation.models import IMAGENET, Weights, load

BOX_THRESHOLD, TEXT_THRESHOLD = 0.3, 0.25
SHORTER, LONGER = 800, 1333  # pixels that the detector reads at
BILINEAR = Image.Resampling.BILINEAR
WORD_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
SPECIAL = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
MOST_SIDE = 4096
ADVICE = "give --detector a GroundingDINO of transformers'"
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Entity:
    """What was found in an output.

    Attributes:
        picture: the entity on black; the whole output where nothing was found.
        box: rounded, and within the output; None: nothing was found.
        score: of the box; ``phrase``: the words that it was found by.
    """

    picture: Image.Image
    box: tuple[int, int, int, int] | None = None
    score: float | None = None
    phrase: str = ""


def corners(box: np.ndarray, width: int, height: int) -> Corners:
    """The corners in pixels of a box (middle x, middle y, width, height) in shares of a size."""
    x, y, w, h = (float(value) for value in box)
    return (
        (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height,
    )  # fmt: skip


def rounded(box: Corners, width: int, height: int) -> tuple[int, int, int, int] | None:
    """A box of whole pixels within a picture; None where nothing is left of it."""
    left, top, right, bottom = (round(edge) for edge in box)
    left, top = max(left, 0), max(top, 0)
    right, bottom = min(right, width), min(bottom, height)
    return (left, top, right, bottom) if left < right and top < bottom else None


def best_box(probabilities: Tensor, boxes: Tensor) -> tuple[int, Tensor] | None:
    """The most probable box above the threshold, and its place; None where there is none.

    Args:
        probabilities: [n, k] of box n for token k.
        boxes: [n, 4].
    """
    scores = probabilities.max(dim=1).values
    place = int(scores.argmax())
    return (place, boxes[place]) if scores[place] > BOX_THRESHOLD else None


class Extractor:
    """Detector and segmenter together."""

    def __init__(self, detector: Weights, sam: Weights, device: str):
        self.detector, self.sam, self.device = load(detector, device), load(sam, device), device
        self.tokenizer = read_words(detector.folder)
        self.sides = read_sides(detector.folder)
        self.protocol = (
            f"{detector}, best box above {BOX_THRESHOLD}; {sam}, one mask for the box; the rest "
            "black, cropped to the box"
        )

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, noun: str) -> Entity:
        """The entity that a noun calls."""
        found = self.detect(picture, noun)
        box = found and rounded(found[0], *picture.size)
        if box is None:
            return Entity(picture)
        inside = self.segment(picture, found[0])
        return Entity(cut_out(picture, inside, box), box, *found[1:])

    def detect(self, picture: Image.Image, noun: str) -> tuple[Corners, float, str] | None:
        """The best box, its score and its words."""
        text = noun.lower().strip()
        text = text if text.endswith(".") else text + "."
        most = self.detector.config.max_text_len
        words = self.tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
        pixels = normalised(picture.resize(shrunk(picture.size, *self.sides), BILINEAR), *IMAGENET)
        output = self.detector(
            pixel_values=pixels[None].to(self.device),
            **{name: words[name].to(self.device) for name in WORD_INPUTS},
        )
        probabilities = output.logits[0].sigmoid().cpu()
        found = best_box(probabilities, output.pred_boxes[0].cpu())
        if found is None:
            return None
        place, box = found
        ids = words["input_ids"][0]
        heard = ids[probabilities[place][: len(ids)] > TEXT_THRESHOLD]
        phrase = self.tokenizer.decode(heard, skip_special_tokens=True).strip(" .")
        return corners(box, *picture.size), float(probabilities[place].max()), phrase

    def segment(self, picture: Image.Image, box: Corners) -> np.ndarray:
        """The mask of what is in a box, bool [h, w]."""
        side = self.sam.config.vision_config.image_size
        width, height = enlarged(picture.size, side)
        pixels = normalised(picture.resize((width, height), BILINEAR), *IMAGENET)
        pixels = F.pad(pixels, (0, side - width, 0, side - height))
        scale = np.array([width / picture.width, height / picture.height] * 2)
        boxes = torch.tensor((np.array(box) * scale)[None, None], dtype=torch.float32)
        output = self.sam(
            pixel_values=pixels[None].to(self.device), input_boxes=boxes.to(self.device),
            multimask_output=False,
        )  # fmt: skip
        masks = output.pred_masks[:, 0].float()  # b=1 c=1 h w
        masks = F.interpolate(masks, (side, side), mode="bilinear")[..., :height, :width]
        masks = F.interpolate(masks, picture.size[::-1], mode="bilinear")
        return (masks[0, 0] > 0).cpu().numpy()


def shrunk(size: tuple[int, int], shorter: int, longer: int) -> tuple[int, int]:
    """The size that a detector reads at: the shorter side so long, the longer one no longer."""
    short, long = sorted(size)
    exact = min(shorter, longer * short / long)
    sides = round(exact), int(exact * long / short)
    return sides if size[0] <= size[1] else sides[::-1]


def enlarged(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size whose longer side is so long, rounded as SAM does."""
    scale = side / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


# ----------------------------------------------------------------------------------------------
# a detector's files


def read_sides(folder: Path) -> tuple[int, int]:
    """The shorter and the longest side that a detector reads at."""
    path = folder / "preprocessor_config.json"
    size = read_json(path, {}, ADVICE).get("size") if path.is_file() else None
    if size is None:
        return SHORTER, LONGER
    if misfit(size, {"shortest_edge": int, "longest_edge": int}) is None:
        sides = size["shortest_edge"], size["longest_edge"]
        if 0 < sides[0] <= sides[1] <= MOST_SIDE:
            return sides
    raise UserError(f"{path}: its size is {shorten(str(size))}; {ADVICE}")


def read_words(folder: Path):
    """BERT's tokenizer, made anew out of the words in vocab.txt or tokenizer.json."""
    from transformers import BertTokenizer

    path = folder / "vocab.txt"
    if path.is_file():
        try:
            words = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text; {ADVICE}") from error
        vocabulary = {word.rstrip("\r"): number for number, word in enumerate(words)}
    else:
        path = folder / "tokenizer.json"
        vocabulary = read_json(path, {"model": {"vocab": {}}}, ADVICE)["model"]["vocab"]
    numbers = set(vocabulary.values())
    if not vocabulary.keys() >= SPECIAL or numbers != set(range(len(vocabulary))):
        raise UserError(f"{path} is no vocabulary of BERT; {ADVICE}")
    try:
        return BertTokenizer(vocab=vocabulary, do_lower_case=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path} makes no tokenizer ({str(error)[:160]}); {ADVICE}") from error
