"""Features of training pictures: what they are, where they are, how they are made and read."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picture
from diffusers import AutoencoderKL
from forked import start_two
from PIL import Image
from safetensors.torch import load_file, save_file
from thin import contents

from imagelab.errors import UserError
from mige import features as command
from mige.data import extraction
from mige.data import features as reading
from mige.data.extraction import Extraction, Unread, claim, extract
from mige.data.features import Kind, ReleaseFeatures, ShardedFeatures, open_features
from mige.data.records import RecordList, parse_record
from mige.data.references import References, key_of
from mige.pipeline import MigePipeline

ROOT = Path(__file__).parents[2]
SUBJECT = {
    "image": "x/Subjects200K/t/7.png", "source_path": [],
    "entity_path": ["x/Subjects200K/e/7.png", "x/Subjects200K/e/8.png"],
    "multi_prompt": "a<imagehere>beside a<imagehere>",
}  # fmt: skip
EDIT = {
    "image": "x/instructpix2pix/t/1.png", "source_path": ["x/instructpix2pix/s/1.png"],
    "entity_path": ["x/instructpix2pix/s/1.png"], "multi_prompt": "make it red in<imagehere>",
}  # fmt: skip
REPLACE = {  # all names are the same
    "image": "x/replace/t/1.png", "source_path": ["x/replace/s/1.png"],
    "entity_path": ["x/replace/s/1.png", "x/replace/e/1.png"],
    "multi_prompt": "a cup in<imagehere>with<imagehere>",
}  # fmt: skip
ALL = [SUBJECT, EDIT, REPLACE]
PATHS = [path for each in ALL for path in parse_record(each).paths]
KIND = (4, 8, 8)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working directory with the pictures of a list, d.json; in F there will be four shards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extraction, "PER_SHARD", 2)  # of eight pictures
    write_list(ALL)
    return tmp_path


def write_list(records: list[dict], name: str = "d.json") -> None:
    """A list and its pictures, no two of which are alike or of one size."""
    Path(name).write_text(json.dumps(records))
    for path in (path for each in records for path in parse_record(each).paths):
        if not Path(path).exists():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            number = int(hashlib.md5(path.encode()).hexdigest()[:4], 16)
            picture(number, 33 + number % 30, 33 + number % 17).save(path)


def usual(model: Path, output: str = "F") -> list[str]:
    """The options of the command."""
    return ["--data", "d.json", "--model", str(model), "--output", output, "--device", "cpu"]


@pytest.fixture
def make(model, work, capsys):
    """Run the command; into F by default."""

    def run(*options: str, output: str = "F", of: Path = model) -> None:
        command.main([*usual(of, output), *options])
        assert capsys.readouterr().out == f"{output}\n"

    return run


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The paths of the pictures that are decoded."""
    seen, read = [], Extraction.read

    def count(self, path: str):
        seen.append(path)
        return read(self, path)

    monkeypatch.setattr(Extraction, "read", count)
    return seen


