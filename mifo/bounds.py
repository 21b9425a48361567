"""How large a user's numbers may be: what lies beyond is a slip, and is told before any work."""

from collections.abc import Mapping

from imagelab.settings import check_within

#: Least and most of each setting that is a number; two whole ones are of a whole number.
BOUNDS: dict[str, tuple[float, float]] = {
    # learning
    "train_steps": (0, 1_000_000),
    "finetune_steps": (0, 1_000_000),
    "reward_steps": (0, 1_000_000),
    "warmup_steps": (0, 1_000_000),
    "checkpoint_steps": (1, 1_000_000),
    "num_class_images": (1, 1_000_000),
    "lora_rank": (1, 1024),  # about the width of a layer, beyond which there is nothing to gain
    "initializer_scale": (0.0, 1000.0),
    "learning_rate": (0.0, 1.0),
    "finetune_learning_rate": (0.0, 1.0),
    "weight_decay": (0.0, 1e6),
    "prior_weight": (0.0, 1e6),
    "attention_weight": (0.0, 1e6),
    "max_grad_norm": (0.0, 1e12),  # which clips nothing
    # synthesis; the model bounds width and height more closely
    "batch_size": (1, 10_000),
    "num_images": (1, 1_000_000),
    "num_inference_steps": (1, 999),
    "width": (1, 16_384),
    "height": (1, 16_384),
    "guidance_steps": (0, 1_000_000),
    "guidance_iterations": (0, 1_000_000),
    "refine_every": (0, 1_000_000),
    "guidance_scale": (0.0, 1e6),
    "lora_scale": (-100.0, 100.0),  # below 0 the opposite, as sliders are used
    "step_size": (0.0, 1e6),
    "final_step_size": (0.0, 1e6),
    "step_scale": (0.0, 1e6),
    "cross_weight": (0.0, 1e6),
    "self_weight": (0.0, 1e6),
    "loss_threshold": (0.0, 1e6),
}
MOST_POSITION = 1000  # of a token in a prompt; also how many positions an option may hold


def check_bounds(settings: Mapping[str, object]) -> None:
    """Raises UserError for a number out of its bounds; what is open, which is None, is in them."""
    check_within(settings, BOUNDS)
