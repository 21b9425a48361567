"""Converting a release: the golden weights, written as one, are a model that gives their arrays."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden_mige import arrays, close, facts, golden_parts, release
from safetensors.torch import load_file, save_file
from test_golden import encoded
from tiny_mige import tiny_vae
from transformers import T5EncoderModel

from imagelab.errors import UserError
from imagelab.io.tensors import UMASK
from mige.conversion import Model
from mige.convert import main
from mige.folder import PARTS, find_weights, read_tokenizer
from mige.method.prediction import predict
from mige.pipeline import MigePipeline
from mige.sources import read_state, read_text_tokenizer
from mige.vocabulary import is_charsmap, read_spiece

SPIECE = Path(__file__).parents[1] / "golden" / "t5_tokenizer"
HEADS = ["--heads", "transformer=2", "vision_encoder=2", "qformer=4", "fusion=8"]
PREFIXES = {
    "subject": "Paint this:\n ", "subject_inference": "paint:\n ", "edit": "Ändere:\n ",
    "subject_edit": "put:\n ",
}  # fmt: skip


def write_release(folder: Path, state: dict | None = None) -> Path:
    """The golden weights as a release, in float32, with an autoencoder and a tokenizer."""
    text = folder / "pretrained_models" / "t5"
    text.mkdir(parents=True)
    shutil.copy(SPIECE / "spiece.model", text)
    size = facts("config")["t5"]
    config = {
        "model_type": "t5", "d_model": size["d_model"], "d_ff": size["d_ff"], "d_kv": size["d_kv"],
        "num_heads": size["heads"], "num_layers": size["layers"], "vocab_size": size["vocab"],
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    (text / "config.json").write_text(json.dumps(config))
    (text / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    tiny_vae().save_pretrained(folder / "pretrained_models" / "sd-vae")
    torch.save({"state_dict": state or release(), "epoch": 3}, folder / "model.pth")
    return folder


@pytest.fixture
def released(tmp_path) -> Path:
    return write_release(tmp_path / "release")


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "models" / "mige"


def convert(release_folder: Path, output: Path, *more: str) -> Path:
    main(["--release", str(release_folder), "--output", str(output), *HEADS, *more])
    return output


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A converted model; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("convert")
    prefixes = folder / "prefixes.json"
    prefixes.write_text(json.dumps(PREFIXES), encoding="utf-8")
    model = convert(
        write_release(folder / "release"), folder / "model", "--prefixes", str(prefixes)
    )
    shutil.rmtree(folder / "release")  # nothing in the model leads back to it
    return model


@cache
def wanted() -> dict[str, dict[str, torch.Tensor]]:
    """The golden weights as the libraries name them, by part."""
    states = {name: part.state_dict() for name, part in golden_parts().items()}
    return states | {"vae": tiny_vae().state_dict()}


def check_weights(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Assert that a model's files hold the golden weights, bit by bit (rounded to a precision)."""
    for name, state in wanted().items():
        found = {}
        for file in find_weights(folder / name, PARTS[name]):
            found |= load_file(file)
        assert state.keys() - found.keys() <= {"encoder.embed_tokens.weight"}
        assert found.keys() <= state.keys()
        for key, tensor in found.items():
            rounded = state[key] if dtype is None or name == "vae" else state[key].to(dtype)
            assert tensor.dtype == rounded.dtype and torch.equal(tensor, rounded), (name, key)


# ----------------------------------------------------------------------------------------------
# the model


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("forward_subject", [(False, False), (True, False)]),
        ("forward_edit", [(False, False), (False, True), (True, True)]),
    ],
)
def test_the_model_gives_the_golden_arrays(converted, name, seen):
    pipeline = MigePipeline.from_pretrained(converted)
    given = arrays(name)
    text, mask = encoded(SimpleNamespace(**pipeline.components), given)
    close(text, given["t5_out"], 1e-5, 5e-6)
    for branch, (has_text, has_source) in enumerate(seen):
        found = predict(
            pipeline.transformer,
            given["x"],
            given["source"] if has_source else torch.zeros_like(given["source"]),
            given["t"][:2],
            text if has_text else pipeline.fusion.null_text.expand_as(text),
            mask,
        )
        close(torch.cat(found, dim=1), given["out"][2 * branch : 2 * branch + 2], 5e-6, 2e-6)


