"""Measures by hand, the golden extraction, and pictures as the models read them."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from golden_mige import GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_bench import noise
from tiny_judges import save_judges
from transformers import ViTModel
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from imagelab.errors import UserError
from mige.evaluation import extraction
from mige.evaluation.extraction import Extractor, best_box, corners, enlarged, rounded, shrunk
from mige.evaluation.measures import (
    cut_out,
    direction,
    distances,
    fill,
    fit,
    mean_cosine,
    middle,
    normalised,
)
from mige.evaluation.models import Clip, Dino, find, load


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folders = save_judges(tmp_path_factory.mktemp("judges"))
    return {name: find(name, str(folder), offline=True) for name, folder in folders.items()}


def grey(levels) -> Image.Image:
    """RGB, each pixel of one level."""
    return Image.fromarray(np.array(levels, np.uint8)).convert("RGB")


# ----------------------------------------------------------------------------------------------
# pixels

ONE, TWO = grey([[0, 255], [51, 102]]), grey([[0, 0], [102, 0]])
INSIDE = np.array([[False, True], [True, False]])


def test_l1_and_l2_by_hand():
    """Differences 0, 1, 1/5 and 2/5."""
    assert distances(ONE, TWO) == pytest.approx(((1 + 0.2 + 0.4) / 4, (1 + 0.04 + 0.16) / 4))
    assert distances(ONE, TWO, INSIDE) == pytest.approx((1.2 / 2, 1.04 / 2))
    assert distances(ONE, TWO, ~INSIDE) == pytest.approx((0.4 / 2, 0.16 / 2))
    assert distances(ONE, TWO, np.zeros((2, 2), bool)) is None


def test_channels_count_alike():
    red = Image.new("RGB", (3, 2), (255, 0, 0))
    assert distances(red, Image.new("RGB", (3, 2))) == pytest.approx((1 / 3, 1 / 3))


def test_what_is_cut_out_and_filled():
    picture = grey([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    inside = np.array([[0, 0, 0], [0, 1, 0], [0, 1, 1]], bool)
    assert np.asarray(cut_out(picture, inside))[..., 0].tolist() == [[5, 0], [8, 9]]
    wide = cut_out(picture, inside, (0, 1, 3, 2))
    assert np.asarray(wide)[..., 0].tolist() == [[0, 5, 0]]
    assert np.asarray(fill(picture, inside))[..., 2].tolist() == [[1, 2, 3], [4, 0, 6], [7, 0, 0]]
    assert np.asarray(picture)[1, 1, 0] == 5  # it is not changed itself


def test_sizes_are_made_equal_bicubically():
    picture = noise(1, 40, 30)
    assert fit(picture, (40, 30)) is picture
    wanted = picture.resize((20, 25), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(fit(picture, (20, 25))), np.asarray(wanted))


def test_the_middle_that_encoders_see():
    """40×30 with the shorter side 16: 21×16, of which the 14×14 from (4, 1) are left."""
    picture = noise(2)
    wanted = picture.resize((21, 16), Image.Resampling.BICUBIC).crop((4, 1, 18, 15))
    assert np.array_equal(np.asarray(middle(picture, 16, 14)), np.asarray(wanted))
    tall = noise(3, 30, 40)
    wanted = tall.resize((16, 21), Image.Resampling.BICUBIC).crop((0, 2, 16, 18))
    assert np.array_equal(np.asarray(middle(tall, 16, 16)), np.asarray(wanted))


def test_normalised_by_hand():
    pixels = normalised(Image.new("RGB", (2, 3), (255, 0, 51)), (0.5, 0.5, 0.1), (0.5, 0.25, 0.1))
    assert pixels.shape == (3, 3, 2)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.0, -2.0, 1.0]))


# ----------------------------------------------------------------------------------------------
# features


def test_cosines_by_hand():
    one = torch.tensor([0.6, 0.8])
    assert mean_cosine(one, torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(0.7)


def test_direction_by_hand():
    """The picture changes along (−1, 1), the text along (0, 2): 45° apart."""
    x, y = torch.eye(2)
    assert direction(y, x, y, -y) == pytest.approx(math.sqrt(0.5))
    assert direction(x, y, y, -y) == pytest.approx(-math.sqrt(0.5))
    assert direction(x, x, y, -y) == 0
    assert direction(y, x, y, y) is None


def test_clip_is_what_the_library_computes(judges):
    """Its own preprocessing, from Pillow; its own cosines, that is logits over their scale."""
    clip, picture = Clip(judges["clip"], "cpu"), noise(4, 50, 37)
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    pixels = prepare(picture, return_tensors="pt")["pixel_values"]
    words = clip.tokenizer("a photo of a dog", return_tensors="pt")
    found = clip.model(pixel_values=pixels, **words)
    wanted = found.logits_per_image / clip.model.logit_scale.exp()
    cosine = mean_cosine(clip.images([picture])[0], clip.text("a photo of a dog")[None])
    assert cosine == pytest.approx(wanted.item(), abs=1e-5)
    assert abs(cosine) > 1e-3


def test_a_long_text_is_cut(judges):
    clip = Clip(judges["clip"], "cpu")
    assert torch.equal(clip.text("dog " * 500), clip.text("dog " * 400))


def test_dino_is_the_class_token_of_the_release_s_picture(judges):
    """ImageNet's numbers, written out; 256 and 224 become 16 and 14."""
    dino, picture = Dino(judges["dino"], "cpu"), noise(5)
    model = ViTModel.from_pretrained(judges["dino"].folder, add_pooling_layer=False)
    square = picture.resize((21, 16), Image.Resampling.BICUBIC).crop((4, 1, 18, 15))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    pixels = (pixels - mean) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    wanted = model(pixels[None]).last_hidden_state[:, 0]
    found = dino.images([picture])
    assert torch.allclose(found, wanted / wanted.norm(), atol=1e-5)
    assert (dino.resize, dino.side) == (16, 14)