def tensors(folder: str = "F") -> dict[str, torch.Tensor]:
    """All features in a folder's shards."""
    found = [load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    assert sum(map(len, found)) == len({name for each in found for name in each})
    return {name: value for each in found for name, value in each.items()}


def encoded(vae, image: Image.Image) -> torch.Tensor:
    """Mean and deviation of a picture of 32×32 pixels, by the autoencoder's own layers."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        mean, log_variance = vae.quant_conv(vae.encoder(pixels / 127.5 - 1)).chunk(2, dim=1)
    return torch.cat([mean, (log_variance / 2).exp()], dim=1)[0]


@pytest.fixture(scope="module")
def vae(model) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(model / "vae")


# ----------------------------------------------------------------------------------------------
# making


def test_the_middle_of_each_picture_is_encoded_as_it_is(make, vae):
    wide, tall = picture(1, 40, 30), picture(2, 30, 52)
    wide.save(SUBJECT["image"])
    tall.save(EDIT["source_path"][0])
    make()
    # 40×30 becomes 42×32, of which the columns 5 to 36 are the middle; 30×52 becomes 32×55, of
    # which half of 23 rows goes above: 11.5, rounded to the even 12
    bilinear = Image.Resampling.BILINEAR
    middles = {
        SUBJECT["image"]: wide.resize((42, 32), bilinear).crop((5, 0, 37, 32)),
        EDIT["source_path"][0]: tall.resize((32, 55), bilinear).crop((0, 12, 32, 44)),
    }
    found = tensors()
    assert sorted(found) == sorted(PATHS)
    for path, middle in middles.items():
        assert found[path].shape == (8, 8, 8) and found[path].dtype == torch.float32
        torch.testing.assert_close(found[path], encoded(vae, middle), atol=1e-5, rtol=1e-5)


def test_pictures_are_read_as_viewers_show_them(make, vae):
    """Turned upright, and with white behind what is transparent."""
    turned, clear = picture(1, 32, 48), Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    turned.save(SUBJECT["image"], exif=exif)
    clear.save(EDIT["image"])
    make()
    upright = turned.transpose(Image.Transpose.ROTATE_270).crop((8, 0, 40, 32))
    white = Image.new("RGB", (32, 32), "white")
    for path, image in ((SUBJECT["image"], upright), (EDIT["image"], white)):
        torch.testing.assert_close(tensors()[path], encoded(vae, image), atol=1e-5, rtol=1e-5)


def test_a_gpu_does_not_work_in_tf32(work, model, vae):
    """What torch is told while the autoencoder works; with cuDNN, without which it is slow."""
    seen, backend = [], torch.backends.cudnn
    hook = vae.encoder.register_forward_pre_hook(
        lambda *_: seen.append((backend.enabled, backend.allow_tf32))
    )
    job = Extraction(vae, Kind.of_model(model), RecordList(Path("d.json")), work, 2, "cpu")
    before = backend.enabled, backend.allow_tf32
    try:
        found = job.encode([job.read(PATHS[0])])
    finally:
        hook.remove()
    assert seen == [(True, False)] and (backend.enabled, backend.allow_tf32) == before
    assert found.shape == (1, 8, 8, 8)


def test_where_a_picture_s_features_are(make):
    make()
    facts = json.loads(Path("F/features.json").read_text())
    assert facts.pop("vae") and facts == {
        "version": 1, "side": 32, "latent_shape": [4, 8, 8], "shards": 4,
    }  # fmt: skip
    for path in PATHS:
        number = int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) % 4
        assert path in load_file(f"F/{number:05d}.safetensors")


def test_the_number_of_shards(model, tmp_path):
    """One for 512 references, rounded up."""
    kind = Kind.of_model(model)
    for references, shards in ((1, 1), (512, 1), (513, 2), (1024, 2), (1025, 3)):
        claim(tmp_path / str(references), kind, references)
        assert reading.read_shards(tmp_path / str(references), kind.vae, KIND) == shards


def test_neither_batches_nor_other_pictures_change_features(make):
    make("--batch_size", "1", output="one")
    make("--batch_size", "3", output="three")
    one, three = tensors("one"), tensors("three")
    for path in PATHS:
        torch.testing.assert_close(one[path], three[path], atol=1e-5, rtol=0)


def test_each_picture_is_decoded_once(make, counted):
    write_list(
        [REPLACE | {"multi_prompt": f"a cup in<imagehere>a{'a' * n}<imagehere>"} for n in range(3)]
    )
    make()
    assert sorted(counted) == sorted(parse_record(REPLACE).paths)


def test_neither_t5_nor_the_vision_encoder_is_read(make, model, tmp_path):
    thin = shutil.copytree(model, tmp_path / "thin")
    for part in ("text_encoder", "vision_encoder", "qformer"):
        for path in (thin / part).glob("*.safetensors"):
            path.unlink()
    make(of=thin)
    assert len(tensors()) == 8


def test_kinds_are_what_the_pipeline_says(model):
    pipeline, kind = MigePipeline.from_pretrained(model), Kind.of_model(model)
    assert (kind.side, kind.side) == (pipeline.size.width, pipeline.size.height)
    assert kind.latent_shape == pipeline._latent_shape(pipeline.size) == KIND


def test_a_list_is_checked_before_anything_is_done(fails, model, work, caplog):
    write_list([*ALL, EDIT | {"multi_prompt": "make it red"}])
    Path(EDIT["image"]).unlink()
    options = usual(model)
    told = fails(command.main, options).err
    assert "d.json has 3 problems, listed above" in told
    assert "d.json: record 3 has no marks <image> and 1 picture" in caplog.text
    assert not Path("F").exists()


def test_wide_records_need_no_features(make):
    wide = EDIT | {"image": "x/instructpix2pix/t/9.png", "width": 900, "height": 200}
    write_list([SUBJECT, wide])
    make()
    assert sorted(tensors()) == sorted(parse_record(SUBJECT).paths)


# ----------------------------------------------------------------------------------------------
# going on


def test_a_list_that_has_grown(make, counted):
    write_list(ALL[:2])
    make()
    before = tensors()
    assert len(before) == 5
    write_list(ALL)
    counted.clear()
    make()
    assert sorted(counted) == sorted(parse_record(REPLACE).paths)
    after = tensors()
    assert sorted(after) == sorted(PATHS)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert json.loads(Path("F/features.json").read_text())["shards"] == 3  # five, by two
    counted.clear()
    make()
    assert not counted


def test_unreadable_pictures_are_listed_and_tried_again(fails, make, model, counted, caplog):
    bad = [EDIT["image"], REPLACE["image"]]
    kept = [Path(path).read_bytes() for path in bad]
    Path(bad[0]).write_bytes(b"no picture")
    Path(bad[1]).write_bytes(kept[1][:300])
    options = usual(model)
    fails(command.main, options)
    assert sorted(tensors()) == sorted(set(PATHS) - set(bad))
    assert len(caplog.messages) == 3
    for path in bad:
        assert sum(f"{path} cannot be read as a picture" in each for each in caplog.messages) == 1
    assert "2 pictures cannot be read" in caplog.messages[-1]
    for path, data in zip(bad, kept, strict=True):
        Path(path).write_bytes(data)
    counted.clear()
    make()
    assert sorted(counted) == sorted(bad)
    assert sorted(tensors()) == sorted(PATHS)


def test_a_picture_that_would_fill_the_memory(fails, model, work, monkeypatch, caplog):
    monkeypatch.setattr("mige.pictures.MAX_PIXELS", 10_000)
    Image.new("RGB", (10, 90)).save(EDIT["image"])  # 32×288, as it is scaled
    Image.new("RGB", (10, 100)).save(REPLACE["image"])  # 32×320
    options = usual(model)
    fails(command.main, options)
    assert f"{REPLACE['image']}: a picture of 10 x 100 pixels is too long" in caplog.text
    assert len(tensors()) == 7


def test_what_several_processes_could_not_read_is_told_together(work, model, vae):
    """The first of two does every second shard, and hears of the other."""
    records, kind = RecordList(Path("d.json")), Kind.of_model(model)
    for path in PATHS:
        Path(path).write_bytes(b"")
    first = SimpleNamespace(
        is_first=True, first_alone=nullcontext, share=lambda work: work[::2],
        gather=lambda mine: [mine, Unread([f"other {n}" for n in range(99)], 150)],
    )  # fmt: skip
    job = Extraction(vae, kind, records, work, 2, "cpu")
    told = extract(job, References.of_list(records, range(3)), Path("F"), first)
    shards = sorted({int(hashlib.sha256(p.encode()).hexdigest()[:16], 16) % 4 for p in PATHS})
    mine = [p for p in PATHS if shards.index(key_of(p) % 4) % 2 == 0]
    assert 1 < len(mine) < 8 and told.count == len(mine) + 150
    assert len(told.lines) == 100 and told.lines[len(mine) :][0] == "other 0"
    assert all(sum(f"{p} cannot be read" in line for line in told.lines) == 1 for p in mine)
    assert [path.name for path in Path("F").iterdir()] == ["features.json"]


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_keeps_its_batches(
    make, fails, model, monkeypatch, interruptible, counted, signum, code
):
    encode, calls = Extraction.encode, []

    def stop_in_the_second(self, pictures):
        calls.append(len(pictures))
        if len(calls) == 2:
            signal.raise_signal(signum)
        return encode(self, pictures)

    monkeypatch.setattr(extraction, "PER_SHARD", 100)
    make("--batch_size", "2", output="one")
    options = usual(model)
    with monkeypatch.context() as patch:
        patch.setattr(Extraction, "encode", stop_in_the_second)
        told = fails(command.main, [*options, "--batch_size", "2"], code=code)
    assert "stopped; the very same command goes on from here" in told.err
    assert calls == [2, 2] and sorted(tensors()) == sorted(PATHS[:4])
    counted.clear()
    make("--batch_size", "2")
    assert sorted(counted) == sorted(PATHS[4:])
    assert contents(Path("F")) == contents(Path("one"))


KILLED = """
import os, signal
from mige import features

calls, replace = [], os.replace

def killed(*paths):
    calls.append(paths)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*paths)

