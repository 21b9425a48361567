"""Evaluation: measures with numbers worked by hand, resumption, and the command on a thin model."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

import semantic_evaluation
from imagelab.attention import layer_grid
from imagelab.boxes import Box
from imagelab.errors import UserError
from imagelab.evaluation import runner
from imagelab.evaluation.features import FeatureSpace, load_features, squared
from imagelab.evaluation.measures import (
    confusion,
    crop,
    diversity,
    layout,
    margins,
    mask_crops,
    objects_by_colour,
)
from imagelab.evaluation.report import Mean, mean_interval, over_all, summarise, total_confusion
from imagelab.io.tensors import read_tensors, write_tensors
from mifo import evaluation, learned
from mifo.cli import evaluation as command
from mifo.cli.synthesis import GUIDANCE_HELP
from mifo.learned import Learned, read_learned_folder
from mifo.learning.instance import read_instance
from mifo.method.layers import decoder_block
from mifo.synthesis.config import SynthesisConfig
from mifo.synthesis.layouts import preset_boxes
from mifo.synthesis.scene import read_grid
from toybox.scenes.scenes import Placement, Scene, render
from toybox.scenes.toys import Look

LEFT, RIGHT = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)


# ----------------------------------------------------------------------------------------------
# measures


def test_confusion_counts_the_nearest_instance():
    similarities = [[0.9, 0.1, 0.2], [0.3, 0.2, 0.8], [0.1, 0.7, 0.2], [0.6, 0.5, 0.1]]
    assert confusion([0, 1, 1, 2], similarities).tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 0]]


def test_margin_is_the_lead_over_the_nearest_other_instance():
    similarities = [[0.9, 0.1, 0.2], [0.3, 0.2, 0.8]]
    assert margins([0, 1], similarities) == pytest.approx([0.7, -0.6])


def test_layout_of_a_filled_box_and_a_shifted_object():
    objects = np.zeros((10, 20), dtype=bool)
    objects[:, :10] = True  # fills the left box
    objects[4:8, 13:18] = True  # 4 × 5 pixels in the right box of 10 × 10
    ious, leakage = layout(objects, [LEFT, RIGHT])
    assert ious == [1.0, 0.2]
    assert leakage == 0.0


def test_layout_takes_the_largest_part_in_the_box_and_follows_it_outside():
    objects = np.zeros((10, 10), dtype=bool)
    objects[0:4, 0:8] = True  # half of it in the box: 4 × 4 of 32 pixels
    objects[8, 0] = True  # a speck in the box
    ious, leakage = layout(objects, [Box(0, 0, 0.4, 1)])
    # Bounding box 4 × 8, box 10 × 4, shared 4 × 4: 16 / (32 + 40 − 16).
    assert ious == [16 / 56]
    assert leakage == 16 / 33


def test_layout_without_objects():
    assert layout(np.zeros((8, 8), dtype=bool), [LEFT]) == ([0.0], None)


def test_objects_by_colour_finds_what_differs_from_the_noisy_background():
    rng = np.random.default_rng(0)
    pixels = rng.normal(120, 4, (40, 40, 3))
    pixels[10:30, 4:16] = (200, 40, 40)
    found = objects_by_colour(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), [LEFT])
    wanted = np.zeros((40, 40), dtype=bool)
    wanted[10:30, 4:16] = True
    assert (found == wanted).mean() > 0.999
    assert found[10:30, 4:16].all()


def test_objects_by_colour_needs_background():
    with pytest.raises(ValueError, match="cover the whole picture"):
        objects_by_colour(Image.new("RGB", (8, 8)), [LEFT, RIGHT])


def test_boxes_without_background_are_refused_before_anything_is_painted(learned_dir):
    config = SynthesisConfig(models_dir=str(learned_dir), seed=0)
    for boxes in ([LEFT, RIGHT], [Box(0, 0, 1, 1), LEFT]):
        with pytest.raises(ValueError, match="cover the whole picture"):
            evaluation.plan_cases(config, ["toys"], [], None, None, boxes)


def plan(learned_dir, boxes, prompts=("<asset1> and <asset0>",), **settings):
    """Cases with what a layout returns; no model may be loaded."""

    def loaded(*_):
        raise AssertionError("the base model was loaded")

    config = SynthesisConfig(models_dir=str(learned_dir), seed=0, num_images=1, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned, "load_base", loaded)
        return evaluation.plan_cases(config, ["toys"], prompts, None, lambda *_: boxes)


def test_a_layout_may_return_whatever_a_box_may_be(learned_dir):
    [case] = plan(learned_dir, [[0, 0.1, 0.5, 0.9], "50%,10%,100%,90%"])
    assert case.boxes == (Box(0, 0.1, 0.5, 0.9), Box(0.5, 0.1, 1, 0.9))
    assert all(isinstance(box, Box) for box in case.boxes)


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([[0, 0, 0.5, 1], [0.5, 0, 1.2, 1]], "holds 1.2, which is more than the whole picture"),
        ([LEFT, [0.5, -0.5, 1, 1]], "has its top edge at -0.5 of the picture"),
        # decoder-1 of the thin model works on 4 × 4 cells: 0.6 and 0.62 lie in the same one.
        ([LEFT, Box(0.6, 0, 0.62, 1)], r"box 2 \(<asset0>\) .* a grid of 4 columns and 4 rows"),
        ([LEFT, [0.5, 0, 1]], "does not hold four numbers"),
        ([LEFT], r"there are 1 boxes and 2 assets in the prompt \(<asset1>, <asset0>\)"),
    ],
)
def test_boxes_are_checked_before_any_work(learned_dir, boxes, says):
    with pytest.raises(UserError, match=says):
        plan(learned_dir, boxes)


def test_assets_of_the_negative_prompt_are_checked_before_any_work(learned_dir):
    with pytest.raises(UserError, match="the negative prompt names <asset7>, which .* not hold"):
        plan(learned_dir, [LEFT, RIGHT], negative_prompt="<asset7>")
    with pytest.raises(UserError, match="the negative prompt writes '<Asset1>'; write <asset1>"):
        plan(learned_dir, [LEFT, RIGHT], negative_prompt="fog, <Asset1>")
    [case] = plan(learned_dir, [LEFT, Box(0.5, 0, 1, 0.5)], negative_prompt="fog, <asset1>")
    assert case.config.negative_prompt == "fog, <asset1>"


@pytest.mark.parametrize(
    ("width", "height", "grid"), [(None, None, (4, 4)), (192, None, (4, 6)), (128, 256, (8, 4))]
)
def test_the_grid_of_boxes_is_that_of_the_model(learned_dir, width, height, grid):
    """Of latents of 16 × 16, halved twice: 32 pixels of the picture a cell."""
    config = SynthesisConfig(models_dir=str(learned_dir), model_id="toys", seed=0)
    config = config.with_settings(width=width, height=height)
    folder = read_learned_folder(learned_dir / "toys")
    assert read_grid(config, folder) == grid
    unet = UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(Path(folder.base_source) / "unet")
    )
    size = (height or 128) // 8, (width or 128) // 8
    assert layer_grid(unet, size, decoder_block(unet)) == grid


def test_records_do_not_depend_on_what_no_evaluation_has(learned_dir):
    """What was measured before there was --lora_scale is not measured again."""
    [case] = plan(learned_dir, [LEFT, Box(0.5, 0, 1, 0.5)])
    settings = evaluation.CasePainter("cpu").facts(case, 0)["settings"]
    assert "lora" in settings and "lora_scale" not in settings


def test_records_depend_on_what_was_learned(learned_dir, tmp_path):
    folder = shutil.copytree(learned_dir / "toys", tmp_path / "toys")

    def key(models_dir=tmp_path) -> str:
        [case] = plan(models_dir, [LEFT, Box(0.5, 0, 1, 0.5)])
        return runner.record_key(case, 0, [], evaluation.CasePainter("cpu"))

    first = key()
    found = [first, key(learned_dir)]  # wherever it lies
    for name in ("asset0.safetensors", learned.LORA):
        change(folder / name)
        found.append(key())
    assert found[1] == first and len(set(found)) == 3


def change(path: Path) -> None:
    """Write a file of tensors anew, with other numbers in one of them."""
    tensors, metadata = read_tensors(path, "")
    name = sorted(tensors)[0]
    write_tensors(path, {**tensors, name: tensors[name] + 1}, metadata)


def test_a_prompt_that_is_given_twice_is_one_case(learned_dir):
    prompts = ("<asset1> and <asset0>", "<asset0> by <asset1>", "<asset1> and <asset0>")
    cases = plan(learned_dir, [LEFT, Box(0.5, 0, 1, 0.5)], prompts)
    assert [case.prompt for case in cases] == ["<asset1> and <asset0>", "<asset0> by <asset1>"]


def test_diversity_is_the_mean_distance_of_pairs():
    vectors = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]  # distances 1, 2 and 1
    assert diversity(vectors) == pytest.approx(4 / 3)
    assert diversity(vectors[:1]) is None


def test_crops(examples):
    instance = read_instance(examples / "toys", 128, 8)
    first, second = mask_crops(Image.fromarray(instance.image), instance.masks)
    assert first.size == second.size == (48, 64)
    assert np.array_equal(np.asarray(second), instance.image[32:96, 72:120])
    picture = Image.fromarray(instance.image)
    assert np.array_equal(np.asarray(crop(picture, RIGHT)), instance.image[:, 64:])


# ----------------------------------------------------------------------------------------------
# tables


def record(own, similarities, features, iou, leakage) -> dict:
    space = {"similarities": similarities, "features": features, "prompt": 0.25}
    return {"own": own, "spaces": {"some": space}, "iou": iou, "leakage": leakage}


RECORDS = [
    record([0, 1], [[0.9, 0.5], [0.2, 0.3]], [1.0, 0.0], [0.5, 0.7], 0.1),
    record([0, 1], [[0.4, 0.6], [0.1, 0.2]], [0.0, 1.0], [0.2, 0.6], None),
]


def test_mean_and_student_interval():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / np.sqrt(3))  # t of two degrees of freedom, deviation 1
    assert mean_interval([5.0]) == Mean(5.0, None)
    assert mean_interval([]) is None


def test_summary_of_two_pictures():
    row = summarise(RECORDS)
    assert {name: round(value.mean, 6) for name, value in row.items()} == {
        "some: right instance": 0.75,  # 2 of 2 crops, then 1 of 2
        "some: margin": 0.1,  # of 0.4, 0.1, −0.2 and 0.1
        "some: prompt": 0.25,
        "some: diversity": 1.0,
        "IoU with the box": 0.5,
        "leakage": 0.1,
    }
    assert row["leakage"].half is None  # one picture had no object
    assert total_confusion(RECORDS, "some").tolist() == [[1, 1], [0, 2]]


def test_identity_of_a_single_instance_says_nothing():
    row = summarise([record([0, 0], [[0.9], [0.8]], [1.0, 0.0], [0.5, 0.7], 0.1)])
    assert row["some: right instance"] is None
    assert row["some: margin"] is None
    assert row["IoU with the box"] == Mean(0.6, None)


def test_over_all_is_the_mean_of_means():
    rows = [{"a": Mean(1.0, 0.5), "b": None}, {"a": Mean(3.0, None), "b": Mean(4.0, 1.0)}]
    found = over_all(rows)
    assert found["a"].mean == 2.0
    assert found["a"].half == pytest.approx(12.706205 * np.sqrt(2) / np.sqrt(2))
    assert found["b"] == Mean(4.0, None)


# ----------------------------------------------------------------------------------------------
# feature spaces


def test_squared_pads_with_the_colour_of_the_border():
    pixels = np.full((2, 4, 3), 7, dtype=np.uint8)
    pixels[:, 1] = 200
    found = np.asarray(squared(Image.fromarray(pixels)))
    assert found.shape == (4, 4, 3)
    assert np.array_equal(found[1:3], pixels)
    assert (found[[0, 3]] == 7).all()
    grey = Image.new("L", (4, 2), 7)
    assert np.array_equal(np.asarray(squared(grey)), np.full((4, 4, 3), 7))


def save_preparation(folder: Path, side: int) -> None:
    config = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.5],
        "crop_size": {"height": side, "width": side},
        "image_processor_type": "CLIPImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def clip_folder(small_sd, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(small_sd / "tokenizer", folder, dirs_exist_ok=True)
    thin = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    thin["num_attention_heads"] = 2
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=thin | {"vocab_size": 552, "bos_token_id": 550, "eos_token_id": 551},
        vision_config=thin | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    save_preparation(folder, 16)
    return folder


def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def prepared() -> torch.Tensor:
    """What the models of these tests get to see: normalised as their config asks."""
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures()])).float() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.5])
    return ((pixels - mean) / std).permute(0, 3, 1, 2)


def test_clip_features_are_those_of_the_whole_model(clip_folder):
    space = load_features(f"clip={clip_folder}", offline=True)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    ids = CLIPTokenizer.from_pretrained(clip_folder)("a photo", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=prepared())
    images, text = (F.normalize(e, dim=1) for e in (wanted.image_embeds, wanted.text_embeds))
    assert torch.allclose(space.images(pictures()), images, atol=1e-5)
    assert torch.allclose(space.text("a photo"), text[0], atol=1e-5)


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    Dinov2Model(config).save_pretrained(folder)
    save_preparation(folder, 16)
    return folder


def test_dinov2_features_are_class_tokens(dinov2_folder):
    space = load_features(f"dinov2={dinov2_folder}", offline=True)
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    with torch.no_grad():
        wanted = model(prepared()).last_hidden_state[:, 0]
    assert torch.allclose(space.images(pictures()), F.normalize(wanted, dim=1), atol=1e-5)
    assert space.text is None


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_other_weights_in_the_same_folder_are_another_space(name, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(f"{name}_folder"), tmp_path / name)

    def source() -> str:
        return load_features(f"{name}={folder}", offline=True).source

    first = source()
    assert source() == first and str(folder) in first
    change(folder / "model.safetensors")
    assert source() != first


@pytest.mark.parametrize(
    "looks",
    [
        (Look("car", 20.0), Look("car", 50.0)),
        (Look("car", 20.0), Look("bus", 20.0)),
    ],
    ids=["near hues", "near kinds"],
)
def test_toybox_features_know_look_alikes_again(looks):
    def scene(looks: tuple[Look, Look], y: float, grey: int) -> Image.Image:
        toys = (Placement(look, x, y, 0.4) for look, x in zip(looks, (0.25, 0.75), strict=True))
        return render(Scene(tuple(toys), None, (grey,) * 3, 0), 128)[0]

    space = load_features("toybox")
    photo, picture = scene(looks, 0.5, 220), scene(looks[::-1], 0.6, 130)
    boxes = Box(0, 0.3, 0.5, 0.8), Box(0.5, 0.3, 1, 0.8)
    references = space.images([crop(photo, box) for box in boxes])
    seen = space.images([crop(picture, box) for box in boxes])
    assert torch.allclose(seen.norm(dim=1), torch.ones(2))
    similarities = (seen @ references.T).tolist()
    assert confusion([1, 0], similarities).tolist() == [[1, 0], [0, 1]]
    assert min(margins([1, 0], similarities)) > 0.03


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet", "is unknown"),
        ("toybox=/some/where", "is unknown"),
        ("clip=/no/such/folder", "could not be loaded"),
        ("dinov2=/no/such/folder", "could not be loaded"),
    ],
)
def test_features_that_are_not_there(spec, words):
    with pytest.raises(ValueError, match=words):
        load_features(spec, offline=True)


# ----------------------------------------------------------------------------------------------
# records


def test_records_drop_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "records.jsonl"
    records = runner.Records(path)
    records.add({"key": "a", "value": 1})
    records.add({"key": "b", "value": 2})
    path.write_bytes(path.read_bytes()[:-5])
    again = runner.Records(path)
    assert again.found == {"a": {"key": "a", "value": 1}}
    again.add({"key": "c", "value": 3})
    assert runner.Records(path).found.keys() == {"a", "c"}


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"key": "a"}\nmy notes'])
def test_a_file_of_something_else_is_kept(content, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="is no record of an evaluation"):
        runner.Records(path)
    assert path.read_text() == content


def test_two_processes_append_each_record_once(tmp_path):
    """Both have seen an empty file; each keeps what the other was first to find."""
    path = tmp_path / "records.jsonl"
    one, two = runner.Records(path), runner.Records(path)
    one.add({"key": "a", "value": 1})
    two.add({"key": "a", "value": 2})
    two.add({"key": "b", "value": 3})
    one.add({"key": "c", "value": 4})
    assert len(path.read_bytes().splitlines()) == 3
    values = {key: record["value"] for key, record in one.found.items()}
    assert values == {"a": 1, "b": 3, "c": 4}
    assert two.found["a"]["value"] == 1


def append(path, start):
    """A process's work: many records, half of them also another's."""
    records = runner.Records(path)
    for number in range(start, start + 100):
        records.add({"key": str(number), "value": "x" * number})


def test_records_of_two_processes_at_once_stay_whole(tmp_path):
    path, start = tmp_path / "records.jsonl", multiprocessing.get_context("fork")
    workers = [start.Process(target=append, args=(path, first)) for first in (0, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sorted(int(line["key"]) for line in lines) == list(range(150))
    assert all(len(line["value"]) == int(line["key"]) for line in lines)


# ----------------------------------------------------------------------------------------------
# the command


def random_features(patch):
    """A random projection of a thumbnail, in place of a real feature space."""

    def images(pictures):
        small = [np.asarray(p.convert("RGB").resize((4, 4)), dtype=np.float32) for p in pictures]
        matrix = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
        return F.normalize(torch.from_numpy(np.stack(small)).flatten(1) @ matrix, dim=1)

    def load(spec, offline):
        return FeatureSpace(spec, "random", images)

    patch.setattr(evaluation, "load_features", load)


def count_pictures(patch) -> list[tuple[int, bool]]:
    """Index, and whether boxes are in control, of every picture that is painted."""
    calls = []
    paint = evaluation.paint

    def count(scene, indices, text):
        calls.extend((index, scene.tokens is not None) for index in indices)
        return paint(scene, indices, text)

    patch.setattr(evaluation, "paint", count)
    return calls


@pytest.fixture
def painted(monkeypatch) -> list[tuple[int, bool]]:
    """Counted pictures, with random features."""
    random_features(monkeypatch)
    return count_pictures(monkeypatch)


def run(learned_dir: Path, output: Path, *options: str) -> None:
    """The command, with two steps for each picture."""
    where = ["--model_id", "toys", "--models_dir", str(learned_dir), "--output_path", str(output)]
    short = ["--num_inference_steps", "2", "--guidance_steps", "1", "--guidance_iterations", "1"]
    plain = ["--device", "cpu", "--mixed_precision", "no", "--features", "random"]
    semantic_evaluation.main([*where, *short, *plain, "--num_images", "2", *options])


@pytest.fixture(scope="module")
def finished(learned_dir, tmp_path_factory) -> Path:
    """The output of two pictures; tests only read it."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        random_features(patch)
        painted = count_pictures(patch)
        run(learned_dir, output)
    assert painted == [(0, True), (1, True)]
    return output


