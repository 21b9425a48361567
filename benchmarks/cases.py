"""What is measured: the same work by MIFO and by the plain path, each with a model of its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import plain
from imagelab.boxes import Box, raster
from imagelab.models.stable_diffusion import StableDiffusion, load_base
from imagelab.prompts import (
    encode_ids,
)
from imagelab.sampling import ddim_scheduler, denoise, initial_noise
from mifo.defaults import Defaults
from mifo.learning.config import Recipe
from mifo.learning.instance import Instance
from mifo.learning.prediction import predicting
from mifo.learning.stages import TEXT_TARGETS, UNET_TARGETS
from mifo.learning.views import Batch, Views
from mifo.method.control import BoxControl
from mifo.method.guidance import GuidanceConfig
from mifo.method.layers import supervised_layers
from mifo.method.learning_loss import learning_loss
from mifo.method.sampling import BoxSampling, guide
from mifo.tokens import (
    add_asset_tokens,
    embed_as,
    find_assets,
    initial_rows,
    token_roles,
    write_rows,
)
from mifo_lora import inject, lora_parameters, remove

TINY_SD = Path(__file__).parents[1] / "tests" / "golden" / "tiny_sd"
MODELS = ("tiny_sd", "toybox", "sd21")
LEARNING = ("stage1", "stage2", "learning")
SYNTHESIS = ("guidance", "denoising", "synthesis")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEED = 0


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    model: str
    what: str
    subjects: int
    batch: int  # images at once; learning has batches of its own
    precision: str  # of MIFO's UNet; the plain path is float32


def load_model(name: str, device: str) -> StableDiffusion:
    """Frozen, float32, on the device."""
    if name == "sd21":
        base = full_size_model(device)
    else:
        base = load_base(str(TINY_SD) if name == "tiny_sd" else name, offline=True)
    for module in (base.unet, base.text_encoder, base.vae):
        module.to(device).requires_grad_(False).eval()
    return base


def full_size_model(device: str) -> StableDiffusion:
    """Stable Diffusion 2.1 base with random weights; the tokenizer is the tiny model's."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = load_base(str(TINY_SD))
    torch.manual_seed(SEED)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64,
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act="gelu",
            )
        )
    return replace(tiny, unet=unet, vae=vae, text_encoder=text_encoder, source="random", digest="")


