"""Keys of diffusers and kohya, on a toy with the module names of Stable Diffusion."""

import json

import pytest
import torch
from torch import nn

import mifo_lora
from mifo_lora import LoraError, from_diffusers, from_file, from_kohya, to_diffusers, to_kohya

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
UNET = {f"{BLOCK}.to_k": (2, 8.0), f"{BLOCK}.to_out.0": (2, 8.0)}
TEXT = {"encoder.layers.0.self_attn.q_proj": (2, 8.0)}
OLD_TEXT = {f"text_model.{name}": value for name, value in TEXT.items()}  # transformers before 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_state(layers: dict[str, tuple[int, float]]) -> dict[str, torch.Tensor]:
    """Random factors of 4-wide Linears, by name: (rank, alpha)."""
    state = {}
    for name, (rank, alpha) in layers.items():
        state[f"{name}.lora_A"] = torch.randn(rank, 4)
        state[f"{name}.lora_B"] = torch.randn(4, rank)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def make_model(*names: str) -> nn.Module:
    """A tree of modules with a 4-wide Linear at each of these names."""
    model = nn.Module()
    for name in names:
        parent, parts = model, name.split(".")
        for part in parts[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(parts[-1], nn.Linear(4, 4))
    return model


def deltas(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """(alpha / r) · B A by layer, from the tensors alone."""
    names = {key.rpartition(".")[0] for key in state}
    return {
        name: state[f"{name}.lora_B"] @ state[f"{name}.lora_A"] * state[f"{name}.alpha"]
        / state[f"{name}.lora_A"].shape[0]
        for name in names
    }  # fmt: skip


def assert_same_deltas(state, other):
    found, expected = deltas(state), deltas(other)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta)


PARTS = [("unet", UNET), ("text_encoder", TEXT), ("text_encoder", OLD_TEXT)]


def test_diffusers_keys_letter_by_letter():
    unet, text = make_state(UNET), make_state(TEXT)
    file = {**to_diffusers(unet), **to_diffusers(text, "text_encoder")}
    assert sorted(file) == [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_B.weight",
    ]
    # alpha / r = 4 is inside B, as readers take the rank for alpha.
    key = f"unet.{BLOCK}.to_k.lora_B.weight"
    assert torch.equal(file[key], unet[f"{BLOCK}.to_k.lora_B"] * 4)


def test_kohya_keys_letter_by_letter():
    unet, text = make_state(UNET), make_state(TEXT)
    file = {**to_kohya(unet), **to_kohya(text, "text_encoder")}
    assert sorted(file) == [
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.alpha",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.alpha",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight",
    ]
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert file[f"{stem}.alpha"] == 8
    assert file[f"{stem}.lora_down.weight"].shape == (2, 4)
    assert file[f"{stem}.lora_up.weight"].shape == (4, 2)


@pytest.mark.parametrize(("part", "layers"), PARTS)
def test_kohya_round_trip_is_exact(part, layers):
    state = make_state(layers)
    found = from_kohya(to_kohya(state, part), make_model(*layers), part)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize(("part", "layers"), PARTS)
def test_diffusers_round_trip_keeps_what_is_added(part, layers):
    state = make_state(layers)
    found = from_diffusers(to_diffusers(state, part), make_model(*layers), part)
    assert_same_deltas(found, state)


@pytest.mark.parametrize("write, read", [(to_kohya, from_kohya), (to_diffusers, from_diffusers)])
def test_layers_of_different_rank_and_alpha_keep_what_they_add(write, read):
    layers = {f"{BLOCK}.to_k": (2, 8.0), f"{BLOCK}.to_q": (4, 1.0), f"{BLOCK}.to_v": (1, 8.0)}
    state = make_state(layers)
    file = write(state)
    assert_same_deltas(read(file, make_model(*layers)), state)
    # The other readers take one alpha for the whole part.
    assert {tensor.item() for key, tensor in file.items() if key.endswith(".alpha")} <= {8.0}


def test_a_file_is_read_part_by_part_injected_or_not():
    unet, text = make_state(UNET), make_state(TEXT)
    file = {**to_kohya(unet), **to_kohya(text, "text_encoder")}
    model = make_model(*UNET)
    mifo_lora.inject_from(model, from_kohya(file, model))
    assert from_kohya(file, model).keys() == unet.keys()
    assert from_kohya(to_kohya(unet), make_model(*TEXT), "text_encoder") == {}


def test_text_encoder_keys_of_either_transformers_are_read():
    state = make_state(TEXT)
    file = {
        key.replace("text_model.", ""): t for key, t in to_diffusers(state, "text_encoder").items()
    }
    assert_same_deltas(from_diffusers(file, make_model(*TEXT), "text_encoder"), state)
    old = from_diffusers(file, make_model(*OLD_TEXT), "text_encoder")
    assert {key.removeprefix("text_model.") for key in old} == state.keys()


@pytest.mark.parametrize("write, read", [(to_kohya, from_kohya), (to_diffusers, from_diffusers)])
def test_without_alpha_the_rank_is_alpha_and_with_it_it_counts(write, read):
    layers = {f"{BLOCK}.to_k": (2, 2.0)}
    state, model = make_state(layers), make_model(*layers)
    file = {key: t for key, t in write(state).items() if not key.endswith("alpha")}
    assert_same_deltas(read(file, model), state)
    (stem,) = {key.split(".lora_")[0] for key in file}
    file[f"{stem}.alpha"] = torch.tensor(6.0)
    assert read(file, model)[f"{BLOCK}.to_k.alpha"] == 6


def test_alphas_of_peft_are_read_from_the_metadata():
    state = make_state(UNET)
    config = {"unet.lora_alpha": 3, "unet.alpha_pattern": {r"attn2\.to_out.0": 5}}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    found = from_diffusers(to_diffusers(state), make_model(*UNET), "unet", metadata)
    assert found[f"{BLOCK}.to_k.alpha"] == 3
    assert found[f"{BLOCK}.to_out.0.alpha"] == 5


def test_a_layers_own_alpha_goes_before_that_of_the_metadata():
    file = to_diffusers(make_state(UNET)) | {f"unet.{BLOCK}.to_k.alpha": torch.tensor(6.0)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3})}
    found = from_diffusers(file, make_model(*UNET), "unet", metadata)
    assert found[f"{BLOCK}.to_k.alpha"] == 6
    assert found[f"{BLOCK}.to_out.0.alpha"] == 3