def test_what_the_model_says_of_itself(converted):
    config = MigePipeline.from_pretrained(converted).config
    assert config.prefixes == PREFIXES
    assert config.slots == 4
    assert config.round_timesteps is True
    scheduler = json.loads((converted / "scheduler" / "scheduler_config.json").read_text())
    numbers = [scheduler[key] for key in ("num_train_timesteps", "beta_start", "beta_end")]
    assert numbers == [1000, 1e-4, 0.02]
    assert str(converted.parent) not in "".join(p.read_text() for p in converted.rglob("*.json"))


def test_whoever_may_read_the_configs_may_read_the_weights(converted):
    modes = {path.stat().st_mode & 0o777 for path in converted.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~UMASK}


def test_saved_again_it_is_the_same_model(converted, tmp_path):
    MigePipeline.from_pretrained(converted).save_pretrained(tmp_path / "again")
    check_weights(tmp_path / "again")
    indices = [
        json.loads((f / "model_index.json").read_text()) for f in (converted, tmp_path / "again")
    ]
    assert indices[0] == indices[1]
    files = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        for folder in (converted, tmp_path / "again")
    ]
    assert files[0] == files[1]


def test_weights_are_the_release_s(converted):
    check_weights(converted)


def _save_bare(state: dict, folder: Path) -> None:
    torch.save(state, folder / "model.pth")


def _save_old(state: dict, folder: Path) -> None:
    torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=False)


def _save_safetensors(state: dict, folder: Path) -> None:
    (folder / "model.pth").unlink()
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("save", [_save_bare, _save_old, _save_safetensors])
def test_other_forms_of_the_release(released, output, save):
    """With what torch saves besides: T5's embeddings twice, and numbers of the Q-Former's words."""
    state = release()
    state["t5_model.encoder.embed_tokens.weight"] = state["t5_model.shared.weight"].clone()
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    save(state, released)
    check_weights(convert(released, output))


def test_bfloat16_stays_and_its_positions_are_known(released, output):
    state = {name: tensor.bfloat16() for name, tensor in release().items()}
    assert not torch.equal(state["pos_embed"].float(), release()["pos_embed"])
    torch.save({"state_dict": state}, released / "model.pth")
    check_weights(convert(released, output), torch.bfloat16)
    assert MigePipeline.from_pretrained(output).transformer.dtype == torch.float32
    parts = MigePipeline.from_pretrained(output, torch_dtype=torch.bfloat16).components
    assert parts["text_encoder"].dtype == torch.bfloat16


def test_large_parts_are_in_several_files(released, output, monkeypatch):
    monkeypatch.setattr("mige.conversion.MOST_SHARD", "100KB")
    convert(released, output)
    assert len(find_weights(output / "transformer", PARTS["transformer"])) > 1
    check_weights(output)
    pipeline = MigePipeline.from_pretrained(output)
    found = pipeline.transformer.state_dict()
    assert all(torch.equal(found[key], each) for key, each in wanted()["transformer"].items())


def test_without_prefixes_a_note_is_told(released, output, caplog, capsys):
    convert(released, output)
    assert "without --prefixes" in caplog.text
    assert MigePipeline.from_pretrained(output).config.prefixes == dict.fromkeys(PREFIXES, "")
    assert capsys.readouterr().out.strip() == str(output)


def test_parts_that_stand_elsewhere(released, output):
    for old, new in (("pretrained_models/sd-vae", "a"), ("pretrained_models/t5", "b")):
        shutil.move(released / old, released.parent / new)
    os.replace(released / "model.pth", released.parent / "trained.pth")
    there = released.parent
    convert(
        released, output, "--vae", f"{there}/a", "--t5", f"{there}/b", "--weights",
        f"{there}/trained.pth",
    )  # fmt: skip
    check_weights(output)


