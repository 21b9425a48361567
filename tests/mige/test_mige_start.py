"""The model that training starts from, out of small models of the real classes."""

import hashlib
import json
import math
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from golden_mige import build_parts
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_mige import PREFIXES, tiny_tokenizer, tiny_vae
from torch.nn import functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from imagelab.models.parts import find_weights
from mige.folder import PARTS
from mige.method.encoder import see
from mige.method.fusion import FeatureFusion
from mige.pipeline import MigePipeline
from mige.start import main
from mige.starting import draw_features, draw_null_text

PROJECTION = "language_projection.weight"
NEEDED = ("vision_model.", "qformer.", "query_tokens", "language_projection.")
TRUNK = "transformer/diffusion_pytorch_model.safetensors"


def fill(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights of which no two are the same: the classes begin with many zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return module.eval().requires_grad_(False)


def make_trunk(**config) -> PixArtTransformer2DModel:
    """PixArt-α's, of the golden arrays' sizes."""
    own = dict(build_parts()["transformer"].config) | {"in_channels": 4} | config
    known = {key: value for key, value in own.items() if not key.startswith("_")}
    return fill(PixArtTransformer2DModel(**known), 1)


def make_t5(**config) -> T5ForConditionalGeneration:
    own = build_parts()["text_encoder"].config.to_dict()
    keys = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
    return fill(T5ForConditionalGeneration(T5Config(**{key: own[key] for key in keys} | config)), 2)


def make_blip2(text_width: int = 40) -> Blip2ForConditionalGeneration:
    parts = build_parts()
    config = Blip2Config(
        vision_config=parts["vision_encoder"].config.to_dict(),
        qformer_config=parts["qformer"].config.to_dict(),
        text_config=make_t5(d_model=text_width).config.to_dict(),
        num_query_tokens=4,
        image_token_index=3,
    )
    return fill(Blip2ForConditionalGeneration(config), 3)


def save_t5(folder: Path, **config) -> T5ForConditionalGeneration:
    """A whole T5, in shards, with its tokenizer."""
    t5 = make_t5(**config)
    t5.save_pretrained(folder, max_shard_size="15KB")
    tiny_tokenizer().save_pretrained(folder)
    return t5


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder with `pixart` and `blip2`; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("start")
    PixArtAlphaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=fill(build_parts()["text_encoder"], 4),
        vae=tiny_vae(),
        transformer=make_trunk(),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder / "pixart")
    make_blip2().save_pretrained(folder / "blip2", max_shard_size="20KB")
    return folder


@pytest.fixture
def own(sources, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(sources, tmp_path / "sources"))


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "models" / "start"


def start(folder: Path, output: Path, *more: object) -> Path:
    options = ["--pixart", folder / "pixart", "--blip2", folder / "blip2", "--output", output]
    main([str(each) for each in (*options, *more)])
    return output


@pytest.fixture(scope="module")
def started(sources, tmp_path_factory) -> Path:
    """The model; tests leave it as it is."""
    return start(sources, tmp_path_factory.mktemp("started") / "model")


