"""LoRA files as people have them: each format that is read, and each kind that is told."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from imagelab.errors import UserError
from imagelab.models.stable_diffusion import load_base
from mifo.export import predict_noise, relative_difference
from mifo.learned_files import read_learned_files
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.scene import read_learned

RANK = 2
PROMPT = "a photo of a cat"
FILE = "lora.safetensors"
ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$"
ONE = "mid_block.*attn1.to_q$"

Factors = dict[str, tuple[Tensor, Tensor]]  # A and B by module


@pytest.fixture(scope="module")
def conv_sd(small_sd, tmp_path_factory) -> Path:
    """A model whose UNet projects with convolutions of 1 × 1, as Stable Diffusion 1 does."""
    folder = tmp_path_factory.mktemp("models") / "conv_sd"
    shutil.copytree(small_sd, folder)
    config = json.loads((folder / "unet/config.json").read_text())
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config | {"use_linear_projection": False})
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def base(conv_sd):
    return load_base(str(conv_sd))


@pytest.fixture(scope="module")
def plain(base) -> Tensor:
    with torch.no_grad():
        return predict_noise(base, PROMPT)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw(model: nn.Module, kinds: type | tuple, pattern: str = "", seed: int = 0) -> Factors:
    """Factors for the modules of some kinds whose names a pattern finds."""
    random = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and re.search(pattern, name):
            out, *sides = module.weight.shape
            a = torch.randn(RANK, *sides, generator=random) / module.weight[0].numel() ** 0.5
            b = torch.randn(out, RANK, *(1 for _ in sides[1:]), generator=random) / 2
            factors[name] = a, b
    return factors


def ours(model: Path, path: str = FILE) -> Tensor:
    """The prediction of the model with a file in it, as this program reads it."""
    with torch.no_grad():
        return predict_noise(read_learned_files(path, [], str(model)).load(str(model))[0], PROMPT)


def fresh(model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(
        model, safety_checker=None, local_files_only=True
    )


def diffusers(model: Path, path: str = FILE) -> Tensor:
    """The prediction of the model with a file in it, as diffusers reads it."""
    pytest.importorskip("peft", reason="diffusers reads LoRAs with peft")
    pipeline = fresh(model)
    pipeline.load_lora_weights(".", weight_name=path, local_files_only=True)
    return predict_noise(pipeline, PROMPT)


def check_same(found: Tensor, wanted: Tensor, plain: Tensor):
    """Equal, and not because nothing was added."""
    assert relative_difference(plain, wanted) > 1e-2
    assert relative_difference(found, wanted) <= 1e-5


# ----------------------------------------------------------------------------------------------
# the formats, as their programs write them


def kohya(unet: Factors, text: Factors, alpha: float = 3.0) -> dict[str, Tensor]:
    stems = {f"lora_unet_{name.replace('.', '_')}": pair for name, pair in unet.items()}
    stems |= {f"lora_te_text_model_{name.replace('.', '_')}": pair for name, pair in text.items()}
    file = {}
    for stem, (a, b) in stems.items():
        file[f"{stem}.lora_down.weight"], file[f"{stem}.lora_up.weight"] = a, b
        file[f"{stem}.alpha"] = torch.tensor(alpha)
    return file


def spelled(factors: Factors, pattern: str) -> dict[str, Tensor]:
    """Keys by a pattern in which {name} is the module's and {AB} what stands for A and B."""
    keys = {}
    for name, pair in factors.items():
        for letter, tensor in zip("AB", pair, strict=True):
            where = {"A": "down", "B": "up"}[letter]
            keys[pattern.format(name=name, AB=letter, where=where)] = tensor
    return keys


def with_processors(factors: Factors, prefix: str = "") -> dict[str, Tensor]:
    """The keys of diffusers' first processors: attn1.processor.to_q_lora.down, to_out_lora.up."""
    keys = spelled(factors, prefix + "{name}_lora.{where}.weight")
    return {
        re.sub(r"\.to_out\.0_lora", ".to_out_lora", key).replace(".to_", ".processor.to_"): tensor
        for key, tensor in keys.items()
    }


def old_text(factors: Factors) -> dict[str, Tensor]:
    keys = spelled(factors, "text_encoder.text_model.{name}_lora.{where}.weight")
    names = {"q_proj_": "to_q_", "k_proj_": "to_k_", "v_proj_": "to_v_", "out_proj_": "to_out_"}
    pattern = re.compile("|".join(names))
    return {pattern.sub(lambda m: names[m[0]], key): tensor for key, tensor in keys.items()}


