"""Callbacks of the training loop, and what stages may ask of it, on a number or two."""

import json
import math
import os
import signal
from contextlib import contextmanager, nullcontext

import pytest
import torch
from thin import free_port
from torch.optim.lr_scheduler import LambdaLR

from imagelab.processes import Processes
from imagelab.training import callbacks
from imagelab.training.callbacks import Ema, Report, SharedGradients, Stopwatch, TimeBudget
from imagelab.training.checkpoint import pack_optimizer, read_checkpoint, unpack_optimizer
from imagelab.training.interrupt import Interrupted
from imagelab.training.loop import Callback, Stage, Trainer


def make_stage(steps, gradient=lambda step: (1.0, 1.0), rate=lambda step, steps: 1.0) -> Stage:
    """Two numbers from (2, −1) on, which plain descent moves by the gradients of the steps."""
    values = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = torch.optim.SGD([values], lr=0.5)

    @contextmanager
    def losses(step):
        yield {"loss": (values * torch.tensor(gradient(step))).sum()}

    stage = Stage(
        "a", steps, [values], optimizer, None, losses,
        state=lambda: {"values": values.detach()},
        load_state=lambda tensors: values.data.copy_(tensors["values"]),
    )  # fmt: skip
    stage.schedule = LambdaLR(optimizer, lambda step: rate(step, stage.steps))
    return stage


@pytest.fixture
def train(tmp_path):
    """Run a stage with a clip that clips nothing, going on from its checkpoint if there is one."""

    def run(stage: Stage, **options) -> Trainer:
        path = tmp_path / "checkpoint.safetensors"
        trainer = Trainer(path, {}, **({"max_grad_norm": 1e9} | options))
        trainer.run({"a": lambda _: stage}, read_checkpoint(path) if path.is_file() else None)
        return trainer

    return run


def values_of(stage: Stage) -> list[float]:
    return stage.parameters[0].tolist()


class At(Callback):
    """Does something after an update."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def after_update(self, trainer, stage, step):
        if step == self.step:
            self.act()


# ----------------------------------------------------------------------------------------------
# the average of the weights


def test_the_average_by_hand(train):
    """The first number is 2, then 1.5, 1, 0.5; it moves by 9/10, 9/11 and 9/12, at least 4/5."""
    stage = make_stage(3)
    ema = Ema(stage.parameters, decay=0.2)
    train(stage, callbacks=[ema])
    first = 2 + (1.5 - 2) * 0.9
    second = first + (1.0 - first) * 9 / 11
    third = second + (0.5 - second) * 0.8
    assert ema.average[0][0].item() == pytest.approx(third)
    with ema.shown():
        assert values_of(stage)[0] == pytest.approx(third)
        assert ema.average[0][0].item() == 0.5
    assert values_of(stage) == [0.5, -2.5]
    ema.swap()
    assert values_of(stage)[0] == pytest.approx(third)


def test_what_callbacks_keep_goes_on_with_a_resumed_run(train, monkeypatch, interruptible):
    """The average to the bit, and the seconds of both runs: half a second a step."""
    clock = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])

    def run(stage, press=None):
        tick = [At(step, lambda: clock.__setitem__(0, clock[0] + 0.5)) for step in range(5)]
        kept = [Ema(stage.parameters, 0.9), Stopwatch()]
        train(stage, callbacks=[*tick, *kept, At(press, lambda: signal.raise_signal(2))])
        return kept

    with pytest.raises(Interrupted, match="after step 3 of a"):
        run(make_stage(5), 2)
    clock[0] += 100
    ema, stopwatch = run(make_stage(5))
    whole = make_stage(5)
    alone = Ema(whole.parameters, 0.9)
    for step in range(5):
        whole.parameters[0].data -= 0.5
        alone.after_update(None, whole, step)
    assert torch.equal(ema.average[0], alone.average[0])
    assert stopwatch.seconds == 2.5


# ----------------------------------------------------------------------------------------------
# reports and time


def test_reports_come_every_so_many_updates_from_the_process_that_writes(train):
    seen = []
    train(make_stage(7), callbacks=[Report(3, seen.append)], checkpoint_steps=None)
    assert seen == [3, 6]
    other = Trainer("nowhere", {}, max_grad_norm=1.0, is_writer=False)
    Report(1, seen.append).after_step(other, make_stage(1), 0)
    assert seen == [3, 6]


def test_what_is_due_is_saved_before_it_is_reported(train, tmp_path):
    """A report that fails costs no step."""

    def fail(done: int) -> None:
        raise OSError("no room for a picture")

    with pytest.raises(OSError, match="no room"):
        train(make_stage(7), callbacks=[Report(4, fail)], checkpoint_steps=4)
    assert read_checkpoint(tmp_path / "checkpoint.safetensors").step == 4


def test_a_time_fixes_the_steps_half_way_and_a_file_keeps_them(tmp_path, monkeypatch):
    trainer = Trainer("nowhere", {}, max_grad_norm=1.0)
    clock = iter([100.0, 101.0, 104.0, 106.0])
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(TimeBudget, "WARMING", 10)
    path, stage = tmp_path / "steps.json", make_stage(7)
    budget = TimeBudget(path, 111.0, Processes("cpu"))
    budget.before_stage(trainer, stage, 1000)
    for done in (1009, 1010, 1040):  # too early; the pace is measured from here; 10 a second
        budget.after_update(trainer, stage, done - 1)
        assert stage.steps is None
    budget.after_update(trainer, stage, 1059)  # after 5 of 10 seconds: 50 steps took them
    assert stage.steps == 1110
    again = make_stage(7)
    TimeBudget(path, 500.0, Processes("cpu")).before_stage(trainer, again, 1060)
    assert again.steps == 1110 == json.loads(path.read_text())["steps"]


def test_a_stage_of_unknown_length_ends_where_a_callback_says(train):
    stage = make_stage(None)
    trainer = train(stage, callbacks=[At(2, lambda: setattr(stage, "steps", 5))])
    assert len(trainer.curves["loss"]) == 5
    assert values_of(stage) == [2 - 2.5, -1 - 2.5]


def test_the_rate_of_a_longer_run_is_anew_from_its_first_step(train):
    """A run of two steps at rate ½·(steps − step), prolonged to four."""

    def rate(step, steps):
        return steps - step

    train(make_stage(2, rate=rate))
    prolonged = make_stage(4, rate=rate)
    train(prolonged)
    assert values_of(prolonged)[0] == 2 - 0.5 * (2 + 1 + 2 + 1)


# ----------------------------------------------------------------------------------------------
# gradients and losses


def test_a_stage_may_make_its_gradients_itself(train):
    """As a CUDA graph does, which writes each step's gradients to where the first ones were."""
    stage = make_stage(3)
    values = stage.parameters[0]
    values.grad = place = torch.zeros(2)

    def losses(step):
        place.copy_(torch.tensor([step, 1.0]))
        return nullcontext({"loss": torch.tensor(float(step))})

    stage.losses, stage.makes_gradients = losses, True
    trainer = train(stage)
    assert values.grad is place
    assert values_of(stage) == [2 - 0.5 * (0 + 1 + 2), -1 - 0.5 * 3]
    assert trainer.curves["loss"] == [0, 1, 2]


