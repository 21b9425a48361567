"""The evaluation's parts by hand, and the shipped classifier on renders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from imagelab.io.pictures import Tile
from toybox.classifier import train as toybox_classifier
from toybox.classifier.network import (
    SCENE,
    WEIGHTS,
    Classifier,
    Reading,
    hue_distance,
    hue_names,
    load_classifier,
    to_input,
)
from toybox.classifier.train import classifier_loss
from toybox.scenes.scenes import draw_scene, render
from toybox.scenes.toys import KINDS, Look
from toybox.stable_diffusion import FOLDER, evaluate
from toybox.stable_diffusion.evaluate import sample_tiles
from toybox.stable_diffusion.measures import Prompt, auc, draw_prompts, judge_one, judge_two


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


def reading(areas: dict[str, float], hues: dict[str, float], hue: float = 0.0) -> Reading:
    """One picture's reading from the kinds that are in it."""
    row, angles = torch.zeros(1, len(KINDS)), torch.zeros(1, len(KINDS))
    for kind, area in areas.items():
        row[0, KINDS.index(kind)] = area
        angles[0, KINDS.index(kind)] = hues[kind]
    return Reading(row, angles, torch.tensor([hue]))


def test_auc_by_hand():
    inside = torch.tensor([True, True, False, False])
    assert auc(torch.tensor([0.9, 0.8, 0.2, 0.1]), inside) == 1
    assert auc(torch.tensor([0.1, 0.2, 0.8, 0.9]), inside) == 0
    assert auc(torch.tensor([0.5, 0.5, 0.5, 0.5]), inside) == 0.5
    assert auc(torch.tensor([0.9, 0.3, 0.5, 0.3]), inside) == pytest.approx((2 + 0.5) / 4)


def test_hues_wrap_around():
    assert hue_distance(torch.tensor([350.0]), torch.tensor([10.0])).item() == 20
    assert hue_names(torch.tensor([355.0, 13.0, 41.0, 250.0])) == ["red", "red", "yellow", "purple"]


def test_prompts_name_every_hue_of_toys_of_different_kinds():
    for toys in (1, 2):
        prompts = draw_prompts(0, 40, toys)
        assert prompts == draw_prompts(0, 40, toys)
        assert len({prompt.text for prompt in prompts}) > 30
        for prompt in prompts:
            assert len({look.kind for look in prompt.looks}) == len(prompt.looks) == toys
            for look in prompt.looks:
                assert f"{look.colour} {look.kind.replace('_', ' ')}" in prompt.text


def test_prompts_keep_to_the_kinds_of_a_model():
    prompts = draw_prompts(0, 40, 2, ("car", "cat", "fox"))
    assert {look.kind for prompt in prompts for look in prompt.looks} == {"car", "cat", "fox"}


def test_judgements_by_hand():
    red_car = Prompt("a red car", (Look("car", 0),))
    seen = reading({"car": 0.2, "van": 0.1}, {"car": 5, "van": 5}, hue=5)
    assert judge_one(seen, [red_car]) == {"kind": [True], "hue": [True]}
    assert judge_one(seen._replace(hue=torch.tensor([180.0])), [red_car])["hue"] == [False]
    pair = Prompt("a red car and a blue fish", (Look("car", 0), Look("fish", 220)))
    both = {"car": 0.1, "fish": 0.05}
    assert judge_two(reading(both, {"car": 2, "fish": 215}), [pair]) == {
        "kinds": [True],
        "hues": [True],
    }
    seen = reading(both | {"van": 0.3}, {"car": 2, "fish": 215, "van": 90})
    assert judge_two(seen, [pair])["kinds"] == [False]
    assert judge_two(seen.among(["car", "fish", "cat"]), [pair]) == {
        "kinds": [True],
        "hues": [True],
    }
    swapped = judge_two(reading(both, {"car": 215, "fish": 2}), [pair])
    assert swapped == {"kinds": [True], "hues": [False]}
    unseen = judge_two(reading({"car": 0.1, "fish": 0.001}, {"car": 2, "fish": 215}), [pair])
    assert unseen == {"kinds": [False], "hues": [False]}


def test_the_shipped_classifier_reads_renders(classifier):
    assert WEIGHTS.stat().st_size < 2_000_000
    rng = np.random.default_rng(12345)
    one = [draw_scene(rng, 1) for _ in range(48)]
    seen = classifier.read(to_input([render(scene, 128)[0] for scene in one], SCENE))
    prompts = [Prompt("", (scene.toys[0].look,)) for scene in one]
    judged = judge_one(seen, prompts)
    assert sum(judged["kind"]) >= 45
    assert sum(judged["hue"]) >= 42
    two = [scene for scene in (draw_scene(rng, 2) for _ in range(48))]
    seen = classifier.read(to_input([render(scene, 128)[0] for scene in two], SCENE)).present(2)
    truth = [{placed.look.kind for placed in scene.toys} for scene in two]
    assert sum(a == b for a, b in zip(seen, truth, strict=True)) >= 41