def weights(folder: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    """All tensors in a part's files."""
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def trunk_weights(folder: Path) -> dict[str, torch.Tensor]:
    return weights(folder / "transformer", "diffusion_pytorch_model")


def below(state: dict, start_of: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, under the rest of their names."""
    return {
        key.removeprefix(start_of): each for key, each in state.items() if key.startswith(start_of)
    }


def check_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert tensor.dtype == wanted[key].dtype and torch.equal(tensor, wanted[key]), key


# ----------------------------------------------------------------------------------------------
# the model


def test_the_widened_trunk_is_pixart_s_whatever_the_source_is(started):
    wide, narrow = MigePipeline.from_pretrained(started).transformer, make_trunk()
    assert wide.config.in_channels == 8
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 24, 40, generator=generator)
    given = {"encoder_hidden_states": text, "timestep": torch.tensor([700.0, 3.0])}
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    wanted = narrow(x, **given, **sizes).sample
    assert wanted.std() > 0.01
    for source in (torch.zeros_like(x), noise, 1e4 * noise):
        assert torch.equal(wide(torch.cat([x, source], 1), **given, **sizes).sample, wanted)


def test_every_tensor_lands_where_it_should(sources, started):
    found, wanted = trunk_weights(started), trunk_weights(sources / "pixart")
    patch, narrow = "pos_embed.proj.weight", wanted.pop("pos_embed.proj.weight")
    wide = found.pop(patch)
    assert wide.shape == (48, 8, 2, 2)
    assert torch.equal(wide[:, :4], narrow) and not wide[:, 4:].any()
    check_same(found, wanted)

    blip2 = weights(sources / "blip2")
    check_same(weights(started / "vision_encoder"), below(blip2, "vision_model."))
    check_same(weights(started / "qformer"), below(blip2, "qformer."))
    fusion = weights(started / "fusion", "diffusion_pytorch_model")
    assert torch.equal(fusion["query_tokens"], blip2["query_tokens"])
    check_same(below(fusion, "projection."), below(blip2, "language_projection."))
    rest = {name.partition(".")[0] for name in fusion} - {"query_tokens", "projection"}
    assert rest == {"features", "null_text"}
    for name, stem in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        check_same(weights(started / name, stem), weights(sources / "pixart" / name, stem))


def test_pictures_mean_what_blip2_says(sources, started):
    """The feature fusion begins as a norm of the Q-Former's vectors."""
    blip2 = Blip2ForConditionalGeneration.from_pretrained(sources / "blip2").eval()
    blip2.vision_model.post_layernorm.eps = 1e-5  # as in MIGE
    parts = MigePipeline.from_pretrained(started).components
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = blip2.get_image_features(pixels)
        meaning = see(parts["vision_encoder"], parts["qformer"], parts["fusion"], pixels)
        projected = parts["fusion"].projection(meaning)
        assert torch.equal(projected, features.pooler_output)
        assert (projected[0] - projected[1]).abs().max() > 1e-3
        patches = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(1))
        begun = parts["fusion"](meaning, patches)
        normed = parts["fusion"].projection(F.layer_norm(meaning, (32,), eps=1e-6))
        assert torch.equal(begun, normed)


def test_it_paints(started):
    pipeline = MigePipeline.from_pretrained(started)
    dog = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    subject = pipeline("a <image> on the beach", [dog], steps=2).images
    assert [each.size for each in subject] == [(32, 32)]
    edit = pipeline("make it snow", source=dog, steps=2).images
    assert len(edit[0].getcolors(1024)) > 10


def test_what_the_model_says_of_itself(started):
    pipeline = MigePipeline.from_pretrained(started)
    assert pipeline.config.slots == 4
    assert pipeline.config.round_timesteps is True
    assert pipeline.config.prefixes == dict.fromkeys(PREFIXES, "")
    config = dict(pipeline.fusion.config)
    numbers = {"queries": 4, "width": 32, "heads": 8, "patch_width": 48, "text_width": 40}
    assert config.items() >= (numbers | {"text_length": 256}).items()
    schedule = json.loads((started / "scheduler" / "scheduler_config.json").read_text())
    numbers = [schedule[key] for key in PARTS["scheduler"].keys]
    assert numbers == [1000, 1e-4, 0.02, "linear", "epsilon"]
    trunk = json.loads((started / "transformer" / "config.json").read_text())
    before = dict(make_trunk().config)
    changed = {key for key in before if key[0] != "_" and trunk[key] != before[key]}
    assert changed == {"in_channels"}
    assert pipeline.text_encoder.config.is_encoder_decoder is False
    text = "a dog beside xyz"
    wanted = tiny_tokenizer()(text).input_ids
    assert pipeline.tokenizer(text).input_ids == wanted and len(wanted) > 4


def test_options_of_the_model(sources, output, tmp_path, capsys):
    path = tmp_path / "prefixes.json"
    path.write_text(json.dumps(PREFIXES))
    start(sources, output, "--prefixes", path, "--exact_timesteps", "--text_length", 24)
    assert capsys.readouterr().out.strip() == str(output)
    pipeline = MigePipeline.from_pretrained(output)
    assert pipeline.config.prefixes == PREFIXES
    assert pipeline.config.round_timesteps is False
    assert pipeline.fusion.null_text.shape == (24, 40)


# ----------------------------------------------------------------------------------------------
# what is drawn


def stream(label: bytes) -> int:
    """The seed of a labelled draw, as imagelab.training.seeds says it."""
    return int.from_bytes(hashlib.sha256(label).digest()[:8], "big") // 2


def test_what_is_drawn_depends_on_the_seed_alone(sources, started, output):
    torch.manual_seed(123)
    start(sources, output, "--seed", 7)
    found = weights(output / "fusion", "diffusion_pytorch_model")
    torch.manual_seed(stream(b"7\x1fstr:start\x1fstr:features"))
    check_same(below(found, "features."), FeatureFusion(32, 8, 48).state_dict())
    torch.manual_seed(5)
    check_same(below(found, "features."), below(draw_features(32, 8, 48, 7), "features."))

    other = weights(started / "fusion", "diffusion_pytorch_model")
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, other[name])}
    drawn = {"null_text", "features.query.weight", "features.attention.in_proj_weight"}
    drawn |= {"features.attention.out_proj.weight"}
    drawn |= {f"features.{name}.{i}.weight" for name in ("key", "value") for i in (0, 2)}
    assert changed == drawn


