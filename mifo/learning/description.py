"""A plan in words."""

from mifo.learning.estimate import estimate_bytes
from mifo.learning.instance import coverage_report
from mifo.learning.plan import Plan


def describe(plan: Plan) -> str:
    """The plan in words, with an estimate of the memory that it takes."""
    config, recipe, instance = plan.config, plan.config.recipe, plan.instance
    height, width = instance.image.shape[:2]
    images = config.class_images or f"{recipe.num_class_images} to make"
    precision = str(plan.dtype).removeprefix("torch.")
    lines = [
        f"base model   {plan.model.source} on {plan.device} in {precision}",
        f"instance     {instance.folder}: {len(instance.masks)} masks, {width}×{height}",
        *(f"             {line}" for line in coverage_report(instance).splitlines()),
        *(f"stage {stage}      {steps} steps" for stage, steps in recipe.steps.items()),
        f"fine-tuning  {recipe.finetune}; attention loss {recipe.attention_loss}",
        f"seed         {config.seed}",
        f"class images {images if recipe.needs_class_images else 'none'}",
        f"memory       about {estimate_bytes(plan) / 2**30:.2f} GiB (an estimate)",
        f"writes       {plan.target}",
    ]
    return "\n".join(lines)
