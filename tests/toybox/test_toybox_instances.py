"""Instance folders: exact, readable by MIFO, never a toy that a caption of the training names."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mifo.learning.instance import read_instance
from toybox.scenes.instances import (
    BETWEEN,
    EXAMPLES,
    FAMILIES,
    example_scene,
    look_alikes,
    main,
    read_looks,
    write_folder,
)
from toybox.scenes.scenes import render
from toybox.scenes.toys import HUES, KINDS

SHIPPED = Path(__file__).parents[2] / "example"


def read_masks(folder: Path) -> np.ndarray:
    """All masks of a folder, bool [i, h, w]."""
    paths = sorted(folder.glob("mask*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]) > 127


def test_hues_lie_halfway_between_the_named_ones():
    assert BETWEEN == (14, 40, 86, 149, 199, 247.5, 300, 342.5)
    assert not set(BETWEEN) & set(HUES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_examples_are_what_the_command_writes(name):
    folder = SHIPPED / name
    picture, masks = render(example_scene(EXAMPLES[name]), 512)
    np.testing.assert_array_equal(read_masks(folder), masks)
    with Image.open(folder / "img.jpg") as shipped:
        assert shipped.size == (512, 512)
        apart = np.abs(np.asarray(shipped, dtype=int) - np.asarray(picture, dtype=int))
    assert apart.mean() < 2  # JPEG, quality 95
    assert read_looks(folder) == list(EXAMPLES[name].looks)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_show_look_alikes_that_no_caption_names(name):
    looks = EXAMPLES[name].looks
    assert 2 <= len(looks) <= 3
    assert len(set(looks)) == len(looks)
    assert len({look.kind for look in looks}) == 1 or len({look.hue for look in looks}) == 1
    assert all(look.colour is None for look in looks)


def test_invented_looks_share_one_thing_and_are_near_in_the_other():
    seen = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        count = 2 + seed % 2
        looks = look_alikes(rng, count)
        kinds, hues = [look.kind for look in looks], [look.hue for look in looks]
        assert all(look.colour is None for look in looks)
        if len(set(kinds)) == 1:
            seen.add("kind")
            steps = np.diff([BETWEEN.index(hue) for hue in hues]) % len(BETWEEN)
            assert list(steps) == [1] * (count - 1)
        else:
            seen.add("hue")
            assert len(set(hues)) == 1
            assert len(set(kinds)) == count
            assert any(set(kinds) <= set(family) for family in FAMILIES)
        assert all(0.8 <= gain <= 1 for look in looks for gain in (look.saturation, look.value))
    assert seen == {"kind", "hue"}


def test_hues_may_begin_anywhere_and_lie_apart():
    firsts = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        hues = [look.hue for look in look_alikes(rng, 3, "kind", apart=(30, 50))]
        steps = np.diff(hues) % 360
        assert all(29.9 <= step <= 50.1 for step in steps)  # hues are rounded to a tenth
        assert all(0 <= hue < 360 for hue in hues)
        firsts.add(hues[0])
        assert len({look.hue for look in look_alikes(rng, 3, "hue", apart=(30, 50))}) == 1
    assert len(firsts) > 40


def test_kinds_and_alike_are_honoured():
    rng = np.random.default_rng(0)
    assert all(look_alikes(rng, 3, kinds=[kind])[0].kind == kind for kind in KINDS)
    some = ("bear", "car", "cat", "fox")
    for _ in range(20):
        alike = look_alikes(rng, 3, "hue", some)
        assert {look.kind for look in alike} == {"bear", "cat", "fox"}
        assert len({look.hue for look in alike}) == 1
        assert {look.kind for look in look_alikes(rng, 2, None, some)} <= set(some)
    assert len({look.kind for look in look_alikes(rng, 3, "kind", some)}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, "hue", ["car", "teapot"]), "no 2 of the kinds car, teapot resemble .* --alike kind"),
        ((2, None, ["car", "unicorn"]), "no toy of kind 'unicorn'"),
        ((4,), "cannot have 4 instances; ask for 1, 2 or 3"),
        ((0,), "cannot have 0 instances"),
    ],
)
def test_what_cannot_be_invented_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        look_alikes(np.random.default_rng(0), *arguments)


def test_new_folders_from_a_seed(tmp_path, capsys):
    options = ["--count", "2", "--seed", "5", "--size", "128", "--instances", "2", "--output"]
    main([*options, str(tmp_path / "a")])
    printed = capsys.readouterr().out.splitlines()
    main([*options, str(tmp_path / "b")])
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == ["set000", "set001"]
    for name, line in zip(("set000", "set001"), printed, strict=True):
        folder, same = tmp_path / "a" / name, tmp_path / "b" / name
        files = ["img.jpg", "instance.json", "mask0.png", "mask1.png", "scene.json"]
        assert sorted(path.name for path in folder.iterdir()) == files
        for file in files:
            assert (folder / file).read_bytes() == (same / file).read_bytes()
        looks = read_looks(folder)
        assert line == f"{folder}: " + ", ".join(f"{one.kind} {one.hue:g}°" for one in looks)
        masks = read_masks(folder)
        assert masks.shape == (2, 128, 128)
        assert masks.sum(axis=0).max() == 1
    assert read_looks(tmp_path / "a" / "set000") != read_looks(tmp_path / "a" / "set001")


def test_mifo_reads_a_folder(tmp_path):
    write_folder(tmp_path / "cars", example_scene(EXAMPLES["toy_car"]), seed=0, size=128)
    instance = read_instance(tmp_path / "cars", 128, 16)
    np.testing.assert_array_equal(np.asarray(instance.masks), read_masks(tmp_path / "cars"))


def test_an_existing_folder_is_left_alone_unless_told(tmp_path, capsys):
    output = ["--size", "64", "--output", str(tmp_path)]
    (tmp_path / "fish").mkdir()
    (tmp_path / "fish" / "mask2.png").write_text("mine")
    (tmp_path / "fish" / "notes.txt").write_text("mine")
    scene = example_scene(EXAMPLES["fish"])
    with pytest.raises(ValueError, match="fish exists already; .* add --overwrite"):
        write_folder(tmp_path / "fish", scene, 0)
    assert (tmp_path / "fish" / "mask2.png").read_text() == "mine"
    with pytest.raises(SystemExit, match="2"):
        main(output)
    assert "exists already" in capsys.readouterr().err
    main([*output, "--overwrite"])
    left = sorted(path.name for path in (tmp_path / "fish").iterdir())
    made = ["img.jpg", "instance.json", "mask0.png", "mask1.png", "scene.json"]
    assert left == sorted([*made, "notes.txt"])
    assert json.loads((tmp_path / "fish" / "scene.json").read_text())["size"] == 64


def test_options_for_new_folders_need_a_count(capsys):
    with pytest.raises(SystemExit):
        main(["--kinds", "car"])
    assert "add --count" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "8"], "--size is 8; give a whole number from 32 to 16384"),
        (["--count", "0"], "--count is 0; give a whole number from 1 to 100000"),
        (["--count", "1", "--seed", "-1"], "the seed is -1; give a whole number from 0 to"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message, tmp_path, fails):
    assert message in fails(main, ["--output", str(tmp_path / "out"), *options]).err
    assert not (tmp_path / "out").exists()


def test_all_folders_are_checked_before_the_first_is_written(tmp_path, fails):
    new = ["--size", "64", "--count", "3", "--output"]
    (tmp_path / "there/set002").mkdir(parents=True)
    told = fails(main, [*new, str(tmp_path / "there")]).err
    assert "set002 exists already; choose another --output or add --overwrite" in told
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["set002"]
    (tmp_path / "there/set002").rmdir()
    (tmp_path / "there/set002").touch()
    told = fails(main, [*new, str(tmp_path / "there"), "--overwrite"]).err
    assert "set002 is a file, not a folder; give another --output" in told
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["set002"]
    told = fails(main, [*new, str(tmp_path / "there/set002")]).err
    assert "set002 is a file, not a folder; give another --output" in told
