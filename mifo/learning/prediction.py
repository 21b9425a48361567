"""What the model predicts for a batch, and where its tokens look meanwhile."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from imagelab.attention import Recorder, layer_grid, processors
from imagelab.models.stable_diffusion import StableDiffusion
from mifo.learning.views import Batch
from mifo.method.losses import REGULARISED_TIMESTEPS


@dataclass
class Prediction:
    """What the loss of a step reads.

    Attributes:
        predicted, target: float32 [b, c, h, w].
        maps: by layer, [m, rows, columns] attention of the chosen assets in the instance view.
    """

    predicted: Tensor
    target: Tensor
    maps: dict[str, Tensor]


@contextmanager
def predicting(model: StableDiffusion, batch: Batch, layers: Sequence[str]) -> Iterator[Prediction]:
    """Predict a batch; the backward pass belongs within.

    Attention is only recorded below timestep 500 of the instance view, where it is regularised.
    The recording processors stay until the end, since a UNet with gradient checkpointing runs
    once more in the backward pass.

    Args:
        layers: names of the cross-attention layers to record.
    """
    unet, scheduler = model.unet, model.scheduler
    recorder = Recorder()
    regularised = batch.timesteps[-1] < REGULARISED_TIMESTEPS
    watched = {name: recorder.processor(name) for name in layers} if regularised else {}
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    text = model.text_encoder(batch.input_ids).last_hidden_state
    target = batch.noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    with processors(unet, watched):
        predicted = model.predict(noisy, batch.timesteps, text)
        size = tuple(batch.latents.shape[-2:])
        maps = {
            name: recorder.maps[name][-1, :, list(batch.positions)].T.unflatten(  # n m -> m n
                1, layer_grid(unet, size, name)
            )
            for name in watched
        }
        yield Prediction(predicted, target, maps)