class Lengths(list, Callback):
    """How many losses the trainer knows after each update."""

    def after_update(self, trainer, stage, step):
        self.append(len(trainer.curves.get("loss", ())))


def test_losses_are_read_now_and_then_and_before_they_are_saved(train):
    lengths = Lengths()
    trainer = train(make_stage(8), read_every=3, checkpoint_steps=5, callbacks=[lengths])
    assert lengths == [0, 0, 3, 3, 3, 6, 6, 6]
    assert trainer.curves["loss"] == [1 - step for step in range(8)]


def test_what_is_not_finite_is_never_saved_though_it_is_read_late(train, tmp_path):
    stage = make_stage(20, gradient=lambda step: (math.nan if step == 6 else 1.0, 1.0))
    with pytest.raises(FloatingPointError, match="not finite at step 6 of a"):
        train(stage, read_every=50, checkpoint_steps=4)
    assert read_checkpoint(tmp_path / "checkpoint.safetensors").step == 4


def test_counts_of_steps_go_where_the_optimiser_keeps_them():
    """A fused AdamW counts on the device of its parameters, a plain one on the CPU."""
    values = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([values], fused=True)
    values.grad = torch.ones(2)
    optimizer.step()
    packed = {name: tensor.clone() for name, tensor in pack_optimizer(optimizer).items()}
    other = torch.nn.Parameter(values.detach().clone())
    resumed = torch.optim.AdamW([other], fused=True)
    unpack_optimizer(resumed, packed)
    for parameter, each in ((values, optimizer), (other, resumed)):
        parameter.grad = torch.tensor([0.5, -1.0])
        each.step()
    assert torch.equal(values, other)
    elsewhere = torch.nn.Parameter(torch.ones(2, device="meta"))
    for fused, kind in ((True, "meta"), (False, "cpu")):
        there = torch.optim.AdamW([elsewhere])
        there.param_groups[0]["fused"] = fused
        unpack_optimizer(there, packed)
        assert there.state[elsewhere]["step"].device.type == kind
        assert there.state[elsewhere]["exp_avg"].device.type == "meta"


# ----------------------------------------------------------------------------------------------
# several processes


def share(index, port, folder):
    """One of two processes, whose gradients are (0, 4) and (2, 0); the second gets a Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(
        WORLD_SIZE="2", RANK=str(index), LOCAL_RANK=str(index),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    processes = Processes("cpu")
    stage = make_stage(100, gradient=lambda step: ((0.0, 4.0), (2.0, 0.0))[index])
    path = folder / f"{index}.safetensors"
    press = At(4, lambda: signal.raise_signal(signal.SIGINT) if index else None)
    trainer = Trainer(
        path, {}, max_grad_norm=1e9, read_every=3, callbacks=[SharedGradients(processes), press]
    )
    with pytest.raises(Interrupted, match="after step 6 of a"):  # when the losses are read
        trainer.run({"a": lambda _: stage})
    assert values_of(stage) == [2 - 0.5 * 6, -1 - 0.5 * 6 * 2]
    assert trainer.curves["loss"] == [-1 + 0.0 - 2.5 * step + 1 for step in range(6)]
    processes.leave()


def test_processes_share_gradients_and_losses_and_stop_together(tmp_path):
    shared = (free_port(), tmp_path)
    torch.multiprocessing.start_processes(share, shared, nprocs=2, start_method="fork")
    first, second = (read_checkpoint(tmp_path / f"{index}.safetensors") for index in (0, 1))
    assert first.step == second.step == 6
    assert torch.equal(first.tensors["trained.values"], second.tensors["trained.values"])
