"""Semantic learning: the two stages, from an instance folder to a learned folder."""

import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mifo.checkpoint import (
    Checkpoint,
    pack_optimizer,
    read_checkpoint,
    unpack_optimizer,
    write_checkpoint,
)
from mifo.config import LearningConfig
from mifo.instance import Instance, asset_token, coverage_report, read_instance
from mifo.learned import (
    FORMAT,
    MANIFEST,
    PIPELINE,
    check_name,
    check_writable,
    recover,
    replacing,
    write_learned,
    write_pipeline,
)
from mifo.models import BaseModel, choose_model, choose_precision, load_base, read_sizes
from mifo.objective import Views, step_loss, supervised_layers
from mifo.priors import class_latents, encode_class_images, find_class_images
from mifo.tokens import ASSET, add_asset_tokens, encode_ids, initial_rows, lend_rows, write_rows
from mifo_lora import inject, load_lora, lora_parameters, lora_state_dict

log = logging.getLogger(__name__)

UNET_TARGETS = tuple(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
TEXT_TARGETS = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
CHECKPOINT = "checkpoint.safetensors"
#: Settings that may differ between a run and its resumption.
FREE_SETTINGS = {"folder_path", "output_dir", "offline", "checkpoint_steps", "save_pipeline"}


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C, at the end of a step, which is saved."""


@dataclass(frozen=True)
class Plan:
    """A checked run: what it will do, before anything long has started.

    ids, rows: the asset tokens, which the base model has got, and their first embeddings.
    """

    config: LearningConfig
    base: BaseModel
    instance: Instance
    ids: list[int]
    rows: Tensor
    device: str
    dtype: torch.dtype
    class_images: list[Path] | None

    @property
    def target(self) -> Path:
        return _target(self.config)

    @property
    def work(self) -> Path:
        """Where the checkpoint of the unfinished run lies."""
        return _work(self.config)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(stage, steps) of the stages that have steps."""
        steps = {1: self.config.train_steps, 2: self.config.finetune_steps}
        if self.config.finetune == "none":
            steps[2] = 0
        return tuple((stage, count) for stage, count in steps.items() if count)

    @property
    def has_prior(self) -> bool:
        return bool(self.config.prior_weight) and any(stage == 2 for stage, _ in self.stages)


def _target(config: LearningConfig) -> Path:
    return Path(config.output_dir) / config.instance


def _work(config: LearningConfig) -> Path:
    return Path(config.output_dir) / f".{config.instance}.work"


def check_target(config: LearningConfig, resume: bool, overwrite: bool) -> None:
    """Raises ValueError where a result or an unfinished run is in the way, or nothing to resume."""
    check_name(config.instance, "instance")
    target, checkpoint = _target(config), _work(config) / CHECKPOINT
    check_writable(target.parent, "output_dir")
    recover(target)
    if target.exists() and not (target / MANIFEST).is_file():
        raise ValueError(f"{target} is there and is no learned folder; give another --output_dir")
    if resume and not checkpoint.is_file():
        raise ValueError(f"there is no unfinished run at {checkpoint.parent}; leave out --resume")
    if target.exists() and not (overwrite or resume):
        raise ValueError(f"{target} is there already; give --overwrite to learn it anew")
    if checkpoint.is_file() and not (overwrite or resume):
        raise ValueError(
            f"{checkpoint.parent} holds an unfinished run; go on with --resume, or start anew with "
            "--overwrite"
        )


def check_settings(config: LearningConfig) -> None:
    """Raises ValueError for settings that make no sense."""
    positive = ("lora_rank", "num_class_images", "checkpoint_steps")
    for name in (*positive, "train_steps", "finetune_steps", "reward_steps", "warmup_steps"):
        value, least = getattr(config, name), int(name in positive)
        if value < least:
            raise ValueError(f"--{name} is {value}; give a whole number from {least} on")
    rates = ("learning_rate", "finetune_learning_rate", "weight_decay", "prior_weight")
    for name in rates:
        value = getattr(config, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"--{name} is {value}; give a number from 0 on")
    if not 0 < config.max_grad_norm < float("inf"):
        raise ValueError(f"--max_grad_norm is {config.max_grad_norm}; give a number above 0")
    if not config.train_steps and (config.finetune == "none" or not config.finetune_steps):
        raise ValueError("there is nothing to learn: --train_steps and --finetune_steps are 0")
    if ASSET.search(config.class_prompt):
        raise ValueError(
            f"--class_prompt {config.class_prompt!r} names an asset, which the base model does not "
            "know; name the kind of thing, as in 'a photo of a chair'"
        )


def make_plan(config: LearningConfig, device: str = "cpu") -> Plan:
    """Read and check everything that a run on a torch device needs, the cheapest first."""
    check_settings(config)
    dtype = choose_precision(config.mixed_precision, device)
    folder = Path(config.folder_path) / config.instance
    source = choose_model(config.model_path, device)
    pictures = find_class_images(config.class_images) if config.class_images else None
    base, sizes = None, read_sizes(source, config.offline)
    if sizes is None:  # a single file tells its sizes only when it is loaded
        base = load_base(source, config.offline)
        sizes = base.resolution, base.multiple
    instance = read_instance(folder, *sizes, config.resize)
    base = base or load_base(source, config.offline)
    encode_ids(base.tokenizer, config.class_prompt)
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, len(instance.masks))
    words = config.initializer_tokens
    rows = initial_rows(base.tokenizer, base.text_encoder, ids, words, config.seed)
    return Plan(config, base, instance, ids, rows, device, dtype, pictures)