LONG = f"{BLOCK}.to_k"
PATTERNS = [
    {"attn2.to_k": 5},
    {"to_k": 5, LONG: 7},  # the first one that fits counts
    {LONG: 7, "to_k": 5},
    {"^attn2.to_k": 5},  # from the beginning of the whole name
    {f"^{LONG}": 7, "attn2.to_k": 5},
    {r"attn2\.to_k$": 5},
    {"n2.to_k": 5},  # no end at a dot
    {"to_q": 5},
    {},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_patterns_that_are_names_are_matched_as_peft_does(patterns):
    other = pytest.importorskip("peft.utils.other")
    layers = {LONG: (2, 8.0)}
    metadata = {"unet.lora_alpha": 3, "unet.alpha_pattern": patterns}
    found = from_diffusers(
        to_diffusers(make_state(layers)),
        make_model(*layers),
        "unet",
        {"lora_adapter_metadata": json.dumps(metadata)},
    )
    assert found[f"{LONG}.alpha"] == patterns.get(other.get_pattern_key(patterns, LONG), 3)


def with_alpha(text: str) -> str:
    return f'{{"unet.lora_alpha": {text}}}'


def with_patterns(text: str) -> str:
    return f'{{"unet.alpha_pattern": {text}}}'


HOSTILE = [
    ("no JSON", "cannot be read as JSON"),
    ("[" * 100_000, r"cannot be read as JSON \(RecursionError\)"),
    (with_alpha("9" * 5000), "cannot be read as JSON"),
    ("[]", "are a list and not an object"),
    ("null", "are None and not an object"),
    ('"' + 500 * "x" + '"', "are 'x{98}… and not an object"),
    (with_alpha("NaN"), "have nan as unet.lora_alpha; give"),
    (with_alpha("Infinity"), "have inf as unet.lora_alpha"),
    (with_alpha("1e300"), r"have 1e\+300 as unet.lora_alpha"),
    (with_alpha("1" + 400 * "0"), "have 10{98}… as unet.lora_alpha"),
    (with_alpha("0"), "have 0 as unet.lora_alpha"),
    (with_alpha("-1"), "have -1 as unet.lora_alpha"),
    (with_alpha("true"), "have True as unet.lora_alpha"),
    (with_alpha('"4"'), "have '4' as unet.lora_alpha"),
    (with_alpha("[4]"), "have a list as unet.lora_alpha"),
    (with_patterns("[]"), "have a list as unet.alpha_pattern"),
    (with_patterns("7"), "have 7 as unet.alpha_pattern"),
    (with_patterns('{"to_k": null}'), r"have None as unet.alpha_pattern\['to_k'\]"),
    (with_patterns('{"to_k": 1e999}'), r"have inf as unet.alpha_pattern\['to_k'\]"),
    (with_patterns('{"(": 4}'), r"alpha_pattern '\(', which is not the name of a module; give"),
    (with_patterns('{"": 4}'), "alpha_pattern '', which is not"),
    (with_patterns('{"down.*to_k": 4}'), r"alpha_pattern 'down\.\*to_k', which is not"),
    (with_patterns(json.dumps({"x" * 500 + "(": 4})), "alpha_pattern 'x{98}…, which is not"),
    # An expression that takes more than the age of the universe on a name of this length.
    (with_patterns(json.dumps({r"(([\w.]+)+)+!": 4})), "which is not the name of a module"),
]


@pytest.mark.parametrize(("text", "words"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_metadata_end_in_one_short_sentence(text, words):
    file, model = to_diffusers(make_state(UNET)), make_model(*UNET)
    with pytest.raises(LoraError, match=words) as caught:
        from_diffusers(file, model, "unet", {"lora_adapter_metadata": text})
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_empty_settings_of_peft_and_other_metadata_are_no_matter():
    file, model = to_diffusers(make_state(UNET)), make_model(*UNET)
    empty = {"unet.lora_alpha": None, "unet.alpha_pattern": None, "unet.rank_pattern": "["}
    metadata = {"lora_adapter_metadata": json.dumps(empty), "ss_network_args": "["}
    found = from_diffusers(file, model, "unet", metadata)
    assert found[f"{LONG}.alpha"] == 2


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_variants_of_peft_are_refused(variant):
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{variant}": True})}
    with pytest.raises(ValueError, match=f"made with {variant}"):
        from_diffusers(to_diffusers(make_state(UNET)), make_model(*UNET), "unet", metadata)


def test_an_underscore_that_could_be_two_modules_is_refused():
    model = make_model("a.b", "a_b")
    file = to_kohya(make_state({"a_b": (2, 2.0)}))
    with pytest.raises(ValueError, match="names 2 Linear or Conv2d modules"):
        from_kohya(file, model)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_conv_in.lora_down.weight", "names 0 Linear or Conv2d modules of Module"),
        (f"lora_unet_{BLOCK.replace('.', '_')}_to_k.hada_w1_a", "no key of a plain LoRA"),
        ("lora_te2_encoder.lora_down.weight", "no key of a plain LoRA"),
        (f"unet.{BLOCK}.to_k.lora_A.weight", "in kohya's format, such as 'lora_unet_<module>"),
    ],
)
def test_foreign_keys_are_named(key, words):
    file = {**to_kohya(make_state(UNET)), key: torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=words):
        from_kohya(file, make_model(*UNET))


def test_half_a_layer_is_refused():
    file, model = to_kohya(make_state(UNET)), make_model(*UNET)
    stem = f"lora_unet_{BLOCK.replace('.', '_')}_to_k"
    with pytest.raises(ValueError, match=r"attn2.to_k.lora_B' are missing"):
        from_kohya({k: t for k, t in file.items() if k != f"{stem}.lora_up.weight"}, model)


@pytest.mark.parametrize("write, read", [(to_kohya, from_kohya), (to_diffusers, from_diffusers)])
def test_layers_of_convolutions_are_read(write, read):
    model = make_model(f"{BLOCK}.to_k")
    model.conv_in = nn.Conv2d(5, 3, kernel_size=3)
    state = make_state({f"{BLOCK}.to_k": (2, 2.0)})
    state |= {"conv_in.lora_A": torch.randn(2, 5, 3, 3), "conv_in.alpha": torch.tensor(2.0)}
    state |= {"conv_in.lora_B": torch.randn(3, 2, 1, 1)}
    file = write(state)
    for found in (read(file, model), from_file(file, {"unet": model})["unet"]):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("read", [from_kohya, lambda f, m: from_file(f, {"unet": m})["unet"]])
def test_a_kernel_of_one_pixel_is_a_matrix_and_a_matrix_a_kernel(read):
    """As A1111 takes them: early LyCORIS wrote kernels for Linear modules."""
    model = make_model("to_k")
    model.proj_in = nn.Conv2d(4, 4, kernel_size=1)
    matrices = make_state({"to_k": (2, 2.0), "proj_in": (2, 2.0)})
    kernels = {k: t if k.endswith("alpha") else t[..., None, None] for k, t in matrices.items()}
    for state in (matrices, kernels):
        found = read(to_kohya(state), model)
        for leaf in ("lora_A", "lora_B"):
            assert torch.equal(found[f"to_k.{leaf}"], matrices[f"to_k.{leaf}"])
            assert torch.equal(found[f"proj_in.{leaf}"], kernels[f"proj_in.{leaf}"])


# --- whole files -----------------------------------------------------------------------------


@pytest.fixture
def models():
    return {"unet": make_model(*UNET), "text_encoder": make_model(*TEXT)}


@pytest.mark.parametrize("write", [to_kohya, to_diffusers])
def test_a_whole_file_is_read_by_part_whichever_keys_it_has(write, models):
    unet, text = make_state(UNET), make_state(TEXT)
    found = from_file({**write(unet), **write(text, "text_encoder")}, models)
    assert_same_deltas(found["unet"], unet)
    assert_same_deltas(found["text_encoder"], text)
    assert from_file(write(text, "text_encoder"), models)["unet"] == {}


def test_a_whole_file_is_read_with_the_alphas_of_its_metadata(models):
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3})}
    found = from_file(to_diffusers(make_state(UNET)), models, metadata)["unet"]
    assert found[f"{BLOCK}.to_k.alpha"] == 3


