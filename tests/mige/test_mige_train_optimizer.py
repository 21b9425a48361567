"""What updates the weights: Muon beside AdamW."""

import pytest
import torch
from safetensors.torch import load_file
from test_mige_train import Begun, data, options_of, work  # noqa: F401 (fixtures)
from training_data import usual

from imagelab.training.optimizers import JoinedOptimizer
from mige import train as command
from mige.training.config import Recipe
from mige.training.memory import estimate
from mige.training.model import trained_parameters
from mige.training.optimizer import matrices_of, moments_of, parameter_groups
from mige.training.plan import CHECKPOINT

MUON = (
    *("--optimizer", "muon", "--learning_rate", "0.01", "--weight_decay", "0.5"),
    *("--conditioning_rate", "0.02"),
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_transformer_has_a_rate_of_its_own():
    named = {"parts.transformer.a": 1, "parts.fusion.b": 2, "parts.transformer.c": 3}
    recipe = Recipe(learning_rate=0.5, conditioning_rate=0.25)
    assert parameter_groups(named, recipe) == [
        {"params": [1, 3], "lr": 0.5}, {"params": [2], "lr": 0.25},
    ]  # fmt: skip
    assert parameter_groups({"parts.fusion.b": 2}, recipe) == [{"params": [2], "lr": 0.25}]
    assert Recipe(learning_rate=0.5).rate_of_conditioning == 0.5
    scaled = Recipe(batch_size=64, learning_rate=0.5, conditioning_rate=0.25, scale_rate=True)
    assert (scaled.rate, scaled.rate_of_conditioning) == (0.25, 0.125)


def test_what_muon_updates(work, model):  # noqa: F811
    """All matrices of the transformer's blocks, and no table, bias or other part's matrix."""
    named, muon = trained_parameters(Begun(model).model), Recipe(optimizer="muon")
    found = {name for name, _ in matrices_of(named, muon)}
    layers = [f"{attn}.{name}" for attn in ("attn1", "attn2") for name in
              ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip
    layers += ["ff.net.0.proj", "ff.net.2"]
    blocks = {name.split(".")[3] for name in found}
    wanted = {
        f"parts.transformer.transformer_blocks.{block}.{layer}.weight"
        for block in blocks
        for layer in layers
    }
    assert found == wanted and len(blocks) > 1
    assert not dict(matrices_of(named, Recipe()))


def test_a_first_update_of_muon(work, model, tmp_path):  # noqa: F811
    """A matrix moves by rate · 0.2 · √(longer side), along singular vectors of its gradient.

    The five iterations leave each singular value between 0.6 and 1.3 of that.
    """
    begun = Begun(model, *MUON)
    gradients = begun.gradients()
    before = {name: p.detach().clone() for name, p in trained_parameters(begun.model).items()}
    command.main([*usual(model, str(tmp_path / "O"), *MUON), "--steps", "1"])
    saved = load_file(tmp_path / "O" / CHECKPOINT)
    matrices = dict(matrices_of(before, Recipe(optimizer="muon")))
    for name, old in before.items():
        rate = 0.01 if name.startswith("parts.transformer.") else 0.02
        moved = old.double() * (1 - rate * 0.5) - saved[f"trained.{name}"].double()
        if name in matrices:
            left, values, right = torch.linalg.svd(gradients[name].double(), full_matrices=False)
            clear = values > 0.05 * values[0]  # the iterations leave tiny ones small
            along = ((left.T @ moved) * right).sum(1)[clear] / (0.01 * 0.2 * max(old.shape) ** 0.5)
            assert along.min() > 0.6 and along.max() < 1.3, name
        else:  # AdamW: the gradient's sign, as long as it is far above ε
            large = gradients[name].abs() > 1e-5
            signs = gradients[name].sign().double()
            assert torch.allclose(moved[large], rate * signs[large], rtol=0.02), name


def test_the_momentum_of_muon(work, model):  # noqa: F811
    """0.95, looked ahead by Nesterov's rule, as its authors have it."""
    optimizer = Begun(model, *MUON).stage.optimizer
    group = optimizer.param_groups[-1]
    assert isinstance(optimizer.parts[1], torch.optim.Muon)
    assert (group["momentum"], group["nesterov"], group["ns_steps"]) == (0.95, True, 5)


def test_a_training_with_muon_goes_on_to_the_bit(work, model, tmp_path):  # noqa: F811
    options = (*MUON, "--warmup_steps", "1", "--cooldown", "0.5")
    for output, all_steps in (("A", [4]), ("B", [2, 4])):
        for steps in all_steps:
            more = ["--steps", str(steps)] + ["--resume"] * (steps != all_steps[0])
            argv = usual(model, str(tmp_path / output), *options)
            if steps == 2:  # the rate is still that of four steps
                argv[argv.index("--cooldown") + 1] = "0"
            command.main([*argv, *more])
    once, twice = (load_file(tmp_path / name / CHECKPOINT) for name in "AB")
    assert once.keys() == twice.keys()
    assert any(name.endswith("momentum_buffer") for name in once)
    for name, value in once.items():
        assert torch.equal(value, twice[name]) or value.isnan().any(), name


def test_muon_keeps_one_number_of_a_weight(work, model):  # noqa: F811
    config = options_of(model)
    whole = estimate(model, config, 1, torch.float32, "cpu")
    found = estimate(model, config.with_settings(optimizer="muon"), 1, torch.float32, "cpu")
    named = trained_parameters(Begun(model).model)
    numbers = sum(each.numel() for _, each in matrices_of(named, Recipe(optimizer="muon")))
    assert numbers > 0 and whole.moments - found.moments == 4 * numbers
    assert moments_of(named, Recipe()) * 4 == whole.moments


def test_joined_optimisers():
    """Their groups and states are those of the parts, which a schedule changes as well."""
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    parts = torch.optim.SGD([first], lr=1.0, momentum=0.9), torch.optim.SGD([second], lr=0.5)
    joined = JoinedOptimizer(*parts)
    schedule = torch.optim.lr_scheduler.LambdaLR(joined, lambda step: 0.1 if step else 1.0)
    for parameter in (first, second):
        parameter.grad = torch.ones(2)
    joined.step()
    assert first.tolist() == [0, 0] and second.tolist() == [0.5, 0.5]
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in parts] == [0.1, 0.05]
    assert set(joined.state) == set(parts[0].state) == {first}
    with pytest.raises(ValueError, match="closure"):
        joined.step(lambda: 0)
    with pytest.raises(NotImplementedError, match="parts"):
        joined.load_state_dict(joined.state_dict())
