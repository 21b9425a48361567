"""MIGE as a diffusers pipeline.

Axes: b samples, g branches of the guidance, c latent channels, h and w latent rows and columns, k
tokens, d width of the text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from imagelab.errors import UserError, shorten
from imagelab.io.images import as_rgb, read_image
from imagelab.io.tensors import UMASK
from imagelab.sampling import to_picture
from imagelab.training.seeds import check_seed, generator_for
from mige.config import DEFAULTS, GUIDANCE_KINDS, Guidance, check_numbers
from mige.folder import PARTS, load_parts, misfit_of_guidance
from mige.latents import Posterior, Size
from mige.method.encoder import (
    VISION_NORM_EPS,
    embed_instruction,
    embed_patches,
    encode_text,
    see,
)
from mige.method.guidance import branches, guide
from mige.method.instruction import length_of, segment_ids
from mige.method.prediction import predict
from mige.method.wording import PREFIXES
from mige.pictures import crop, letterbox, to_pixels, to_vision
from mige.request import Request, make_request

#: Stand before the texts where a model's config has no sentences of its own.
PLAIN_PREFIXES = dict.fromkeys(PREFIXES, "")


Given = Image.Image | str | Path  # a picture, or where it is


class Condition(NamedTuple):
    """An encoded request: states [k, d] of its instruction, their mask [k], the source's latents.

    ``source`` is scaled, [c, h, w]; zeros where nothing is edited.
    """

    text: Tensor
    mask: Tensor
    source: Tensor
    has_source: bool


class MigePipeline(DiffusionPipeline):
    """Paints subjects and edits pictures by multimodal instructions.

    Args:
        slots: pictures that an instruction may have, at most.
        round_timesteps: see timesteps in bfloat16's steps, as the released weights do.
        prefixes: sentences before the instruction, by task
            (:data:`~mige.method.wording.PREFIXES`); None: nothing.
        guidance: what of :class:`~mige.config.Guidance` suits the model, by task; the paper's
            numbers where nothing is said.
    """

    model_cpu_offload_seq = "vision_encoder->qformer->fusion->text_encoder->transformer->vae"

    def __init__(
        self,
        transformer,
        vae,
        tokenizer,
        text_encoder,
        vision_encoder,
        qformer,
        fusion,
        scheduler,
        slots: int = 4,
        round_timesteps: bool = False,
        prefixes: Mapping[str, str] | None = None,
        guidance: Mapping[str, Mapping[str, float]] | None = None,
    ):
        super().__init__()
        if wrong := misfit_of_guidance(guidance or {}):
            raise UserError(f"{wrong}; give guidance by task, or none")
        self.register_modules(
            transformer=transformer, vae=vae, tokenizer=tokenizer, text_encoder=text_encoder,
            vision_encoder=vision_encoder, qformer=qformer, fusion=fusion, scheduler=scheduler,
        )  # fmt: skip
        self.register_to_config(
            slots=slots, round_timesteps=round_timesteps, prefixes=dict(prefixes or PLAIN_PREFIXES),
            guidance={task: dict(numbers) for task, numbers in (guidance or {}).items()},
        )  # fmt: skip
        vision_encoder.post_layernorm.eps = VISION_NORM_EPS

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32
    ) -> "MigePipeline":
        """Read a model folder; only known classes and safetensors are opened.

        Args:
            torch_dtype: of all parts but the autoencoder, which stays in float32.

        Raises:
            UserError: a part is missing, damaged, or does not fit the others.
        """
        if not isinstance(torch_dtype, torch.dtype):
            raise UserError(f"torch_dtype is {torch_dtype!r}; give torch.bfloat16 or torch.float32")
        if torch_dtype == torch.float16:
            raise UserError(
                "float16 overflows in T5, whose states go beyond 65504; take bfloat16 or float32"
            )
        return cls(**load_parts(folder, torch_dtype))

    def save_pretrained(self, folder: str | Path, **settings) -> None:
        """Write a model folder, as diffusers does, that others may read as well."""
        super().save_pretrained(folder, **settings)
        for file in Path(folder).glob("*/*.safetensors"):
            if file.parent.name in PARTS:
                file.chmod(0o666 & ~UMASK)  # safetensors lets only the owner read

    # ------------------------------------------------------------------------------------------
    # what the configs say

    @property
    def vae_factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> Size:
        """Of the pictures that the model was trained for."""
        side = self.transformer.config.sample_size * self.vae_factor
        return Size(side, side)

    @property
    def multiple(self) -> int:
        """What a picture's sides must be divisible by, in pixels."""
        return self.vae_factor * self.transformer.config.patch_size

    def guidance(self, task: str) -> Guidance:
        """How a task is sampled, where nobody says otherwise."""
        own = self.config.guidance.get(task, {})
        numbers = {name: GUIDANCE_KINDS[name](value) for name, value in own.items()}
        return replace(DEFAULTS[task], **numbers)

    def _latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(c, h, w) of a picture's latents."""
        factor = self.vae_factor
        return self.vae.config.latent_channels, size.height // factor, size.width // factor

    def check_size(self, size: Size) -> None:
        """Raises UserError for a size that the model cannot paint."""
        for name, value in (("width", size.width), ("height", size.height)):
            if value < self.multiple or value % self.multiple:
                below = max(1, value // self.multiple) * self.multiple
                raise UserError(
                    f"--{name} is {value}, and this model paints multiples of {self.multiple}: "
                    f"give {below} or {below + self.multiple}"
                )

    def segments(self, request: Request) -> list[list[int]]:
        """Token ids of a request's words; a UserError where they and its pictures do not fit."""
        count, slots = len(request.pictures), self.config.slots
        if count > slots:
            raise UserError(
                f"there are {count} pictures, and this model takes {slots}; leave some out"
            )
        if request.marks > slots:
            raise UserError(
                f"the instruction {shorten(request.text)!r} names its picture {request.marks} "
                f"times, and this model takes {slots} pictures; name it less often"
            )
        segments = segment_ids(self.tokenizer, request.prompt(self.config.prefixes))
        length = length_of(segments, self.fusion.config.queries)
        limit = self.fusion.config.text_length
        if length > limit:
            raise UserError(
                f"the instruction {shorten(request.text)!r} takes {length} tokens with its "
                f"pictures, and the model reads {limit}; shorten it"
            )
        return segments

    # ------------------------------------------------------------------------------------------
    # encoding

    @torch.no_grad()
    def encode(self, request: Request, seed: int, size: Size | None = None) -> Condition:
        """Encode a request, once for all of its pictures and steps.

        Args:
            seed: with the request's name, it fixes what is drawn from the posteriors.
            size: of the pictures to paint; None: the model's own.
        """
        size = size or self.size
        segments = self.segments(request)
        references, source = self._latents(request, seed, size)
        vectors = None
        if request.pictures:
            side = self.vision_encoder.config.image_size
            seen = torch.stack([to_vision(picture, side) for picture in request.pictures])
            meaning = see(
                self.vision_encoder, self.qformer, self.fusion, seen.to(self._execution_device)
            )
            # one at a time: a source may have another size than a subject
            vectors = torch.cat(
                [
                    self._fuse(one[None], latents)
                    for one, latents in zip(meaning, references, strict=True)
                ]
            )
            if request.task == "edit":  # which may name its one picture more than once
                vectors = vectors.expand(request.marks, -1, -1)
        embedded = embed_instruction(
            self.fusion, self.text_encoder, segments, vectors, self.tokenizer.eos_token_id
        )
        device = self._execution_device
        moved = embedded._replace(
            embeddings=embedded.embeddings.to(device), mask=embedded.mask.to(device)
        )
        text = encode_text(self.text_encoder, moved)
        return Condition(text, moved.mask, source, request.source is not None)

    def _fuse(self, meaning: Tensor, latents: Tensor) -> Tensor:
        patches = embed_patches(self.transformer, latents[None])
        return self.fusion(
            meaning.to(self.fusion.dtype), patches.to(meaning.device, self.fusion.dtype)
        )

    def _latents(self, request: Request, seed: int, size: Size) -> tuple[list[Tensor], Tensor]:
        """Unscaled latents of each picture, and the scaled ones of the source.

        The source of a plain edit is drawn once, for both; that of an edit with a subject twice.
        """
        own, references = self.size, []
        source = torch.zeros(self._latent_shape(size), device=self._execution_device)
        for index, picture in enumerate(request.pictures):
            if request.task == "subject":
                fitted = letterbox(picture, own.width, own.height)
            else:
                wanted = size if index == request.source else own
                fitted = crop(picture, wanted.width, wanted.height)
            posterior = self._posterior(fitted)
            drawn = posterior.sample(generator_for(seed, "reference", request.name, index))
            if index == request.source:
                mine = drawn
                if request.task == "subject_edit":
                    mine = posterior.sample(generator_for(seed, "source", request.name))
                source = mine * self.vae.config.scaling_factor
            references.append(drawn)
        return references, source

    def _posterior(self, picture: Image.Image) -> Posterior:
        pixels = to_pixels(picture)[None].to(self._execution_device, self.vae.dtype)
        found = self.vae.encode(pixels).latent_dist
        return Posterior(found.mean[0].float(), found.std[0].float())

    # ------------------------------------------------------------------------------------------
    # painting

    def noise(self, request: Request, seed: int, size: Size | None = None) -> Tensor:
        """Standard normal latents [c, h, w] of a picture, from the CPU's generator alone."""
        shape = self._latent_shape(size or self.size)
        return torch.randn(shape, generator=generator_for(seed, "noise", request.name))

    @torch.no_grad()
    def denoise(
        self,
        conditions: Sequence[Condition],
        noise: Tensor,
        guidance: Guidance,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Latents float32 [b, c, h, w] of pictures that are all edits, or all not.

        Args:
            conditions: one for each of the noises [b, c, h, w].
            on_step: gets the step, the guided noise and the new latents.

        Raises:
            FloatingPointError: the latents are no longer finite.
        """
        device, count = self._execution_device, len(conditions)
        asked = branches(conditions[0].has_source, guidance.image_scale)
        text = torch.stack([each.text for each in conditions])
        null = self.fusion.null_text.to(text).expand_as(text)
        text = torch.cat([text if branch.text else null for branch in asked])  # (g b) k d
        mask = torch.stack([each.mask for each in conditions]).repeat(len(asked), 1)
        given = torch.stack([each.source for each in conditions]).float()
        source = torch.cat([given if b.source else torch.zeros_like(given) for b in asked])
        latents = noise.float().to(device)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(guidance.steps, device=device)
        for step, timestep in enumerate(scheduler.timesteps):
            predicted, _ = predict(
                self.transformer,
                latents.repeat(len(asked), 1, 1, 1),
                source,
                timestep.expand(len(asked) * count),
                text,
                mask,
                self.config.round_timesteps,
            )
            guided = guide(
                predicted.unflatten(0, (len(asked), count)),
                guidance.text_scale,
                guidance.image_scale,
            )
            latents = scheduler.step(guided, timestep, latents).prev_sample
            if not latents.isfinite().all():
                raise FloatingPointError(
                    f"the latents are not finite after step {step}; try --mixed_precision no"
                )
            if on_step:
                on_step(step, guided, latents)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents [b, c, h, w] as RGB pictures, decoded one by one to save memory."""
        pictures = []
        for sample in latents:
            scaled = (sample[None] / self.vae.config.scaling_factor).to(self.vae.dtype)
            pictures.append(to_picture(self.vae.decode(scaled).sample[0].float()))
        return pictures

    def paint(
        self,
        requests: Sequence[tuple[Request, Condition, int]],
        guidance: Guidance,
        size: Size | None = None,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures of encoded requests, each with the seed of its noise, as one batch."""
        noise = torch.stack([self.noise(request, seed, size) for request, _, seed in requests])
        conditions = [condition for _, condition, _ in requests]
        pictures = self.decode(self.denoise(conditions, noise, guidance, on_step))
        self.maybe_free_model_hooks()
        return pictures

    def __call__(
        self,
        instruction: str,
        images: Given | Sequence[Given] = (),
        source: Given | None = None,
        source_place: int = 0,
        num_images: int = 1,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        is_global: bool = False,
        steps: int | None = None,
        text_scale: float | None = None,
        image_scale: float | None = None,
    ) -> ImagePipelineOutput:
        """Carry out one instruction.

        Args:
            instruction: with ``<image>`` where a picture is meant.
            images: subjects, in the order of their marks, or a single one: pictures, or paths of
                files.
            source: the picture to edit; None paints a new one. Its mark is number ``source_place``.
            seed: of the first picture; every next one has the next seed.
            width, height: pixels; None: the model's own.
            is_global: whether an edit concerns the whole picture.
            steps: of the sampler; None: the model's.
            text_scale, image_scale: weights of the instruction and of the source; None: the
                model's.

        Raises:
            UserError: the request makes no sense; see :func:`~mige.request.make_request`.
        """
        numbers = {"steps": steps, "text_scale": text_scale, "image_scale": image_scale}
        given = {name: value for name, value in numbers.items() if value is not None}
        check_numbers({"num_images": num_images, "width": width, "height": height} | given)
        check_seed(seed)
        size = Size(width or self.size.width, height or self.size.height)
        self.check_size(size)
        images = [images] if isinstance(images, Given) else images
        source = None if source is None else _read(source)
        request = make_request(
            instruction, tuple(map(_read, images)), source, source_place, is_global=is_global
        )
        how = replace(self.guidance(request.task), **given)
        condition = self.encode(request, seed, size)
        pictures = []
        for index in range(num_images):
            pictures += self.paint([(request, condition, seed + index)], how, size)
        return ImagePipelineOutput(images=pictures)


def _read(picture: Given) -> Image.Image:
    """A picture in RGB; a UserError for what is none."""
    if isinstance(picture, str | Path):
        return read_image(Path(picture))
    if not isinstance(picture, Image.Image):
        raise UserError(
            f"a {type(picture).__name__} was given for a picture; give one of Pillow's, or a path"
        )
    return as_rgb(picture)