def test_an_autoencoder_of_an_older_diffusers(released, output):
    """Pickled, its attention under the former names, and without a scaling factor."""
    folder = released / "pretrained_models" / "sd-vae"
    file = folder / "diffusion_pytorch_model.safetensors"
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(file).items():
        for new, old in former.items():
            name = name.replace(f".{new}.", f".{old}.")
        state[name] = tensor
    assert any("query" in name for name in state)
    torch.save(state, file.with_suffix(".bin"))
    file.unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    convert(released, output)
    check_weights(output)
    assert MigePipeline.from_pretrained(output).vae.config.scaling_factor == 0.18215


# ----------------------------------------------------------------------------------------------
# the tokenizer


@pytest.mark.parametrize(("text", "ids"), json.loads((SPIECE / "ids.json").read_text()))
def test_texts_get_the_ids_of_sentencepiece(converted, text, ids):
    tokenizer = read_tokenizer(converted / "tokenizer")
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer(text).input_ids == [*ids, 1]


def test_extra_pieces_stand_behind_the_others(tmp_path):
    """T5 counts them down to 0, which is the last of its words."""
    shutil.copy(SPIECE / "spiece.model", tmp_path)
    tokenizer = read_text_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, read_tokenizer(tmp_path / "saved")):
        assert len(each) == 152
        assert each.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [151, 52]
        assert each("a<extra_id_3> cat", add_special_tokens=False).input_ids == [5, 148, 22]


def test_a_tokenizer_in_the_newer_form_will_do(converted, tmp_path):
    folder = tmp_path / "t5"
    folder.mkdir()
    shutil.copy(converted / "tokenizer" / "tokenizer.json", folder)
    tokenizer = read_text_tokenizer(folder)
    assert (
        tokenizer("the \uff41 cat").input_ids == read_text_tokenizer(SPIECE)("the a cat").input_ids
    )


def test_a_damaged_vocabulary_is_told(tmp_path):
    """Wherever it ends, and whatever byte is another, there is a tokenizer or a sentence."""
    data = (SPIECE / "spiece.model").read_bytes()
    path = tmp_path / "spiece.model"
    refused = 0
    for place in range(0, len(data), 7):
        for damaged in (data[:place], data[:place] + b"\xff" + data[place + 1 :]):
            path.write_bytes(damaged)
            try:
                tokenizer = read_text_tokenizer(tmp_path)
                assert tokenizer("the \u00a0 cafe\u0301 \uff41").input_ids[-1] == 1
            except UserError as error:
                refused += 1
                assert str(path) in str(error)
    assert refused > 150
    for text in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>"):
        path.write_bytes(text)
        with pytest.raises(UserError, match="spiece.model"):
            read_spiece(path)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (b"\x12\x02\x18\x01", None),  # the trainer's settings: the kind of model is unigram
        (b"\x12\x02\x18\x02", "another kind"),  # byte pairs
        (b"\x0a\x05\x0a\x01Q\x18\x01", None),  # a piece: Q, of type 1
        (b"\x0a\x05\x0a\x01Q\x18\x04", "another kind"),  # of type 4, a user's own
        (b"\x0a\x03\x0a\x01e", "twice"),
        (b"\x0a\x08\x0a\x01Q\x15\x00\x00\xc0\x7f", "no numbers"),  # its score is NaN
    ],
)
def test_vocabularies_that_are_not_t5_s(tmp_path, fields, told):
    """A message goes on with what is written behind it."""
    path = tmp_path / "spiece.model"
    path.write_bytes((SPIECE / "spiece.model").read_bytes() + fields)
    if told is None:
        assert read_spiece(path)[0][51][0] == "l"
        return
    with pytest.raises(UserError, match=told):
        read_spiece(path)


