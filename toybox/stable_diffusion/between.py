"""How well placeholders show hues without a name, measured while there is an embedder of looks.

Pictures of "a photo of <asset0>", where the token's embedding comes from a look of any hue; the
classifier of ``toybox.classifier.network`` reads what they show.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from toybox.classifier.network import SCENE, Classifier, hue_distance, to_input
from toybox.scenes.scenes import Caption
from toybox.scenes.toys import KINDS
from toybox.stable_diffusion.data import Words
from toybox.stable_diffusion.looks import (
    LookEmbedder,
    encode_text,
    features,
    placeholder_embeddings,
)

STEPS, GUIDANCE, BATCH = 25, 5.0, 128
CLOSE = 15  # degrees within which a hue counts as met


def draw_looks(seed: int, images: int, kinds: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Kinds [b] as indices in KINDS, and looks [b, 3]: hue in degrees, gains of 1."""
    rng = np.random.default_rng((seed, 998))
    chosen = [KINDS.index(kinds[i]) for i in rng.integers(len(kinds), size=images)]
    numbers = torch.ones(images, 3)
    numbers[:, 0] = torch.from_numpy(rng.uniform(0, 360, images))
    return torch.tensor(chosen), numbers


def prompt_states(pipeline, embedder: LookEmbedder, kinds, numbers, noise, share) -> Tensor:
    """States [b, t, w] of "a photo of <asset0>" with the embeddings of looks."""
    device, tokenizer = pipeline.device, pipeline.tokenizer
    worded = Caption("a photo of <asset0>", (0,), (3,))
    tokens, slots, _ = Words(tokenizer).encode(worded, {0})
    ids = torch.full((len(kinds), tokenizer.model_max_length), tokenizer.pad_token_id)
    places = torch.zeros_like(ids)
    ids[:, : len(tokens)] = torch.tensor(tokens)
    places[:, : len(slots)] = torch.tensor(slots)
    looks = features(kinds[:, None], numbers[:, None]).to(device)
    table = pipeline.text_encoder.get_input_embeddings().weight
    share = torch.full((len(kinds), 1, 1), share, device=device)
    placeholders = placeholder_embeddings(embedder(looks), noise[:, None].to(device), share, table)
    return encode_text(pipeline.text_encoder, ids.to(device), places.to(device), placeholders)


@torch.no_grad()
def measure_between(
    pipeline,
    embedder: LookEmbedder,
    classifier: Classifier,
    images: int,
    seed: int,
    kinds: Sequence[str],
    share: float = 0.0,
) -> dict[str, float]:
    """How well pictures show looks of any hue; ``share`` is the noise in the embeddings, b.

    Returns the median error of the hue in degrees, the share of pictures within 15 degrees, and
    the share of the right kind.
    """
    chosen, numbers = draw_looks(seed, images, kinds)
    noise = torch.randn(
        images, pipeline.text_encoder.config.hidden_size,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    silence = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    silent = pipeline.text_encoder(silence.to(pipeline.device)).last_hidden_state
    pictures = []
    for start in range(0, images, BATCH):
        part = slice(start, start + BATCH)
        states = prompt_states(pipeline, embedder, chosen[part], numbers[part], noise[part], share)
        draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(states))]
        pictures += pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=silent.expand(len(states), -1, -1),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=draws,
        ).images
    seen = classifier.read(to_input(pictures, SCENE))
    error = hue_distance(seen.hue, numbers[:, 0])
    return {
        "images": images,
        "noise": share,
        "hue_error_degrees": error.median().item(),
        "hue_within_15_degrees": (error <= CLOSE).float().mean().item(),
        "kind": (seen.kind() == chosen).float().mean().item(),
    }
