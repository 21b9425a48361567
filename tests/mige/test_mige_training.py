"""Loss, its gradients and dropout, beside the authors' code and by hand-worked numbers."""

import math

import numpy as np
import pytest
import torch
from golden_mige import PROMPTS, WordTokenizer, arrays, build_parts, close, facts, release

from mige.method.dropout import choose_dropped, drop
from mige.method.instruction import segment_ids
from mige.method.loss import Diffusion, discretised_likelihood, gaussian_divergence
from mige.method.prediction import predict
from mige.release import load_exactly, place_of, split_release
from mige.training.config import Recipe
from mige.training.model import TrainedModel, choose_trained
from mige.training.samples import Batch

PROCESS = Diffusion()


pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------------------------
# beside the authors' code


def test_terms_of_the_loss():
    given = arrays("loss")
    noised = PROCESS.noised(given["x_start"], given["noise"], given["t"])
    assert torch.equal(noised, given["x_t"])
    assert torch.equal(given["model_t"], given["t"])
    predicted, variance = given["model_out"].chunk(2, dim=1)
    terms = PROCESS.loss(given["x_start"], given["noise"], given["t"], predicted, variance)
    for found, name in zip(terms, ("mse", "vb", "loss"), strict=True):
        assert torch.equal(found, given[name])


def test_the_whole_model_s_loss_and_gradients():
    """ViT frozen but for its last norm, no dropout; every norm of a gradient is compared."""
    given = arrays("loss_model")
    model = golden_model()
    choose_trained(model, Recipe(dropout=0.0), 0)
    terms = model(golden_batch(given))
    for term, name in zip(terms, ("mse", "vb", "loss"), strict=True):
        close(term, given[name], 3e-6, 1e-6)
    terms.loss.mean().backward()
    check_gradients(dict(model.parts))


def golden_batch(given: dict[str, torch.Tensor], draw: float = 1.0) -> Batch:
    """The authors' batch of the two prompts; with a draw below 0.15 something is left out."""
    segments = [segment_ids(WordTokenizer(), prompt) for prompt in PROMPTS]
    counts = [len(each) - 1 for each in segments]
    return Batch(
        tasks=("edit",) * len(segments),
        segments=tuple(segments),
        counts=tuple(counts),
        clean=given["x_start"],
        noise=given["noise"],
        source=given["source"],
        timesteps=given["t"],
        draws=torch.full((len(segments),), draw),
        vision=first_of_each(given["ref_clip"], counts),
        latents=first_of_each(given["ref_vae"], counts),
    )