def describe(plan: Plan) -> str:
    """The plan in words, with an estimate of memory and work."""
    config, base = plan.config, plan.base
    height, width = plan.instance.image.shape[:2]
    count = {
        n: sum(p.numel() for p in getattr(base, n).parameters())
        for n in ("unet", "text_encoder", "vae")
    }
    size = torch.finfo(plan.dtype).bits // 8
    if config.finetune == "full":
        memory = 16 * (count["unet"] + count["text_encoder"])  # weights, gradients, two moments
    else:
        memory = size * count["unet"] + 4 * (count["text_encoder"] + count["vae"])
    # Activations kept for the backward pass: some 160 values for each latent pixel and channel.
    channels = sum(base.unet.config.block_out_channels)
    activations = size * 160 * channels * height * width // base.vae_factor**2
    memory += activations // (8 if config.gradient_checkpointing else 1)
    images = config.class_images or f"{config.num_class_images} to make"
    lines = [
        f"base model   {base.source} on {plan.device} in {str(plan.dtype).removeprefix('torch.')}",
        f"instance     {plan.instance.folder}: {len(plan.instance.masks)} masks, {width}×{height}",
        *(f"             {line}" for line in coverage_report(plan.instance).splitlines()),
        *(f"stage {stage}      {steps} steps" for stage, steps in plan.stages),
        f"fine-tuning  {config.finetune}; attention loss {config.attention_loss}",
        f"seed         {config.seed}",
        f"class images {images if plan.has_prior else 'none'}",
        f"memory       about {memory / 2**30:.1f} GiB (an estimate)",
        f"writes       {plan.target}",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# the run


class _Run:
    """The state of a run: what is trained, by what, and what has been seen."""

    def __init__(self, plan: Plan):
        config, base = plan.config, plan.base
        self.plan, self.config, self.base = plan, config, base
        self.generator = torch.Generator().manual_seed(config.seed)
        self.losses: dict[str, list[float]] = {"loss": [], "reconstruction": [], "attention": []}
        self.ids = plan.ids
        self.rows = torch.nn.Parameter(plan.rows.to(plan.device))
        base.vae.to(plan.device)
        base.text_encoder.to(plan.device)
        full = config.finetune == "full"
        base.unet.to(plan.device, torch.float32 if full else plan.dtype)
        if config.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()  # diffusers checkpoints in training mode only; SD's has no dropout
        self.views = Views(base, plan.instance, self.ids, plan.device)
        self.prior: Tensor | None = None
        self.optimizer: torch.optim.Optimizer
        self.schedule = None

    @property
    def modules(self) -> tuple:
        return self.base.unet, self.base.text_encoder

    def enter(self, stage: int, steps: int) -> None:
        """Make what a stage trains trainable, with an optimiser of its own."""
        config = self.config
        parameters: list[Tensor] = [self.rows]
        rate = config.learning_rate
        if stage == 2:
            rate = config.lora_learning_rate
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
        self.optimizer = torch.optim.AdamW(
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
        if self.config.attention_loss != "mifo":
            return {"none": None}.get(self.config.attention_loss, self.config.attention_loss)
        return "reward" if stage == 1 and step < self.config.reward_steps else "penalty"

    def step(self, stage: int, step: int, layers: list[str]) -> float:
        prior = self.prior if stage == 2 else None
        batch = self.views.draw(self.generator, prior, self.config.class_prompt)
        attention_loss, weight = self.attention_loss(stage, step), self.config.prior_weight
        with ExitStack() as kept:
            with (
                lend_rows(self.base.text_encoder, self.ids, self.rows),
                torch.autocast(
                    self.plan.device.split(":")[0],
                    self.plan.dtype,
                    enabled=self.config.finetune == "full" and self.plan.dtype != torch.float32,
                ),
            ):
                loss = step_loss(self.base, batch, layers, attention_loss, weight, kept)
            self.optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        if not (loss.total.isfinite() and norm.isfinite()):
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {step} of stage {stage}; nothing "
                "was overwritten: try --mixed_precision no or a smaller learning rate"
            )
        self.optimizer.step()
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
        facts = {"settings": _kept_settings(self.config), "inputs": _inputs(self.plan)}
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


def learn(plan: Plan, resume: bool = False) -> Path:
    """Run both stages and write the learned folder, which appears only when complete.

    Raises:
        Interrupted: Ctrl-C; the step was finished and saved.
        ValueError: ``resume`` with other settings than the unfinished run's.
        FloatingPointError: a loss was not finite; nothing was overwritten.
    """
    path = plan.work / CHECKPOINT
    saved = read_checkpoint(path) if resume else None
    if saved:
        _check_same(saved, plan)
    run = _Run(plan)
    if not resume:
        shutil.rmtree(plan.work, ignore_errors=True)
    try:
        with _finish_step_on_interrupt() as stop:
            for stage, steps in plan.stages:
                if saved and saved.stage > stage:
                    continue
                _run_stage(run, stage, steps, saved, path, stop)
                saved = None
        _save(plan, run)
    except (KeyboardInterrupt, OSError, MemoryError):
        if path.is_file():
            log.warning("saved in %s: go on with the same command and --resume", plan.work)
        raise
    shutil.rmtree(plan.work, ignore_errors=True)
    return plan.target


def _check_same(saved: Checkpoint, plan: Plan) -> None:
    """Raises ValueError unless an unfinished run had the settings and the files of a plan."""
    then, now = saved.facts["settings"], _kept_settings(plan.config)
    if differ := ", ".join(f"--{k} {then[k]}" for k in then if then[k] != now.get(k)):
        raise ValueError(f"the unfinished run had other settings ({differ}); resume it with those")
    inputs = _inputs(plan)
    if changed := [
        name for name, digest in saved.facts["inputs"].items() if digest != inputs[name]
    ]:
        raise ValueError(
            f"the {changed[0]} is not what the unfinished run had; put that back, or start anew "
            "with --overwrite"
        )


def _inputs(plan: Plan) -> dict:
    """What a run reads, by hash."""
    return {
        "base model": plan.base.digest,
        "picture": plan.instance.image_hash,
        "set of masks": list(plan.instance.mask_hashes),
        "set of class images": [str(path) for path in plan.class_images or ()],
    }


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
        return encode_class_images(base, run.plan.class_images, size)
    batch = 8 if run.plan.device.startswith("cuda") else 4
    cache = Path(config.output_dir) / ".class_images"
    count, seed = config.num_class_images, config.seed
    return class_latents(base, config.class_prompt, count, size, seed, batch, cache, after_batch)


def _save(plan: Plan, run: _Run) -> None:
    """Write the learned folder aside and rename it into place."""
    from mifo.figures import attention_figure, learning_curves
    from mifo.inspection import asset_maps, separation

    config, base = plan.config, plan.base
    with lend_rows(base.text_encoder, run.ids, run.rows):
        maps = asset_maps(base, run.views, len(run.ids))
    scores = separation(maps, plan.instance.masks)
    log.info("separation of the assets' attention: %s", ", ".join(f"{s:.2f}" for s in scores))
    manifest = _manifest(plan, run, scores)
    with replacing(plan.target) as folder:
        lora = config.finetune == "lora" and any(stage == 2 for stage, _ in plan.stages)
        write_learned(folder, base, run.rows, lora, manifest)
        learning_curves(folder / "learning.png", run.losses, plan.stages, config.reward_steps)
        attention_figure(folder / "attention.png", plan.instance, maps, scores)
        if config.save_pipeline or config.finetune == "full":
            from mifo_lora import remove

            write_rows(base.text_encoder, run.ids, run.rows)
            if lora:
                for module in run.modules:
                    remove(module, keep_merged=True)
            write_pipeline(folder / PIPELINE, base)


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


def _kept_settings(config: LearningConfig) -> dict:
    """The settings that a resumed run has to share, in JSON's types."""
    return {
        field.name: list(value)
        if isinstance(value := getattr(config, field.name), tuple)
        else value
        for field in fields(config)
        if field.name not in FREE_SETTINGS
    }


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


def saved_seed(config: LearningConfig) -> int:
    """The seed of the unfinished run that ``--resume`` goes on with."""
    return read_checkpoint(_work(config) / CHECKPOINT).facts["settings"]["seed"]