@pytest.fixture
def output(finished, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "evaluation")


def result(output: Path) -> dict:
    return json.loads((output / "evaluation.json").read_text())


def records(output: Path) -> list[dict]:
    return list(runner.Records(output / "records.jsonl").found.values())


def test_command(finished):
    found = result(finished)
    (case,) = found["cases"]
    assert case["prompt"] == "a photo of <asset0> and <asset1>"
    boxes = [[0.0625, 0.25, 0.4375, 0.75], [0.5625, 0.25, 0.9375, 0.75]]  # masks of 48×64 pixels
    assert case["boxes"] == [pytest.approx(box) for box in boxes]
    assert case["seeds"] == [0, 1]
    counts = total_confusion(records(finished), "random")
    assert found["confusion"]["random"] == counts.tolist()
    assert counts.sum(axis=1).tolist() == [2, 2]
    right = case["measures"]["random: right instance"]["mean"]
    assert right == pytest.approx(np.trace(counts) / 4)
    assert "random: prompt" not in case["measures"]
    table = (finished / "evaluation.md").read_text()
    assert f"| toys | `a photo of <asset0> and <asset1>` | {right:.3f}" in table
    with Image.open(finished / "sheet.png") as sheet:
        assert sheet.width == 3 * 196 - 4 and sheet.height > 192
    with Image.open(finished / "confusion.png") as figure:
        assert min(figure.size) > 200
    assert len(list((finished / "pictures").glob("*.png"))) == 2


