"""The recipe of learning, in the paper's numbers: what is optimised, how, and by which losses.

The stages run on a UNet of three levels and 16 channels; what they compute is computed a second
time by hand.
"""

import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from by_hand import attention_of, bilinear, nearest, stream_of
from thin import thin_unet

import mifo.learning.run
from imagelab.training.interrupt import Interrupt
from imagelab.training.loop import Trainer
from mifo.defaults import Defaults
from mifo.learning import stages
from mifo.learning.config import CLASS_PROMPT, LearningConfig, Recipe
from mifo.learning.plan import make_plan
from mifo.learning.prediction import predicting
from mifo.learning.result import describe_result
from mifo.learning.session import Session
from mifo.learning.stages import finetuning_stage, token_stage
from mifo.method.layers import loss_layers, map_layers, supervised_layers
from mifo.method.learning_loss import learning_loss
from mifo.tokens import initial_rows

STAGES = {"stage 1": token_stage, "stage 2": finetuning_stage}
TRAINER = SimpleNamespace(interrupt=Interrupt())
SEED = 4
#: Cross-attention layers of the UNet of three levels.
DOWN = [f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2" for i in (0, 1)]
UP = [f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn2" for i in (1, 2) for j in (0, 1)]
MIDDLE = ["mid_block.attentions.0.transformer_blocks.0.attn2"]


@pytest.fixture
def begin(examples, thin_argv):
    """Begin a learning of the example with settings, by default without class images."""
    model = thin_argv[-1]

    def make(**settings) -> Session:
        given = {
            "folder_path": str(examples), "instance": "toys", "model_path": model, "seed": SEED,
            "prior_weight": 0.0,
        }  # fmt: skip
        return Session(make_plan(LearningConfig.from_settings(**(given | settings))))

    return make


@pytest.fixture
def prior(monkeypatch):
    """Class latents of fixed numbers, in place of ones that are painted."""
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(stages, "class_latents", lambda *_, **__: latents)
    return latents


def run(session: Session, folder, stage: str) -> None:
    trainer = Trainer(folder / "checkpoint", {}, max_grad_norm=1.0)
    trainer.run({stage: partial(STAGES[stage], session)})


def weights(session: Session) -> dict[str, torch.Tensor]:
    """A copy of all weights of the model, by the part and their name."""
    model = session.model
    return {
        f"{part}:{name}": parameter.detach().clone()
        for part in ("unet", "text_encoder", "vae")
        for name, parameter in getattr(model, part).named_parameters()
    }


def changed(before: dict, after: dict) -> set[str]:
    """The names of what is new or has changed in any bit."""
    return {
        name for name in after if name not in before or not torch.equal(after[name], before[name])
    }


# ----------------------------------------------------------------------------------------------
# the numbers of the recipe


def test_the_defaults_are_the_papers():
    recipe, numbers = Recipe(), Defaults()
    assert (recipe.train_steps, recipe.reward_steps, recipe.finetune_steps) == (600, 200, 400)
    assert (numbers.learning_rate, recipe.warmup_steps) == (5e-3, 10)
    assert (recipe.weight_decay, recipe.max_grad_norm) == (1e-2, 1.0)
    assert (recipe.prior_weight, recipe.attention_weight) == (1.0, 1.0)
    assert (CLASS_PROMPT, numbers.num_class_images) == ("a photo of a chair", 100)
    assert (recipe.attention_loss, recipe.optimizer, recipe.lora_rank) == ("mifo", "adamw", 16)
    assert (numbers.lora_learning_rate, numbers.full_learning_rate) == (1e-4, 2e-6)
    assert (numbers.guidance_scale, numbers.step_scale) == (7.5, 1.0)
    assert numbers.initializer_scale == 1.0


def test_the_reward_is_of_the_first_steps_of_stage_1_alone():
    recipe = Recipe()
    terms = [recipe.attention_term(1, step) for step in range(600)]
    assert terms == ["reward"] * 200 + ["penalty"] * 400
    assert {recipe.attention_term(2, step) for step in range(400)} == {"penalty"}


def test_other_attention_losses_on_request():
    of = {
        kind: [Recipe(attention_loss=kind).attention_term(*at) for at in ((1, 0), (1, 300), (2, 0))]
        for kind in ("reward", "penalty", "break_a_scene", "none")
    }
    assert of == {
        "reward": ["reward", "reward", None],
        "penalty": ["penalty"] * 3,
        "break_a_scene": ["break_a_scene"] * 3,
        "none": [None] * 3,
    }


@pytest.mark.parametrize("limit", [1.0, 0.25])
def test_a_run_clips_at_its_recipes_norm(begin, monkeypatch, tmp_path, limit):
    seen = {}

    class Watched(Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            seen.update(options)

        def run(self, makers, *_):
            seen["stages"] = list(makers)

    monkeypatch.setattr(mifo.learning.run, "Trainer", Watched)
    monkeypatch.setattr(mifo.learning.run, "write_result", lambda *_: None)
    settings = {} if limit == 1.0 else {"max_grad_norm": limit}
    plan = begin(output_dir=str(tmp_path), **settings).plan
    mifo.learning.run.learn(plan)
    assert seen["max_grad_norm"] == limit
    assert seen["stages"] == ["stage 1", "stage 2"]
    assert seen["fp16"] is False


# ----------------------------------------------------------------------------------------------
# optimisers


def rates_of(stage) -> list[float]:
    """The rate of every step; the stage's parameters have no gradients, and stay."""
    rates = []
    for _ in range(stage.steps):
        rates.append({group["lr"] for group in stage.optimizer.param_groups})
        stage.optimizer.step()
        stage.schedule.step()
    assert all(len(of_step) == 1 for of_step in rates)
    return [of_step.pop() for of_step in rates]


def check_adamw(optimizer) -> None:
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.99), 1e-8, 1e-2)
    assert not (group["amsgrad"] or group["maximize"])


def test_stage_1_optimises_the_rows_alone(begin):
    session = begin()
    stage = token_stage(session, TRAINER)
    check_adamw(stage.optimizer)
    assert stage.parameters == [session.rows]
    assert stage.optimizer.param_groups[0]["params"] == [session.rows]
    assert (stage.name, stage.steps) == ("stage 1", 600)


def test_the_rates_of_stage_1_warm_up_and_fall_along_a_cosine(begin):
    rates = rates_of(token_stage(begin(), TRAINER))
    assert rates[:10] == pytest.approx([5e-4 * step for step in range(10)])
    falling = [2.5e-3 * (1 + math.cos(math.pi * step / 590)) for step in range(590)]
    assert rates[10:] == pytest.approx(falling)
    assert rates[10] == 5e-3 and rates[305] == pytest.approx(2.5e-3)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"finetune": "lora"}, 1e-4),
        ({"finetune": "full"}, 2e-6),
        ({"finetune": "full", "finetune_learning_rate": 0.5}, 0.5),
    ],
)
def test_stage_2_optimises_the_rows_and_the_modules_at_one_rate(begin, settings, rate):
    session = begin(**settings)
    stage = finetuning_stage(session, TRAINER)
    check_adamw(stage.optimizer)
    ours = stage.optimizer.param_groups[0]["params"]
    assert ours[0] is session.rows and len({id(p) for p in ours}) == len(ours)
    assert [id(p) for p in ours] == [id(p) for p in stage.parameters]
    trainable = [p for module in session.modules.values() for p in module.parameters()]
    trainable = {id(p) for p in trainable if p.requires_grad}
    assert {id(p) for p in ours[1:]} == trainable
    assert (stage.name, stage.steps) == ("stage 2", 400)
    assert set(rates_of(stage)) == {rate}


