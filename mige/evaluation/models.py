"""CLIP and DINO as the release measures with them, from a folder or from the hub.

A model folder is read as if from a stranger (see `imagelab.models.parts`): classes are ours,
weights are safetensors, and nothing of a config makes a loader look elsewhere.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagelab.errors import UserError, shorten
from imagelab.models.digests import weights_digest
from imagelab.models.loading import quiet_libraries, read_part
from imagelab.models.parts import Part, find_weights, harmless, link_weights, read_config
from imagelab.models.sources import NOT_THE_HUB
from imagelab.models.tokenizers import copy_clip_tokenizer
from mige.evaluation.measures import middle, normalised
from mige.folder import check_finite
from mige.pictures import DEVIATION, MEAN

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: What the release measured with, or its likeness in transformers.
USUAL = {
    "clip": "openai/clip-vit-base-patch32",
    "dino": "facebook/dino-vits16",
    "detector": "IDEA-Research/grounding-dino-base",
    "sam": "facebook/sam-vit-huge",
}
KINDS = {
    "clip": "CLIPModel", "dino": "ViTModel", "detector": "GroundingDinoForObjectDetection",
    "sam": "SamModel",
}  # fmt: skip
WEIGHTS = "model"
WORDS = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.json", "tokenizer_config.json")
#: Keys of nested configs by which a backbone would come from elsewhere.
BACKBONES = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs")


@dataclass(frozen=True)
class Weights:
    """A model's folder, found before any work.

    Attributes:
        option: the name of the option that it was given by, of :data:`KINDS`.
        source: what was given.
        digest: sha256 over its weights, its config and its words.
    """

    option: str
    source: str
    folder: Path
    digest: str

    def __str__(self) -> str:
        return f"{KINDS[self.option]} `{self.source}` ({self.digest[:12]})"


def find(option: str, source: str, offline: bool) -> Weights:
    """The folder of a model, which is fetched unless it is there or ``offline``.

    Raises UserError where there is none, or it holds no safetensors.
    """
    folder = _locate(option, source, offline)
    with _naming(option):
        files = find_weights(folder, _part(option))
        config = _config(folder, option)
    words = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in WORDS
        if (folder / name).is_file()
    }
    facts = [weights_digest({str(at): file for at, file in enumerate(files)}), config, words]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Weights(option, source, folder, digest)


def _locate(option: str, source: str, offline: bool) -> Path:
    folder = Path(source).expanduser()
    with suppress(OSError, ValueError):  # too long a name, a zero byte
        if folder.is_dir():
            return folder
    advice = (
        f"give --{option} a folder of transformers' with safetensors in it, or a hub id such as "
        f"{USUAL[option]}"
    )
    if not re.fullmatch(r"[\w-][\w.-]{0,95}/[\w.-]{1,95}", source, re.ASCII):
        raise UserError(f"there is no model folder {shorten(source)}; {advice}")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "preprocessor_config.json", *WORDS]
    wanted += [f"{WEIGHTS}*.safetensors", f"{WEIGHTS}.safetensors.index.json"]
    reason = "nothing is there"
    for is_local in (True, False)[: 1 if offline else 2]:
        try:
            found = snapshot_download(source, allow_patterns=wanted, local_files_only=is_local)
        except Exception as error:  # the hub's library raises almost anything
            if isinstance(error, OSError) and error.errno in NOT_THE_HUB:
                raise
            reason = type(error).__name__
            continue
        if not is_local or any(Path(found).glob(f"{WEIGHTS}*.safetensors")):
            return Path(found)
    how = "is not in the local cache" if offline else "could not be fetched from the hub"
    raise UserError(f"the model {source} {how} ({reason}); {advice}")


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Within, a UserError about a model's files names the option that it was given by."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("another one", f"another --{option}")) from error


def _part(option: str) -> Part:
    return Part("transformers", (KINDS[option],), "config.json", weights=WEIGHTS)


def _config(folder: Path, option: str) -> dict:
    """A model's config, without what makes a loader look elsewhere, at any depth."""
    files = find_weights(folder, _part(option))
    config = read_config(folder / "config.json", _part(option), *files)
    return harmless(config, BACKBONES)


# ----------------------------------------------------------------------------------------------
# loading


def load(weights: Weights, device: str, **more):
    """A model with its weights, in float32, ready to work.

    Raises UserError for weights that do not fit, or are not finite.
    """
    import transformers

    quiet_libraries()
    kind = getattr(transformers, KINDS[weights.option])

    def read(folder: Path):
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, local_files_only=True, **more
        )
        if report["missing_keys"]:
            raise UserError(f"its weights lack {min(report['missing_keys'])}")
        return model

    with TemporaryDirectory(prefix="imagelab-", ignore_cleanup_errors=True) as name:
        ours = Path(name)
        with _naming(weights.option):
            config = _config(weights.folder, weights.option)
            part = _part(weights.option)
            link_weights(find_weights(weights.folder, part), ours, part)
        (ours / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            model = read_part(read, ours, f"--{weights.option}")
        except UserError as error:
            raise UserError(str(error).replace(str(ours), str(weights.folder))) from error
    with _naming(weights.option):
        check_finite(model, weights.folder)
    return model.eval().requires_grad_(False).to(device)


class Clip:
    """CLIP: unit vectors of pictures and of texts."""

    def __init__(self, weights: Weights, device: str):
        from transformers import CLIPTokenizer

        self.model, self.device = load(weights, device), device
        self.side = self.model.config.vision_config.image_size
        with TemporaryDirectory(prefix="imagelab-") as name, _naming(weights.option):
            copy_clip_tokenizer(weights.folder, Path(name))
            self.tokenizer = read_part(
                lambda _: CLIPTokenizer.from_pretrained(name, local_files_only=True),
                weights.folder,
                f"--{weights.option}",
            )
        self.protocol = (
            f"{weights}: shorter side {self.side} bicubic, middle {self.side}×{self.side}"
        )

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, d], on the CPU."""
        ready = [normalised(middle(p, self.side, self.side), MEAN, DEVIATION) for p in pictures]
        found = self.model.vision_model(torch.stack(ready).to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(found), dim=1).cpu()

    @torch.inference_mode()
    def text(self, text: str) -> Tensor:
        """[d], on the CPU; words beyond the model's length are cut off."""
        most = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(text, truncation=True, max_length=most, return_tensors="pt").input_ids
        found = self.model.text_model(ids.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(found), dim=1)[0].cpu()


class Dino:
    """DINO: unit vectors of pictures, the class token behind the last norm."""

    def __init__(self, weights: Weights, device: str):
        self.model = load(weights, device, add_pooling_layer=False)
        self.device, self.side = device, self.model.config.image_size
        self.resize = self.side * 8 // 7  # 256 for 224
        self.protocol = (
            f"{weights}: shorter side {self.resize} bicubic, middle {self.side}×{self.side}, "
            "ImageNet's mean and deviation"
        )

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, d], on the CPU."""
        ready = [normalised(middle(p, self.resize, self.side), *IMAGENET) for p in pictures]
        found = self.model(torch.stack(ready).to(self.device)).last_hidden_state[:, 0]
        return F.normalize(found, dim=1).cpu()
