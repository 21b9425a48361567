"""What a finished run writes: the learned folder, with its curves, masks and attention maps."""

import logging
from collections.abc import Sequence

import torch

import mifo
from imagelab.io.atomic import replacing
from imagelab.io.images import proportion
from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learned import (
    FORMAT,
    PIPELINE,
    check_own,
    read_learned_folder,
    write_learned,
    write_pipeline,
)
from mifo.learning.inspection import asset_maps, separation
from mifo.learning.overlay import MASKS, draw_instance
from mifo.learning.session import Session
from mifo.tokens import asset_token, embed_as, write_rows

log = logging.getLogger(__name__)


def write_result(session: Session, curves: dict[str, list[float]]) -> None:
    """Write the learned folder aside and rename it into place.

    Args:
        curves: every step's losses, by name.
    """
    from imagelab.figures import plot_attention, plot_losses

    plan, recipe, model = session.plan, session.recipe, session.model
    with embed_as(model.text_encoder, session.ids, session.rows):
        maps = asset_maps(model, session.views, len(session.ids))
    scores = separation(maps, plan.instance.masks)
    log.info("separation of the assets' attention: %s", ", ".join(f"{s:.2f}" for s in scores))
    if low := mixed_up(scores):
        log.warning(
            "%s may not have been learned: too little of its attention is on its own instance "
            "(see attention.png); learn again with another --seed, or start each token from words "
            "of its own, as with --initializer_tokens 'red dog' 'brown dog'",
            " and ".join(map(asset_token, low)),
        )
    manifest = describe_result(session, curves, scores)
    with replacing(plan.target, check_own) as folder:
        has_lora = recipe.finetune == "lora" and 2 in recipe.steps
        write_learned(folder, model, session.rows, has_lora, manifest)
        plot_losses(folder / "learning.png", curves, recipe.turns)
        draw_instance(plan.instance).save(folder / MASKS)
        image, masks = plan.instance.image, plan.instance.masks
        titles = [
            (f"mask of {asset_token(i)}", f"its attention, {score:.0%} on its own")
            for i, score in enumerate(scores)
        ]
        plot_attention(folder / "attention.png", image, masks, maps.numpy(), titles)
        if recipe.finetune == "full":
            write_rows(model.text_encoder, session.ids, session.rows)
            write_pipeline(folder / PIPELINE, model)
        elif plan.config.save_pipeline:  # from weights in float32, not in the run's precision
            learned = read_learned_folder(folder)
            loaded, _ = learned.load(offline=plan.config.runtime.offline)
            write_pipeline(folder / PIPELINE, loaded)


def mixed_up(scores: Sequence[float]) -> list[int]:
    """The assets whose separation is nearer to that of a guess, one of so many, than to 1."""
    limit = (1 + 1 / len(scores)) / 2
    return [asset for asset, score in enumerate(scores) if len(scores) > 1 and score < limit]


def describe_result(session: Session, curves: dict[str, list[float]], scores: list[float]) -> dict:
    """The manifest of the learned folder."""
    import diffusers
    import transformers

    plan = session.plan
    return {
        "format": FORMAT,
        "base_model": base_facts(plan.model),
        "tokens": [asset_token(i) for i in range(len(session.ids))],
        "image_sha256": plan.instance.image_hash,
        "mask_sha256": list(plan.instance.mask_hashes),
        "size": list(plan.instance.image.shape[1::-1]),
        "proportions": [proportion(mask) for mask in plan.instance.masks],
        "settings": plan.config.settings(),
        "origins": plan.origins,
        "precision": str(plan.dtype).removeprefix("torch."),
        "final_losses": {name: _tail_mean(values) for name, values in curves.items()},
        "separation": scores,
        "versions": {
            "mifo": mifo.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def base_facts(model: StableDiffusion) -> dict[str, str]:
    """What says which base model it is, for JSON."""
    return {"source": model.source, "sha256": model.digest, "configs": model.configs}


def _tail_mean(values: list[float], count: int = 50) -> float | None:
    """Mean of the last finite values: single steps are noisy."""
    tail = [value for value in values if value == value][-count:]
    return sum(tail) / len(tail) if tail else None