# ----------------------------------------------------------------------------------------------
# what is trained


def test_stage_1_changes_the_rows_and_no_weight(begin, tmp_path):
    session = begin(train_steps=2)
    before, rows = weights(session), session.rows.detach().clone()
    run(session, tmp_path, "stage 1")
    assert changed(before, weights(session)) == set()
    assert not torch.equal(session.rows, rows)


def test_the_warm_up_starts_from_nothing_and_an_update_without_it_is_as_large_as_the_rate(
    begin, tmp_path
):
    """Adam's first steps go by the rate itself, whatever the gradient's size."""
    session = begin(train_steps=1)
    rows = session.rows.detach().clone()
    run(session, tmp_path, "stage 1")
    assert torch.equal(session.rows, rows)
    session = begin(train_steps=1, warmup_steps=0)
    run(session, tmp_path, "stage 1")
    moved = session.rows.detach() - rows * (1 - 5e-3 * 1e-2)  # beside the decay
    drawn = session.views.draw(1, 0)
    learned = [session.ids.index(drawn.input_ids[0, at]) for at in drawn.positions]
    assert (moved[learned].abs() - 5e-3).abs().median() < 1e-5


def test_stage_2_changes_the_rows_and_the_lora(begin, tmp_path):
    session = begin(finetune_steps=2, finetune_learning_rate=0.02)
    before, rows = weights(session), session.rows.detach().clone()
    run(session, tmp_path, "stage 2")
    text = session.model.text_encoder
    (attention,) = [name for name, _ in text.named_modules() if name.endswith("layers.0.self_attn")]
    targets = [f"text_encoder:{attention}.{x}_proj" for x in ("q", "k", "v", "out")]
    for layer in DOWN + UP + MIDDLE:
        targets += [f"unet:{layer}.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")]
    names = {f"{target}.lora_{side}" for target in targets for side in "AB"}
    assert changed(before, weights(session)) == names
    assert not torch.equal(session.rows, rows)


