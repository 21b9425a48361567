"""The training loop by itself, on a problem of two numbers whose updates are worked out by hand."""

import errno
import math
import os
import signal
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import imagelab.io.tensors
from imagelab.errors import UserError
from imagelab.training import loop
from imagelab.training.checkpoint import read_checkpoint, read_curves, read_facts
from imagelab.training.interrupt import Interrupted
from imagelab.training.loop import Callback, Stage, Trainer
from imagelab.training.seeds import generator_for, seed_for

RATES = (0.1, 0.4, 0.2, 0.05, 0.3)


class Toy:
    """Stages that pull two numbers to places that depend on the step.

    ``events`` lists what happens; ``on_step(name, step)`` is called in the middle of a step, and
    ``spoil(loss)`` may change its loss.
    """

    def __init__(self):
        self.events, self.rates = [], []
        self.on_step = lambda name, step: None
        self.spoil = lambda loss: loss

    def make(self, name: str, steps: int, trainer: Trainer) -> Stage:
        self.events.append(f"make {name}")
        self.values = values = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
        optimizer = torch.optim.AdamW([values], lr=1.0, betas=(0.5, 0.75), weight_decay=0.125)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: RATES[step % 5])

        @contextmanager
        def losses(step):
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.events.append(f"{name} {step}")
            self.on_step(name, step)
            draw = torch.randn(2, generator=generator_for(0, name, step))
            loss = (values * draw).sum() + values.square().sum()
            aside = torch.tensor(math.nan) if step % 2 else loss.detach() * 2
            yield {"loss": self.spoil(loss), "aside": aside}
            self.events.append("left")

        def load_state(tensors):
            values.data.copy_(tensors["values"])

        self.stage = Stage(
            name, steps, [values], optimizer, schedule, losses,
            state=lambda: {"values": values.detach()}, load_state=load_state,
        )  # fmt: skip
        return self.stage

    def stages(self, **steps: int) -> dict:
        return {name: partial(self.make, name, count) for name, count in steps.items()}