ENDS = 1 << 8  # a unit whose first child holds the place of a text
TEXT = 1 << 31  # such a child


@pytest.mark.parametrize(
    ("units", "texts", "fits"),
    [
        ({}, b"", True),
        ({0: 255 << 10}, b"", True),
        ({0: 256 << 10}, b"", False),  # children in a second block, and there is one
        ({3: (1 << 9) | (1 << 10)}, b"", False),  # the same, counted in blocks
        ({0: (7 << 10) | ENDS, 7: TEXT | 2}, b"ab\0", True),
        ({0: (7 << 10) | ENDS, 7: TEXT | 3}, b"ab\0", False),
        ({0: (7 << 10) | ENDS, 7: 2}, b"ab\0", False),
        ({0: (7 << 10) | ENDS, 7: TEXT | 1}, "aé\0".encode(), True),
        ({0: (7 << 10) | ENDS, 7: TEXT | 2}, "aé\0".encode(), False),  # in the middle of é
        ({}, b"\xc3\0", False),
    ],
)
def test_tables_of_characters_that_lead_nowhere(units, texts, fits):
    """The library would abort at them, when it meets such a character."""
    trie = b"".join(units.get(place, 0).to_bytes(4, "little") for place in range(256))
    assert is_charsmap((1024).to_bytes(4, "little") + trie + texts) is fits
    assert not is_charsmap((1020).to_bytes(4, "little") + trie + texts)
    assert not is_charsmap((2048).to_bytes(4, "little") + trie + texts)
    assert not is_charsmap(b"")


# ----------------------------------------------------------------------------------------------
# what cannot be converted


class Code:
    """What a pickle of it would run makes a file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "was_run"),)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into a release, or take them out; ``__`` stands for a dot."""
    state = release()
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    torch.save({"state_dict": state}, folder / "model.pth")


def write_config(folder: Path, part: str, **values) -> None:
    path = folder / "pretrained_models" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


