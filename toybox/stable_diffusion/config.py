"""Every number of toybox's training, and what it means: their only home."""

from dataclasses import dataclass

from toybox.scenes.scenes import COUNT_ODDS
from toybox.scenes.toys import KINDS

OFTENER = 3  # times as often as another kind


@dataclass(frozen=True)
class TrainConfig:
    """Every number of the training."""

    seed: int = 0
    vae_scenes: int = 1500
    vae_steps: int = 9000
    vae_batch: int = 16
    vae_crop: int = 32
    vae_lr: float = 5e-4
    kl_weight: float = 1e-6
    decoder_steps: int = 1500
    decoder_batch: int = 4
    decoder_lr: float = 1e-3
    kinds: tuple[str, ...] = KINDS
    oftener: tuple[str, ...] = ()
    count_odds: tuple[float, ...] = COUNT_ODDS
    free_looks: float = 0.5
    scenes: int = 20_000
    mirrored: bool = False
    captions: int = 8
    steps: int = 9000
    sample_steps: int = 1000
    batch: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 200
    cooldown: float = 0.25
    ema: float = 0.999
    caption_dropout: float = 0.1
    bare_captions: float = 1 / 3
    near_hue: float = 8.0
    placeholders: float = 0.4
    mixed: float = 0.15
    look_noise: float = 0.9
    min_snr: float = 5.0
    grounding_weight: float = 0.02
    grounding_timesteps: int = 1000

    @property
    def shares(self) -> list[float] | None:
        """How probable each of the kinds is, 1 in all; None where all are alike."""
        if not self.oftener:
            return None
        odds = [OFTENER if kind in self.oftener else 1 for kind in self.kinds]
        return [each / sum(odds) for each in odds]


#: Least and most of each number; two whole ones are of a whole number.
BOUNDS = {
    "vae_scenes": (1, 10_000_000),
    "vae_steps": (0, 10_000_000),
    "vae_batch": (1, 100_000),
    "vae_lr": (0.0, 1.0),
    "kl_weight": (0.0, 1e6),
    "decoder_steps": (0, 10_000_000),
    "decoder_batch": (1, 100_000),
    "decoder_lr": (0.0, 1.0),
    "free_looks": (0.0, 1.0),
    "scenes": (1, 10_000_000),
    "captions": (1, 10_000),
    "steps": (0, 10_000_000),
    "sample_steps": (1, 1_000_000_000),
    "batch": (1, 100_000),
    "lr": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
    "warmup": (0, 10_000_000),
    "cooldown": (0.0, 1.0),
    "ema": (0.0, 1.0),
    "caption_dropout": (0.0, 1.0),
    "bare_captions": (0.0, 1.0),
    "near_hue": (0.0, 180.0),
    "placeholders": (0.0, 1.0),
    "mixed": (0.0, 1.0),
    "look_noise": (0.0, 1.0),
    "min_snr": (0.001, 1e6),  # at 0 no timestep would have a weight
    "grounding_weight": (0.0, 1e6),
    "grounding_timesteps": (0, 1000),
}
HELP = {
    "seed": "fixes the scenes and every draw",
    "vae_scenes": "scenes that the autoencoder learns from",
    "vae_steps": "steps of the autoencoder; 0: the latents stay as --begin_from has them",
    "vae_batch": "crops a step",
    "vae_crop": "side of a crop, in pixels",
    "vae_lr": "learning rate of the autoencoder",
    "kl_weight": "weight of the posterior's divergence from a normal one",
    "decoder_steps": "steps of the decoder alone, on whole scenes, after those of the autoencoder",
    "decoder_batch": "scenes in each of them",
    "decoder_lr": "their learning rate",
    "kinds": "kinds of toys; fewer are learned sooner",
    "oftener": "of these, the ones that are drawn three times as often as the others",
    "count_odds": "odds of scenes with one toy, two and three",
    "free_looks": "share of scenes whose toys have any hue and strength of colour; the others' "
    "hues have names",
    "scenes": "scenes that the UNet and the text encoder learn from",
    "mirrored": "mirrored copies of them, too",
    "captions": "captions drawn for each of them",
    "steps": "steps of the UNet and the text encoder",
    "sample_steps": "how many of them lie between sample grids",
    "batch": "scenes a step",
    "lr": "their learning rate",
    "weight_decay": "AdamW's, of all parts",
    "warmup": "steps over which the learning rate rises",
    "cooldown": "share of the steps over which it falls at the end, as a cosine, to a hundredth",
    "ema": "decay of the average over the weights",
    "caption_dropout": "share of scenes without a caption",
    "bare_captions": "share of captions without articles",
    "near_hue": "how far from a named hue, in degrees, a caption still calls it so",
    "placeholders": "share of captions that name every toy by a placeholder token, whose embedding "
    "says how it looks",
    "mixed": "share of captions that name each toy by a placeholder or by words",
    "look_noise": "the most noise in a placeholder's embedding: each has a share from 0 to this",
    "min_snr": "cap of the signal-to-noise ratio in the weights of the loss",
    "grounding_weight": "weight of the loss that lays nouns' attention on their toys",
    "grounding_timesteps": "below which it is asked for",
}
