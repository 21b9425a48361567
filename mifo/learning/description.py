"""A plan in words."""

from mifo.learning.config import Recipe
from mifo.learning.estimate import estimate_bytes
from mifo.learning.instance import coverage_report
from mifo.learning.plan import Plan


def describe(plan: Plan) -> str:
    """The plan in words, with an estimate of the memory that it takes."""
    config, recipe, instance = plan.config, plan.config.recipe, plan.instance
    height, width = instance.image.shape[:2]
    count, origins = recipe.num_class_images, plan.origins
    images = f'{count} to make ({origins["num_class_images"]}) of "{recipe.class_prompt}"'
    images = config.class_images or f"{images} ({origins['class_prompt']})"
    rates = {1: "learning_rate", 2: "finetune_learning_rate"}
    rates = {stage: (getattr(recipe, name), origins.get(name)) for stage, name in rates.items()}
    precision = str(plan.dtype).removeprefix("torch.")
    lines = [
        f"base model   {plan.model.source} on {plan.device} in {precision}",
        f"instance     {instance.folder}: {len(instance.masks)} masks, {width}×{height}",
        *(f"             {line}" for line in coverage_report(instance).splitlines()),
        *(
            f"stage {stage}      {steps} steps, rate {rates[stage][0]:g} ({rates[stage][1]})"
            for stage, steps in recipe.steps.items()
        ),
        f"first tokens {_first_tokens(plan)}",
        f"fine-tuning  {recipe.finetune}",
        f"attention    {_attention(recipe)}",
        f"seed         {config.seed}",
        f"class images {images if recipe.needs_class_images else 'none'}",
        f"memory       about {estimate_bytes(plan) / 2**30:.2f} GiB (an estimate)",
        f"writes       {plan.target}",
    ]
    return "\n".join(lines)


def _first_tokens(plan: Plan) -> str:
    """What the tokens start from."""
    recipe = plan.config.recipe
    if recipe.initialize_from_class:
        return "the class in instance.json"
    if recipe.initializer_tokens:
        return ", ".join(recipe.initializer_tokens)
    return f"random, scale {recipe.initializer_scale:g} ({plan.origins['initializer_scale']})"


def _attention(recipe: Recipe) -> str:
    """The attention loss, and which steps go by which of its terms."""
    if recipe.attention_loss == "none":
        return "none"
    parts = [recipe.attention_loss]
    for stage in recipe.steps:
        terms = recipe.attention_steps(stage).items()
        words = ", then ".join(f"{term or 'none'} {count}" for term, count in terms)
        parts.append(f"stage {stage}: {words}")
    return "; ".join(parts)
