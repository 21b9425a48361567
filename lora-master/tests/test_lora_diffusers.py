"""What diffusers makes of our files, and we of its: compared by outputs, on a tiny pipeline."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import mifo_lora

UNET_TARGETS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
TEXT_TARGETS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]


def make_pipeline() -> StableDiffusionPipeline:
    """The same random pipeline each time: a two-level UNet and a two-layer text encoder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        use_linear_projection=True,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder.eval(),
        tokenizer=None,
        unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def outputs(pipe: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise prediction for fixed text states, and text states of fixed tokens."""
    noise = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=noise)
    states = torch.randn(2, 7, 32, generator=noise)
    ids = torch.arange(14).view(2, 7) + 2
    return pipe.unet(latents, 500, states).sample, pipe.text_encoder(ids)[0]


def assert_same(found, expected, atol=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def assert_differ(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() > 1e-2


@pytest.fixture(scope="module")
def base():
    return outputs(make_pipeline())


@pytest.fixture(params=["even", "mixed"])
def pipe(request, base):
    """A pipeline with a LoRA of ours in both parts: one rank and alpha, or many."""
    pipe = make_pipeline()
    if request.param == "even":
        mifo_lora.inject(pipe.unet, UNET_TARGETS, rank=4, alpha=8)
        mifo_lora.inject(pipe.text_encoder, TEXT_TARGETS, rank=4, alpha=2)
    else:
        mifo_lora.inject(pipe.unet, UNET_TARGETS[:2], rank=4, alpha=8)
        mifo_lora.inject(pipe.unet, UNET_TARGETS[2:], rank=2, alpha=1)
        mifo_lora.inject(pipe.text_encoder, TEXT_TARGETS[:1], rank=3)
        mifo_lora.inject(pipe.text_encoder, TEXT_TARGETS[1:], rank=2, alpha=5)
    assert_same(outputs(pipe), base, atol=0)
    for part in (pipe.unet, pipe.text_encoder):
        for layer in mifo_lora.lora_layers(part).values():
            nn.init.normal_(layer.lora_B, std=0.5)
    assert_differ(outputs(pipe), base)
    return pipe


def file_of(pipe, write):
    unet, text = (mifo_lora.lora_state_dict(m) for m in (pipe.unet, pipe.text_encoder))
    return {**write(unet, "unet"), **write(text, "text_encoder")}


def test_every_targeted_layer_is_injected(pipe):
    assert len(mifo_lora.lora_layers(pipe.unet)) == 4 * 4  # down, mid, two in up
    assert len(mifo_lora.lora_layers(pipe.text_encoder)) == 2 * 4


@pytest.mark.parametrize("write", [mifo_lora.to_diffusers, mifo_lora.to_kohya])
def test_diffusers_computes_the_same_from_our_file(tmp_path, pipe, write):
    name = "pytorch_lora_weights.safetensors"
    mifo_lora.save_lora(tmp_path / name, file_of(pipe, write), {"tokens": "<asset0>"})
    other = make_pipeline()
    other.load_lora_weights(tmp_path, weight_name=name, local_files_only=True)
    assert_same(outputs(other), outputs(pipe))


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (mifo_lora.to_diffusers, mifo_lora.from_diffusers),
        (mifo_lora.to_kohya, mifo_lora.from_kohya),
    ],
)
def test_we_compute_the_same_from_our_file(pipe, write, read):
    file, other = file_of(pipe, write), make_pipeline()
    mifo_lora.inject_from(other.unet, read(file, other.unet))
    mifo_lora.inject_from(other.text_encoder, read(file, other.text_encoder, "text_encoder"))
    assert_same(outputs(other), outputs(pipe))


def test_we_compute_the_same_from_a_file_of_diffusers_and_peft(tmp_path, base):
    peft = pytest.importorskip("peft")
    pipe = make_pipeline()
    for part, targets in ((pipe.unet, UNET_TARGETS), (pipe.text_encoder, TEXT_TARGETS)):
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, init_lora_weights="gaussian",
            alpha_pattern={targets[0]: 1},
        )  # fmt: skip
        part.add_adapter(config)
        for name, parameter in part.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    expected = outputs(pipe)
    assert_differ(expected, base)
    weights = {
        f"{part}_lora_layers": peft.get_peft_model_state_dict(getattr(pipe, part))
        for part in ("unet", "text_encoder")
    }
    configs = {
        f"{part}_lora_adapter_metadata": getattr(pipe, part).peft_config["default"].to_dict()
        for part in ("unet", "text_encoder")
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path, **weights, **configs)
    file, metadata = mifo_lora.read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    other = make_pipeline()
    for part in ("unet", "text_encoder"):
        model = getattr(other, part)
        mifo_lora.inject_from(model, mifo_lora.from_diffusers(file, model, part, metadata))
    assert_same(outputs(other), expected)


def test_merged_and_removed_on_the_pipeline(pipe, base):
    expected = outputs(pipe)
    parts = (pipe.unet, pipe.text_encoder)
    for part in parts:
        mifo_lora.merge(part)
    assert_same(outputs(pipe), expected)
    for part in parts:
        mifo_lora.remove(part)
    assert_same(outputs(pipe), base, atol=0)