def test_full_finetuning_changes_everything_but_the_table_and_the_vae(begin, tmp_path):
    session = begin(finetune="full", finetune_steps=2, finetune_learning_rate=0.02)
    before, rows = weights(session), session.rows.detach().clone()
    table = session.model.text_encoder.get_input_embeddings().weight
    run(session, tmp_path, "stage 2")
    kept = before.keys() - changed(before, weights(session))
    assert {name for name in kept if not name.startswith("vae:")} == {
        f"text_encoder:{name}"
        for name, parameter in session.model.text_encoder.named_parameters()
        if parameter is table
    }
    assert {name for name in kept if name.startswith("vae:")} == {
        name for name in before if name.startswith("vae:")
    }
    assert not torch.equal(session.rows, rows)


# ----------------------------------------------------------------------------------------------
# the LoRA


def test_the_lora_starts_as_nothing_with_a_drawn_from_labelled_seeds(begin):
    session = begin(lora_rank=3)
    unet, text_encoder = session.model.unet, session.model.text_encoder
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 16, 16, generator=draw), torch.randn(1, 5, 16, generator=draw)
    ids = session.views.draw(1, 0).input_ids

    def outputs():
        with torch.no_grad():
            states = text_encoder(ids).last_hidden_state
            return states, unet(latents, torch.tensor([500]), text).sample

    before = outputs()
    finetuning_stage(session, TRAINER)
    after = outputs()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))
    for part, module in session.modules.items():
        draw = stream_of(SEED, "lora", part)
        layers = [m for m in module.modules() if hasattr(m, "lora_A")]
        assert len(layers) == {"unet": 4 * 7, "text_encoder": 4}[part]
        for layer in layers:
            bound = layer.in_features**-0.5
            a = torch.empty(3, layer.in_features).uniform_(-bound, bound, generator=draw)
            torch.testing.assert_close(layer.lora_A.detach(), a)
            assert layer.lora_B.shape == (layer.out_features, 3) and not layer.lora_B.any()
            assert (layer.lora_alpha, layer.scaling) == (3, 1)


# ----------------------------------------------------------------------------------------------
# losses