def test_pictures_are_those_of_synthesis(learned_dir, finished, tmp_path):
    import semantic_synthesis

    semantic_synthesis.main(
        f"""--model_id toys --models_dir {learned_dir} --output_path {tmp_path / "output"} --seed 0
        --num_images 2 --device cpu --mixed_precision no --num_inference_steps 2
        --guidance_steps 1 --guidance_iterations 1 --prompt""".split()
        + ["a photo of <asset0> and <asset1>"]
    )
    for number, record in enumerate(records(finished)):
        measured = Image.open(finished / "pictures" / record["picture"])
        painted = Image.open(tmp_path / "output" / "toys" / f"{number:04d}.png")
        assert np.array_equal(np.asarray(measured), np.asarray(painted))


def test_goes_on_where_it_was(learned_dir, finished, output, painted, capsys):
    path = output / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-30])  # as if stopped while writing the second record
    for missing in ([(1, True)], []):
        painted.clear()
        run(learned_dir, output)
        assert painted == missing
        assert result(output) == result(finished)
        assert capsys.readouterr().out == (finished / "evaluation.md").read_text()


def test_a_picture_that_was_removed_is_painted_again(learned_dir, finished, output, painted):
    gone = output / "pictures" / records(output)[1]["picture"]
    content = gone.read_bytes()
    gone.unlink()
    (output / "evaluation.json").unlink()
    for missing in ([(1, True)], []):
        painted.clear()
        run(learned_dir, output)
        assert painted == missing
        assert result(output) == result(finished) and gone.read_bytes() == content
        lines = (output / "records.jsonl").read_text().splitlines()
        assert len(lines) == 3 and lines[2] == lines[1]


