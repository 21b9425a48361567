"""What a learning run holds while it runs: the model on its device, the asset rows, the views."""

import torch

from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learning.config import Recipe
from mifo.learning.plan import Plan
from mifo.learning.views import Views


class Session:
    """A run's model, moved to where it learns.

    Attributes:
        ids: of the asset tokens; rows: their embeddings, a parameter [assets, width].
        views: draws the batches.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.ids = plan.ids
        self.rows = torch.nn.Parameter(plan.rows.to(plan.device, copy=True))
        model = self.model
        model.vae.to(plan.device)  # while it is alone there
        self.views = Views(model, plan.instance, self.ids, plan.device, self.seed)
        model.vae.to("cpu")  # learning itself does without it
        model.text_encoder.to(plan.device)
        is_full = self.recipe.finetune == "full"
        model.unet.to(plan.device, torch.float32 if is_full else plan.dtype)
        if plan.config.runtime.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()

    @property
    def model(self) -> StableDiffusion:
        return self.plan.model

    @property
    def recipe(self) -> Recipe:
        return self.plan.config.recipe

    @property
    def seed(self) -> int:
        return self.plan.config.seed

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """What stage 2 may train, by name."""
        return {"unet": self.model.unet, "text_encoder": self.model.text_encoder}

    def autocast(self) -> torch.autocast:
        """Half precision for a whole model that learns in float32; nothing for a LoRA."""
        dtype = self.plan.dtype
        is_needed = self.recipe.finetune == "full" and dtype != torch.float32
        return torch.autocast(self.plan.device.split(":")[0], dtype, enabled=is_needed)
