"""The loss of the UNet and its text encoder: of the noise, and of where nouns look.

Axes: b batch, l toys (up to three), t tokens, n pixels of a map.
"""

import torch
from torch import Tensor

from imagelab.attention import Recorder, attention_layers, processors
from toybox.stable_diffusion.architecture import build_scheduler
from toybox.stable_diffusion.batches import Batch
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.looks import encode_text, placeholder_embeddings


def grounding_loss(
    maps: list[Tensor], coverage: Tensor, nouns: Tensor, named: Tensor, count: Tensor
) -> Tensor:
    """How far each noun's attention is from lying on its toy, and from reigning there.

    −log s + max(0, log ½ − log a), mean over layers and nouns: s is the share of the noun's
    attention that falls on its toy, a its mean over the toy's pixels. Without the second term
    every pixel leaves nearly all of its attention to the start token.

    Args:
        maps: each layer's [b, n, t] cross-attention, n = h·w pixels in row order.
        coverage: [b, l, h, w] share of each latent pixel that a toy covers.
        nouns: [b, l] position of the token that names each toy.
        named: [b, l] 1 for the nouns that are grounded, 0 for the others.
        count: what their sum is divided by, [].
    """
    inside = coverage.flatten(2).transpose(1, 2)  # [b, n, l]
    loss = 0.0
    for attention in maps:
        columns = attention.gather(2, nouns[:, None].expand(-1, attention.shape[1], -1))
        on_toy = (columns * inside).sum(1)  # [b, l]
        share = on_toy / columns.sum(1).clamp_min(1e-8)
        mean = on_toy / inside.sum(1).clamp_min(1e-8)
        far = -share.clamp_min(1e-4).log() - (2 * mean).clamp(1e-4, 1).log()
        loss = loss + (named * far).sum() / count
    return loss / len(maps)


def timestep_weights(snr: Tensor, most: float) -> Tensor:
    """Weight of each timestep's squared error of the noise, 1 on average, [timesteps].

    Min-SNR (Hang et al. 2023, arXiv 2303.09556) for the signal-to-noise ratios above ``most``, and
    1/√SNR (Yu et al. 2023, arXiv 2310.08442) for those below 1: the noisiest steps, where a caption
    decides what is drawn and where, would have no part in the loss otherwise.
    """
    weights = snr.clamp(max=most) / snr / snr.clamp(max=1).sqrt()
    return weights / weights.mean()


class Loss:
    """``loss(*batch)``: of the noise, and of the nouns' attention at decoder-1.

    Its mean over the processes is that of the whole batch. It is for use inside of
    :meth:`watching`.
    """

    def __init__(self, config: TrainConfig, unet, text_encoder, embedder, compiled: bool = False):
        self.config, self.unet = config, unet
        self.text_encoder, self.embedder = text_encoder, embedder
        alphas = build_scheduler().alphas_cumprod.to(unet.device)
        self.signal, self.spread = alphas.sqrt(), (1 - alphas).sqrt()
        self.weights = timestep_weights(alphas / (1 - alphas), config.min_snr)
        self.recorder = Recorder()
        layers = attention_layers(unet, "cross")
        self.watched = [name for name in layers if name.startswith("up_blocks.1.")]
        self.predict = torch.compile(unet, dynamic=False) if compiled else unet

    def watching(self):
        """Context manager: the UNet's decoder-1 keeps its attention."""
        processes = {name: self.recorder.processor(name) for name in self.watched}
        return processors(self.unet, processes)

    def __call__(self, *tensors: Tensor) -> Tensor:
        batch = Batch(*tensors)
        steps = batch.timesteps
        noisy = (
            self.signal[steps, None, None, None] * batch.latents
            + self.spread[steps, None, None, None] * batch.noise
        )
        table = self.text_encoder.get_input_embeddings().weight
        placeholders = placeholder_embeddings(
            self.embedder(batch.looks), batch.blur, batch.share, table
        )
        hidden = encode_text(self.text_encoder, batch.ids, batch.slots, placeholders)
        predicted = self.predict(noisy, steps, hidden).sample
        error = (predicted - batch.noise).square().mean((1, 2, 3))
        loss = (self.weights[steps] * error).mean()
        # Taken out of the recorder: what it keeps would hold on to the graph of this step.
        maps = [self.recorder.maps.pop(name) for name in self.watched]
        ground = grounding_loss(maps, batch.coverage, batch.nouns, batch.named, batch.count)
        return loss + self.config.grounding_weight * ground
