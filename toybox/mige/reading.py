"""Triplets as the parts that read learn from them: instructions, their pictures, and what is meant.

Axes: n triplets, p pictures of all of them, b batch, r pictures of a batch, k tokens, d width of
the text, c latent channels, h and w rows and columns.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from mige.method.encoder import encode_text
from mige.method.instruction import Embedded, length_of, segment_ids
from mige.method.wording import MARK, prompt_for
from mige.training.model import TrainedModel
from mige.training.samples import Batch
from toybox.classifier.network import to_tensor
from toybox.mige.architecture import PREFIXES
from toybox.mige.views import CHUNK, as_seen, kept, small
from toybox.scenes.toys import HUES, KINDS
from toybox.scenes.triplets import OPS, WORDS, Triplet, draw_triplet
from toybox.scenes.wording import noun

#: What may be asked for, by task.
ASKED = tuple(f"{task} {op}" for task, ops in OPS.items() for op in ops)
#: Places in WORDS of colours, and of what kinds are called.
HUE_WORDS = [WORDS.index(hue) for hue in HUES]
KIND_WORDS = sorted({WORDS.index(word) for kind in KINDS for word in noun(kind).split()})
PADDED = 400  # bytes of a prompt, at most
SOME = 64  # triplets by which a model is looked at
ENCODED = 64  # pictures that the autoencoder takes at a time


def words_of(prompt: str) -> np.ndarray:
    """Which of WORDS a prompt has, bool [words]."""
    there = set(prompt.replace(MARK, " ").split())
    return np.array([word in there for word in WORDS])


def source_kinds(triplet: Triplet) -> np.ndarray:
    """Which kinds the picture to edit shows, bool [kinds]; of subjects, none.

    They are those of the target, without what is new, and with what is gone.
    """
    looks = [toy.look for toy in triplet.toys if not toy.is_new]
    looks += [triplet.gone.look] if triplet.gone else []
    kinds = {look.kind for look in looks} if triplet.source is not None else set()
    return np.array([kind in kinds for kind in KINDS])


class Drawn(Dataset):
    """Chunks of triplets, as NumPy arrays by name; pictures are behind each other.

    ``prompts``: uint8 [n, PADDED], UTF-8 with zeros behind; ``asked``: [n], the place in ASKED;
    ``words``: bool [n, words]; ``counts``: [n], pictures; ``pixels``: uint8 [p, 3, side, side], as
    the vision encoder reads them; ``whole``: uint8 [p, h, w, 3]; ``kind``: [p], the place in KINDS,
    −1 for a source; ``hue``: [p] in degrees; ``kinds``: bool [p, kinds], those in a source.
    """

    def __init__(self, seed: int, split: str, count: int, side: int):
        self.seed, self.split, self.count, self.side = seed, split, count, side

    def __len__(self) -> int:
        return -(-self.count // CHUNK)

    def __getitem__(self, chunk: int) -> dict[str, np.ndarray]:
        indices = range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.count))
        found: dict[str, list] = {}
        for index in indices:
            triplet = draw_triplet(self.seed, self.split, index)
            for name, value in (*self._texts(triplet), *self._pictures(triplet)):
                found.setdefault(name, []).append(value)
        return {name: np.stack(values) for name, values in found.items()}

    def _texts(self, triplet: Triplet):
        prompt = prompt_for(triplet.task, triplet.prompt, PREFIXES, for_training=True)
        text = np.frombuffer(prompt.encode().ljust(PADDED, b"\0"), np.uint8)
        yield "prompts", text
        yield "asked", np.int64(ASKED.index(f"{triplet.task} {triplet.op}"))
        yield "words", words_of(triplet.prompt)
        yield "counts", np.int64(len(triplet.entities))

    def _pictures(self, triplet: Triplet):
        shown = {toy.reference: toy.look for toy in triplet.toys if toy.reference is not None}
        for at, picture in enumerate(triplet.entities):
            look = shown.get(at) if at != triplet.source else None
            yield "pixels", small(picture, self.side)
            yield "whole", np.asarray(picture)
            yield "kind", np.int64(KINDS.index(look.kind) if look else -1)
            yield "hue", np.float32(look.hue if look else 0)
            is_source = at == triplet.source
            yield "kinds", source_kinds(triplet) & is_source


@torch.no_grad()
def draw_readings(
    vae, seed: int, split: str, count: int, side: int, path: Path | None = None, workers: int = 0
) -> dict[str, Tensor]:
    """Triplets, and ``latents`` [p, c, h, w] of their pictures in place of ``whole``.

    Args:
        side: pixels that the vision encoder reads.
        path: of the file that they are kept in; None: none.
    """

    def encode(chunk: dict) -> dict:
        whole = to_tensor(chunk["whole"]).to(vae.device).split(ENCODED)
        latents = [vae.encode(part).latent_dist.mean.half().cpu() for part in whole]
        others = {name: array for name, array in chunk.items() if name != "whole"}
        return others | {"latents": torch.cat(latents)}

    return kept(Drawn(seed, split, count, side), path, workers, "triplets", encode)


# ----------------------------------------------------------------------------------------------
# what a step is fed


class Truth(NamedTuple):
    """What a batch means.

    Attributes:
        asked: int [b], the place in ASKED; words: bool [b, words], those of the prompts.
        kind: int [r], the place in KINDS of what a reference shows, −1 for a source.
        hue: [r, 2], cosine and sine.
        kinds: bool [r, kinds], those in a source.
        cells: [r, q, 3], how much of each cell of a picture toys cover, and by that their hue's
            cosine and sine; of none, where nobody looked.
    """

    asked: Tensor
    words: Tensor
    kind: Tensor
    hue: Tensor
    kinds: Tensor
    cells: Tensor

    @property
    def is_reference(self) -> Tensor:
        return self.kind >= 0


@dataclass
class Readings:
    """Triplets that are read again and again.

    Args:
        data: as :func:`draw_readings` gives them.
        seen: what a vision encoder makes of the pictures, as :func:`look` gives it; None: batches
            hold the pictures.
        cells: [p, q, 3], see :class:`Truth`; None: there are none.
    """

    data: dict[str, Tensor]
    tokenizer: object
    device: str = "cpu"
    seen: Tensor | None = None
    cells: Tensor | None = None

    def __post_init__(self):
        texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in self.data["prompts"]]
        self.segments = [segment_ids(self.tokenizer, text) for text in texts]
        self.ends = self.data["counts"].cumsum(0)

    def __len__(self) -> int:
        return len(self.segments)

    def read(self, rows: list[int]) -> tuple[Batch, Truth]:
        """Some triplets, and what they mean, on the device."""
        data, counts = self.data, [int(self.data["counts"][row]) for row in rows]
        ends = [int(self.ends[row]) for row in rows]
        places = [
            at for end, count in zip(ends, counts, strict=True) for at in range(end - count, end)
        ]
        angle = data["hue"][places].deg2rad()
        truth = Truth(
            data["asked"][rows], data["words"][rows], data["kind"][places],
            torch.stack([angle.cos(), angle.sin()], -1), data["kinds"][places],
            torch.zeros(len(places), 0, 3) if self.cells is None else self.cells[places],
        )  # fmt: skip
        nothing = torch.zeros(len(rows), 0)  # nothing is painted
        batch = Batch(
            tasks=tuple(ASKED[int(each)].split()[0] for each in truth.asked),
            segments=tuple(self.segments[row] for row in rows),
            counts=tuple(counts),
            clean=nothing,
            noise=nothing,
            source=nothing,
            timesteps=torch.zeros(len(rows), dtype=torch.long),
            draws=nothing,
            vision=as_seen(data["pixels"][places]) if self.seen is None else self.seen[places],
            latents=data["latents"][places].float(),
        )
        return batch.to(self.device), Truth(*(each.to(self.device) for each in truth))

    def some(self) -> Batch:
        """The first triplets, by which a model is looked at."""
        return self.read(list(range(min(SOME, len(self)))))[0]


class Remembered(nn.Module):
    """Stands for a frozen vision encoder, whose norm learns: what it reads is :func:`look`'s."""

    def __init__(self, encoder):
        super().__init__()
        self.post_layernorm, self.config, self.dtype = (
            encoder.post_layernorm, encoder.config, encoder.dtype
        )  # fmt: skip

    def forward(self, seen: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.post_layernorm(seen))