FORMATS = {
    "kohya": lambda unet, text: kohya(unet, text),
    "kohya without alphas": lambda unet, text: {
        key: tensor for key, tensor in kohya(unet, text).items() if not key.endswith("alpha")
    },
    "kohya, the text encoder as te1": lambda unet, text: {
        key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in kohya(unet, text).items()
    },
    "diffusers": lambda unet, text: {
        **spelled(unet, "unet.{name}.lora_{AB}.weight"),
        **spelled(text, "text_encoder.text_model.{name}.lora_{AB}.weight"),
    },
    "diffusers before peft": lambda unet, text: {
        **spelled(unet, "unet.{name}.lora.{where}.weight"),
        **spelled(text, "text_encoder.text_model.{name}.lora_linear_layer.{where}.weight"),
    },
    "diffusers with processors": lambda unet, text: {
        **with_processors(unet, "unet."), **old_text(text),
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_layers_of_attention_as_diffusers_reads_them(form, base, conv_sd, plain):
    unet = draw(base.unet, nn.Linear, ATTENTION)
    text = draw(base.text_encoder, nn.Linear, ATTENTION)
    assert len(unet) == 2 * 4 * 16 and len(text) >= 4
    save_file(FORMATS[form](unet, text), FILE)
    check_same(ours(conv_sd), diffusers(conv_sd), plain)


@pytest.mark.parametrize("form", ["kohya", "diffusers", "diffusers before peft"])
@pytest.mark.parametrize("pattern", [r"proj_(in|out)$", ""], ids=["1 × 1", "every module"])
def test_convolutions_as_diffusers_reads_them(form, pattern, base, conv_sd, plain):
    unet = draw(base.unet, (nn.Linear, nn.Conv2d), pattern)
    kernels = {tuple(a.shape[2:]) for a, _ in unet.values()}
    assert (1, 1) in kernels and ((3, 3) in kernels) == (pattern == "")
    save_file(FORMATS[form](unet, {}), FILE)
    check_same(ours(conv_sd), diffusers(conv_sd), plain)


def test_linear_projections_as_diffusers_reads_them(small_sd):
    """Those of Stable Diffusion 2, and the feed-forward layers of both parts."""
    base = load_base(str(small_sd))
    unet = draw(base.unet, nn.Linear, r"proj_(in|out)$|\.ff\.")
    save_file(kohya(unet, draw(base.text_encoder, nn.Linear, "fc[12]$")), FILE)
    with torch.no_grad():
        plain = predict_noise(base, PROMPT)
    check_same(ours(small_sd), diffusers(small_sd), plain)


@pytest.mark.parametrize(
    "write", [with_processors, lambda f: spelled(f, "{name}.lora_{AB}.weight")]
)
def test_a_unet_alone_without_its_prefix(write, base, conv_sd, plain):
    """diffusers reads it as the UNet's own."""
    pytest.importorskip("peft")
    save_file(write(draw(base.unet, nn.Linear, ATTENTION)), FILE)
    pipeline = fresh(conv_sd)
    pipeline.unet.load_lora_adapter(".", weight_name=FILE, prefix=None, local_files_only=True)
    check_same(ours(conv_sd), predict_noise(pipeline, PROMPT), plain)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_what_peft_saves(part, conv_sd, plain, caplog):
    """Its alphas are in the adapter_config.json beside the file."""
    peft = pytest.importorskip("peft")
    pipeline = fresh(conv_sd)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=5, init_lora_weights=False,
        target_modules=["to_k", "conv1", "proj_in"] if part == "unet" else ["q_proj", "fc1"],
        alpha_pattern={"to_k": 1} if part == "unet" else {"encoder.layers.0.mlp.fc1": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(getattr(pipeline, part), config)
    model.save_pretrained("saved")
    assert sorted(path.name for path in Path("saved").iterdir() if path.suffix != ".md") == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    wanted = predict_noise(pipeline, PROMPT)
    check_same(ours(conv_sd, "saved/adapter_model.safetensors"), wanted, plain)
    assert "alpha" not in caplog.text
    Path("saved/adapter_config.json").unlink()
    without = ours(conv_sd, "saved/adapter_model.safetensors")
    assert relative_difference(without, wanted) > 1e-4
    assert "adapter_model.safetensors does not say its alpha" in caplog.text


SAME = {  # as the keys of diffusers, which diffusers reads
    "base_model.model. alone": "base_model.model.{name}.lora_{AB}.weight",
    "base_model.model. behind the part": "unet.base_model.model.{name}.lora_{AB}.weight",
    "an adapter's name": "unet.{name}.lora_{AB}.default_0.weight",
    "peft's own name": "base_model.model.{name}.lora_{AB}.default.weight",
}


@pytest.mark.parametrize("pattern", SAME.values(), ids=SAME)
def test_peft_keys_in_other_hands(pattern, base, conv_sd, plain):
    unet = draw(base.unet, nn.Linear, ATTENTION)
    save_file(spelled(unet, "unet.{name}.lora_{AB}.weight"), "diffusers.safetensors")
    save_file(spelled(unet, pattern), FILE)
    check_same(ours(conv_sd), diffusers(conv_sd, "diffusers.safetensors"), plain)


def test_alphas_that_diffusers_wrote(conv_sd, plain):
    """Into the metadata, with patterns; convolutions have alphas, too."""
    peft = pytest.importorskip("peft")
    pipeline = fresh(conv_sd)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=5, target_modules=["to_k", "conv1"], init_lora_weights=False,
        alpha_pattern={"resnets.0.conv1": 1, r"attn2\.to_k": 9},
    )  # fmt: skip
    torch.manual_seed(0)
    pipeline.unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        ".",
        unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
    )
    name = "pytorch_lora_weights.safetensors"
    wanted = predict_noise(pipeline, PROMPT)
    check_same(ours(conv_sd, name), wanted, plain)
    check_same(diffusers(conv_sd, name), wanted, plain)


def test_two_adapters_in_one_file_are_told(base, conv_sd):
    unet = draw(base.unet, nn.Linear, ONE)
    file = {}
    for name in ("cat", "dog"):
        mine = spelled(unet, "unet.{name}.lora_{AB}." + name + ".weight")
        file |= {key: tensor.clone() for key, tensor in mine.items()}
    save_file(file, FILE)
    with pytest.raises(UserError, match="more than once, under the names of two adapters"):
        read_learned_files(FILE, [], str(conv_sd))


@pytest.mark.parametrize("scale", [0.7, -1.5])
def test_a_strength_as_diffusers_takes_it(scale, base, conv_sd, plain):
    """Of both parts, and of every kind of layer."""
    pytest.importorskip("peft")
    unet = draw(base.unet, (nn.Linear, nn.Conv2d), "to_k$|conv1$|proj_in$")
    save_file(kohya(unet, draw(base.text_encoder, nn.Linear, ATTENTION)), FILE)
    pipeline = fresh(conv_sd)
    pipeline.load_lora_weights(".", weight_name=FILE, adapter_name="a", local_files_only=True)
    whole = predict_noise(pipeline, PROMPT)
    pipeline.set_adapters(["a"], [scale])
    wanted = predict_noise(pipeline, PROMPT)
    assert relative_difference(whole, wanted) > 1e-2
    settings = SynthesisConfig(lora=FILE, lora_scale=scale, model_path=str(conv_sd))
    with torch.no_grad():
        found = predict_noise(read_learned(settings).load(str(conv_sd))[0], PROMPT)
    check_same(found, wanted, plain)


def test_a_strength_of_0_adds_nothing(base, conv_sd, plain):
    save_file(kohya(draw(base.unet, nn.Linear, ATTENTION), {}), FILE)
    settings = SynthesisConfig(lora=FILE, lora_scale=0.0, model_path=str(conv_sd))
    with torch.no_grad():
        found = predict_noise(read_learned(settings).load(str(conv_sd))[0], PROMPT)
    assert torch.equal(found, plain)


# ----------------------------------------------------------------------------------------------
# embeddings in the file


def test_bundled_embeddings_of_assets_are_read_and_others_told(base, conv_sd, plain, caplog):
    lora = kohya(draw(base.unet, nn.Linear, ATTENTION), {})
    width = base.text_encoder.config.hidden_size
    row = torch.arange(float(width))
    save_file(lora, "without.safetensors")
    save_file(
        {
            **lora,
            "bundle_emb.asset3.string_to_param.*": row[None].half(),
            "bundle_emb.<asset4>.emb_params": -row,
            "bundle_emb.my cat.string_to_param.*": torch.ones(1, width),
            "bundle_emb.asset5.string_to_param.*": torch.ones(2, width),
        },
        FILE,
    )
    files = read_learned_files(FILE, [], str(conv_sd))
    assert files.tokens == ["<asset3>", "<asset4>"] and files.where == FILE
    assert torch.equal(files.rows[3], row) and torch.equal(files.rows[4], -row)
    assert files.row_files == {3: Path(FILE), 4: Path(FILE)}
    told = "brings embeddings that are left out, as they are no assets of one vector: "
    assert f"{FILE} {told}asset5, my cat" in caplog.text
    model, ids = files.load(str(conv_sd))
    table = model.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids], torch.stack([row, -row]))
    with torch.no_grad():
        found = predict_noise(model, PROMPT)
    check_same(found, diffusers(conv_sd, "without.safetensors"), plain)


