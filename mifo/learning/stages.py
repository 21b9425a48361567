"""The two stages of semantic learning: the paper's recipe (arXiv 2511.00542, section 3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from imagelab.training.interrupt import Interrupt
from imagelab.training.loop import Stage, Tensors, Trainer
from imagelab.training.seeds import generator_for
from mifo.learning.config import Recipe
from mifo.learning.prediction import predicting
from mifo.learning.priors import class_latents, encode_class_images
from mifo.learning.session import Session
from mifo.learning.views import Batch
from mifo.method.layers import supervised_layers
from mifo.method.learning_loss import StepLoss, learning_loss
from mifo.tokens import embed_as
from mifo_lora import inject, load_lora, lora_parameters, lora_state_dict

UNET_TARGETS = tuple(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
TEXT_TARGETS = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))


def token_stage(session: Session, trainer: Trainer) -> Stage:
    """Stage 1: the asset rows alone learn, with the reward, then the penalty.

    AdamW with a warm-up and a cosine; UNet, VAE and the text encoder's own weights are frozen.
    """
    from diffusers.optimization import get_scheduler

    recipe, rows = session.recipe, session.rows
    optimizer = make_optimizer(recipe, [rows], recipe.learning_rate)
    schedule = get_scheduler(
        "cosine_with_restarts", optimizer,
        num_warmup_steps=recipe.warmup_steps, num_training_steps=recipe.train_steps,
    )  # fmt: skip
    layers = supervised_layers(session.model.unet, session.views.size, stage=1)

    @contextmanager
    def losses(step: int) -> Iterator[Tensors]:
        batch = session.views.draw(1, step)
        with step_losses(session, batch, layers, recipe.attention_term(1, step)) as found:
            yield found

    return Stage(
        "stage 1", recipe.train_steps, [rows], optimizer, schedule, losses,
        state=lambda: {"rows": rows.detach().cpu()},
        load_state=lambda tensors: copy_rows(rows, tensors["rows"]),
    )  # fmt: skip


def finetuning_stage(session: Session, trainer: Trainer) -> Stage:
    """Stage 2: a LoRA, or all of UNet and text encoder, learns with the asset rows.

    A batch is one class image and one view of the instance: reconstruction, prior preservation
    and the penalty; AdamW at a constant rate.
    """
    from diffusers.optimization import get_scheduler

    recipe, rows = session.recipe, session.rows
    prior = prior_latents(session, trainer.interrupt)
    parameters = [rows, *unfreeze(session)]
    optimizer = make_optimizer(recipe, parameters, recipe.finetune_learning_rate)
    schedule = get_scheduler("constant", optimizer)
    layers = supervised_layers(session.model.unet, session.views.size, stage=2)

    @contextmanager
    def losses(step: int) -> Iterator[Tensors]:
        batch = session.views.draw(2, step, prior, recipe.class_prompt)
        with step_losses(session, batch, layers, recipe.attention_term(2, step)) as found:
            yield found

    def state() -> Tensors:
        return {"rows": rows.detach().cpu(), **module_state(session)}

    def load_state(tensors: Tensors) -> None:
        copy_rows(rows, tensors["rows"])
        load_module_state(session, tensors)

    return Stage(
        "stage 2", recipe.finetune_steps, parameters, optimizer, schedule, losses, state, load_state
    )


@contextmanager
def step_losses(
    session: Session, batch: Batch, layers: Sequence[str], attention_term: str | None
) -> Iterator[Tensors]:
    """The losses of one batch, by name; "loss" is their weighted sum. Backward belongs within."""
    recipe = session.recipe
    with (
        embed_as(session.model.text_encoder, session.ids, session.rows),
        session.autocast(),
        predicting(session.model, batch, layers if attention_term else ()) as found,
    ):
        loss: StepLoss = learning_loss(
            found.predicted, found.target, found.maps, batch.masks, attention_term,
            recipe.prior_weight, recipe.attention_weight,
        )  # fmt: skip
        attention = torch.stack(loss.attention).sum() if loss.attention else torch.tensor(torch.nan)
        yield {"loss": loss.total, "reconstruction": loss.reconstruction, "attention": attention}


def prior_latents(session: Session, interrupt: Interrupt) -> Tensor | None:
    """Scaled latents [i, c, h, w] of the class images: the user's own, or made; None for none."""
    plan, recipe, model = session.plan, session.recipe, session.model
    if not recipe.needs_class_images:
        return None

    def stop_if_asked() -> None:
        interrupt.raise_if_asked("before stage 2")

    size = session.views.size
    if plan.class_images:
        model.vae.to(plan.device)
        latents = encode_class_images(model, plan.class_images, size, stop_if_asked)
        model.vae.to("cpu")
        return latents
    is_large = plan.device.startswith("cuda") and not plan.config.runtime.gradient_checkpointing
    return class_latents(
        model, recipe.class_prompt, recipe.num_class_images, size, session.seed,
        batch=8 if is_large else 4,
        cache=plan.target.parent / ".class_images",
        after_batch=stop_if_asked,
    )  # fmt: skip


def make_optimizer(recipe: Recipe, parameters: Sequence[Tensor], rate: float):
    """AdamW with betas (0.9, 0.99), or bitsandbytes' with its moments in 8 bits."""
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW
    else:
        from bitsandbytes.optim import AdamW8bit as optimizer
    return optimizer(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)


def unfreeze(session: Session) -> list[Tensor]:
    """Make what stage 2 trains beside the rows trainable: a fresh LoRA, or the whole modules."""
    recipe = session.recipe
    if recipe.finetune == "lora":
        targets = {"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS}
        for part, module in session.modules.items():
            draw = generator_for(session.seed, "lora", part)
            inject(module, targets[part], recipe.lora_rank, generator=draw)
        parameters = [p for module in session.modules.values() for p in lora_parameters(module)]
        for parameter in parameters:
            parameter.requires_grad_()
        return parameters
    for module in session.modules.values():
        module.requires_grad_(True)
    session.model.text_encoder.get_input_embeddings().weight.requires_grad_(False)
    modules = session.modules.values()
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def module_state(session: Session) -> Tensors:
    """The LoRA, or all weights, of UNet and text encoder, on the CPU."""
    state = {}
    for part, module in session.modules.items():
        if session.recipe.finetune == "lora":
            found = lora_state_dict(module)
        else:
            found = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
        state |= {f"{part}:{name}": tensor for name, tensor in found.items()}
    return state


def load_module_state(session: Session, tensors: Tensors) -> None:
    """Take back what :func:`module_state` returned."""
    for part, module in session.modules.items():
        mine = {
            name.removeprefix(f"{part}:"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{part}:")
        }
        if session.recipe.finetune == "lora":
            load_lora(module, mine)
        else:
            module.load_state_dict(mine)


@torch.no_grad()
def copy_rows(rows: Tensor, values: Tensor) -> None:
    """Set the asset rows [assets, width]."""
    rows.copy_(values)