def test_another_name_of_the_same_device_paints_nothing(learned_dir, output, painted, monkeypatch):
    monkeypatch.setattr("imagelab.models.device.choose_device", lambda _: "cpu")
    run(learned_dir, output, "--device", "auto")
    assert painted == []


def test_other_settings_are_painted_anew(learned_dir, output, painted):
    run(learned_dir, output, "--num_images", "1", "--no_box_control")
    assert painted == [(0, False)]
    assert result(output)["cases"][0]["box_control"] is False
    assert len(records(output)) == 2 + 1
    painted.clear()
    run(learned_dir, output, "--num_images", "1", "--boxes", "[[0, 0, 0.4, 1], [0.5, 0, 0.9, 1]]")
    assert painted == [(0, True)]


def test_several_prompts_and_own_boxes(learned_dir, tmp_path, painted, monkeypatch):
    loads, load = [], Learned.load
    monkeypatch.setattr(Learned, "load", lambda *a: loads.append(a) or load(*a))
    options = ["--num_images", "1", "--boxes", "[[0.25, 0.25, 0.75, 0.75]]"]
    run(learned_dir, tmp_path, *options, "--prompt", "<asset1> here", "an <asset0>")
    found = result(tmp_path)
    assert [case["prompt"] for case in found["cases"]] == ["<asset1> here", "an <asset0>"]
    assert np.sum(found["confusion"]["random"], axis=1).tolist() == [1, 1]
    means = [case["measures"]["IoU with the box"]["mean"] for case in found["cases"]]
    assert found["all"]["IoU with the box"]["mean"] == pytest.approx(np.mean(means))
    assert len(loads) == 1
    assert "| all |" in (tmp_path / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model_id", "nothing"], "there is no learned folder"),
        (["--model_id", "../toys"], "is not the plain name of a folder"),
        (["--prompt", "a house"], "must name assets"),
        (["--prompt", "a photo of <asset2>"], "<asset0>, <asset1>"),
        (["--prompt", "<asset0>", "--boxes", "[[0,0,0.5,1],[0.5,0,1,1]]"], "there are 2 boxes"),
        (["--boxes", "[[0, 0, 2, 1]]"], "more than the whole picture"),
        (["--num_images", "0"], "--num_images is 0"),
        (["--folder_path", "nowhere"], "there is no folder nowhere"),
        (["--features", "resnet"], "is unknown"),
        (["--features", "clip=/a", "clip=/b"], "names one twice"),
    ],
)
def test_bad_input(options, words, learned_dir, tmp_path, monkeypatch, fails):
    painted = count_pictures(monkeypatch)
    assert words in fails(run, learned_dir, tmp_path / "evaluation", *options).err
    assert painted == []
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "tpu"], "--device tpu is not available here"),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
    ],
)
def test_the_device_is_checked_before_features_are_loaded(
    options, says, learned_dir, tmp_path, monkeypatch, fails
):
    def loaded(*_):
        raise AssertionError("features were loaded before the device was checked")

    monkeypatch.setattr(evaluation, "load_features", loaded)
    assert says in fails(run, learned_dir, tmp_path / "evaluation", *options).err
    assert not (tmp_path / "evaluation").exists()