def first_of_each(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The pictures of all marks; slots without a mark are left out."""
    return torch.cat([each[:count] for each, count in zip(values, counts, strict=True)])


def golden_model(**settings) -> TrainedModel:
    """All parts with the golden weights."""
    parts = build_parts()
    for name, state in split_release(release()).items():
        load_exactly(parts[name], state, name)
    return TrainedModel(parts, PROCESS, end=1, round_timesteps=False, **settings)


def check_gradients(parts: dict) -> None:
    some = arrays("grads")
    fusion, trunk = parts["fusion"], parts["transformer"]
    for found, name in (
        (trunk.pos_embed.proj.weight, "x_embedder"),
        (fusion.query_tokens, "query_tokens"),
        (fusion.projection.weight, "t5_proj"),
        (fusion.features.mix.weight, "ffm_mlp"),
        (trunk.proj_out.weight, "final"),
    ):
        close(found.grad, some[name], 5e-6, 5e-6)
    own = {f"{part}.{k}": p for part, module in parts.items() for k, p in module.named_parameters()}
    compared = 0
    for name, wanted in facts("grad_norms")["norms"].items():
        found = norm_of(own, name)
        if wanted > 1e-6:
            assert found == pytest.approx(wanted, rel=5e-6, abs=5e-6), name
            compared += 1
        else:
            assert found < 1e-5, name
    assert compared >= 170


def norm_of(own: dict, name: str) -> float:
    """The norm of a gradient under the release's name, of which a part may have several."""
    part, renamed = place_of(name)
    if ".qkv." in renamed or ".kv." in renamed:
        stem, joint, end = renamed.rpartition(".qkv" if ".qkv." in renamed else ".kv")
        names = [f"{stem}.to_{letter}{end}" for letter in joint.lstrip(".")]
    else:
        names = [renamed]
    gradients = [own[f"{part}.{each}"].grad for each in names]
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def test_dropout_s_choice_and_effect():
    given, trunk = arrays("train_dropout"), arrays("trunk")
    dropped = choose_dropped(given["u"])
    assert torch.equal(dropped.text, given["drop_text"])
    assert torch.equal(dropped.source, given["drop_source"])
    parts = build_parts()
    for name, state in split_release(release()).items():
        load_exactly(parts[name], state, name)
        parts[name].eval().requires_grad_(False)
    text, source = drop(dropped, given["t5_out"], parts["fusion"].null_text, given["source"])
    mask = trunk["mask"][:1].expand(len(text), -1)
    found = predict(parts["transformer"], given["x"], source, given["t"], text, mask)
    close(torch.cat(found, dim=1), given["out"], 5e-6, 2e-6)


# ----------------------------------------------------------------------------------------------
# by hand


def test_null_text_has_the_mask_of_its_own_prompt():
    """5 words, two pictures of 4 vectors and the end; and 7 words, a picture and the end."""
    model, read = golden_model(), {}
    model.parts["transformer"].register_forward_pre_hook(
        lambda _, args, named: read.update(named), with_kwargs=True
    )
    with torch.no_grad():
        model(golden_batch(arrays("loss_model"), draw=0.02))
    null_text = model.parts["fusion"].null_text
    assert torch.equal(read["encoder_hidden_states"], null_text.expand(2, -1, -1))
    assert read["encoder_attention_mask"].tolist() == [
        [1] * 14 + [0] * 10, [1] * 12 + [0] * 12,
    ]  # fmt: skip


def test_shares_of_dropout():
    draws = (torch.arange(2000) + 0.5) / 2000
    dropped = choose_dropped(draws)
    assert dropped.text.sum() == dropped.source.sum() == 200
    assert (dropped.text & dropped.source).sum() == 100
    assert choose_dropped(torch.tensor([0.0, 0.05, 0.1, 0.15])).text.tolist() == [
        True, False, True, False,
    ]  # fmt: skip


def test_noise_is_added_by_the_product_of_alphas():
    """At t = 1 of β 1e-4 and 1e-4 + 0.0199 / 999."""
    product = (1 - 1e-4) * (1 - (1e-4 + 0.0199 / 999))
    found = PROCESS.noised(
        torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0), torch.tensor([1])
    )
    assert found.item() == pytest.approx(2 * product**0.5 + 3 * (1 - product) ** 0.5, rel=1e-6)


def test_divergence_of_normal_distributions():
    """KL(N(1, 4) ‖ N(0, 1)) = (4 + 1 − 1 − ln 4) / 2."""
    found = gaussian_divergence(
        torch.tensor(1.0), torch.tensor(math.log(4)), torch.tensor(0.0), torch.tensor(0.0)
    )
    assert found.item() == pytest.approx((4 - math.log(4)) / 2)


def test_levels_share_all_probability():
    """Those of the 256 levels add up to 1, and the middle ones are densities times a width."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    found = discretised_likelihood(levels, torch.tensor(0.1), torch.tensor(math.log(0.2))).exp()
    assert found.sum().item() == pytest.approx(1, abs=1e-6)
    density = np.exp(-((levels.numpy() - 0.1) ** 2) / 0.08) / (0.2 * math.sqrt(2 * math.pi))
    assert found[140].item() == pytest.approx(density[140] * 2 / 255, rel=0.01)
    assert discretised_likelihood(
        torch.tensor(0.0), torch.tensor(50.0), torch.tensor(-3.0)
    ).item() == pytest.approx(math.log(1e-12))


def test_the_bound_does_not_teach_the_noise():
    """Of the bound alone the prediction gets no gradient; the variance does."""
    predicted, variance = (torch.randn(2, 1, 2, 2, requires_grad=True) for _ in range(2))
    clean, noise = torch.randn(2, 2, 1, 2, 2)
    terms = PROCESS.loss(clean, noise, torch.tensor([0, 500]), predicted, variance)
    terms.bound.sum().backward(retain_graph=True)
    assert predicted.grad is None and variance.grad.abs().sum() > 0
    variance.grad = None
    terms.mse.sum().backward()
    wanted = 2 * (predicted - noise) / 4
    assert torch.allclose(predicted.grad, wanted.detach())
    assert variance.grad is None