def test_an_asset_that_is_bundled_and_given_is_told(base, conv_sd):
    unet = kohya(draw(base.unet, nn.Linear, ONE), {})
    save_file({**unet, "bundle_emb.asset0.emb_params": torch.ones(1, 32)}, FILE)
    save_file({"x": torch.ones(1, 32)}, "asset0.safetensors")
    with pytest.raises(UserError, match=f"{FILE} and asset0.safetensors both hold <asset0>"):
        read_learned_files(FILE, ["asset0.safetensors"], str(conv_sd))


def test_embeddings_alone_are_no_lora(conv_sd):
    save_file({"bundle_emb.asset0.emb_params": torch.ones(1, 32)}, FILE)
    with pytest.raises(UserError, match="holds embeddings and no LoRA; give --lora another"):
        read_learned_files(FILE, [], str(conv_sd))


# ----------------------------------------------------------------------------------------------
# what is not read, told by its keys before anything is loaded

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PLAIN = [f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight", f"{STEM}.alpha"]
DOTTED = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KINDS = [
    ("a DoRA", [*PLAIN, f"{STEM}.dora_scale"]),
    ("a DoRA", [f"{DOTTED}.lora_A.weight", f"{DOTTED}.lora_magnitude_vector"]),
    ("a LoHa", [f"{STEM}.hada_w1_a", f"{STEM}.alpha"]),
    ("a LoKr", [f"{STEM}.lokr_w1", f"{STEM}.alpha"]),
    ("an (IA)^3", [f"{STEM}.weight", f"{STEM}.on_input"]),
    ("an (IA)^3", ["base_model.model.mid_block.attn1.to_k.ia3_l"]),
    ("a GLoRA", [f"{STEM}.a1.weight", f"{STEM}.b2.weight"]),
    ("an OFT", [f"{STEM}.oft_blocks"]),
    ("an OFT", [f"{STEM}.oft_diag"]),
    ("a LoRA of three factors", [*PLAIN, "lora_unet_conv_in.lora_mid.weight"]),
    ("a set of whole differences", [f"{STEM}.diff", f"{STEM}.diff_b"]),
    ("a set of whole differences", [*PLAIN, "lora_unet_conv_norm_out.w_norm"]),
    ("a LoRA with biases", [f"{DOTTED}.lora_B.weight", f"{DOTTED}.lora_B.bias"]),
    ("a Custom Diffusion", ["mid_block.attn2.processor.to_k_custom_diffusion.weight"]),
    ("a LoRA in the numbered keys", ["unet:0:up", "unet:0:down", "text_encoder:3:up"]),
    ("a ControlNet-LoRA", ["lora_controlnet", "input_blocks.1.0.in_layers.2.down"]),
    ("a LoRA of SDXL", [*PLAIN, "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"]),
    ("a LoRA of SDXL", ["lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k.alpha"]),
    ("a LoRA of SDXL", ["text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"]),
    ("a LoRA of Flux", ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"]),
    ("a LoRA of Flux", ["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"]),
    (
        "a LoRA of Stable Diffusion 3 or Flux",
        ["transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight"],
    ),
    ("a LoRA of another kind", ["transformer.blocks.0.attn.to_k.lora_A.weight"]),
    ("a LoRA of another kind", ["diffusion_model.blocks.0.cross_attn.k.lora_A.weight"]),
]


@pytest.fixture
def refusal():
    """What is said of a --lora with such keys."""

    def run(keys) -> str:
        save_file({key: torch.zeros(2, 2) for key in keys}, FILE)
        with pytest.raises(UserError) as caught:
            read_learned_files(FILE, [], "no model is loaded")
        return str(caught.value)

    return run


@pytest.mark.parametrize(("kind", "keys"), KINDS)
def test_kinds_that_are_not_read_are_named(kind, keys, refusal):
    said = refusal(keys)
    assert said.startswith(f"{FILE} is {kind}")
    assert said.endswith("give --lora a plain LoRA for Stable Diffusion 1 or 2")


OTHERS = [
    (["model.diffusion_model.input_blocks.0.0.weight"], "is a whole checkpoint; give it with --mo"),
    (["first_stage_model.encoder.conv_in.weight", "cond_stage_model.x"], "is a whole checkpoint"),
    (["conv_in.weight", "down_blocks.0.x.weight"], "is a part of a whole model; give that model's"),
    (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is a part of a whole model"),
    (["text_model.embeddings.token_embedding.weight", "x"], "is a part of a whole model"),
    (["emb_params"], "holds 'emb_params' alone, as a token file does; give it with --tokens"),
    (["some", "thing"], "holds no LoRA: its first key is 'some'"),
    (["x" * 5000, "y"], "holds no LoRA: its first key is 'x{59}…'"),
]


@pytest.mark.parametrize(("keys", "words"), OTHERS, ids=[words for _, words in OTHERS])
def test_what_is_no_lora_is_told(keys, words, refusal):
    said = refusal(keys)
    assert re.search(words, said) and len(said) < 250
    assert said.endswith("give --lora a plain LoRA for Stable Diffusion 1 or 2")


@pytest.mark.parametrize("place", [".", "model"])
@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"{DOTTED}.lora_A.weight", "is a LoRA, not a base model; give it with --lora, and the"),
        ("<asset0>", "is a token file, not a base model; give it with --tokens, and the model"),
        ("emb_params", "is a token file, not a base model"),
    ],
)
def test_a_file_that_is_added_to_a_model_is_none(key, words, place, tiny_sd):
    """Also when it lies in a model's folder."""
    if place == "model":
        Path(place).mkdir()
        shutil.copy(tiny_sd / "model_index.json", place)
    path = Path(place) / FILE
    save_file({key: torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=f"^{path} {words}"):
        load_base(str(path), offline=True)


def test_a_name_of_an_embedding_tells_no_kind(base, conv_sd):
    unet = kohya(draw(base.unet, nn.Linear, ONE), {})
    save_file({**unet, "bundle_emb.x.oft_blocks.diff": torch.ones(1, 32)}, FILE)
    assert read_learned_files(FILE, [], str(conv_sd)).rows == {}


def test_float8_and_hostile_settings_are_one_sentence(base, conv_sd):
    file = spelled(draw(base.unet, nn.Linear, ONE), "unet.{name}.lora_{AB}.weight")
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in file.items()}, FILE)
    with pytest.raises(UserError, match="in float8_e4m3fn, which is not supported; give --lora"):
        read_learned_files(FILE, [], str(conv_sd))
    settings = json.dumps({"unet.alpha_pattern": {r"(([\w.]+)+)+!": 4}})
    save_file(file, FILE, {"lora_adapter_metadata": settings})
    with pytest.raises(UserError, match=f"{FILE} on {conv_sd}: .* is not the name of a module"):
        ours(conv_sd)


BAD_CONFIGS = [
    ("[]", "it is a list and not an object"),
    ("{", "is not valid JSON"),
    ('{"lora_alpha": 1e999}', "is not valid JSON"),
    ('{"lora_alpha": [1]}', "have a list as unet.lora_alpha"),
    ('{"use_dora": true}', "made with use_dora"),
]


@pytest.mark.parametrize(("text", "words"), BAD_CONFIGS)
def test_bad_settings_of_peft_beside_a_file(text, words, base, conv_sd):
    unet = draw(base.unet, nn.Linear, ONE)
    save_file(spelled(unet, "base_model.model.{name}.lora_{AB}.weight"), FILE)
    Path("adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        ours(conv_sd)