def layout(subjects: int) -> list[Box]:
    """Boxes in a grid, 80% of each cell."""
    columns = int(np.ceil(np.sqrt(subjects)))
    rows = -(-subjects // columns)
    return [
        Box(
            (i % columns + 0.1) / columns,
            (i // columns + 0.1) / rows,
            (i % columns + 0.9) / columns,
            (i // columns + 0.9) / rows,
        )
        for i in range(subjects)
    ]


def make_work(
    row: Row, is_plain: bool, device: str, steps: int
) -> tuple[StableDiffusion, Callable]:
    """The model of one side and its work, which takes the same effort whenever it is called."""
    base = load_model(row.model, device)
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, row.subjects)
    base.text_encoder.to(device)
    rows = initial_rows(base.tokenizer, base.text_encoder, ids, (), SEED).to(device)
    if is_plain:
        plain.require_gradients(base)
    elif row.precision != "fp32":
        base.unet.to(PRECISIONS[row.precision])
    if row.what in SYNTHESIS:
        write_rows(base.text_encoder, ids, rows)
        return base, synthesis_work(base, row, is_plain, device, steps)
    make_learner = partial(Learner, base, ids, rows, is_plain, device)
    if row.what == "learning":
        return base, lambda: learn(make_learner(), steps)
    learner = make_learner()
    learner.enter(int(row.what[-1]))
    return base, learner.measured_step


# ----------------------------------------------------------------------------------------------
# synthesis


def synthesis_work(
    base: StableDiffusion, row: Row, is_plain: bool, device: str, steps: int
) -> Callable:
    """A guidance iteration, a denoising step or a whole synthesis of ``row.batch`` latents.

    The threshold of the box loss is 0, so that guidance never stops early: all rows do all of it.
    """
    prompt = "a photo of " + " and ".join(f"<asset{i}>" for i in range(row.subjects))
    found = find_assets(base.tokenizer, prompt, range(row.subjects))
    tokens = token_roles(base.tokenizer, prompt, [[at] for _, at in found])
    ids = torch.stack([encode_ids(base.tokenizer, text) for text in ("", prompt)])
    with torch.no_grad():
        text = base.text_encoder(ids.to(device)).last_hidden_state.to(base.unet.dtype)
    seeds = range(SEED, SEED + row.batch)
    side = base.unet.config.sample_size
    noise = initial_noise((base.unet.config.in_channels, side, side), seeds).to(device)
    boxes = layout(row.subjects)

    def control():
        if is_plain:
            return plain.Control(base.unet, tokens, boxes, (side, side))
        return BoxControl(base.unet, tokens, boxes, (side, side), seeds)

    if row.what == "guidance":
        config = GuidanceConfig(guidance_iterations=1, loss_threshold=0)
        given = (noise, torch.tensor(901, device=device), text if is_plain else text[1:], 1, config)
        within = control()  # made once for all iterations, as in a synthesis
        if is_plain:
            return lambda: plain.guide(within, *given)
        return lambda: guide(base, within, *given)
    if row.what == "denoising":
        steps, config = 1, GuidanceConfig(guidance_steps=0)
        control = cache(control)  # likewise
    else:
        config = GuidanceConfig(guidance_steps=min(15, -(-3 * steps // 10)), loss_threshold=0)
    given = (noise, text, steps, 7.5)
    if is_plain:
        scheduler = ddim_scheduler(base.scheduler)
        return lambda: plain.denoise(scheduler, *given, control(), config, seeds)
    return lambda: denoise(base, *given, BoxSampling(base, control(), text[1:], steps, config))


# ----------------------------------------------------------------------------------------------
# learning


class Learner:
    """Steps of both stages over a random picture, LoRA in stage 2."""

    def __init__(
        self, base: StableDiffusion, ids: list[int], rows: Tensor, is_plain: bool, device: str
    ):
        self.base, self.ids, self.is_plain = base, ids, is_plain
        self.rows = rows.clone().requires_grad_()
        side = base.resolution
        image = np.random.default_rng(SEED).integers(0, 256, (side, side, 3), np.uint8)
        masks = np.zeros((len(ids), side, side), bool)
        for mask, box in zip(masks, layout(len(ids)), strict=True):
            mask[raster(box, side, side)] = True
        instance = Instance("random", Path(), image, masks, (side, side), (), "", ())
        self.views = Views(base, instance, ids, device, SEED)
        self.size = self.views.size
        if is_plain:
            self.views.moments = plain.FreshMoments(base, image)
        latents = (base.unet.config.in_channels, *self.size)
        self.class_latents = initial_noise(latents, range(2))

    def enter(self, stage: int) -> None:
        recipe, numbers, trained = Recipe(), Defaults(), [self.rows]
        if stage == 2:
            for module, targets in ((self.base.unet, UNET_TARGETS),
                                    (self.base.text_encoder, TEXT_TARGETS)):  # fmt: skip
                draw = torch.Generator().manual_seed(SEED)
                inject(module, targets, recipe.lora_rank, generator=draw)
                trained += [p.requires_grad_() for p in lora_parameters(module)]
        if self.is_plain:
            plain.require_gradients(self.base)
        self.stage, self.trained = stage, trained
        self.layers = supervised_layers(self.base.unet, self.size, stage)
        rate = numbers.learning_rate if stage == 1 else numbers.lora_learning_rate
        self.optimizer = torch.optim.AdamW(trained, rate, (0.9, 0.99))

    def draw(self, step: int) -> Batch:
        prior = self.class_latents if self.stage == 2 else None
        return self.views.draw(self.stage, step, prior, "a photo of a chair")

    def measured_step(self) -> None:
        """The same draw each time, at a timestep that is regularised."""
        batch = self.draw(0)
        self.update(replace(batch, timesteps=torch.full_like(batch.timesteps, 250)))

    def update(self, batch: Batch) -> None:
        name = "reward" if self.stage == 1 else "penalty"
        with embed_as(self.base.text_encoder, self.ids, self.rows):
            if self.is_plain:
                loss = plain.learning_loss(self.base, batch, self.layers, name)
            else:
                with predicting(self.base, batch, self.layers) as found:
                    loss = learning_loss(
                        found.predicted, found.target, found.maps, batch.masks, name
                    ).total
        self.base.unet.zero_grad()
        self.base.text_encoder.zero_grad()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


def learn(learner: Learner, steps: int) -> None:
    """So many steps of each stage; the model is left as it was, without LoRA."""
    for stage in (1, 2):
        learner.enter(stage)
        for step in range(steps):
            learner.update(learner.draw(step))
    for module in (learner.base.unet, learner.base.text_encoder):
        remove(module)