SIZES = [
    (".lora_down.weight", (2, 3)),
    (".lora_down.weight", (2, 4, 3, 3)),
    (".lora_down.weight", (2, 3, 1, 1)),
    (".lora_down.weight", (4,)),
    (".lora_down.weight", ()),
    (".lora_up.weight", (3, 2)),
    (".lora_up.weight", (4, 2, 1, 2)),
    (".lora_up.weight", (4,)),
    (".lora_up.weight", ()),
    (".alpha", (2,)),
]


@pytest.mark.parametrize(("ending", "shape"), SIZES)
def test_a_tensor_of_another_size_does_not_fit(ending, shape, models):
    file = to_kohya(make_state(UNET))
    key = f"lora_unet_{BLOCK.replace('.', '_')}_to_k{ending}"
    assert key in file
    words = f"1 of its 6 keys fit no Linear or Conv2d module .*is '{key}' of shape {list(shape)}; "
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        from_file({**file, key: torch.ones(shape)}, models)


FOREIGN = [
    "lora_unet_conv_in.lora_down.weight",
    f"lora_unet_{BLOCK.replace('.', '_')}_to_k.dora_scale",
    f"lora_te_{BLOCK.replace('.', '_')}_to_k.lora_down.weight",  # of the other part
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    f"unet.{BLOCK}.to_k.lora_A.weight",  # of the other format
    "<asset0>",
]