T5_TABLE = "t5_model.encoder.embed_tokens.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (
        lambda f: torch.save({"state_dict": {"a": Code(f)}}, f / "model.pth"),
        "could run code",
    ),
    "plain code": (
        lambda f: (f / "model.pth").write_bytes(pickle.dumps(Code(f), protocol=2)),
        "could run code",
    ),
    "text": (lambda f: (f / "model.pth").write_text("no tensors"), "damaged"),
    "no tensors": (lambda f: torch.save({"state_dict": {}}, f / "model.pth"), "no tensors by name"),
    "a number": (
        lambda f: torch.save({"state_dict": {"a": 3}}, f / "model.pth"),
        "holds a, which is no tensor",
    ),
    "a list": (lambda f: torch.save([torch.ones(2)], f / "model.pth"), "no tensors by name"),
    "huge views": (
        lambda f: change(f, query_tokens=torch.ones(1, 1, 1).expand(1, 10**9, 10**9)),
        "not supported",
    ),
    "missing": (
        lambda f: change(f, FFM__mlp__bias=None, t5_proj__bias=None),
        "lacks features.mix.bias, projection.bias of fusion",
    ),
    "unknown": (
        lambda f: change(f, **dict.fromkeys(("e", "d", "c", "b"), torch.ones(1))),
        "has b, c, d and 1 more, which transformer does not know",
    ),
    "twice": (
        lambda f: change(f, visual_encoder__post_layernorm__weight=torch.ones(24)),
        "post_layernorm.weight under two names",
    ),
    "other shape": (
        lambda f: change(f, blocks__1__mlp__fc2__bias=torch.ones(47)),
        "transformer_blocks.1.ff.net.2.bias of transformer: the shapes are [47] and should be [48]",
    ),
    "not three in one": (
        lambda f: change(f, blocks__1__attn__qkv__bias=torch.ones(100)),
        "not 3 in one",
    ),
    "biases": (
        lambda f: change(f, visual_encoder__blocks__1__attn__v_bias=None),
        "q_bias and v_bias",
    ),
    "two tables": (
        lambda f: change(f, **{T5_TABLE.replace(".", "__"): torch.ones(64, 40)}),
        "shared.weight and encoder.embed_tokens.weight",
    ),
    "integers": (
        lambda f: change(f, FFM__mlp__bias=torch.ones(32, dtype=torch.int64)),
        "torch.int64 in fusion",
    ),
    "not finite": (
        lambda f: change(f, t5_proj__bias=torch.full((40,), float("nan"))),
        "NaN or infinity in projection.bias of fusion",
    ),
    "positions": (
        lambda f: change(f, pos_embed=release()["pos_embed"].flip(1)),
        "away from sines and cosines",
    ),
    "positions a little off": (
        lambda f: change(f, pos_embed=release()["pos_embed"] + 3e-3),
        "0.003 away from sines and cosines",
    ),
    "no weights": (lambda f: (f / "model.pth").unlink(), "--weights"),
    "no autoencoder": (
        lambda f: shutil.rmtree(f / "pretrained_models" / "sd-vae"),
        "config.json says AutoencoderKL",
    ),
    "two autoencoders": (
        lambda f: shutil.copytree(
            f / "pretrained_models" / "sd-vae", f / "pretrained_models" / "x" / "y" / "vae"
        ),
        "2 folders may be",
    ),
    "an autoencoder's weights": (
        lambda f: (
            f / "pretrained_models" / "sd-vae" / "diffusion_pytorch_model.safetensors"
        ).unlink(),
        "--vae",
    ),
    "another autoencoder": (
        lambda f: write_config(f, "sd-vae", scaling_factor=0.13025),
        "scales latents by 0.13025",
    ),
    "an autoencoder of other sizes": (
        lambda f: write_config(f, "sd-vae", block_out_channels=[8, 8, 16]),
        "of vae; fetch it again",
    ),
    "an autoencoder that cannot be": (
        lambda f: write_config(f, "sd-vae", down_block_types=["What"] * 3),
        "could not be loaded",
    ),
    "no T5": (lambda f: shutil.rmtree(f / "pretrained_models" / "t5"), "spiece.model"),
    "another T5": (lambda f: write_config(f, "t5", d_model=48), "d_model is 48"),
    "a T5 with other activations": (
        lambda f: write_config(f, "t5", feed_forward_proj="relu"),
        "feed_forward_proj is relu",
    ),
    "too many words": (
        lambda f: (f / "pretrained_models" / "t5" / "tokenizer_config.json").unlink(),
        "has 152 pieces",
    ),
    "nothing": (lambda f: shutil.rmtree(f), "there is no folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_release_is_told_in_a_sentence(released, output, fails, case):
    damage, told = BROKEN[case]
    damage(released)
    line = fails(convert, released, output).err.strip().splitlines()[-1]
    assert told in line
    assert len(line) < 500
    assert not output.exists()
    assert not (released / "was_run").exists()
    assert not output.parent.exists() or not list(output.parent.iterdir())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ('{"subject": ""}', "has no 'subject_inference'"),
        (json.dumps(PREFIXES | {"edit": 3}), "edit is 3 and not text"),
        (json.dumps(PREFIXES | {"edit": "a" * 2001}), "longer than any prompt"),
    ],
)
def test_prefixes_of_another_form(released, output, fails, content, told):
    path = released / "prefixes.json"
    path.write_text(content)
    assert told in fails(convert, released, output, "--prefixes", str(path)).err
    assert not output.exists()


@pytest.mark.parametrize("heads", ["trunk=2", "transformer", "transformer=two", "qformer=99999"])
def test_heads_of_another_form(released, output, fails, heads):
    told = fails(main, ["--release", str(released), "--output", str(output), "--heads", heads]).err
    assert "transformer=NUMBER" in told


