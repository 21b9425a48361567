"""MIGE's model folders and lists from strangers. ATTACKS=all in the environment tries all cases."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from hostile import (
    CANARY,
    Bomb,
    join_header,
    json_changes,
    outcome,
    some,
    split_header,
    tensor_changes,
)
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "mige"))
from tiny_mige import PREFIXES, save_tiny  # noqa: E402

from mige.config import Guidance
from mige.items import check_items, read_items, read_pictures  # noqa: E402
from mige.pipeline import MigePipeline  # noqa: E402
from mige.request import make_request  # noqa: E402

RED = Image.new("RGB", (8, 8), "red")
TENSORS = "diffusion_pytorch_model.safetensors"
WEIGHTS = {
    "transformer": f"transformer/{TENSORS}",
    "vae": f"vae/{TENSORS}",
    "fusion": f"fusion/{TENSORS}",
    "text_encoder": "text_encoder/model.safetensors",
    "vision_encoder": "vision_encoder/model.safetensors",
    "qformer": "qformer/model.safetensors",
}
CONFIGS = {
    "transformer/config.json": ("num_attention_heads", "num_layers"),
    "fusion/config.json": ("text_width", "text_length"),
    "text_encoder/config.json": ("d_model", "num_layers"),
    "vision_encoder/config.json": ("hidden_size", "image_size"),
    "qformer/config.json": ("hidden_size", "cross_attention_frequency"),
    "scheduler/scheduler_config.json": ("beta_start", "num_train_timesteps"),
    "tokenizer/tokenizer.json": ("model", None),
    "model_index.json": ("slots", "slots"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "good")


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy to make hostile; the canary module can be imported by whoever tries to."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{CANARY}.py").write_text("class X: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return shutil.copytree(good, tmp_path / "model")


def use(folder: Path) -> None:
    """Load a model and paint one step with it."""
    pipeline = MigePipeline.from_pretrained(folder)
    request = make_request("a <image> zzq", (RED,))
    condition = pipeline.encode(request, 0)
    pipeline.paint([(request, condition, 0)], Guidance(1, 2.0))


def test_a_good_folder_is_read(folder):
    assert outcome(lambda: use(folder)) == ""


@pytest.mark.parametrize(
    ("file", "change"),
    some([(file, change) for file, keys in CONFIGS.items() for change in json_changes(*keys)]),
)
def test_configs(folder, file, change):
    json_changes(*CONFIGS[file])[change](folder / file)
    told = outcome(lambda: use(folder))
    assert not told or folder.name in told


@pytest.mark.parametrize(
    ("part", "change"), some([(part, change) for part in WEIGHTS for change in tensor_changes()])
)
def test_weights(folder, part, change):
    tensor_changes()[change](folder / WEIGHTS[part])
    told = outcome(lambda: use(folder))
    assert folder.name in told


def put(path: Path, **facts) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


INDEXED = {
    "a class of a strange module": {"vision_encoder": [CANARY, "X"]},
    "a fusion of one's own": {"fusion": [CANARY, "X"]},
    "a scheduler of one's own": {"scheduler": [f"mige.{CANARY}", "ContinuousDPMSolver"]},
    "another class of the library": {"text_encoder": ["transformers", "T5Model"]},
    "a further part": {"safety_checker": [CANARY, "X"]},
    "a pipeline of one's own": {"_class_name": [f"{CANARY}", "X"]},
    "endless slots": {"slots": 10**9},
    "endless steps": {"guidance": {"edit": {"steps": 10**12}}},
    "steps of a list": {"guidance": {"edit": [20]}},
    "a prefix of megabytes": {"prefixes": dict.fromkeys(PREFIXES, "x" * 2**22)},
}  # fmt: skip


@pytest.mark.parametrize("attack", INDEXED)
def test_code_never_runs(folder, attack):
    put(folder / "model_index.json", **INDEXED[attack])
    told = outcome(lambda: use(folder))
    assert told or attack in ("a further part", "a pipeline of one's own")


@pytest.mark.parametrize(
    ("file", "facts"),
    [
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.X"}}),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "aqlm"}}),
        ("text_encoder/config.json", {"attn_implementation": "nobody/kernel"}),
        ("qformer/config.json", {"hidden_act": f"{CANARY}.X"}),
        ("vision_encoder/config.json", {"model_type": CANARY}),
        ("fusion/config.json", {"_class_name": f"{CANARY}.X"}),
        ("transformer/config.json", {"activation_fn": f"{CANARY}.X"}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.X", "evil.X"]}}),
        ("tokenizer/tokenizer_config.json", {"chat_template": "{{ ''.__class__ }}"}),
    ],
)
def test_configs_run_nothing(folder, file, facts):
    (folder / Path(file).parent / "evil.py").write_text(f"import {CANARY}\nclass X: pass\n")
    put(folder / file, **facts)
    outcome(lambda: use(folder))


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    "target", ["other.bin", "../vae/config.json", "/etc/passwd", "other.safetensors", ""]
)
def test_shards_lead_nowhere_else(folder, part, target):
    """An index is read where there is no single file; it may name its own shards alone."""
    path = folder / WEIGHTS[part]
    header, data = split_header(path)
    (folder / part / "other.bin").write_bytes(pickle.dumps(Bomb()))
    if target == "other.safetensors":
        other = folder / part / target
        other.touch()
        join_header(other, {"strange": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b"")
    path.unlink()
    names = {name: target for name in header if name != "__metadata__"}
    index = {"metadata": {}, "weight_map": names}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    told = outcome(lambda: use(folder))
    assert folder.name in told


PIECES = {
    "patterns that never end": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}},
    "a normalizer of one's own": {"normalizer": {"type": "Python", "code": CANARY}},
    "a table of characters that is none": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    },
    "a table that is no base64": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "*"}
    },
    "normalizers in each other": {"normalizer": {"normalizers": [{"normalizers": [{}]}] * 50}},
    "another model": {"model": {"type": "BPE", "vocab": [], "merges": []}},
    "no pieces": {"model": {"type": "Unigram", "vocab": []}},
    "pieces of other kinds": {"model": {"type": "Unigram", "vocab": [["a", "b"]]}},
    "the same piece twice": {"model": {"type": "Unigram", "vocab": [["a", 0], ["a", 0]]}},
    "few pieces": {"model": {"type": "Unigram", "vocab": [["a", 0]]}},
    "more pieces than the model has": {
        "model": {"type": "Unigram", "vocab": [[f"p{n}", -n] for n in range(5000)]}
    },
    "millions of extra pieces": {
        "model": {"type": "Unigram", "vocab": [[f"<extra_id_{n}>", 0] for n in range(3000)]}
    },
}


@pytest.mark.parametrize("attack", PIECES)
def test_vocabularies(folder, attack):
    put(folder / "tokenizer" / "tokenizer.json", **PIECES[attack])
    told = outcome(lambda: use(folder))
    assert told or "pattern" in attack or "normalizer" in attack


# ----------------------------------------------------------------------------------------------
# lists


@pytest.fixture
def listed(tmp_path):
    RED.save(tmp_path / "dog.png")
    path = tmp_path / "list.json"
    record = {"entity_path": ["dog.png"], "multi_prompt": "a<imagehere>on it"}
    path.write_text(json.dumps([record]))
    return path


def read(path: Path, pipeline) -> None:
    """As the commands read a list."""
    items = read_items(path, None, edits=False)
    read_pictures(items)
    check_items(items, pipeline)


LISTS = {
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "no list": '{"entity_path": []}',
    "numbers": "[1, 2]",
    "a huge number": '[{"entity_path": [], "multi_prompt": "a", "width": ' + "9" * 10_000 + "}]",
    "not UTF-8": b"\xff\xfe[",
    "a path of a device": '[{"entity_path": ["/dev/zero"], "multi_prompt": "a<imagehere>"}]',
    "a path with a zero byte": '[{"entity_path": ["a\\u0000b"], "multi_prompt": "a<imagehere>"}]',
    "a path of kilobytes": '[{"entity_path": ["PATH"], "multi_prompt": "a<imagehere>"}]'.replace(
        "PATH", "x" * 9000
    ),
    "a folder": '[{"entity_path": ["."], "multi_prompt": "a<imagehere>"}]',
    "a surrogate": '[{"entity_path": [], "multi_prompt": "a \\ud800"}]',
    "entities that are none": '[{"entity_path": [1], "multi_prompt": "a<imagehere>"}]',
    "a source that is none": '[{"entity_path": [], "source_path": "x", "multi_prompt": "a"}]',
    "a task that is none": '[{"entity_path": [], "multi_prompt": "a", "task": ["x"]}]',
    "thousands of marks": '[{"entity_path": [], "multi_prompt": "' + "<imagehere>" * 5000 + '"}]',
}  # fmt: skip


@pytest.mark.parametrize("attack", LISTS)
def test_lists(good, listed, attack):
    content = LISTS[attack]
    listed.write_bytes(content if isinstance(content, bytes) else content.encode())
    pipeline = MigePipeline.from_pretrained(good)
    told = outcome(lambda: read(listed, pipeline))
    assert told


def test_a_good_list_is_read(good, listed):
    pipeline = MigePipeline.from_pretrained(good)
    assert outcome(lambda: read(listed, pipeline)) == ""