os.replace = killed
features.main()
"""


def start(*words: str) -> subprocess.Popen:
    """Python in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_killed_and_shared_runs_make_the_same_files(make, model):
    """To the byte: each shard is made by one process, from its beginning."""
    for name in ("F", "two"):
        claim(Path(name), Kind.of_model(model), 8)
    killed = start("-c", KILLED, *usual(model))
    shared = start_two("mige.features", *usual(model, "two"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each process has: sums are rounded alike
    try:
        make(output="whole")
        told = killed.communicate()[1]
        assert killed.returncode == -signal.SIGKILL, told
        assert len(list(Path("F").glob("*.safetensors"))) == 2
        assert len(list(Path("F").glob(".*.part"))) == 1  # the third was about to get its name
        make()
    finally:
        torch.set_num_threads(threads)
    out, told = shared.communicate()
    assert shared.returncode == 0, told
    assert out == "two\n"  # one of the two tells
    assert contents(Path("F")) == contents(Path("two")) == contents(Path("whole"))


# ----------------------------------------------------------------------------------------------
# folders that hold something else


@pytest.fixture
def other(model, tmp_path):
    """A copy of the model with another number in a config, or other weights of a part."""

    def copy(part: str, **config) -> Path:
        folder = shutil.copytree(model, tmp_path / "other")
        path = folder / part / "config.json"
        if config:
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        else:
            (file,) = (folder / part).glob("*.safetensors")
            save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
        return folder

    return copy


def test_features_of_another_autoencoder(make, fails, other):
    make()
    folder, before = other("vae"), contents(Path("F"))
    options = usual(folder)
    assert "holds features of another model" in fails(command.main, options).err
    assert contents(Path("F")) == before
    with pytest.raises(UserError, match="F holds features of another model"):
        open_features(Path("F"), folder)


def test_features_of_another_size(make, fails, other):
    make()
    folder = other("transformer", sample_size=16)
    options = usual(folder)
    told = fails(command.main, options).err
    assert "of another size: latents 4×8×8, and this model's are 4×16×16" in told
    with pytest.raises(UserError, match="of another size"):
        open_features(Path("F"), folder)


def test_a_model_folder_is_no_folder_of_features(model):
    told = f"^{model} is a model folder; give the folder that mige.features wrote$"
    with pytest.raises(UserError, match=told):
        open_features(model, model)


def test_other_weights_of_other_parts_do_not_matter(make, counted, other):
    make()
    counted.clear()
    make(of=other("transformer"))
    assert not counted


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 2}, "is of version 2, and this program reads 1"),
        ({"shards": 0}, "tells of 0 shards"),
        ({"shards": "4"}, "shards is '4' and not a whole number"),
        ({"latent_shape": None}, "latent_shape is None and not a list"),
    ],
)
def test_facts_that_are_none(make, model, changes, told):
    make()
    path = Path("F/features.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=told):
        open_features(Path("F"), model)


def test_a_folder_of_other_files(fails, model, work):
    Path("F").mkdir()
    Path("F/notes.txt").touch()
    Path("d.json").unlink()  # which is read after the folder is found to be right
    options = usual(model)
    assert "F holds other files (notes.txt)" in fails(command.main, options).err
    with pytest.raises(UserError, match="F holds other files"):  # made since the command began
        claim(Path("F"), Kind.of_model(model), 8)
    assert [path.name for path in Path("F").iterdir()] == ["notes.txt"]


def test_a_folder_that_is_being_written(fails, model, work):
    options = usual(model)
    with extraction.folder_lock(Path("F")):
        told = fails(command.main, options).err
    assert "is being written by another process" in told and "--output" in told


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_damaged_shard(make, fails, model, length):
    make()
    name = max(Path("F").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    whole = name.read_bytes()
    name.write_bytes(whole[:length])
    options = usual(model)
    wanted = f"{name} cannot be read as safetensors"
    told = fails(command.main, options).err
    assert wanted in told and "remove this file, and run" in told
    assert name.read_bytes() == whole[:length]
    features, records = open_features(Path("F"), model), RecordList(Path("d.json"))
    with pytest.raises(UserError, match=wanted):
        list(features.missing(records, range(3)))
    with pytest.raises(UserError, match=wanted):
        for path in PATHS:
            features.posterior(records[0], path, "target")
    name.unlink()
    make()
    assert name.read_bytes() == whole


@pytest.mark.parametrize("options", [["--batch_size", "0"], ["--device", "tpu"], ["--data", "no"]])
def test_options_that_make_no_sense(fails, model, work, options):
    assert options[1] in fails(command.main, [*usual(model), *options]).err
    assert not Path("F").exists()


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"sample_size": "x"}),
        ("transformer", {"sample_size": 0}),
        ("vae", {"latent_channels": None}),
        ("vae", {"block_out_channels": 8}),
    ],
)
def test_configs_that_tell_no_size(fails, work, other, part, changes):
    folder = other(part, **changes)
    options = usual(folder)
    assert str(folder) in fails(command.main, options).err