def step_by_hand(session: Session, batch, layers: dict[str, int], term: str) -> dict[str, float]:
    """The losses of a batch; ``layers``: pixels a map's cell, by name."""
    model, count = session.model, len(batch.positions)
    kept = model.scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]
    noisy = kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise
    text_encoder = copy.deepcopy(model.text_encoder)
    with torch.no_grad(), attention_of(model.unet, layers) as maps:
        text_encoder.get_input_embeddings().weight[session.ids] = session.rows
        text = text_encoder(batch.input_ids).last_hidden_state
        predicted = model.unet(noisy, batch.timesteps, text).sample
    error = (predicted - batch.noise).square()
    found = {"reconstruction": (error[-1] * nearest(batch.masks.amax(0), 8)).mean().item()}
    found["prior"] = error[0].mean().item() if len(error) > 1 else 0.0
    terms = []
    for name, factor in layers.items():
        goals = bilinear(batch.masks, factor)
        side = 128 // factor
        for asset in range(count):
            seen = maps[name][-1, :, 4 + 2 * asset].reshape(side, side)
            goal = goals[asset]
            error = 0.5 * goal - seen if term == "reward" else seen * (1 - goal)
            terms.append(error.square().mean().item())
    found["attention"] = sum(terms)
    return found


@torch.no_grad()
def sharpen(session: Session) -> None:
    """Let tokens and samples differ in where they look; a random model looks everywhere alike."""
    for layer in DOWN + UP:
        session.model.unet.get_submodule(f"{layer}.to_q").weight *= 30