def test_the_classifier_learns():
    torch.manual_seed(0)
    small = Classifier(32)
    pictures = torch.randn(4, 3, 16, 16)
    kinds = torch.zeros(4, 1 + len(KINDS), 2, 2)
    kinds[:, 3] = 1
    hue = torch.tensor([0.0, 1.0])[None, :, None, None].expand(4, 2, 2, 2)
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        logits, vectors = small(pictures)
        losses.append(classifier_loss(logits, vectors, kinds, hue))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_the_classifiers_command_trains_writes_and_measures(tmp_path, monkeypatch):
    accuracy = toybox_classifier.accuracy
    monkeypatch.setattr(
        toybox_classifier, "accuracy", lambda trained, seed, _: accuracy(trained, seed, 60)
    )
    options = ["--scenes", "100", "--steps", "60", "--batch", "16", "--width", "16"]
    toybox_classifier.main(["--output", str(tmp_path / "new/small.safetensors"), *options])
    record = json.loads((tmp_path / "new/small.json").read_text())
    assert record["train"]["width"] == 16
    assert record["held_out"]["crop_hue_error_degrees"] < 60  # a guess has 90
    again = accuracy(load_classifier(tmp_path / "new/small.safetensors"), 999, 60)
    assert again == record["held_out"]


def test_a_place_that_cannot_be_written_to_is_told_before_the_training(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        toybox_classifier.main(["--output", str(tmp_path / "file/small.safetensors")])
    assert "is a file, not a folder; give another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps is 0; give a whole number from 1 to"),
        (["--scenes", "0"], "--scenes is 0; give a whole number from 1 to"),
        (["--width", "50"], "--width is 50; give a multiple of 8"),
        (["--width", "0"], "--width is 0; give a whole number from 8 to 4096"),
        (["--lr", "nan"], "--lr is nan; give a number from 0 to 1"),
        (["--seed", "-1"], "the seed is -1; give a whole number from 0 to"),
        (["--output", "w.json"], "--output is w.json; give a file that ends in .safetensors"),
        (["--output", "here/"], "--output is here; give a file that ends in .safetensors"),
        (["--output", "folder.safetensors"], "folder.safetensors is a folder, not a file"),
        (["--output", "config.safetensors"], "config.json is there already; replace it with"),
        (["--output", "mine.safetensors"], "mine.safetensors is there already; replace it with"),
    ],
)
def test_what_the_classifier_cannot_learn_or_write_is_told_before_the_training(
    options, message, tmp_path, monkeypatch, fails
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("config.json", "mine.safetensors"):
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(toybox_classifier, "train", None)
    assert message in fails(toybox_classifier.main, options).err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "config.json").read_text() == "mine"


def test_weights_and_their_record_are_replaced_when_told(tmp_path, monkeypatch):
    monkeypatch.setattr(toybox_classifier, "accuracy", lambda *_: {"crop_kind": 0.5})
    options = ["--scenes", "2", "--steps", "1", "--batch", "2", "--width", "8", "--overwrite"]
    for name in ("small.safetensors", "small.json"):
        (tmp_path / name).write_text("old")
    toybox_classifier.main(["--output", str(tmp_path / "small.safetensors"), *options])
    assert load_classifier(tmp_path / "small.safetensors").kinds.weight.shape[1] == 8
    assert json.loads((tmp_path / "small.json").read_text())["held_out"] == {"crop_kind": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "the seed is -1; give a whole number from 0 to"),
        (["--images", "0"], "--images is 0; give a whole number from 1 to"),
    ],
)
def test_what_cannot_be_measured_is_told(options, message, tmp_path, fails):
    assert message in fails(evaluate.main, ["--output", str(tmp_path / "out"), *options]).err
    assert not (tmp_path / "out").exists()


def test_the_command_measures_the_shipped_model(tmp_path, capsys):
    """Two pictures a measure: every number is there, and counts what it should."""
    evaluate.main(["--images", "2", "--output", str(tmp_path / "out"), "--device", "cpu"])
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    shipped = json.loads((FOLDER.parent / "evaluation.json").read_text())
    assert found.keys() == shipped.keys()
    assert found["autoencoder"]["psnr_db"] == pytest.approx(shipped["autoencoder"]["psnr_db"])
    for section in ("one", "two", "one_of_asked", "two_of_asked", "renders"):
        assert found[section].keys() == shipped[section].keys()
        shares = {k: v for k, v in found[section].items() if k != "kind_by_kind"}
        assert set(shares.values()) <= {0, 0.5, 1}, section
    assert found["settings"] == shipped["settings"] | {"images": 2}
    assert f"PSNR in dB | {found['autoencoder']['psnr_db']:.1f} | ≥ 28.0" in capsys.readouterr().out
    with Image.open(tmp_path / "out/samples.png") as sheet:
        assert min(sheet.size) >= 128


def test_missing_weights_are_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="no weights at .*; train them: python -m toybox.classif"):
        load_classifier(tmp_path / "none.safetensors")


def test_wrong_pictures_have_a_red_caption():
    prompt = Prompt("a red car", (Look("car", 0),))
    picture = Image.new("RGB", (16, 16), (10, 200, 30))
    right, wrong = sample_tiles([(prompt, picture, True), (prompt, picture, False)])
    assert right == Tile(picture, "a red car", "black") and wrong.colour == "red"


def test_the_table_lists_what_was_measured():
    result = {section: {} for section, _ in evaluate.MEASURES}
    result["autoencoder"]["psnr_db"] = 28.25
    result["one"]["kind"] = 0.914
    assert evaluate.table(result).splitlines()[2:] == [
        "| autoencoder, held-out scenes: PSNR in dB | 28.2 | ≥ 28.0 |",
        "| one object: right kind | 91.4% | ≥ 90.0% |",
    ]