@pytest.fixture
def disk(work):
    """An empty disk of 64 KiB, which takes root on Linux."""
    folder = work / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(make, fails, model, disk):
    """A shard takes some 17 KiB: the second does not find room, and the first stays."""
    write_list(ALL[:1])
    make(output="disk/F")
    before = contents(disk)
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096 - 4096))
    write_list(ALL)
    options = usual(model, "disk/F")
    assert "the disk is full" in fails(command.main, options).err
    (disk / "filler").unlink()
    assert contents(disk) == before
    make(output="disk/F")
    assert sorted(tensors("disk/F")) == sorted(PATHS)


# ----------------------------------------------------------------------------------------------
# reading


def test_posteriors_are_read_by_path(make, model, monkeypatch):
    make()
    monkeypatch.setattr(reading, "MOST_OPEN", 1)
    features, records = open_features(Path("F"), model), RecordList(Path("d.json"))
    features.posterior(records[0], PATHS[0], "target")  # a file is open
    sent = pickle.loads(pickle.dumps(features))  # as to a worker
    wanted = tensors()
    assert len({value.sum().item() for value in wanted.values()}) == 8  # equal names or not
    for here in (features, sent, features):
        for record, path, role in (
            (records[0], "x/Subjects200K/e/8.png", "entity"),
            (records[1], "x/instructpix2pix/s/1.png", "entity"),
            (records[1], "x/instructpix2pix/s/1.png", "source"),
            (records[2], "x/replace/t/1.png", "target"),
            (records[2], "x/replace/s/1.png", "source"),
            (records[2], "x/replace/e/1.png", "entity"),
        ):
            found = here.posterior(record, path, role)
            assert torch.equal(found.mean, wanted[path][:4])
            assert torch.equal(found.deviation, wanted[path][4:])
            assert found.mean.untyped_storage().nbytes() == 8 * 8 * 8 * 4  # not a whole shard
        assert len(here._open) == 1
    assert list(features.missing(records, range(3))) == []


