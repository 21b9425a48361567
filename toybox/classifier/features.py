"""The classifier as a feature space, in which pictures of toys are compared."""

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagelab.evaluation.features import FeatureSpace, squared
from toybox.classifier.network import CROP, SCENE, classifier_digest, load_classifier, to_input


def feature_space() -> FeatureSpace:
    """What the classifier reads: half the cosine is that of the kinds, half that of the hues."""
    classifier = load_classifier()

    def read(pictures: Sequence[Image.Image], side: int = CROP) -> Tensor:
        seen = classifier.read(to_input([squared(p) for p in pictures], side))
        angle = seen.hue.deg2rad()
        hues = torch.stack([angle.cos(), angle.sin()], dim=1)
        return torch.cat([F.normalize(seen.areas, dim=1), hues], dim=1) / 2**0.5

    return FeatureSpace("toybox", classifier_digest()[:12], read, scenes=partial(read, side=SCENE))
