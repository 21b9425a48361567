"""Every number of toybox's training: their only home."""

from dataclasses import dataclass

from toybox.scenes import COUNT_ODDS, KINDS


@dataclass(frozen=True)
class TrainConfig:
    """Every number of the training."""

    seed: int = 0
    vae_scenes: int = 1500
    vae_steps: int = 9000
    vae_batch: int = 16
    vae_crop: int = 32  # pixels
    vae_lr: float = 5e-4
    kl_weight: float = 1e-6
    kinds: tuple[str, ...] = KINDS  # fewer are learned sooner
    count_odds: tuple[float, ...] = COUNT_ODDS  # of scenes with one toy, two and three
    scenes: int = 20_000
    steps: int = 9000
    skip: int = 0  # steps whose draws are passed over, those of the run that is gone on from
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 200  # steps
    cooldown: float = 0.25  # of all steps, cosine to a hundredth
    ema: float = 0.999
    caption_dropout: float = 0.1
    bare_captions: float = 1 / 3  # share without articles
    min_snr: float = 5.0
    grounding_weight: float = 0.02
    grounding_timesteps: int = 1000  # below which it is asked for
