"""The sampler: equal to diffusers' pipeline, over a UNet or a transformer, each image by itself."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import PixArtTransformer2DModel, StableDiffusionPipeline
from thin import thin_pipeline, thin_scheduler, thin_unet

from imagelab.errors import UserError
from imagelab.models.stable_diffusion import StableDiffusion
from imagelab.sampling import check_steps, ddim_scheduler, denoise, initial_noise
from imagelab.training.seeds import seed_for

STEPS = 6
SHAPE = (4, 8, 12)


@pytest.fixture(scope="module")
def unet():
    return thin_unet(3, seed=3)


@pytest.fixture(scope="module")
def text():
    return torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(4))


def model_of(unet, **settings) -> StableDiffusion:
    return StableDiffusion(None, None, None, unet, thin_scheduler(**settings), "random", "")


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, in parts of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --- seeds and noise -------------------------------------------------------------------------


def test_labelled_seeds_are_pinned():
    """By hand: 63 bits of sha256 over "7", "str:noise" and over "7", "str:clusters", "int:15"."""
    assert seed_for(7, "noise") == 7034650234738456355
    assert seed_for(7, "clusters", 15) == 8207202903834049960
    assert (
        len({seed_for(7), seed_for(7, 1), seed_for(7, "1"), seed_for(71), seed_for(7, 1, 1)}) == 5
    )


def test_noise_of_an_image_is_its_seeds_alone():
    both = initial_noise((4, 6, 10), [5, 6])
    assert both.shape == (2, 4, 6, 10)
    torch.manual_seed(seed_for(6, "noise"))
    assert torch.equal(both[1], torch.randn(4, 6, 10))
    assert torch.equal(both[:1], initial_noise((4, 6, 10), [5]))


# --- the schedule ----------------------------------------------------------------------------


def test_sampler_keeps_the_models_noise_schedule_and_prediction():
    theirs = thin_scheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler = ddim_scheduler(theirs)
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, theirs.alphas_cumprod)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == list(range(951, 0, -50))


@pytest.mark.parametrize("total", [1000, 400])
def test_steps_start_near_the_noisy_end_or_are_refused(total):
    """Within a fifth of it, past the one stride that every number of steps leaves out."""
    scheduler = ddim_scheduler(thin_scheduler(num_train_timesteps=total))
    refused = set()
    for steps in range(1, total):
        scheduler.set_timesteps(steps)
        reached = scheduler.timesteps[0] + total // steps
        try:
            check_steps(steps, scheduler)
        except UserError:
            refused.add(steps)
        assert (steps in refused) == (reached <= 0.8 * total)
    assert refused and min(refused) > total // 4
    assert not refused & {total // 3, total // 2, total - 1}
    with pytest.raises(UserError, match=f"is {total}, .* at most {total // 4}, or"):
        check_steps(total, scheduler)


# --- denoising -------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_it_is_diffusers_pipeline(unet, text, tiny_sd, prediction):
    model = model_of(unet, prediction_type=prediction)
    scheduler = ddim_scheduler(model.scheduler)
    pipeline: StableDiffusionPipeline = thin_pipeline(tiny_sd / "tokenizer", unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(SHAPE, [5, 6])
    theirs = pipeline(
        prompt_embeds=text[1:].expand(2, -1, -1),
        negative_prompt_embeds=text[:1].expand(2, -1, -1),
        latents=noise.clone(),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        height=64,
        width=96,
        output_type="latent",
    ).images
    ours = denoise(model, noise, text, STEPS, 3.0)
    assert difference(ours, theirs) <= 1e-5
    assert difference(ours, noise) > 0.1


class Shift:
    """A control that moves the latents before the first step and writes down when it is asked."""

    def __init__(self):
        self.asked = []

    def before_step(self, step, timestep, latents):
        self.asked.append((step, int(timestep)))
        return latents + 1 if step == 0 else latents

    @contextmanager
    def denoising_pass(self):
        self.asked.append("pass")
        yield
        self.asked.append("end")


def test_a_control_is_asked_before_each_step_and_holds_its_pass(unet, text):
    model, noise, steps, control = model_of(unet), initial_noise(SHAPE, [5]), [], Shift()
    controlled = denoise(model, noise, text, 2, 7.5, control, steps.append)
    assert torch.equal(controlled, denoise(model, noise + 1, text, 2, 7.5))
    assert control.asked == [(0, 501), "pass", "end", (1, 1), "pass", "end"]
    assert [step.number for step in steps] == [0, 1]
    assert torch.equal(steps[0].start, noise + 1)
    assert torch.equal(steps[1].start, steps[0].latents)
    assert torch.equal(steps[1].latents, controlled)


def test_latents_that_are_not_finite_end_the_run(unet, text):
    broken = text.clone()
    broken[0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="after step 0; try --mixed_precision no"):
        denoise(model_of(unet), initial_noise(SHAPE, [5]), broken, STEPS, 7.5)


class ThinPixArt:
    """A random PixArt of two blocks behind the protocol; it predicts ε and a variance."""

    device, dtype, scheduler = torch.device("cpu"), torch.float32, thin_scheduler()

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=2, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=16,
            use_additional_conditions=False, norm_num_groups=4,
        ).requires_grad_(False).eval()  # fmt: skip

    def predict(self, latents, timesteps, text):
        sizes = {"resolution": None, "aspect_ratio": None}
        predicted = self.transformer(
            latents, text, timesteps.expand(len(latents)), added_cond_kwargs=sizes
        ).sample
        return predicted.chunk(2, dim=1)[0]  # without the variance


def test_it_paints_with_a_transformer(text):
    """Each image as alone; one step as DDIM's formula has it."""
    model, noise = ThinPixArt(), initial_noise((4, 8, 12), [5, 6])
    both = denoise(model, noise, text, STEPS, 3.0)
    assert both.shape == noise.shape and both.isfinite().all()
    assert difference(both[1:], denoise(model, noise[1:], text, STEPS, 3.0)) < 1e-5
    alpha = model.scheduler.alphas_cumprod
    t = torch.tensor(1)  # the one step goes from t = 1 to the first alpha
    free, asked = (model.predict(noise, t, states.expand(2, -1, -1)) for states in text)
    epsilon = free + 3.0 * (asked - free)
    clean = (noise - (1 - alpha[1]).sqrt() * epsilon) / alpha[1].sqrt()
    expected = alpha[0].sqrt() * clean + (1 - alpha[0]).sqrt() * epsilon
    assert difference(denoise(model, noise, text, 1, 3.0), expected) < 1e-5