def stage_losses(stage, step: int) -> dict[str, float]:
    with stage.losses(step) as losses:
        return {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize(
    ("reward_steps", "term", "weight"), [(8, "reward", 1e-2), (0, "penalty", 2e-2)]
)
def test_the_losses_of_stage_1_by_hand(begin, reward_steps, term, weight):
    session = begin(reward_steps=reward_steps, attention_weight=500.0)
    sharpen(session)
    stage, seen = token_stage(session, TRAINER), set()
    layers = {UP[0]: 16, UP[1]: 16, UP[2]: 8, UP[3]: 8}
    for step in range(8):
        batch = session.views.draw(1, step)
        hand, losses = step_by_hand(session, batch, layers, term), stage_losses(stage, step)
        total = hand["reconstruction"]
        regularised = batch.timesteps.item() < 500
        seen.add((regularised, len(batch.positions)))
        assert losses["reconstruction"] == pytest.approx(total, rel=1e-4)
        if regularised:
            assert losses["attention"] == pytest.approx(hand["attention"], rel=1e-4)
            total += 500 * weight * hand["attention"]
        else:
            assert math.isnan(losses["attention"])
        assert losses["loss"] == pytest.approx(total, rel=1e-4)
    assert {regularised for regularised, _ in seen} == {True, False}
    assert {count for _, count in seen} == {1, 2}


def test_the_losses_of_stage_2_by_hand(begin, prior):
    """The instance's own timestep decides on the penalty, whatever the class image's is."""
    session = begin(prior_weight=3.0, class_prompt="a photo", attention_weight=500.0)
    sharpen(session)
    stage, seen = finetuning_stage(session, TRAINER), set()
    layers = {DOWN[1]: 16, UP[0]: 16, UP[1]: 16}
    for step in range(12):
        batch = session.views.draw(2, step, prior, "a photo")
        hand, losses = step_by_hand(session, batch, layers, "penalty"), stage_losses(stage, step)
        regularised = (batch.timesteps < 500).tolist()
        seen.add(tuple(regularised))
        total = hand["reconstruction"] + 3 * hand["prior"]
        assert losses["reconstruction"] == pytest.approx(hand["reconstruction"], rel=1e-4)
        if regularised[-1]:
            assert losses["attention"] == pytest.approx(hand["attention"], rel=1e-4)
            total += 500 * 2e-2 * hand["attention"]
        else:
            assert math.isnan(losses["attention"])
        assert losses["loss"] == pytest.approx(total, rel=1e-4)
    assert len(seen) == 4  # both, either, none


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_class_images_are_those_of_the_recipe_and_the_runs_seed(
    begin, monkeypatch, tmp_path, device
):
    session = begin(prior_weight=1.0, output_dir=str(tmp_path / "out"))
    session.plan = replace(session.plan, device=device)
    given = {}
    monkeypatch.setattr(
        stages, "class_latents", lambda *args, **named: given.update(named, args=args)
    )
    stages.prior_latents(session, Interrupt())
    assert given["args"] == (session.model, "a photo of a chair", 100, (16, 16), SEED)
    assert given["batch"] == {"cpu": 4, "cuda": 8}[device]
    assert given["cache"] == tmp_path / "out" / ".class_images"
    assert stages.prior_latents(begin(prior_weight=0.0), Interrupt()) is None


def test_the_penalty_is_of_the_steps_after_the_reward(begin, monkeypatch):
    """At the stage's own default, and with the recipe's weights."""
    given, session = [], begin(prior_weight=0.5, attention_weight=7.0)
    real = stages.learning_loss
    monkeypatch.setattr(
        stages, "learning_loss", lambda *args: given.append(args[4:]) or real(*args)
    )
    stage = token_stage(session, TRAINER)
    for step in (0, 199, 200, 599):
        stage_losses(stage, step)
    assert given == [(term, 0.5, 7.0) for term in ("reward", "reward", "penalty", "penalty")]


@pytest.mark.parametrize(
    ("timesteps", "watched"),
    [((499,), True), ((500,), False), ((499, 500), False), ((500, 499), True), ((0, 999), False)],
)
def test_attention_is_regularised_below_timestep_500_of_the_instance(begin, timesteps, watched):
    session = begin()
    batch = session.views.draw(1, 0)
    count = len(timesteps)
    batch.timesteps = torch.tensor(timesteps)
    batch.latents, batch.noise, batch.input_ids = (
        x.expand(count, *x.shape[1:]) for x in (batch.latents, batch.noise, batch.input_ids)
    )
    with torch.no_grad(), predicting(session.model, batch, UP) as found:
        assert list(found.maps) == (UP if watched else [])


def test_a_loss_of_two_layers_and_two_assets_by_hand():
    """Latents of 2×2, masks of 8×8 with single pixels inside, to tell the ways to resize apart."""
    masks = torch.zeros(2, 8, 8)
    masks[0, 0, 0] = 1  # nearest takes it, bilinear without antialias does not
    masks[1, 5, 5] = 1  # one of the four pixels in the middle of the last quarter
    masks[1, 4, 4] = 1  # what nearest takes there
    predicted = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[1.0, 2.0], [3.0, 4.0]]]])
    target = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]], [[[3.0, 0.0], [0.0, 1.0]]]])
    maps = {
        "a": torch.tensor([[[0.2, 0.0], [0.0, 0.4]], [[0.0, 0.1], [0.0, 0.8]]]),
        "b": torch.tensor([[[0.5]], [[0.25]]]),
    }
    loss = learning_loss(predicted, target, maps, masks, "penalty", 0.1, 10.0)
    # inside both masks: (1 - 3)² and (4 - 1)², of four elements
    assert loss.reconstruction.item() == pytest.approx(13 / 4)
    assert loss.prior.item() == pytest.approx((1 + 4 + 9 + 16) / 4)
    # asset 0: its mask is nothing at 2×2 and at 1×1; asset 1's is ¼ in the last cell and at 1×1
    # the middle of 8×8 is pixels 3 and 4: of these four, one is inside
    terms = [(0.04 + 0.16) / 4, (0.01 + 0.36) / 4, 0.25, 0.1875**2]
    assert [x.item() for x in loss.attention] == pytest.approx(terms)
    total = 13 / 4 + 0.1 * 7.5 + 10 * 2e-2 * sum(terms)
    assert loss.total.item() == pytest.approx(total)
    reward = learning_loss(predicted[1:], target[1:], maps, masks, "reward")
    terms = [0.2 / 4, (0.01 + 0.675**2) / 4, 0.25, 0.125**2]
    assert [x.item() for x in reward.attention] == pytest.approx(terms)
    assert reward.prior is None
    assert reward.total.item() == pytest.approx(13 / 4 + 1e-2 * sum(terms))


