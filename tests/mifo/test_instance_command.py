"""The learning command and masks: labels, thin ones, and the picture of how they were read."""

import re

import numpy as np
import pytest
from PIL import Image

from imagelab.boxes import color_of
from mifo.learning.config import LearningConfig
from mifo.learning.instance import read_instance
from mifo.learning.overlay import draw_masks
from mifo.learning.resume import kept_settings
from semantic_learning import main


@pytest.fixture
def folder(tmp_path, examples):
    """A copy of the instance folder `toys`, to change; its masks are 48 x 64 of 128 x 128."""
    target = tmp_path / "mine/toys"
    target.mkdir(parents=True)
    for path in (examples / "toys").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.fixture
def argv(learn_argv, folder, tmp_path):
    options = ["--folder_path", str(folder.parent), "--output_dir", str(tmp_path / "out")]
    return [*learn_argv, *options, "--dry_run"]


def test_masks_are_drawn_in_their_colours():
    photo = Image.new("RGB", (64, 64), (100, 60, 20))
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 4:60, 4:28] = masks[1, 4:60, 36:60] = True
    pixels = np.asarray(draw_masks(photo, masks))
    for mask, column in zip(range(2), (24, 56), strict=True):
        wanted = [
            int(0.45 * p + 0.55 * c) for p, c in zip((100, 60, 20), color_of(mask), strict=True)
        ]
        assert pixels[50, column].tolist() == wanted
        assert pixels[4, column].tolist() == list(color_of(mask))  # the frame
    assert pixels[50, 32].tolist() == [100, 60, 20]  # between them


def test_a_dry_run_draws_the_masks_and_says_where(argv, folder, tmp_path, capsys):
    main(argv)
    path = tmp_path / "out/toys.masks.png"
    assert f"masks        {path} shows them as they were read" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["toys.masks.png"]
    instance = read_instance(folder, 128, 64)
    with Image.open(path) as picture:
        found = np.asarray(picture).astype(int)
    inside = 0.45 * instance.image + 0.55 * np.array(color_of(1))
    assert np.abs(found[70:90, 80:110] - inside[70:90, 80:110]).max() <= 1  # of mask1
    assert np.array_equal(found[100:], instance.image[100:])  # below both


def test_a_learned_folder_keeps_the_drawing(learned_dir, examples):
    instance = read_instance(examples / "toys", 128, 64)
    with Image.open(learned_dir / "toys/masks.png") as picture:
        found = np.asarray(picture)
    assert np.array_equal(found, draw_masks(Image.fromarray(instance.image), instance.masks))
    assert not np.array_equal(found, instance.image)


def test_labels_by_option(argv, folder, capsys, fails):
    """One picture of labels as both masks: 48 x 64 pixels of 1, as many of 2, and a rim."""
    labels = np.zeros((128, 128), np.uint8)
    labels[32:96, 8:56], labels[32:96, 72:120], labels[100:110] = 1, 2, 255
    for index in range(2):
        Image.fromarray(labels).save(folder / f"mask{index}.png")
    told = fails(main, argv).err
    assert "mask0.png holds several labels (0 " in told and "with --mask_label" in told
    told = fails(main, [*argv, "--mask_label", "1", "2", "255"]).err
    assert "--mask_label has 3 entries for 2 masks" in told
    main([*argv, "--mask_label", "1", "2"])
    plan = capsys.readouterr().out
    for index in range(2):  # 3072 of 16384
        assert f"mask{index} covers 18.8% of the picture" in plan
    assert "share" not in plan


def test_a_run_goes_on_with_its_labels():
    assert kept_settings(LearningConfig(mask_label=("1", "2")))["mask_label"] == ["1", "2"]


def test_a_thin_mask_is_refused_before_anything_is_written(argv, folder, tmp_path, fails):
    """Columns 9 … 14: of 8 pixels the latents see the first, mirrored the last."""
    pole = np.zeros((128, 128), np.uint8)
    pole[:, 9:15] = 255
    Image.fromarray(pole).save(folder / "mask1.png")
    told = fails(main, argv[:-1]).err
    assert re.search(
        "mask1 of .*toys is so thin or small that nothing of it is left in the 16 x 16", told
    )
    assert not (tmp_path / "out").exists()


def test_masks_are_read_before_a_model_is_fetched(argv, folder, fails, monkeypatch):
    monkeypatch.setattr("mifo.learning.plan.choose_model", pytest.fail)
    Image.new("L", (128, 128)).save(folder / "mask1.png")
    assert "mask1.png is empty" in fails(main, argv).err
