"""The pretend device is strict: a move between devices that is left out makes a run fail.

Each case names a function of the project, and what it does not do: ``.to`` of its tensors or of its
modules, or ``.cpu``.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from device_runs import learn, on, paint, stopped_after
from PIL import Image
from pretend_device import pretend
from torch import Tensor, nn

PAINTING = [
    (nn.Module, "to", "prepare"),
    (Tensor, "to", "StableDiffusion.encode_text"),
    (Tensor, "to", "paint"),
    (Tensor, "cpu", "to_picture"),
    (Tensor, "cpu", "Refiner.refine"),
    (Tensor, "to", "RegionSet.at.<locals>.make"),
    (Tensor, "to", "BoxControl.__init__"),
]
LEARNING = [
    (nn.Module, "to", "Session.__init__"),
    (Tensor, "to", "Session.__init__"),
    (Tensor, "to", "StableDiffusion.encode"),
    (Tensor, "cpu", "Views.__init__"),
    (Tensor, "to", "Views.draw"),
    (Tensor, "cpu", "encode_class_images"),
    (Tensor, "to", "LoRALinear.__init__"),
    (Tensor, "to", "asset_maps"),
    (Tensor, "cpu", "asset_maps"),
]
RESUMING = [(Tensor, "to", "unpack_optimizer")]
#: How torch says that tensors are on different devices.
REFUSALS = "same device|numpy"


def calling_function() -> str:
    """The project's function that has called a function of torch, maybe by way of libraries."""
    frame = sys._getframe(2)
    while "site-packages" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_qualname.removesuffix(".<locals>.<listcomp>")


@pytest.fixture
def left_out(monkeypatch):
    """Within, one function's calls of a method do nothing; there must be such a call."""

    @contextmanager
    def leave_out(owner: type, name: str, function: str):
        method, calls = getattr(owner, name), []

        def mutant(self, *args, **kwargs):
            if calling_function() != function:
                return method(self, *args, **kwargs)
            calls.append(args)
            return self

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, mutant)
            yield
        assert calls, f"{function} calls no .{name} (any more): bring this list up to date"

    return leave_out


@pytest.fixture(scope="module")
def argv(thin_argv, tmp_path_factory) -> list[str]:
    """Learning in few steps, with a picture of the class."""
    folder = tmp_path_factory.mktemp("chairs")
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(folder / "chair.png")
    options = f"--class_images {folder} --prior_weight 1 --train_steps 1 --finetune_steps 2"
    return [*thin_argv, *options.split()]


@pytest.fixture(scope="module")
def learned(argv, tmp_path_factory) -> Path:
    return learn(argv, tmp_path_factory.mktemp("learned"))


def name_of(value) -> str:
    return getattr(value, "__name__", value)


@pytest.mark.parametrize("owner, name, function", LEARNING, ids=name_of)
def test_learning_fails_without(owner, name, function, argv, left_out, tmp_path):
    with pretend("cuda"), left_out(owner, name, function):  # noqa: SIM117
        with pytest.raises((RuntimeError, TypeError), match=REFUSALS):
            learn(argv, tmp_path, *on("cuda", "no"))


@pytest.mark.parametrize("owner, name, function", RESUMING, ids=name_of)
def test_resuming_fails_without(owner, name, function, argv, left_out, tmp_path):
    with pretend("cuda"), stopped_after(2):
        learn(argv, tmp_path, *on("cuda", "no"))
    with pretend("cuda"), left_out(owner, name, function):  # noqa: SIM117
        with pytest.raises((RuntimeError, TypeError), match=REFUSALS):
            learn(argv, tmp_path, *on("cuda", "no"), "--resume")


@pytest.mark.parametrize("owner, name, function", PAINTING, ids=name_of)
def test_painting_fails_without(owner, name, function, learned, left_out, tmp_path):
    with pretend("cuda"), left_out(owner, name, function):  # noqa: SIM117
        with pytest.raises((RuntimeError, TypeError), match=REFUSALS):
            paint(learned, tmp_path, *on("cuda", "no"))