def test_views_hold_the_autoencoders_scaled_posterior_of_the_picture_and_of_its_mirror_image(begin):
    session = begin()
    vae = session.model.vae
    picture = torch.from_numpy(session.plan.instance.image).permute(2, 0, 1).float()
    for mirrored in (0, 1):
        pixels = (picture.flip(-1) if mirrored else picture) / 127.5 - 1
        with torch.no_grad():
            mean, logarithm = vae.quant_conv(vae.encoder(pixels[None]))[0].chunk(2)
        by_hand = torch.stack([mean, (logarithm / 2).exp()]) * vae.config.scaling_factor
        torch.testing.assert_close(session.views.moments[mirrored], by_hand)


# ----------------------------------------------------------------------------------------------
# layers


def test_the_layers_of_a_unet_of_three_levels_by_name():
    unet = thin_unet(3)
    assert supervised_layers(unet, (16, 16), 1) == UP
    assert supervised_layers(unet, (16, 16), 2) == [DOWN[1], UP[0], UP[1]]
    both = [name[:-1] + kind for name in UP[:2] for kind in "12"]
    assert map_layers(unet) == both
    assert loss_layers(unet) == [MIDDLE[0][:-1] + "1", MIDDLE[0], *both]


def test_the_layers_of_a_unet_of_four_levels_by_name():
    """Stable Diffusion's: its encoder works at decoder-1's resolution in its third block."""
    unet = thin_unet(4)
    third = "down_blocks.2.attentions.0.transformer_blocks.0.attn2"
    assert supervised_layers(unet, (16, 16), 1) == UP
    assert supervised_layers(unet, (16, 16), 2) == [third, UP[0], UP[1]]


# ----------------------------------------------------------------------------------------------
# the first rows


@pytest.mark.parametrize(("settings", "scale"), [({}, 1), ({"initializer_scale": 0.25}, 0.25)])
def test_the_rows_start_from_the_tables_own_mean_and_deviation_by_hand(begin, settings, scale):
    session = begin(**settings)
    table = session.model.text_encoder.get_input_embeddings().weight.detach().double()[:552]
    mean = table.sum(0) / 552
    deviation = ((table - mean).square().sum(0) / 551).sqrt()
    draw = torch.randn(2, 16, generator=stream_of(SEED, "asset rows"))
    torch.testing.assert_close(
        session.rows.detach().double(),
        mean + scale * deviation * draw.double(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_rows_start_from_the_mean_of_their_words(begin):
    session = begin()
    tokenizer, text_encoder = session.model.tokenizer, session.model.text_encoder
    table = text_encoder.get_input_embeddings().weight.detach()
    car, toy, dog = (
        table[tokenizer.convert_tokens_to_ids(f"{word}</w>")] for word in ("car", "toy", "dog")
    )
    rows = initial_rows(tokenizer, text_encoder, session.ids, ("toy car", "dog"), seed=0)
    torch.testing.assert_close(rows, torch.stack([(toy + car) / 2, dog]))


# ----------------------------------------------------------------------------------------------
# the result


def test_final_losses_are_means_of_the_last_fifty_finite_ones(begin):
    curves = {"loss": [1.0] * 100 + [2.0] * 25 + [4.0] * 25, "attention": [math.nan, 3.0, math.nan]}
    facts = describe_result(begin(), curves | {"none": [math.nan]}, [0.5, 0.5])
    assert facts["final_losses"] == {"loss": 3.0, "attention": 3.0, "none": None}