def test_all_keys_that_do_not_fit_are_counted(models):
    file = {**to_kohya(make_state(UNET)), **dict.fromkeys(FOREIGN, torch.ones(2, 4))}
    with pytest.raises(ValueError, match=f"6 of its 12 keys .*first is '{FOREIGN[0]}'"):
        from_file(file, models)
    for key in FOREIGN:
        with pytest.raises(ValueError, match=f"1 of its 1 keys fit no .*'{key}'"):
            from_file({key: torch.ones(2, 3)}, models)


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (2, 4), (2, 4, 3), (2, 3, 3, 3)])
def test_a_kernel_of_another_size_does_not_fit(shape):
    model = nn.Module()
    model.conv = nn.Conv2d(4, 4, kernel_size=3)
    file = {"lora_unet_conv.lora_down.weight": torch.ones(shape)}
    with pytest.raises(ValueError, match="1 of its 1 keys fit no"):
        from_file(file, {"unet": model})


def test_a_very_long_key_is_shown_in_part(models):
    with pytest.raises(LoraError, match="keys fit no Linear .*'x{98}… of shape") as caught:
        from_file({"x" * 100_000: torch.ones(2)}, models)
    assert len(str(caught.value)) < 400


def test_a_whole_file_has_whole_layers(models):
    file = to_kohya(make_state(UNET))
    del file[f"lora_unet_{BLOCK.replace('.', '_')}_to_k.lora_up.weight"]
    with pytest.raises(ValueError, match="to_k.lora_B' are missing"):
        from_file(file, models)


@pytest.mark.parametrize("convert", [to_kohya, to_diffusers])
def test_an_unknown_part_is_refused(convert):
    with pytest.raises(ValueError, match="part is 'vae'; give one of unet, text_encoder"):
        convert(make_state(UNET), "vae")


def test_metadata_of_kohya():
    file = {**to_kohya(make_state(UNET)), **to_kohya(make_state(TEXT), "text_encoder")}
    found = mifo_lora.kohya_metadata(file, "stable-diffusion-v2-512", "toy car")
    assert found["ss_network_module"] == "networks.lora"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "8.0")
    assert found["ss_v2"] == "True"
    assert found["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert found["modelspec.title"] == found["ss_output_name"] == "toy car"
    other = to_kohya(make_state({"to_k": (4, 4.0), "to_q": (2, 4.0)}))
    mixed = mifo_lora.kohya_metadata({**file, **other}, "stable-diffusion-v1", "toy car")
    assert (mixed["ss_network_dim"], mixed["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert mixed["ss_v2"] == "False"