@torch.no_grad()
def look(encoder, pixels: Tensor) -> Tensor:
    """What a vision encoder makes of pictures, uint8 [p, 3, h, w], before its norm.

    Half precision [p, patches, width], on the CPU.
    """
    seen = []
    for part in tqdm(pixels.split(ENCODED), "looking"):
        embedded = encoder.embeddings(as_seen(part).to(encoder.device))
        seen.append(encoder.encoder(inputs_embeds=embedded).last_hidden_state.half().cpu())
    return torch.cat(seen)


class States(NamedTuple):
    """What T5 makes of a batch, where it is read.

    Attributes:
        pictures: [r, q, d] at the positions of pictures.
        end: [b, d] at the end token, where no word stands.
    """

    pictures: Tensor
    end: Tensor


def read_states(model: TrainedModel, batch: Batch) -> States:
    """T5's states of a batch's instructions; padding that all of them have is left out."""
    embedded = model.embed(batch)
    most = int(embedded.mask.sum(1).max())
    embedded = Embedded(*(each[:, :most] for each in embedded))
    text = encode_text(model.parts["text_encoder"], embedded)
    queries = model.parts["fusion"].config.queries
    pictures, ends = [], []
    for row, segments in enumerate(batch.segments):
        ends.append(text[row, length_of(segments, queries) - 1])
        pictures += [text[row, start : start + queries] for start in starts(segments, queries)]
    return States(torch.stack(pictures), torch.stack(ends))


def starts(segments: list[list[int]], queries: int) -> list[int]:
    """The positions at which the pictures of an instruction begin."""
    return [sum(map(len, segments[: at + 1])) + queries * at for at in range(len(segments) - 1)]
