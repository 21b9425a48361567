"""Feature spaces in which pictures are compared: CLIP, DINOv2, and those of installed packages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from imagelab.errors import UserError
from imagelab.io.tensors import tensors_digest

#: Spaces of transformers' models, and where their weights come from by default.
SOURCES = {
    "clip": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "dinov2": "facebook/dinov2-small",
}


@dataclass(frozen=True)
class FeatureSpace:
    """Functions from pictures to unit vectors, which are compared by their cosine.

    Attributes:
        source: identifies the weights, among all of this name.
        images: features [b, d] of crops, pictures of any size with one thing in them.
        text: the feature [d] of a text; None for a space without texts.
        scenes: features of whole pictures; None where ``images`` serves for them.
    """

    name: str
    source: str
    images: Callable[[Sequence[Image.Image]], Tensor]
    text: Callable[[str], Tensor] | None = None
    scenes: Callable[[Sequence[Image.Image]], Tensor] | None = None


def load_features(spec: str, offline: bool = False) -> FeatureSpace:
    """The feature space of ``name`` or ``name=source``, source being a folder or hub id.

    Raises UserError for an unknown name or weights that cannot be loaded.
    """
    name, _, source = spec.partition("=")
    embedded = {found.name: found for found in entry_points(group="imagelab.features")}
    if spec in embedded:
        return embedded[spec].load()()
    if name not in SOURCES:
        raise UserError(
            f"--features {spec!r} is unknown; give some of {', '.join([*embedded, *SOURCES])}, the "
            "last two with a folder or hub id if you like: clip=<folder>"
        )
    source = source or SOURCES[name]
    try:
        return {"clip": _clip, "dinov2": _dinov2}[name](source, offline)
    except Exception as error:  # transformers raises almost anything for what it cannot load
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--features {spec}: {source} could not be loaded ({reason[:160]}); give a folder of "
            f"transformers' with safetensors in it: {name}=<folder>"
        ) from error


def squared(picture: Image.Image) -> Image.Image:
    """RGB, padded to a square with the median colour of its border, not cropped or squeezed."""
    picture = picture.convert("RGB")
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = tuple(np.median(border, axis=0).astype(int).tolist())
    return ImageOps.pad(picture, (max(picture.size),) * 2, color=colour)


def _clip(source: str, offline: bool) -> FeatureSpace:
    from transformers import AutoTokenizer, CLIPModel

    where = {"local_files_only": offline}
    model = CLIPModel.from_pretrained(source, use_safetensors=True, **where).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    prepare = _preparation(source, model.config.vision_config.image_size, where)

    @torch.inference_mode()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        pooled = model.vision_model(prepare(pictures)).pooler_output
        return F.normalize(model.visual_projection(pooled), dim=1)

    @torch.inference_mode()
    def text(prompt: str) -> Tensor:
        ids = tokenizer(prompt, truncation=True, return_tensors="pt").input_ids
        return F.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=1)[0]

    return FeatureSpace("clip", _identity(source, model), images, text)


def _dinov2(source: str, offline: bool) -> FeatureSpace:
    from transformers import AutoModel

    where = {"local_files_only": offline}
    model = AutoModel.from_pretrained(source, use_safetensors=True, **where).eval()
    prepare = _preparation(source, None, where)

    @torch.inference_mode()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        return F.normalize(model(prepare(pictures)).last_hidden_state[:, 0], dim=1)  # class token

    return FeatureSpace("dinov2", _identity(source, model), images)


def _identity(source: str, model: torch.nn.Module) -> str:
    """A source with a digest of its weights: a folder may hold others later."""
    return f"{source} {tensors_digest(model.state_dict())[:16]}"


def _preparation(source: str, side: int | None, where: dict) -> Callable:
    """A function from pictures to a model's input [b, 3, side, side], as its config asks."""
    from transformers.image_processing_base import ImageProcessingMixin

    config, _ = ImageProcessingMixin.get_image_processor_dict(source, **where)
    side = side or config["crop_size"]["height"]
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("image_mean", "image_std"))

    def prepare(pictures: Sequence[Image.Image]) -> Tensor:
        resized = [squared(p).resize((side, side), Image.BICUBIC) for p in pictures]
        pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in resized])
        return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std

    return prepare