def test_the_null_text_has_a_stream_of_its_own():
    seed = stream(b"7\x1fstr:start\x1fstr:null text")
    drawn = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(draw_null_text(24, 40, 7), drawn / math.sqrt(40), atol=1e-7)
    squares = draw_null_text(256, 400, 0).square().sum(1)
    assert 0.95 < squares.mean() < 1.05


def test_the_feature_fusion_begins_as_the_release_s():
    before = torch.get_rng_state()
    drawn = below(draw_features(64, 8, 96, 0), "features.")
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in drawn.items():
        if name == "attention.in_proj_weight":  # Xavier's uniform numbers
            bound = math.sqrt(6 / (64 + 3 * 64))
            assert 0.95 * bound < tensor.abs().max() <= bound
        elif name.startswith("norm") and name.endswith("weight"):
            assert (tensor == 1).all()
        elif name.endswith("bias") or name == "mix.weight":
            assert not tensor.any()
        else:
            assert 0.018 < tensor.std() < 0.022, name
    assert len(drawn) == 1 + 2 * 4 + 2 * 4 + 4 + 2
    assert drawn["key.0.weight"].shape == (64, 96)


# ----------------------------------------------------------------------------------------------
# other forms of the same


def test_a_whole_t5_and_an_autoencoder_from_elsewhere(own, output):
    t5 = save_t5(own / "t5", d_ff=48)
    shutil.move(own / "pixart/vae", own / "vae")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(own / "pixart" / name)
    start(own, output, "--t5", own / "t5", "--vae", own / "vae")
    found = MigePipeline.from_pretrained(output)
    wanted = t5.encoder.state_dict()
    check_same(below(found.text_encoder.state_dict(), "encoder."), wanted)
    assert found.text_encoder.config.d_ff == 48
    assert torch.equal(found.text_encoder.shared.weight, t5.shared.weight)
    check_same(found.vae.state_dict(), tiny_vae().state_dict())


def test_a_text_encoder_whose_table_has_its_other_name(own, output):
    file = own / "pixart/text_encoder/model.safetensors"
    state = load_file(file)
    table = state.pop("shared.weight")
    save_file(state | {"encoder.embed_tokens.weight": table}, file, {"format": "pt"})
    found = MigePipeline.from_pretrained(start(own, output)).text_encoder
    assert torch.equal(found.shared.weight, table)
    assert torch.equal(found.encoder.embed_tokens.weight, table)