# ----------------------------------------------------------------------------------------------
# entities


def test_extraction_is_golden():
    with np.load(GOLDEN / "extract_entity.npz") as golden:
        picture, inside = Image.fromarray(golden["image"]), golden["mask"]
        box = rounded(corners(golden["box_cxcywh"], *picture.size), *picture.size)
        assert box == (8, 4, 23, 15)
        assert np.array_equal(np.asarray(cut_out(picture, inside, box)), golden["crop"])


def test_boxes_stay_within_the_picture():
    assert corners(np.array([0.5, 0.25, 0.5, 0.5]), 40, 20) == (10, 0, 30, 10)
    assert rounded((-3.2, 1.5, 41.7, 2.5), 40, 30) is None  # both edges at 2, as Python rounds
    assert rounded((-3.2, 1.4, 41.7, 2.6), 40, 30) == (0, 1, 40, 3)
    assert rounded((3.1, 1, 3.2, 9), 40, 30) is None
    assert rounded((50, 1, 60, 9), 40, 30) is None


def test_the_best_box_is_above_the_threshold():
    boxes = torch.arange(12.0).reshape(3, 4)
    likely = torch.tensor([[0.1, 0.31], [0.2, 0.1], [0.45, 0.0]])
    place, box = best_box(likely, boxes)
    assert place == 2 and box.tolist() == [8, 9, 10, 11]
    assert best_box(likely * 0.6, boxes) is None
    assert best_box(torch.full((3, 2), 0.3), boxes) is None


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((640, 480), (1066, 800)), ((480, 640), (800, 1066)), ((512, 512), (800, 800)),
        ((2000, 500), (1333, 333)), ((500, 2000), (333, 1333)), ((1000, 3), (1333, 4)),
    ],
)  # fmt: skip
def test_sizes_that_the_detector_reads(size, wanted):
    assert shrunk(size, 800, 1333) == wanted
    assert get_size_with_aspect_ratio(size[::-1], 800, 1333) == wanted[::-1]


def test_sizes_that_sam_reads():
    assert enlarged((640, 480), 1024) == (1024, 768)
    assert enlarged((333, 500), 1024) == (682, 1024)  # 681.98