def test_the_room_that_a_model_takes():
    """A tensor with two names is written once."""
    table, other = torch.zeros(10, 4), torch.zeros(3, dtype=torch.bfloat16)
    assert Model({}, {"a": {"x": table, "y": table}, "b": {"z": other}}, None).size == 160 + 6


def test_weights_stay_on_the_disk_until_they_are_used(released, monkeypatch):
    """Thirteen gigabytes are more than many machines' memory."""
    load, asked = torch.load, []

    def watch(*args, **named):
        asked.append((named["mmap"], named["weights_only"]))
        return load(*args, **named)

    monkeypatch.setattr(torch, "load", watch)
    read_state(released / "model.pth")
    torch.save(release(), released / "old.pth", _use_new_zipfile_serialization=False)
    read_state(released / "old.pth")  # which torch cannot map
    assert asked == [(True, True), (False, True)]


def test_a_disk_without_room(released, output, fails, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    told = fails(convert, released, output).err
    assert "takes 0.1 GB, and 0.0 GB are free" in told
    assert not output.parent.exists()


# ----------------------------------------------------------------------------------------------
# what is there


def test_what_is_there_is_replaced_only_when_asked(released, output, fails):
    output.mkdir(parents=True)
    convert(released, output)  # an empty folder is as good as none
    before = (output / "model_index.json").stat().st_mtime_ns
    assert "--overwrite" in fails(convert, released, output).err
    assert (output / "model_index.json").stat().st_mtime_ns == before
    (output / "vae" / "left").touch()
    (output / "README.md").write_text("years")
    told = fails(convert, released, output, "--overwrite").err
    assert f"{output} holds README.md, which would be removed with the folder; move it" in told
    (output / "README.md").rename(output.with_name("README.md"))
    (output / ".DS_Store").touch()
    convert(released, output, "--overwrite")
    assert not (output / "vae" / "left").exists()
    check_weights(output)
    output.with_name("README.md").unlink()
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_other_work_is_never_replaced(released, output, fails):
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years")
    assert "no model folder" in fails(convert, released, output, "--overwrite").err
    assert "holds" in fails(convert, released, released.parent, "--overwrite").err
    assert (output / "thesis.tex").read_text() == "years"
    assert (released / "model.pth").is_file()


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_what_came_to_the_output_meanwhile_stays(released, output, fails, monkeypatch, more):
    """Another conversion, which was faster, or what somebody put there."""
    faster = T5EncoderModel.save_pretrained

    def slow(self, folder, **settings):
        monkeypatch.setattr(T5EncoderModel, "save_pretrained", faster)
        shutil.copytree(convert(released, output.with_name("faster")), output)
        if more:
            (output / "notes.txt").touch()
        faster(self, folder, **settings)

    monkeypatch.setattr(T5EncoderModel, "save_pretrained", slow)
    told = fails(convert, released, output, *more).err
    assert ("holds notes.txt, which would be removed" if more else "holds a model") in told
    check_weights(output)


@pytest.mark.parametrize("there", [False, True])
def test_ctrl_c_leaves_nothing(released, output, fails, interruptible, monkeypatch, there):
    if there:
        convert(released, output)
        change(released, t5_proj__bias=torch.zeros(40))
    seen = []

    def stop(self, folder, **more):
        seen.extend(Path(folder).parent.iterdir())
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(T5EncoderModel, "save_pretrained", stop)
    more = ["--overwrite"] if there else []
    fails(convert, released, output, *more, code=130)
    assert {path.name for path in seen} == {"fusion", "qformer"}  # it was at work
    assert sorted(path.name for path in output.parent.iterdir()) == ["mige"] * there
    if there:
        check_weights(output)


def test_a_full_disk_leaves_what_was_there(released, output, fails, monkeypatch):
    convert(released, output)

    def fill(self, folder, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(T5EncoderModel, "save_pretrained", fill)
    assert "disk is full" in fails(convert, released, output, "--overwrite").err
    check_weights(output)
    assert [path.name for path in output.parent.iterdir()] == ["mige"]
