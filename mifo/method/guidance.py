"""Settings of the box control."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GuidanceConfig:
    """The method's own numbers (arXiv 2511.00542, section 4)."""

    guidance_steps: int = 15  # denoising steps with guidance, in which the boxes are the regions
    guidance_iterations: int = 5  # at most, in each of these steps
    step_size: float = 8.0  # at step 0
    final_step_size: float = 2.0  # toward step guidance_steps
    step_scale: float | None = None  # factor on both, for other latents; None: the model's, or 1
    cross_weight: float = 1.5
    self_weight: float = 0.5
    loss_threshold: float = 0.2  # loss / subjects below which a step's guidance ends
    refine_every: int = 5  # steps, from guidance_steps on; 0: the boxes stay the regions