def test_folders_of_an_older_diffusers(own, output, started):
    """PixArt-α on the hub: the trunk's class has its former name, and former settings."""
    path = own / "pixart/transformer/config.json"
    config = json.loads(path.read_text())
    config |= {"_class_name": "Transformer2DModel", "double_self_attention": False}
    del config["use_additional_conditions"], config["interpolation_scale"]
    path.write_text(json.dumps(config | {"num_vector_embeds": None}))
    index = own / "pixart/model_index.json"
    facts = json.loads(index.read_text()) | {"transformer": ["diffusers", "Transformer2DModel"]}
    index.write_text(json.dumps(facts))
    start(own, output)
    check_same(trunk_weights(output), trunk_weights(started))
    index = json.loads((output / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "PixArtTransformer2DModel"]


def test_a_qformer_whose_config_tells_no_width_of_pictures(own, output):
    """BLIP-2 takes the vision encoder's, whatever it says."""
    change_qformer(own, encoder_hidden_size=1408)
    assert Blip2Config.from_pretrained(own / "blip2").qformer_config.encoder_hidden_size == 24
    found = MigePipeline.from_pretrained(start(own, output)).qformer
    assert found.config.encoder_hidden_size == 24


def test_precisions_stay_but_the_fusion_s(own, output):
    make_trunk().bfloat16().save_pretrained(own / "pixart/transformer")
    halves = {name: tensor.half() for name, tensor in weights(own / "blip2").items()}
    save_file(halves, own / "blip2/model.safetensors")
    start(own, output)
    assert {each.dtype for each in trunk_weights(output).values()} == {torch.bfloat16}
    assert {each.dtype for each in weights(output / "qformer").values()} == {torch.float16}
    fusion = weights(output / "fusion", "diffusion_pytorch_model")
    assert {each.dtype for each in fusion.values()} == {torch.float32}
    assert torch.equal(fusion["projection.weight"], halves[PROJECTION].float())
    assert MigePipeline.from_pretrained(output).transformer.dtype == torch.float32


def shards(folder: Path) -> tuple[set[str], set[str]]:
    """A BLIP-2's shards that hold what is needed, and the others."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in places.items() if name.startswith(NEEDED)}
    return needed, set(places.values()) - needed


def test_the_language_model_is_not_read(own, output, started):
    needed, others = shards(own / "blip2")
    assert len(needed) > 3 and len(others) > 1
    for name in others:
        (own / "blip2" / name).unlink()
    start(own, output)
    for name in ("vision_encoder", "qformer"):
        check_same(weights(output / name), weights(started / name))


def test_the_language_model_beside_the_rest_is_not_read(own, output, started):
    """It holds what this program could not read, and what it would refuse."""
    state = weights(own / "blip2")
    state["language_model.shared.weight"] = torch.zeros(2).to(torch.float8_e4m3fn)
    state["language_model.lm_head.weight"] = torch.full((2,), float("nan"))
    state["qformer.embeddings.position_ids"] = torch.arange(4)[None]  # in older files
    for file in (own / "blip2").glob("model*"):
        file.unlink()
    save_file(state, own / "blip2/model.safetensors")
    start(own, output)
    check_same(weights(output / "qformer"), weights(started / "qformer"))


@pytest.mark.parametrize("offline", [False, True])
def test_models_of_the_hub(sources, tmp_path, output, started, monkeypatch, offline):
    """No file is fetched that is not needed."""
    cache = tmp_path / "cache"

    def fetch(hub_id, allow_patterns, local_files_only):
        assert local_files_only is offline
        folder = sources / hub_id.removeprefix("org/")
        for file in folder.rglob("*.*"):
            name = file.relative_to(folder).as_posix()
            if any(fnmatch(name, each) for each in allow_patterns):
                (cache / hub_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / hub_id / name)
        return str(cache / hub_id)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    more = ["--offline"] if offline else []
    main(["--pixart", "org/pixart", "--blip2", "org/blip2", "--output", str(output), *more])
    check_same(weights(output / "qformer"), weights(started / "qformer"))
    check_same(trunk_weights(output), trunk_weights(started))
    needed, _ = shards(sources / "blip2")
    fetched = {path.name for path in (cache / "org/blip2").iterdir()}
    assert fetched == needed | {"config.json", "model.safetensors.index.json"}
    assert not (cache / "org/pixart/scheduler").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [([], "could not be fetched (OSError)"), (["--offline"], "is not in the local cache")],
)
def test_a_hub_that_is_not_there(sources, output, fails, monkeypatch, more, told):
    def fetch(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    error = fails(start, sources, output, "--t5", "org/t5", *more).err
    assert told in error and "org/t5 is no folder" in error and "--t5" in error
    assert not output.parent.exists()


# ----------------------------------------------------------------------------------------------
# what no model can start from


def change_config(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_qformer(folder: Path, **changes) -> None:
    path = folder / "blip2/config.json"
    change_config(path, qformer_config=json.loads(path.read_text())["qformer_config"] | changes)


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into a file, or take them out; ``__`` stands for a dot."""
    state = load_file(file)
    for name, tensor in tensors.items():
        state[name.replace("__", ".")] = tensor
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, file, {"format": "pt"})


def replace_trunk(folder: Path, **config) -> None:
    make_trunk(**config).save_pretrained(folder / "pixart/transformer")


def replace_blip2(folder: Path, blip2: torch.nn.Module) -> None:
    shutil.rmtree(folder / "blip2")
    blip2.save_pretrained(folder / "blip2")


def only_pickles(folder: Path, stem: str) -> None:
    for file in folder.glob(f"{stem}*"):
        file.unlink()
    torch.save({"a": torch.ones(1)}, folder / f"{stem}.bin")