def test_help_says_what_each_option_is():
    actions = {action.dest: action.help for action in command.parse_args([])[0]._actions}
    assert "semantic_synthesis.py" not in "".join(actions.values())
    assert GUIDANCE_HELP.items() <= actions.items()
    assert "one for each asset of a prompt in its order" in actions["boxes"]
    assert "the same list is for every prompt" in actions["boxes"]


def test_another_photo_is_refused(learned_dir, examples, tmp_path, fails):
    shutil.copytree(examples / "toys", tmp_path / "toys")
    Image.new("RGB", (128, 128)).save(tmp_path / "toys" / "img.jpg")
    told = fails(run, learned_dir, tmp_path / "out", "--folder_path", str(tmp_path))
    assert "was learned from another photo or other masks" in told.err


def test_without_features_only_toybox_can_be_judged(learned_dir, tmp_path):
    config = SynthesisConfig(models_dir=str(learned_dir), num_images=1, seed=0)
    cases = evaluation.plan_cases(config, ["toys"], [], None, preset_boxes)
    with pytest.raises(ValueError, match="give --features"):
        evaluation.choose_spaces([], cases)
    base = replace(cases[0].learned.bases[0], source="toybox")
    cases = [replace(cases[0], learned=replace(cases[0].learned, bases=(base,)))]
    assert [space.name for space in evaluation.choose_spaces([], cases)] == ["toybox"]


def test_all_stands_for_every_learned_folder(tmp_path):
    for name in ("b", "a", ".a.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "pictures").mkdir()
    assert evaluation.list_learned(tmp_path, ["all"]) == ["a", "b"]
    with pytest.raises(ValueError, match="holds no learned folder"):
        evaluation.list_learned(tmp_path / "pictures", ["all"])