class Counter(Callback):
    """Counts updates and keeps the norms of the unclipped gradients."""

    def __init__(self):
        self.count, self.norms = 0, []

    def before_update(self, trainer, stage, losses):
        self.norms.append(stage.parameters[0].grad.norm().item())

    def after_update(self, trainer, stage, step):
        self.count += 1

    def state(self):
        return {"count": torch.tensor(self.count)}

    def load_state(self, tensors):
        self.count = int(tensors["count"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "work" / "checkpoint.safetensors"


@pytest.fixture
def train(path):
    """Make a trainer with a clip of 1 and other options."""

    def make(**options) -> Trainer:
        return Trainer(path, {"of": "a test"}, **({"max_grad_norm": 1.0} | options))

    return make


def stand(toy: Toy, trainer: Trainer) -> list:
    """All that a run has to bring back: values, moments, schedule, curves; NaN as text."""
    state = toy.stage.optimizer.state[toy.values]
    schedule = toy.stage.schedule
    return [
        toy.values.tolist(),
        {key: value.tolist() for key, value in state.items()},
        (schedule.last_epoch, schedule.get_last_lr(), toy.stage.optimizer.param_groups[0]["lr"]),
        repr(trainer.curves),
    ]


# ----------------------------------------------------------------------------------------------
# seeds


def test_a_seed_is_the_start_of_a_sha256_over_seed_and_labels():
    """By `printf '7\\x1fstr:view\\x1fint:1\\x1fint:5' | sha256sum`."""
    assert seed_for(7, "view", 1, 5) == 0x47FBDF1EAE2B1F33 >> 1
    assert seed_for(0) == 0x5FECEB66FFC86F38 >> 1
    assert seed_for(0, 1) == 0xAC268F4EB0892951 >> 1
    assert seed_for(0, "1") == 0x9B285B6783C4B5AF >> 1


# ----------------------------------------------------------------------------------------------
# updates


def test_updates_are_adamw_at_the_rates_of_the_schedule_on_clipped_gradients(train):
    """Worked out in plain numbers: p − rate·decay·p − rate·m̂/(√v̂ + ε)."""
    toy, trainer = Toy(), train()
    trainer.run(toy.stages(a=5))
    values, mean, square = [2.0, -1.0], [0.0, 0.0], [0.0, 0.0]
    for step, rate in enumerate(RATES):
        draw = torch.randn(2, generator=generator_for(0, "a", step)).tolist()
        gradient = [d + 2 * v for d, v in zip(draw, values, strict=True)]
        norm = math.hypot(*gradient)
        gradient = [g * min(1.0, 1.0 / norm) for g in gradient]
        for i, g in enumerate(gradient):
            mean[i] = 0.5 * mean[i] + 0.5 * g
            square[i] = 0.75 * square[i] + 0.25 * g * g
            least = math.sqrt(square[i] / (1 - 0.75 ** (step + 1))) + 1e-8
            values[i] -= rate * 0.125 * values[i]
            values[i] -= rate * mean[i] / (1 - 0.5 ** (step + 1)) / least
    assert toy.rates == list(RATES)
    assert toy.values.tolist() == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize(("limit", "norm"), [(1.0, 1.0), (5.0, 5.0), (20.0, 10.0)])
def test_gradients_are_clipped_to_the_norm_and_not_below(train, limit, norm):
    """A gradient of (6, 8), whose norm is 10."""
    toy, trainer, seen = Toy(), train(max_grad_norm=limit, callbacks=[Counter()]), []
    stage = toy.make("a", 1, trainer)

    @contextmanager
    def losses(step):
        yield {"loss": (stage.parameters[0] * torch.tensor([6.0, 8.0])).sum()}

    stage.losses = losses
    stage.optimizer.register_step_pre_hook(lambda *_: seen.append(toy.values.grad.tolist()))
    trainer.run({"a": lambda _: stage})
    assert seen[0] == pytest.approx([0.6 * norm, 0.8 * norm], rel=1e-5)
    assert trainer.callbacks[0].norms == [10.0]  # a callback sees them unclipped


def test_gradients_of_one_step_are_not_added_to_the_next(train):
    toy, trainer = Toy(), train(max_grad_norm=1e9, callbacks=[Counter()])
    trainer.run(toy.stages(a=1))
    again = Toy()
    twice = train(max_grad_norm=1e9, callbacks=[Counter()])
    values = []
    again.on_step = lambda name, step: values.append(again.values.tolist())
    twice.run(again.stages(a=2))
    draw = torch.randn(2, generator=generator_for(0, "a", 1)).tolist()
    gradient = [d + 2 * v for d, v in zip(draw, values[1], strict=True)]
    assert twice.callbacks[0].norms[0] == trainer.callbacks[0].norms[0]
    assert twice.callbacks[0].norms[1] == pytest.approx(math.hypot(*gradient), rel=1e-5)


def test_the_backward_pass_belongs_to_the_losses(train):
    toy, trainer = Toy(), train()

    def spoil(loss):
        loss.register_hook(lambda _: toy.events.append("backward"))
        return loss

    toy.spoil = spoil
    trainer.run(toy.stages(a=1))
    assert toy.events == ["make a", "a 0", "backward", "left"]


def test_curves_hold_every_step_in_order_nan_included(train, path):
    toy, trainer = Toy(), train()
    trainer.run(toy.stages(a=3, b=2))
    assert list(trainer.curves) == ["loss", "aside"]
    loss, aside = trainer.curves["loss"], trainer.curves["aside"]
    assert len(loss) == len(aside) == 5
    assert [math.isnan(value) for value in aside] == [False, True, False, False, True]
    for at in (0, 2, 3):
        assert aside[at] == 2 * loss[at]
    assert repr(read_curves(path)) == repr(trainer.curves)
    assert loss[0] == loss_of("a", 0, (2.0, -1.0)) and loss[3] == loss_of("b", 0, (2.0, -1.0))


def loss_of(name: str, step: int, values: tuple[float, float]) -> float:
    draw = torch.randn(2, generator=generator_for(0, name, step)).tolist()
    terms = [v * d + v * v for v, d in zip(values, draw, strict=True)]
    return pytest.approx(sum(terms), rel=1e-5)


@pytest.mark.parametrize("read_every", [2, 3, 100])
def test_reading_the_losses_seldom_changes_nothing(train, path, read_every):
    plain, often = Toy(), train()
    often.run(plain.stages(a=5, b=4))
    toy, seldom = Toy(), train(read_every=read_every, checkpoint_steps=4)
    seldom.run(toy.stages(a=5, b=4))
    assert stand(toy, seldom) == stand(plain, often)
    assert repr(read_curves(path)) == repr(often.curves)


def test_losses_that_make_the_gradients_themselves(train):
    """The trainer then runs no backward pass, and clips, steps and records as ever."""
    plain, alone = Toy(), train()
    alone.run(plain.stages(a=4))
    toy, trainer = Toy(), train()
    stage = toy.make("a", 4, trainer)
    losses = stage.losses

    @contextmanager
    def with_gradients(step):
        with losses(step) as found:
            (gradient,) = torch.autograd.grad(found["loss"], toy.values)
            toy.values.grad = gradient
            yield {name: loss.detach() for name, loss in found.items()}

    stage.losses, stage.makes_gradients = with_gradients, True
    trainer.run({"a": lambda _: stage})
    assert stand(toy, trainer) == stand(plain, alone)


# ----------------------------------------------------------------------------------------------
# stages


def test_stages_are_made_in_order_when_their_turn_comes_and_announced_once_saved(train, path):
    toy, trainer = Toy(), train()

    def after_stage(name):
        saved = read_checkpoint(path)
        toy.events.append(f"after {name}: {saved.stage} {saved.step}")

    trainer.run(toy.stages(a=1, b=2), after_stage=after_stage)
    assert [event for event in toy.events if event != "left"] == [
        "make a", "a 0", "after a: a 1", "make b", "b 0", "b 1", "after b: b 2",
    ]  # fmt: skip


def test_a_resumed_run_makes_no_stage_that_is_over(train, path):
    toy = Toy()
    toy.on_step = lambda name, step: name == "b" and step == 1 and stop()
    with pytest.raises(RuntimeError):
        train(checkpoint_steps=1).run(toy.stages(a=2, b=3, c=1))
    toy = Toy()
    train().run(toy.stages(a=2, b=3, c=1), read_checkpoint(path))
    made = [event for event in toy.events if event != "left"]
    assert made == ["make b", "b 1", "b 2", "make c", "c 0"]


def test_a_callback_hears_where_a_stage_begins_or_goes_on(train, path):
    heard = []

    class Listener(Callback):
        def before_stage(self, trainer, stage, first):
            heard.append((stage.name, first))

    toy = Toy()
    toy.on_step = lambda name, step: name == "b" and step == 2 and stop()
    with pytest.raises(RuntimeError):
        train(checkpoint_steps=1, callbacks=[Listener()]).run(toy.stages(a=2, b=3))
    train(callbacks=[Listener()]).run(Toy().stages(a=2, b=3), read_checkpoint(path))
    assert heard == [("a", 0), ("b", 0), ("b", 2)]


def stop():
    raise RuntimeError("stopped")


# ----------------------------------------------------------------------------------------------
# checkpoints


def saved_steps(monkeypatch) -> list:
    """(stage, step) of every checkpoint that is written from now on."""
    written, write = [], loop.write_checkpoint

    def noted(path, checkpoint):
        written.append((checkpoint.stage, checkpoint.step))
        write(path, checkpoint)

    monkeypatch.setattr(loop, "write_checkpoint", noted)
    return written


def test_checkpoints_are_written_at_the_asked_steps_and_at_the_end(train, monkeypatch):
    written = saved_steps(monkeypatch)
    train(checkpoint_steps=2).run(Toy().stages(a=5, b=2))
    assert written == [("a", 2), ("a", 4), ("a", 5), ("b", 2)]
    written.clear()
    train().run(Toy().stages(a=5))
    assert written == [("a", 5)]


def test_checkpoints_are_written_after_the_asked_seconds(train, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    written = saved_steps(monkeypatch)
    toy, trainer = Toy(), train(checkpoint_seconds=25)

    def tick(name, step):
        clock[0] += 10

    toy.on_step = tick
    trainer.run(toy.stages(a=8))
    assert written == [("a", 3), ("a", 6), ("a", 8)]


def test_another_process_writes_nothing(train, path):
    trainer = train(checkpoint_steps=1, is_writer=False)
    trainer.run(Toy().stages(a=2))
    assert not path.parent.exists()


def test_a_checkpoint_says_of_which_run_it_is(train, path):
    train().run(Toy().stages(a=2))
    facts = read_facts(path)
    assert facts["of"] == "a test" and facts["curves"] == ["loss", "aside"]


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(
    "stage, step", [*(("a", s) for s in range(4)), *(("b", s) for s in (0, 1, 2))]
)
def test_a_run_resumed_at_any_step_equals_one_that_was_not_stopped(
    train, path, interruptible, stage, step, fp16
):
    """Values, moments, counts of steps, rates, curves and the callback's count, to the bit."""
    counts = {"a": 4, "b": 3}
    whole, alone = Toy(), train(callbacks=[Counter()], fp16=fp16)
    alone.run(whole.stages(**counts))
    toy = Toy()
    toy.on_step = lambda *at: at == (stage, step) and signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped after step {step + 1} of {stage}"):
        train(callbacks=[Counter()], fp16=fp16).run(toy.stages(**counts))
    saved = read_checkpoint(path)
    assert (saved.stage, saved.step) == (stage, step + 1)
    resumed, trainer = Toy(), train(callbacks=[Counter()], fp16=fp16)
    trainer.run(resumed.stages(**counts), saved)
    assert stand(resumed, trainer) == stand(whole, alone)
    assert trainer.callbacks[0].count == 7
    assert trainer.scaler.state_dict() == alone.scaler.state_dict()
    assert resumed.rates == whole.rates[7 - len(resumed.rates) :]


def test_what_cannot_be_read_in_the_middle_costs_no_step(train, path):
    """The steps before are saved; the run goes on from there as if it had not ended."""
    whole = Toy()
    trainer = train()
    trainer.run(whole.stages(a=5))
    wanted = stand(whole, trainer)
    path.unlink()
    toy = Toy()

    def fail(name: str, step: int) -> None:
        if step == 3:
            raise UserError("picture 7 is gone")

    toy.on_step = fail
    with pytest.raises(UserError, match="picture 7 is gone"):
        train().run(toy.stages(a=5))
    assert read_checkpoint(path).step == 3
    again, trainer = Toy(), train()
    trainer.run(again.stages(a=5), read_checkpoint(path))
    assert stand(again, trainer) == wanted


def test_what_cannot_be_read_at_first_leaves_nothing(train, path):
    toy = Toy()
    toy.on_step = lambda name, step: (_ for _ in ()).throw(UserError("no list"))
    with pytest.raises(UserError, match="no list"):
        train().run(toy.stages(a=5))
    assert not path.exists()


def test_a_full_disk_leaves_the_former_checkpoint(train, path, monkeypatch):
    save_file, toy = imagelab.io.tensors.save_file, Toy()

    def full(tensors, aside, *rest):
        save_file(tensors, aside, *rest)
        os.truncate(aside, 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(name, step):
        if step == 3:
            monkeypatch.setattr(imagelab.io.tensors, "save_file", full)

    toy.on_step = fill
    with pytest.raises(OSError, match="No space left"):
        train(checkpoint_steps=2).run(toy.stages(a=6))
    assert toy.events[-2] == "a 3"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(imagelab.io.tensors, "save_file", save_file)
    saved = read_checkpoint(path)
    assert saved.step == 2
    whole, alone = Toy(), train()
    alone.run(whole.stages(a=6))
    resumed, trainer = Toy(), train()
    trainer.run(resumed.stages(a=6), saved)
    assert stand(resumed, trainer) == stand(whole, alone)


# ----------------------------------------------------------------------------------------------
# Ctrl-C


def test_a_second_ctrl_c_stops_in_the_middle_of_the_step(train, path, interruptible):
    toy = Toy()

    def press(name, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            toy.events.append("between")
            signal.raise_signal(signal.SIGINT)
            toy.events.append("not reached")

    toy.on_step = press
    trainer = train(checkpoint_steps=1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.run(toy.stages(a=4))
    assert not isinstance(stopped.value, Interrupted)
    assert toy.events[-1] == "between"
    assert read_checkpoint(path).step == len(trainer.curves["loss"]) == 2


def test_ctrl_c_is_as_before_once_the_run_has_ended(train, interruptible):
    former = signal.getsignal(signal.SIGINT)
    train().run(Toy().stages(a=1))
    assert signal.getsignal(signal.SIGINT) is former


# ----------------------------------------------------------------------------------------------
# numbers that are not finite


def infinite_above(limit: float, tries: list):
    """Spoils losses: the gradient is infinite while the scale of fp16 is above a limit."""

    def spoil(loss):
        def hook(gradient):
            tries.append(gradient.item())
            return gradient * math.inf if gradient.item() > limit else gradient

        loss.register_hook(hook)
        return loss

    return spoil


def test_a_step_that_overflows_in_fp16_is_made_again_at_half_the_scale(train):
    """Nothing of the failed tries is left: powers of two scale exactly."""
    plain, alone = Toy(), train()
    alone.run(plain.stages(a=4))
    toy, trainer, tries = Toy(), train(fp16=True), []
    toy.spoil = infinite_above(16384.0, tries)
    trainer.run(toy.stages(a=4))
    assert tries == [65536.0, 32768.0, *[16384.0] * 4]
    assert stand(toy, trainer) == stand(plain, alone)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(train, path, of, fp16):
    toy, before = Toy(), []
    trainer = train(checkpoint_steps=2, fp16=fp16)

    def begin(name, step):
        if step == 3:
            before[:] = path.read_bytes(), toy.values.tolist()
            toy.spoil = (
                infinite_above(0.0, []) if of == "gradient" else lambda loss: loss * math.nan
            )

    toy.on_step = begin
    with pytest.raises(FloatingPointError, match="not finite at step 3 of a"):
        trainer.run(toy.stages(a=6))
    assert [path.read_bytes(), toy.values.tolist()] == before
    assert read_checkpoint(path).step == 2 and len(trainer.curves["loss"]) == 3


def test_what_is_not_finite_is_found_when_the_losses_are_read(train, path):
    """Before a checkpoint is written, too: the last one holds nothing of it."""
    toy = Toy()
    toy.on_step = lambda name, step: setattr(
        toy, "spoil", (lambda loss: loss * math.nan) if step == 3 else (lambda loss: loss)
    )
    trainer = train(read_every=100, checkpoint_steps=2)
    with pytest.raises(FloatingPointError, match="not finite at step 3 of a"):
        trainer.run(toy.stages(a=6))
    saved = read_checkpoint(path)
    assert saved.step == 2 and saved.tensors["trained.values"].isfinite().all()


def test_fp16_looks_at_each_gradient(tmp_path):
    with pytest.raises(ValueError, match="read_every must be 1"):
        Trainer(tmp_path / "c.safetensors", {}, max_grad_norm=1.0, fp16=True, read_every=2)
