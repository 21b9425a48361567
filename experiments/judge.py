"""Which toys a picture shows, as the classifier sees them: right in their boxes, or there at all.

A toy is the right one if its kind is right, and covers at least FILLED of its box, and its hue is
nearest to its own among the hues of the photo, and at most CLOSE degrees from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagelab.boxes import Box
from toybox.classifier.boxes import Seen, read_boxes
from toybox.classifier.network import SCENE, Classifier, classifier_digest, hue_distance, to_input
from toybox.scenes.toys import KINDS, Look

CLOSE = 25.0  # degrees
FILLED = 0.1  # share of a box; thin toys that fill theirs cover 0.13 or more
PRESENT = 0.015  # share of a picture that an instance covers at least to be there
VERSION = 1  # of how these are used


def judge_facts() -> list:
    """All that a judgement depends on but the picture, for keys."""
    return [VERSION, CLOSE, FILLED, PRESENT, classifier_digest()]


@dataclass(frozen=True)
class Judged:
    """What is in a box.

    Attributes:
        cover: the share of the box that the kind covers.
        error: degrees from the hue it should have.
    """

    kind: str
    cover: float
    hue: float
    error: float
    is_right: bool


def judge_boxes(
    classifier: Classifier,
    picture: Image.Image,
    boxes: Sequence[Box],
    own: Sequence[int],
    looks: Sequence[Look],
) -> list[Judged]:
    """What is in each box of a picture.

    Args:
        own: for each box, the index of its instance in ``looks``, all those of the photo.
    """
    seen = read_boxes(classifier, picture, boxes)
    return [judge(each, index, looks) for each, index in zip(seen, own, strict=True)]


def judge(seen: Seen, own: int, looks: Sequence[Look]) -> Judged:
    """What was seen in a box, judged as instance ``own`` of ``looks``, all those of the photo."""
    kind, cover, hue = seen
    errors = hue_distance(torch.tensor(hue), torch.tensor([look.hue for look in looks]))
    error = errors[own].item()
    is_own = kind == looks[own].kind and cover >= FILLED
    return Judged(kind, cover, hue, error, is_own and error <= min(errors.min().item(), CLOSE))


@torch.inference_mode()
def find_instances(
    classifier: Classifier, pictures: Sequence[Image.Image], looks: Sequence[Look]
) -> np.ndarray:
    """Bool [pictures, instances]: which instances of a photo are anywhere in each picture.

    A cell of the classifier shows an instance as far as it sees its kind, if its hue is nearest to
    the instance's own among those of the instances of this kind, and at most CLOSE degrees from it.
    """
    logits, vectors = classifier(to_input(list(pictures), SCENE))  # b 1+k r c, b 2 r c
    kinds = logits.softmax(1)[:, 1:]  # b k r c, without the background
    hues = torch.atan2(vectors[:, 1], vectors[:, 0]).rad2deg() % 360  # b r c
    shares = [
        (kinds[:, KINDS.index(look.kind)] * _is_hue_of(look, hues, looks)).mean((1, 2))
        for look in looks
    ]
    return (torch.stack(shares, 1) >= PRESENT).numpy()


def _is_hue_of(own: Look, hues: Tensor, looks: Sequence[Look]) -> Tensor:
    """Bool [b, r, c], the cells whose hue is an instance's."""
    error = hue_distance(hues, torch.tensor(float(own.hue)))
    is_own = error <= CLOSE
    for look in looks:
        if look.kind == own.kind and look != own:
            is_own &= error < hue_distance(hues, torch.tensor(float(look.hue)))
    return is_own
