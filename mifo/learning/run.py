"""Semantic learning: the two stages, from a plan to a learned folder."""

import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from imagelab.errors import memory_errors
from imagelab.training.checkpoint import (
    Checkpoint,
    pack_optimizer,
    read_checkpoint,
    unpack_optimizer,
    write_checkpoint,
)
from mifo.learned import (
    FORMAT,
    PIPELINE,
    LearnedFolder,
    load_learned,
    replacing,
    write_learned,
    write_pipeline,
)
from mifo.learning.objective import Views, step_loss, supervised_layers
from mifo.learning.phrases import fit_phrases
from mifo.learning.plan import CHECKPOINT, Plan, check_same, inputs_of, kept_settings
from mifo.learning.priors import class_latents, encode_class_images
from mifo.tokens import asset_token, lend_rows, write_rows
from mifo_lora import inject, load_lora, lora_parameters, lora_state_dict

log = logging.getLogger(__name__)

UNET_TARGETS = tuple(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
TEXT_TARGETS = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C, at the end of a step, which is saved."""


class _Run:
    """The state of a run: what is trained, by what, and what has been seen."""

    def __init__(self, plan: Plan):
        config, base = plan.config, plan.base
        self.plan, self.config, self.base = plan, config, base
        self.generator = torch.Generator().manual_seed(config.seed)
        self.losses: dict[str, list[float]] = {"loss": [], "reconstruction": [], "attention": []}
        self.ids = plan.ids
        self.rows = torch.nn.Parameter(plan.rows.to(plan.device, copy=True))
        base.vae.to(plan.device)  # while it is alone there
        self.views = Views(base, plan.instance, self.ids, plan.device)
        base.vae.to("cpu")  # learning itself does without it
        base.text_encoder.to(plan.device)
        full = config.finetune == "full"
        base.unet.to(plan.device, torch.float32 if full else plan.dtype)
        if config.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        self.inputs = inputs_of(plan)
        self.scaler = torch.amp.GradScaler(
            plan.device.split(":")[0], enabled=plan.dtype == torch.float16
        )
        self.prior: Tensor | None = None
        self.optimizer: torch.optim.Optimizer
        self.schedule = None

    @property
    def modules(self) -> tuple:
        return self.base.unet, self.base.text_encoder

    def begin(self) -> None:
        """Fit the rows that start as phrases."""
        if words := self.config.initializer_tokens:
            base, start = self.base, self.rows.detach()
            fitted = fit_phrases(base.tokenizer, base.text_encoder, self.ids, words, start)
            self.rows.data.copy_(fitted)

    def enter(self, stage: int, steps: int) -> None:
        """Make what a stage trains trainable, with an optimiser of its own."""
        config = self.config
        parameters: list[Tensor] = [self.rows]
        rate = config.learning_rate
        if stage == 2:
            rate = config.stage_two_learning_rate
            if config.finetune == "lora":
                draw = torch.Generator().manual_seed(config.seed)
                inject(self.base.unet, UNET_TARGETS, config.lora_rank, generator=draw)
                inject(self.base.text_encoder, TEXT_TARGETS, config.lora_rank, generator=draw)
                parameters += [p for module in self.modules for p in lora_parameters(module)]
                for parameter in parameters:
                    parameter.requires_grad_()
            else:
                table = self.base.text_encoder.get_input_embeddings().weight
                for module in self.modules:
                    module.requires_grad_(True)
                table.requires_grad_(False)
                parameters += [p for m in self.modules for p in m.parameters() if p.requires_grad]
        self.trained = parameters
        self.optimizer = optimizer_class(config.optimizer)(
            parameters, lr=rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        from diffusers.optimization import get_scheduler

        self.schedule = get_scheduler(
            "cosine_with_restarts" if stage == 1 else "constant",
            self.optimizer,
            num_warmup_steps=config.warmup_steps if stage == 1 else 0,
            num_training_steps=steps,
        )

    def attention_loss(self, stage: int, step: int) -> str | None:
        """The key of ATTENTION_LOSSES that a step is regularised with; None for none."""
        chosen = self.config.attention_loss
        if chosen == "none" or (chosen == "reward" and stage == 2):
            return None
        if chosen != "mifo":
            return chosen
        return "reward" if stage == 1 and step < self.config.reward_steps else "penalty"

    def step(self, stage: int, step: int, layers: list[str]) -> float:
        prior = self.prior if stage == 2 else None
        batch = self.views.draw(self.generator, prior, self.config.class_prompt)
        attention_loss = self.attention_loss(stage, step)
        weights = self.config.prior_weight, self.config.attention_weight
        with ExitStack() as kept:
            with (
                lend_rows(self.base.text_encoder, self.ids, self.rows),
                torch.autocast(
                    self.plan.device.split(":")[0],
                    self.plan.dtype,
                    enabled=self.config.finetune == "full" and self.plan.dtype != torch.float32,
                ),
            ):
                loss = step_loss(self.base, batch, layers, attention_loss, *weights, kept)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss.total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        scale = self.scaler.get_scale()  # 1 unless in fp16, whose scaler leaves out a step that
        if not (loss.total.isfinite() and (norm.isfinite() or scale > 1)):  # overflows, and halves
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {step} of stage {stage}; nothing "
                "was overwritten: go on with --mixed_precision no, or start anew with a smaller "
                "learning rate and --overwrite"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # the step was not left out
            self.schedule.step()
        attention = torch.stack(loss.attention).sum().item() if loss.attention else float("nan")
        self.losses["loss"].append(loss.total.item())
        self.losses["reconstruction"].append(loss.reconstruction.item())
        self.losses["attention"].append(attention)
        return self.losses["loss"][-1]

    def checkpoint(self, stage: int, step: int) -> Checkpoint:
        tensors = {"rows": self.rows.detach().cpu(), "generator": self.generator.get_state()}
        tensors |= {
            f"losses.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self.losses.items()
        }
        tensors |= pack_optimizer(self.optimizer)
        for part, module in zip(("unet", "text_encoder"), self.modules, strict=True):
            state = {}
            if stage == 2 and self.config.finetune == "lora":
                state = lora_state_dict(module)
            elif stage == 2:
                state = {k: v.cpu() for k, v in module.state_dict().items()}
            tensors |= {f"{part}:{key}": value for key, value in state.items()}
        facts = {"settings": kept_settings(self.config), "inputs": self.inputs}
        facts["scaler"] = self.scaler.state_dict()
        facts["schedule"] = self.schedule.state_dict()
        facts["schedule"].pop("lr_lambdas", None)
        return Checkpoint(stage, step, tensors, facts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """After :meth:`enter` of the checkpoint's stage."""
        tensors = checkpoint.tensors
        with torch.no_grad():
            self.rows.copy_(tensors["rows"])
        self.generator.set_state(tensors["generator"])
        self.losses = {key: tensors[f"losses.{key}"].tolist() for key in self.losses}
        for part, module in zip(("unet", "text_encoder"), self.modules, strict=True):
            found = {
                k.removeprefix(f"{part}:"): v
                for k, v in tensors.items()
                if k.startswith(f"{part}:")
            }
            if found and self.config.finetune == "lora":
                load_lora(module, found)
            elif found:
                module.load_state_dict(found)
        unpack_optimizer(self.optimizer, tensors)
        self.schedule.load_state_dict(
            {**self.schedule.state_dict(), **checkpoint.facts["schedule"]}
        )
        for group, rate in zip(
            self.optimizer.param_groups, checkpoint.facts["schedule"]["_last_lr"], strict=True
        ):
            group["lr"] = rate
        if scale := checkpoint.facts.get("scaler"):
            self.scaler.load_state_dict(scale)


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """AdamW, or bitsandbytes' with its moments in 8 bits."""
    if name == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def learn(
    plan: Plan, resume: bool = False, after_stage: Callable[[int, Path], None] | None = None
) -> Path:
    """Run both stages and write the learned folder, which appears only when complete.

    Args:
        plan: what to do.
        resume: go on from the checkpoint of an unfinished run.
        after_stage: called with each stage that has ended and the path of its last checkpoint.

    Raises:
        Interrupted: Ctrl-C; the step was finished and saved.
        UserError: ``resume`` with other settings than the unfinished run's.
        FloatingPointError: a loss was not finite; nothing was overwritten.
        MemoryError: there was not enough memory, on the device or off it.
    """
    path = plan.work / CHECKPOINT
    saved = read_checkpoint(path) if resume else None
    if saved:
        check_same(saved, plan)
    try:
        with memory_errors():
            run = _Run(plan)
            if not resume:
                shutil.rmtree(plan.work, ignore_errors=True)
                run.begin()
            with _finish_step_on_interrupt() as stop:
                for stage, steps in plan.stages:
                    if saved and saved.stage > stage:
                        continue
                    _run_stage(run, stage, steps, saved, path, stop)
                    saved = None
                    if after_stage:
                        after_stage(stage, path)
            _save(plan, run)
    except (KeyboardInterrupt, OSError, MemoryError, FloatingPointError):
        if path.is_file():
            log.warning("saved in %s: go on with the same command and --resume", plan.work)
        raise
    shutil.rmtree(plan.work, ignore_errors=True)
    return plan.target


def _run_stage(
    run: _Run, stage: int, steps: int, saved: Checkpoint | None, path: Path, stop: threading.Event
) -> None:
    def interrupt(where: str) -> None:
        if stop.is_set():
            raise Interrupted(f"stopped {where}")

    if stage == 2:
        run.prior = _prior(run, lambda: interrupt("before stage 2"))
    run.enter(stage, steps)
    first = 0
    if saved:
        run.restore(saved)
        first = saved.step
        saved.tensors.clear()  # a full model and its moments, which are in the run now
    layers = supervised_layers(run.base.unet, tuple(run.views.moments.shape[-2:]), stage)
    progress = tqdm(range(first, steps), f"stage {stage}", total=steps, initial=first, unit="step")
    for step in progress:
        loss = run.step(stage, step, layers)
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        done = step + 1
        if stop.is_set() or done % run.config.checkpoint_steps == 0 or done == steps:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(path, run.checkpoint(stage, done))
            interrupt(f"after step {done} of stage {stage}")


def _prior(run: _Run, after_batch: Callable[[], None]) -> Tensor | None:
    config, base = run.config, run.base
    if not run.plan.has_prior:
        return None
    size = tuple(run.views.moments.shape[-2:])
    if run.plan.class_images:
        base.vae.to(run.plan.device)
        latents = encode_class_images(base, run.plan.class_images, size)
        base.vae.to("cpu")
        return latents
    batch = 8 if run.plan.device.startswith("cuda") and not config.gradient_checkpointing else 4
    cache = Path(config.output_dir) / ".class_images"
    count, seed = config.num_class_images, config.seed
    return class_latents(base, config.class_prompt, count, size, seed, batch, cache, after_batch)


def _save(plan: Plan, run: _Run) -> None:
    """Write the learned folder aside and rename it into place."""
    from imagelab.figures import attention_figure, learning_curves
    from mifo.learning.inspection import asset_maps, separation

    config, base = plan.config, plan.base
    with lend_rows(base.text_encoder, run.ids, run.rows):
        maps = asset_maps(base, run.views, len(run.ids))
    scores = separation(maps, plan.instance.masks)
    log.info("separation of the assets' attention: %s", ", ".join(f"{s:.2f}" for s in scores))
    manifest = _manifest(plan, run, scores)
    with replacing(plan.target) as folder:
        lora = config.finetune == "lora" and any(stage == 2 for stage, _ in plan.stages)
        write_learned(folder, base, run.rows, lora, manifest)
        reward_steps = config.reward_steps if config.attention_loss == "mifo" else 0
        learning_curves(folder / "learning.png", run.losses, plan.stages, reward_steps)
        attention_figure(folder / "attention.png", plan.instance, maps, scores)
        if config.finetune == "full":
            write_rows(base.text_encoder, run.ids, run.rows)
            write_pipeline(folder / PIPELINE, base)
        elif config.save_pipeline:  # from weights in float32, not in the precision of learning
            whole, _ = load_learned(LearnedFolder(folder, manifest), offline=config.offline)
            write_pipeline(folder / PIPELINE, whole)


def _manifest(plan: Plan, run: _Run, scores: list[float]) -> dict:
    import diffusers
    import transformers

    last = {key: _tail_mean(values) for key, values in run.losses.items()}
    return {
        "format": FORMAT,
        "base_model": {"source": plan.base.source, "sha256": plan.base.digest},
        "tokens": [asset_token(i) for i in range(len(run.ids))],
        "image_sha256": plan.instance.image_hash,
        "mask_sha256": list(plan.instance.mask_hashes),
        "size": list(plan.instance.image.shape[1::-1]),
        "settings": asdict(plan.config),
        "precision": str(plan.dtype).removeprefix("torch."),
        "final_losses": last,
        "separation": scores,
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def _tail_mean(values: list[float], count: int = 50) -> float | None:
    """Mean of the last finite values: single steps are noisy."""
    tail = [value for value in values if value == value][-count:]
    return sum(tail) / len(tail) if tail else None


@contextmanager
def _finish_step_on_interrupt() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C sets the event; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum, frame):
        stop.set()
        signal.signal(signal.SIGINT, former)
        log.warning("finishing this step; press Ctrl-C again to stop at once")

    former = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, former)