def test_features_that_are_missing(make, model):
    write_list([SUBJECT])
    make()
    write_list([EDIT, SUBJECT, REPLACE, SUBJECT | {"entity_path": ["x/add/1.png"] * 2}])
    features, records = open_features(Path("F"), model), RecordList(Path("d.json"))
    told = list(features.missing(records, np.array([0, 1, 3])))
    assert sorted(told) == [
        "d.json: record 0: there are no features of x/instructpix2pix/s/1.png",
        "d.json: record 0: there are no features of x/instructpix2pix/t/1.png",
        "d.json: record 3: there are no features of x/add/1.png",
    ]
    for path in PATHS[3:]:  # in shards that are there, and in others
        with pytest.raises(UserError, match=f"there are no features of {path} in F"):
            features.posterior(records[0], path, "target")
    for path in Path("F").glob("*.safetensors"):
        path.unlink()
    assert sorted(open_features(Path("F"), model).missing(records, np.array([1]))) == [
        f"d.json: record 1: there are no features of {path}" for path in sorted(PATHS[:3])
    ]


def test_no_features(model, work):
    with pytest.raises(UserError, match="no features in F; `python -m mige.features` makes them"):
        open_features(Path("F"), model)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (torch.ones(8, 8, 4), "is float32 8×8×4, and features of this model are float32 8×8×8"),
        (torch.ones(8, 8, 8).half(), "is float16 8×8×8"),
        (torch.full((8, 8, 8), torch.nan), "holds NaN, infinity, or deviations below zero"),
        (-torch.ones(8, 8, 8), "holds NaN, infinity, or deviations below zero"),
    ],
)
def test_features_of_another_form(make, model, values, told):
    make()
    for path in Path("F").glob("*.safetensors"):
        save_file({name: values.clone() for name in load_file(path)}, path)
    features, record = open_features(Path("F"), model), parse_record(EDIT)
    with pytest.raises(UserError, match=told):
        features.posterior(record, record.target, "target")


