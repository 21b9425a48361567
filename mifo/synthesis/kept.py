"""The model of the last scene, kept in memory for scenes that need the same one."""

from imagelab.models.device import choose_precision
from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learned import Learned
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.layouts import GetBoxes
from mifo.synthesis.placing import GivenBoxes
from mifo.synthesis.scene import Scene, make_scene, model_source, read_learned


class KeptModel:
    """Makes scenes, and loads a model only where the last scene had another one."""

    def __init__(self):
        self._key: str | None = None
        self._base: StableDiffusion | None = None

    def make_scene(
        self,
        config: SynthesisConfig,
        get_boxes: GetBoxes | None,
        boxes: GivenBoxes | None = None,
        device: str = "cpu",
    ) -> Scene:
        """As :func:`mifo.synthesis.scene.make_scene`."""
        learned = read_learned(config)
        key = model_key(config, learned, device)
        if key != self._key:
            self._key = self._base = None  # freed before another is loaded
        scene = make_scene(
            config, get_boxes, boxes, device=device, base=self._base, learned=learned
        )
        self._key, self._base = key, scene.base
        return scene


def model_key(config: SynthesisConfig, learned: Learned, device: str) -> str:
    """What a painted model is made of: two of the same key are the same.

    The precision is a part of it, since weights are rounded to it for good; the device is none,
    since they move whole. Of the base model it knows the name alone.
    """
    precision = choose_precision(config.runtime.mixed_precision, device)
    source = model_source(config, learned)
    return " ".join([str(precision), source, str(learned.bases), learned.digest])