class Heard:
    """A detector or segmenter that answers what it is told, and keeps what it was asked."""

    def __init__(self, model, **answer):
        self.config, self.answer = model.config, answer

    def __call__(self, **asked):
        self.asked = asked
        return type("Output", (), self.answer)


def test_what_detector_and_sam_are_asked(judges):
    """As the library's own processors prepare it; the box in the pixels of SAM's picture."""
    extract, picture = Extractor(judges["detector"], judges["sam"], "cpu"), noise(6, 60, 40)
    logits = torch.full((1, 2, 16), -9.0)
    logits[0, 1, 2] = 2.0
    boxes = torch.tensor([[[0.5, 0.5, 1, 1], [0.25, 0.5, 0.3, 0.5]]])
    extract.detector = Heard(extract.detector, logits=logits, pred_boxes=boxes)
    masks = torch.full((1, 1, 1, 16, 16), -1.0)
    masks[..., :8] = 1.0  # the left half of SAM's square, 32 of 64: of 60 pixels 30
    extract.sam = Heard(extract.sam, pred_masks=masks)
    entity = extract(picture, " Red dog ")
    assert entity.box == (6, 10, 24, 30)  # 15 ± 9, 20 ± 10
    assert np.array_equal(np.asarray(entity.picture), np.asarray(picture)[10:30, 6:24])
    assert entity.score == pytest.approx(1 / (1 + math.exp(-2)))
    assert entity.phrase == "dog"
    ids = extract.detector.asked["input_ids"].tolist()
    assert ids == [[2, 9, 8, 5, 3]]  # [CLS] red dog . [SEP]
    sizes = {"shortest_edge": 96, "longest_edge": 128}
    wanted = GroundingDinoImageProcessorPil(size=sizes)(picture, return_tensors="pt")
    close(extract.detector.asked["pixel_values"], wanted["pixel_values"])
    square = {"height": 64, "width": 64}
    wanted = SamImageProcessorPil(size={"longest_edge": 64}, pad_size=square)(
        picture, return_tensors="pt"
    )
    close(extract.sam.asked["pixel_values"], wanted["pixel_values"])
    scale = 64 / 60, 43 / 40
    wanted = [[[6 * scale[0], 10 * scale[1], 24 * scale[0], 30 * scale[1]]]]
    assert torch.allclose(extract.sam.asked["input_boxes"], torch.tensor(wanted))
    assert extract.sam.asked["multimask_output"] is False


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-4


