"""Learning losses, gradients and maps equal those of the authors' release (tests/golden)."""

import pytest
import torch
from thin import batch_loss, load_golden

from imagelab.attention import Recorder, processors
from imagelab.models.stable_diffusion import load_base
from mifo.learning.views import Batch
from mifo.method.layers import supervised_layers
from mifo.method.losses import ATTENTION_LOSSES
from mifo.tokens import add_asset_tokens, embed_as

CASES = {"reward": (1, "reward"), "penalty": (1, "penalty"), "finetune": (2, "penalty")}


@pytest.fixture(scope="module", params=CASES)
def case(request, tiny_sd):
    """One step of a golden case: what was given, the loss, and the base model with gradients."""
    golden = load_golden(f"golden_learning_{request.param}")
    stage, attention_loss = CASES[request.param]
    base = load_base(str(tiny_sd))
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, 3)
    if request.param == "finetune":
        base.unet.requires_grad_(True)
        base.text_encoder.requires_grad_(True)
    rows = golden["asset_embeddings"].clone().requires_grad_()
    subset = golden["token_subset"].tolist()
    prompts = golden["input_ids"][None]
    if stage == 2:
        class_ids = base.tokenizer(
            "a photo of a chair", padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        prompts = torch.cat([class_ids, prompts])
    batch = Batch(
        latents=golden["latents"],
        noise=golden["noise"],
        timesteps=golden["timesteps"],
        input_ids=prompts,
        masks=golden["masks"][subset].float(),
        positions=[golden["input_ids"].tolist().index(ids[asset]) for asset in subset],
    )
    layers = supervised_layers(base.unet, (64, 64), stage)
    with embed_as(base.text_encoder, ids, rows):
        loss = batch_loss(base, batch, layers, attention_loss)
        loss.total.backward()
    return {
        "name": request.param, "golden": golden, "base": base, "ids": ids, "rows": rows,
        "batch": batch, "layers": layers, "loss": loss,
    }  # fmt: skip


def test_loss(case):
    golden, loss = case["golden"], case["loss"]
    assert loss.total.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    terms = [loss.reconstruction, *([] if loss.prior is None else [loss.prior]), *loss.attention]
    ours = torch.stack(terms).detach().double()
    assert ours.shape == golden["mse_terms"].shape
    assert torch.allclose(ours, golden["mse_terms"], rtol=1e-5, atol=0)


def test_the_weights_are_factors_of_their_terms(case):
    base, loss = case["base"], case["loss"]
    with torch.no_grad(), embed_as(base.text_encoder, case["ids"], case["rows"]):
        weighed = batch_loss(base, case["batch"], case["layers"], CASES[case["name"]][1], 0.5, 3.0)
    weight = ATTENTION_LOSSES[CASES[case["name"]][1]][1]
    expected = loss.total + 2 * weight * torch.stack(loss.attention).sum()
    if loss.prior is not None:
        expected = expected - 0.5 * loss.prior
    assert weighed.total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_asset_gradients(case):
    ours, theirs = case["rows"].grad, case["golden"]["grad_embedding_rows"]
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_gradient_norms_of_the_whole_model(case):
    if case["name"] != "finetune":
        pytest.skip("the release trains the whole model in stage 2 only")
    norm = torch.stack([p.grad.norm() for p in case["base"].unet.parameters()]).norm()
    assert norm.item() == pytest.approx(case["golden"]["grad_unet_norm"].item(), rel=1e-5)
    gradients = [p.grad for p in case["base"].text_encoder.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in (*gradients, case["rows"].grad)]).norm()
    assert norm.item() == pytest.approx(case["golden"]["grad_text_norm"].item(), rel=1e-5)


def test_states_predictions_and_maps(case):
    golden, base, batch = case["golden"], case["base"], case["batch"]
    recorder = Recorder()
    with torch.no_grad(), embed_as(base.text_encoder, case["ids"], case["rows"]):
        text = base.text_encoder(batch.input_ids).last_hidden_state
        noisy = base.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        with processors(base.unet, {name: recorder.processor(name) for name in case["layers"]}):
            predicted = base.unet(noisy, batch.timesteps, text).sample
    assert torch.allclose(text, golden["text_hidden"], atol=1e-5)
    assert torch.allclose(predicted, golden["noise_prediction"], atol=1e-5)
    theirs = [golden[key] for key in golden if key.endswith("_subject_tokens")]
    assert len(theirs) == len(case["layers"])
    for name, map_ in zip(case["layers"], theirs, strict=True):
        ours = recorder.maps[name][-1][:, batch.positions].unflatten(0, map_.shape[:2])
        assert torch.allclose(ours, map_, atol=1e-5), name
