"""Boxes as annotation tools write them, in every command that takes boxes and from Python."""

import json

import pytest

import mifo
import semantic_evaluation
import semantic_synthesis
from imagelab.boxes import Box
from imagelab.errors import UserError

PROMPT = "a photo of <asset0> and <asset1>"
BOXES = [[0.0, 0.25, 0.5, 0.75], [0.5, 0.25, 1.0, 0.75]]
QUICK = {"num_inference_steps": 1, "guidance_steps": 0, "refine_every": 0, "device": "cpu"}
OPTIONS = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    "options",
    [
        ["--boxes", "[[0,0.25,0.5,0.5], [0.5,0.25,0.5000001,0.5]]", "--box_format", "xywh"],
        ["--boxes", '[{"bbox":[0,0.25,0.5,0.5]}, {"x":0.5,"y":0.25,"width":0.5,"height":0.5}]',
         "--box_format", "xywh"],
        ["--boxes", '[{"bbox_2d":[0,32,64,"96px"]}, [0.5,0.25,1.0000001,0.75]]',
         "--width", "128", "--height", "128"],
        ["--box", "<asset1>=64,32,64,64px", "--box", "<asset0>=0,0.25,0.5,0.5",
         "--box_format", "xywh", "--width", "128", "--height", "128"],
        ["--box", "<asset0>=0.25 0.5 0.5 0.5", "--box", "<asset1>=0.75 0.5 0.5 0.5",
         "--box_format", "cxcywh"],
        ["--box", '<asset0>={"xmin":0,"ymin":0.25,"xmax":0.5,"ymax":0.75}',
         "--box", '<asset1>={"x":0.5,"y":0.25,"width":0.5,"height":0.5}'],
    ],
)  # fmt: skip
def test_painting(options, learned_dir, tmp_path):
    where = ["--models_dir", str(learned_dir), "--model_id", "toys", "--output_path", str(tmp_path)]
    semantic_synthesis.main([*where, *OPTIONS, "--seed", "1", "--prompt", PROMPT, *options])
    facts = json.loads((tmp_path / "toys/0000.json").read_text())
    assert facts["subjects"] == ["<asset0>", "<asset1>"] and facts["boxes"] == BOXES


def test_measuring(learned_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mifo.evaluation.choose_spaces", lambda *_: [])
    monkeypatch.setattr("mifo.evaluation.evaluate", lambda cases, *_: seen.append(cases[0].boxes))
    monkeypatch.setattr("imagelab.evaluation.report.write_report", lambda *_: "")
    where = ["--models_dir", str(learned_dir), "--model_id", "toys", "--output_path", str(tmp_path)]
    boxes = "[[0,0.25,0.5,0.5], [0.5,0.25,0.5,0.5]]"
    semantic_evaluation.main([*where, "--boxes", boxes, "--box_format", "xywh", "--device", "cpu"])
    assert seen == [tuple(Box(*box) for box in BOXES)]


def test_from_python(learned_dir):
    toys = mifo.load("toys", learned_dir)
    named = {
        "<asset0>": {"x": 0, "y": 0.25, "width": 0.5, "height": 0.5},
        "<asset1>": [{"bbox": (0.5, 0.25, 0.5, 0.5)}],
    }
    listed = [(0, 0.25, 0.5, 0.5), "50%,25%,50%,50%"]
    for boxes in (named, listed):
        (picture,) = toys.paint(PROMPT, boxes, box_format="xywh", seed=1, **QUICK)
        assert [list(box) for box in picture.boxes] == BOXES
    (picture,) = toys.paint("<asset0>", [{"bbox_2d": [0, 0.25, 0.5, 0.75]}], seed=1, **QUICK)
    assert [list(box) for box in picture.boxes] == BOXES[:1]
    with pytest.raises(UserError, match="the names x, y, width, height, which say left, top, wid"):
        toys.paint(PROMPT, named, box_format="corners", seed=1, **QUICK)
    with pytest.raises(UserError, match="beyond its right edge .* or give --box_format xywh"):
        toys.paint("<asset0>", [(0.6, 0.2, 0.3, 0.4)], seed=1, **QUICK)