# ----------------------------------------------------------------------------------------------
# the release's layout


def release(*files: str) -> None:
    """Write files of the release's layout below R, with the numbers 1, 2, …"""
    for number, name in enumerate(files, 1):
        kind, folder, stem = name.split("/")
        path = Path("R", kind, folder, "32resolution", "noflip", f"{stem}.npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((8, 8, 8), number, dtype=np.float32))


ADD = {
    "image": "x/add/t/3.png", "source_path": ["x/add/s/4.png"],
    "entity_path": ["x/add/e/5.png", "x/add/s/4.png"], "multi_prompt": "<imagehere>into<imagehere>",
}  # fmt: skip


def test_the_release_s_layout(model, work):
    release(
        "vae/vae_subject200k/7", "vae_entity/vae_subject200k/7", "vae_entity/vae_subject200k/8",
        "vae/vae_instructpix/1", "vae_source/vae_instructpix/1",
        "vae/vae_add/3", "vae_entity/vae_add/4", "vae_entity/vae_add/5", "vae_source/vae_add/4",
        "vae/vae_replace/3",
    )  # fmt: skip
    features = open_features(Path("R"), model)
    subject, edit, add = map(parse_record, (SUBJECT, EDIT, ADD))
    replace = parse_record(ADD | {"image": "x/replace/add/3.png"})
    wanted = [
        (subject, subject.target, "target", 1),
        (subject, subject.entities[0], "entity", 2),
        (subject, subject.entities[1], "entity", 3),
        (edit, edit.target, "target", 4),
        (edit, edit.source, "source", 5),
        (edit, edit.entities[0], "entity", 5),  # the picture to edit, which lies there alone
        (add, add.target, "target", 6),
        (add, add.entities[1], "entity", 7),
        (add, add.entities[0], "entity", 8),
        (add, add.source, "source", 9),
        (replace, replace.target, "target", 10),
    ]
    path = Path("R/vae/vae_add/32resolution/noflip/3.npy")
    values = np.load(path)
    values[4:] = 60
    np.save(path, values)
    for record, name, role, number in wanted:
        found = features.posterior(record, name, role)
        assert found.mean.shape == found.deviation.shape == KIND
        assert (found.mean == number).all()
        assert (found.deviation == number * (10 if number == 6 else 1)).all()
    assert list(features.missing(RecordList(Path("d.json")), range(2))) == []


def test_pictures_that_share_a_file(model, work):
    """Whether of one record, or of two far apart."""
    release("vae/vae_replace/1", "vae_source/vae_replace/1", "vae_entity/vae_replace/1")
    features, record = open_features(Path("R"), model), parse_record(REPLACE)
    assert (features.posterior(record, record.target, "target").mean == 1).all()
    with pytest.raises(UserError, match="s/1.png and x/replace/e/1.png share R/vae_entity"):
        features.posterior(record, record.entities[0], "entity")
    release("vae/vae_instructpix/1", "vae_source/vae_instructpix/1")
    twin = EDIT | {"image": "y/instructpix2pix/1.png"}
    write_list([EDIT, REPLACE, EDIT, twin])
    told = list(features.missing(RecordList(Path("d.json")), range(4)))
    assert sorted(each.split(",")[0] for each in told) == [
        "d.json: record 1: x/replace/e/1.png and x/replace/s/1.png share "
        "R/vae_entity/vae_replace/32resolution/noflip/1.npy",
        "d.json: record 3: y/instructpix2pix/1.png and x/instructpix2pix/t/1.png share "
        "R/vae/vae_instructpix/32resolution/noflip/1.npy",
    ]


def test_what_the_release_s_layout_lacks(model, work):
    release("vae/vae_instructpix/1")
    mine = EDIT | {"image": "mine/1.png", "task": "edit"}
    write_list([EDIT, mine])
    features, records = open_features(Path("R"), model), RecordList(Path("d.json"))
    first, again, second = features.missing(records, range(2))
    where = "d.json: record 0: there is no R/vae_source/vae_instructpix/32resolution/noflip/1.npy"
    assert first == again == where  # as a reference, and as the source
    assert "record 1: the path 'mine/1.png' tells no folder of the release's features" in second
    with pytest.raises(UserError, match="there is no file R/vae_source"):
        features.posterior(records[0], records[0].source, "source")


class Trap:
    """Whoever unpickles it makes a file."""

    def __reduce__(self):
        return Path("sprung").touch, ()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (np.array([Trap()], dtype=object), "cannot be read as an array"),
        (pickle.dumps(Trap()), "cannot be read as an array"),
        (b"", "cannot be read as an array"),
        (
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (8,)}",
            "cannot",
        ),
        (np.ones((8, 8, 4), np.float32), "is float32 8×8×4, and features of this model"),
        (np.ones((8, 8, 8)), "is float64 8×8×8"),
        (np.full((8, 8, 8), np.inf, np.float32), "holds NaN, infinity"),
    ],
)
def test_files_of_the_release_that_are_none(work, content, told):
    release("vae/vae_instructpix/1")
    path = Path("R/vae/vae_instructpix/32resolution/noflip/1.npy")
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    record = parse_record(EDIT)
    with pytest.raises(UserError, match=f"{path} {told}"):
        ReleaseFeatures(Path("R"), KIND, 32).posterior(record, record.target, "target")
    assert not Path("sprung").exists()


def test_both_kinds_can_be_sent_to_workers(make, model):
    make()
    release("vae/vae_instructpix/1")
    for folder, kind in (("F", ShardedFeatures), ("R", ReleaseFeatures)):
        sent = pickle.loads(pickle.dumps(open_features(Path(folder), model)))
        assert type(sent) is kind and sent.posterior(parse_record(EDIT), EDIT["image"], "target")