def lose_shard(folder: Path, name: str) -> None:
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / places[name]).unlink()


def lie_about_shard(folder: Path, name: str, place: str) -> None:
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    change_config(path, weight_map=places | {name: place})


BROKEN = {
    "the 1024 model": (
        lambda f: replace_trunk(f, use_additional_conditions=True),
        "as PixArt-α for 1024×1024 does; give the one for 512×512 by --pixart",
    ),
    "the 1024 model's config": (
        lambda f: change_config(
            f / "pixart/transformer/config.json", use_additional_conditions=None, sample_size=128
        ),
        "also reads sizes (use_additional_conditions)",
    ),
    "a widened trunk": (
        lambda f: replace_trunk(f, in_channels=8),
        "takes 8 channels and gives 8, and PixArt-α's gives twice as many",
    ),
    "a trunk without a variance": (
        lambda f: replace_trunk(f, out_channels=4),
        "takes 4 channels and gives 4",
    ),
    "a trunk of another autoencoder": (
        lambda f: replace_trunk(f, in_channels=3, out_channels=6),
        "takes 3 channels, and the autoencoder",
    ),
    "a trunk of another T5": (
        lambda f: replace_trunk(f, caption_channels=44),
        "pixart is for a T5 44 wide, and that of",
    ),
    "a trunk of another kind": (
        lambda f: change_config(f / "pixart/transformer/config.json", norm_type="ada_norm_zero"),
        "could not be loaded",
    ),
    "a trunk's tensor": (
        lambda f: change(f / "pixart" / TRUNK, proj_out__bias=None),
        "pixart/transformer lacks proj_out.bias; fetch it again, or give another --pixart",
    ),
    "a trunk's tensor of another shape": (
        lambda f: change(f / "pixart" / TRUNK, proj_out__bias=torch.ones(31)),
        "has in another shape proj_out.bias;",
    ),
    "a trunk's tensors of its own": (
        lambda f: change(f / "pixart" / TRUNK, a=torch.ones(1), b=torch.ones(1)),
        "has, and the part does not know, a and 1 more;",
    ),
    "a trunk of whole numbers": (
        lambda f: change(f / "pixart" / TRUNK, proj_out__bias=torch.ones(32, dtype=torch.int64)),
        "has as whole numbers proj_out.bias;",
    ),
    "another pipeline": (
        lambda f: change_config(
            f / "pixart/model_index.json", transformer=["diffusers", "SD3Transformer2DModel"]
        ),
        "transformer is diffusers.SD3Transformer2DModel",
    ),
    "a trunk alone": (lambda f: (f / "pixart/model_index.json").unlink(), "there is no file"),
    "a pickled trunk": (
        lambda f: only_pickles(f / "pixart/transformer", "diffusion_pytorch_model"),
        "pickled .bin weights are never read",
    ),
    "a pickled T5": (
        lambda f: only_pickles(f / "pixart/text_encoder", "model"),
        "text_encoder/model.safetensors (pickled .bin weights are never read)",
    ),
    "a pickled BLIP-2": (
        lambda f: only_pickles(f / "blip2", "model"),
        "blip2/model.safetensors (pickled .bin weights are never read)",
    ),
    "a pickled autoencoder": (
        lambda f: only_pickles(f / "pixart/vae", "diffusion_pytorch_model"),
        "vae/diffusion_pytorch_model.safetensors (pickled .bin weights are never read)",
    ),
    "a BLIP-2 of another T5": (
        lambda f: replace_blip2(f, make_blip2(48)),
        "the projection of {}/blip2 is for a T5 48 wide, and that of {}/pixart is 40",
    ),
    "no shard": (
        lambda f: lose_shard(f / "blip2", PROJECTION),
        "there is no {}/blip2/model-0",
    ),
    "a shard elsewhere": (
        lambda f: lie_about_shard(f / "blip2", PROJECTION, "../pixart/x.safetensors"),
        "names no shards, or files elsewhere",
    ),
    "a shard that has it not": (
        lambda f: lie_about_shard(f / "blip2", "query_tokens", "none.safetensors"),
        "none.safetensors",
    ),
    "an InstructBLIP": (
        lambda f: change_config(f / "blip2/config.json", model_type="instructblip"),
        "is of a instructblip",
    ),
    "a BLIP-2 that compares": (
        lambda f: change_config(
            f / "blip2/config.json", architectures=["Blip2ForImageTextRetrieval"]
        ),
        "Blip2ForImageTextRetrieval",
    ),
    "a BLIP-2 of many layers": (
        lambda f: change_config(
            f / "blip2/config.json", vision_config={"num_hidden_layers": 10**9}
        ),
        "num_hidden_layers of vision_encoder is 1000000000",
    ),
    "a Q-Former of no such width": (
        lambda f: change_qformer(f, hidden_size=64),
        "has in another shape qformer.encoder.layer.0",
    ),
    "another kind of T5": (
        lambda f: change_config(f / "pixart/text_encoder/config.json", model_type="umt5"),
        "is of a umt5 and not of a t5",
    ),
    "two tables": (
        lambda f: change(
            f / "pixart/text_encoder/model.safetensors",
            encoder__embed_tokens__weight=torch.ones(64, 40),
        ),
        "shared.weight and encoder.embed_tokens.weight in",
    ),
    "no table": (
        lambda f: change(f / "pixart/text_encoder/model.safetensors", shared__weight=None),
        "lacks encoder.embed_tokens.weight and 1 more",
    ),
    "not finite": (
        lambda f: change(
            f / "pixart/text_encoder/model.safetensors",
            encoder__final_layer_norm__weight=torch.full((40,), float("inf")),
        ),
        "encoder.final_layer_norm.weight of text_encoder holds NaN or infinity",
    ),
    "no tokenizer": (
        lambda f: shutil.rmtree(f / "pixart/tokenizer"),
        "there is neither spiece.model nor tokenizer.json",
    ),
    "another autoencoder": (
        lambda f: change_config(f / "pixart/vae/config.json", scaling_factor=0.13025),
        "scales latents by 0.13025",
    ),
    "a damaged file": (
        lambda f: (f / "pixart" / TRUNK).write_bytes(b"no"),
        "cannot be read as safetensors",
    ),
    "no PixArt-α": (lambda f: shutil.rmtree(f / "pixart"), "there is no folder {}/pixart"),
    "no BLIP-2": (
        lambda f: shutil.rmtree(f / "blip2"),
        "there is no folder {}/blip2; give another --blip2",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_a_start_is_told_before_anything_is_written(own, output, fails, case):
    damage, told = BROKEN[case]
    damage(own)
    line = fails(start, own, output).err.strip().splitlines()[-1]
    assert told.replace("{}", str(own)) in line
    assert len(line) < 700
    assert not output.parent.exists()


def test_a_t5_of_another_width(own, output, fails):
    save_t5(own / "t5", d_model=48)
    told = fails(start, own, output, "--t5", own / "t5").err
    assert f"pixart is for a T5 40 wide, and that of {own}/t5 is 48; give another --t5" in told


def test_a_t5_of_fewer_words(own, output, fails):
    save_t5(own / "t5", vocab_size=49)
    told = fails(start, own, output, "--t5", own / "t5").err
    assert "has 50 pieces, and the text encoder knows 49" in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--text_length", 0), "--text_length is 0; give a whole number from 1 to 4096"),
        (("--text_length", 4097), "--text_length is 4097"),
        (("--seed", -1), "the seed is -1"),
        (("--seed", 2**63), "give a whole number from 0"),
        (("--prefixes", "none.json"), "there is no file none.json"),
    ],
)
def test_numbers_that_cannot_be(sources, output, fails, more, told):
    assert told in fails(start, sources, output, *more).err
    assert not output.parent.exists()


def test_what_is_there_is_replaced_only_when_asked(own, output, fails):
    output.mkdir(parents=True)
    start(own, output)  # an empty folder is as good as none
    (output / "left").touch()
    assert "--overwrite" in fails(start, own, output).err
    assert "holds left, which would" in fails(start, own, output, "--overwrite").err
    (output / "left").rename(output / "qformer" / "left")
    start(own, output, "--overwrite")
    assert not (output / "qformer" / "left").exists()
    assert find_weights(output / "qformer", PARTS["qformer"])
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_no_source_is_replaced(own, output, fails):
    before = sorted(own.rglob("*"))
    assert "holds" in fails(start, own, own, "--overwrite").err
    assert "holds" in fails(start, own, own / "blip2", "--overwrite").err
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years")
    assert "no model folder" in fails(start, own, output, "--overwrite").err
    assert sorted(own.rglob("*")) == before