def test_the_mask_is_enlarged_as_the_library_does(judges):
    extract, picture = Extractor(judges["detector"], judges["sam"], "cpu"), noise(7, 45, 61)
    masks = torch.randn(1, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    extract.sam = Heard(extract.sam, pred_masks=masks)
    wanted = SamImageProcessorPil(pad_size={"height": 64, "width": 64}).post_process_masks(
        [masks[0]], [(61, 45)], [(64, 47)]
    )
    found = extract.segment(picture, (0.0, 0.0, 9.0, 9.0))
    assert np.array_equal(found, wanted[0][0, 0].numpy())
    assert 0 < found.mean() < 1


def test_nothing_found_is_the_whole_picture(judges):
    extract, picture = Extractor(judges["detector"], judges["sam"], "cpu"), noise(8)
    logits = torch.full((1, 2, 16), -1.0)  # 0.27
    extract.detector = Heard(extract.detector, logits=logits, pred_boxes=torch.rand(1, 2, 4))
    entity = extract(picture, "dog")
    assert entity.picture is picture and entity.box is None


def test_the_real_detector_and_sam_together(judges):
    """Logits and boxes of the models themselves, put together by hand."""
    extract, picture = Extractor(judges["detector"], judges["sam"], "cpu"), noise(9)
    entity = extract(picture, "dog")
    words = extract.tokenizer("dog.", return_tensors="pt")
    pixels = normalised(
        picture.resize((128, 96), Image.Resampling.BILINEAR), (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )  # fmt: skip
    model = load(judges["detector"], "cpu")
    with torch.inference_mode():
        output = model(pixel_values=pixels[None], **words)
    scores = output.logits.sigmoid()[0].max(1).values
    x, y, w, h = output.pred_boxes[0, scores.argmax()].tolist()
    box = [40 * (x - w / 2), 30 * (y - h / 2), 40 * (x + w / 2), 30 * (y + h / 2)]
    assert entity.box == tuple(map(round, box))
    assert entity.score == pytest.approx(scores.max().item(), abs=1e-5)


# ----------------------------------------------------------------------------------------------
# models from elsewhere


def test_a_config_cannot_make_the_loader_look_elsewhere(judges, tmp_path):
    folder = shutil.copytree(judges["detector"].folder, tmp_path / "copy")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModel": "evil.py"}
    config["backbone_config"] |= {"auto_map": {"x": "evil"}, "_attn_implementation": "evil/kernel"}
    config["text_config"] |= {"attn_implementation": "evil/kernel"}
    config |= {"backbone": "evil/hub", "use_pretrained_backbone": True, "use_timm_backbone": True}
    path.write_text(json.dumps(config))
    weights = find("detector", str(folder), offline=True)
    assert weights.digest == judges["detector"].digest  # nothing of that is read
    assert load(weights, "cpu").config.text_config._attn_implementation != "evil/kernel"


def test_other_numbers_in_a_config_or_in_weights_are_another_model(judges, tmp_path):
    folder = shutil.copytree(judges["dino"].folder, tmp_path / "copy")
    assert find("dino", str(folder), True).digest == judges["dino"].digest
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    first = find("dino", str(folder), True).digest
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert len({judges["dino"].digest, first, find("dino", str(folder), True).digest}) == 3


def test_shards_are_the_same_model(judges, tmp_path):
    model = load(judges["dino"], "cpu", add_pooling_layer=False)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    whole, parts = Dino(judges["dino"], "cpu"), Dino(find("dino", str(tmp_path), True), "cpu")
    assert torch.equal(whole.images([noise(1)]), parts.images([noise(1)]))


def test_the_hub_is_asked_for_what_is_not_there(judges, tmp_path, monkeypatch):
    """Local files come first; half a model is none; offline nobody is asked."""
    asked = []
    (tmp_path / "config.json").write_text("{}")

    def snapshot_download(source, allow_patterns, local_files_only):
        asked.append((source, local_files_only))
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in allow_patterns)
        return str(tmp_path if local_files_only else judges["dino"].folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find("dino", "a/b", offline=False).digest == judges["dino"].digest
    assert asked == [("a/b", True), ("a/b", False)]
    with pytest.raises(UserError, match="a/b is not in the local cache"):
        find("dino", "a/b", offline=True)
    assert asked[2:] == [("a/b", True)]
    shutil.copy(judges["dino"].folder / "model.safetensors", tmp_path)
    shutil.copy(judges["dino"].folder / "config.json", tmp_path)
    assert find("dino", "a/b", offline=False).folder == tmp_path
    assert asked[3:] == [("a/b", True)]


def test_models_that_cannot_be_used(judges, tmp_path):
    with pytest.raises(UserError, match="there is no model folder nowhere; give --clip a folder"):
        find("clip", "nowhere", True)
    with pytest.raises(UserError, match="the model a/b is not in the local cache .* --dino"):
        find("dino", "a/b", True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="pickled .bin weights are never read.*--sam"):
        find("sam", str(tmp_path / "empty"), True)
    wrong = find("clip", str(judges["dino"].folder), True)
    with pytest.raises(UserError, match=f"{judges['dino'].folder} could not be loaded.*--clip"):
        Clip(wrong, "cpu")


def test_weights_that_are_not_finite(judges, tmp_path):
    folder = shutil.copytree(judges["dino"].folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.bias"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        Dino(find("dino", str(folder), True), "cpu")


def test_words_of_a_detector(judges, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\ndog\n")
    with pytest.raises(UserError, match="vocab.txt is no vocabulary of BERT"):
        extraction.read_words(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    words = judges["detector"].folder / "vocab.txt"
    vocabulary = {word: number for number, word in enumerate(words.read_text().split())}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    assert extraction.read_words(tmp_path)("a dog").input_ids == [2, 6, 8, 3]
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 800}}')
    with pytest.raises(UserError, match="its size is"):
        extraction.read_sides(tmp_path)
