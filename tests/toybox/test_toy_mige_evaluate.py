"""The evaluation of toy MIGEs: what is painted, kept, measured and written; and the command."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mige.config import Guidance, PaintingConfig
from mige.method.wording import MARK
from toybox.mige import judge
from toybox.mige.architecture import (
    ToyMigeConfig,
    build_parts,
    build_pipeline,
    build_tokenizer,
    load_vae,
    save,
)
from toybox.mige.evaluate import main
from toybox.mige.evaluation import items, painters, running
from toybox.mige.evaluation.items import ROWS, draw_item, draw_items
from toybox.mige.evaluation.painters import MigePainter, request_of, stand_ins
from toybox.mige.evaluation.report import share_of, summarise, wilson, write_report
from toybox.mige.evaluation.running import Findings, evaluate, key_of
from toybox.scenes.triplets import OPS, SIDE
from toybox.scenes.wording import TASKS

ROW = "edit-recolour"


class FakePainter(MigePainter):
    """Paints targets; where ``wrong`` says an index, the unchanged source."""

    def __init__(self, wrong=(), digest="d", **settings):
        pipeline = SimpleNamespace(
            transformer=SimpleNamespace(dtype="torch.float32"),
            guidance=lambda task: Guidance(9, 1.5 + len(task)),
        )
        settings = {"seed": 0, "steps": 20, "batch_size": 3} | settings
        super().__init__(pipeline, digest, PaintingConfig.from_settings(**settings), "fake")
        self.wrong, self.painted, self.batches = wrong, [], []

    def paint(self, items):
        self.painted += [(item.row, item.index) for item in items]
        self.batches.append(len(items))
        return [
            painters.source_of(item) if item.index in self.wrong else item.triplet.target
            for item in items
        ]

    def restore(self, pictures):
        """Ten levels brighter or, near white, darker."""
        return [Image.fromarray(_shifted(np.asarray(picture))) for picture in pictures]


def _shifted(pixels: np.ndarray) -> np.ndarray:
    return np.where(pixels < 240, pixels + 10, pixels - 10).astype(np.uint8)


def run(painter, output: Path, rows=(ROW,), items=4, calibration=0) -> Findings:
    return evaluate(painter, rows, items, calibration, painter.config.seed, output)


# ----------------------------------------------------------------------------------------------
# items


def test_rows_are_all_ops_but_the_longest():
    asked = {(row.task, row.op) for row in ROWS.values()}
    assert asked == {(task, op) for task in TASKS for op in OPS[task]} - {("subject", "two_word")}


def test_items_are_held_out_and_every_second_edit_has_no_mark(monkeypatch):
    drawn, draw = [], items.draw_triplet
    monkeypatch.setattr(items, "draw_triplet", lambda *asked: drawn.append(asked) or draw(*asked))
    first, second = (draw_item(5, "edit-add", index) for index in (0, 1))
    assert drawn == [(5, "test", 0, "edit", "add"), (5, "test", 1, "edit", "add")]
    assert (first.wording, first.text) == ("mark", first.triplet.prompt)
    assert (second.wording, second.text) == ("plain", second.triplet.plain)
    assert MARK not in second.text
    assert request_of(second).instruction == f"{second.triplet.plain} in{MARK}"
    subject = draw_item(5, "subject-edit-add", 1)
    assert (subject.wording, subject.text) == (None, subject.triplet.prompt)
    batches = draw_items(5, "edit-add", [0, 2, 3], 2)
    assert [[item.index for item in batch] for batch in batches] == [[0, 2], [3]]


@pytest.mark.parametrize(
    ("row", "sources"),
    [
        ("subject-two", {None}), ("edit-move", {0}), ("subject-edit-add", {0, 1}),
        ("subject-edit-replace", {0, 1}),
    ],
)  # fmt: skip
def test_requests_have_the_pictures_in_the_order_of_their_marks(row, sources):
    found = set()
    for index in range(8):
        item = draw_item(0, row, index)
        request = request_of(item)
        assert request.task == ROWS[row].task
        assert request.pictures == item.triplet.entities
        assert request.source == item.triplet.source
        assert request.name == f"{row}/{index}"
        found.add(request.source)
    assert found == sources


# ----------------------------------------------------------------------------------------------
# running


def test_each_item_is_painted_once_and_measured(tmp_path):
    painter = FakePainter(wrong=(2,))
    found = run(painter, tmp_path).rows[ROW]
    assert painter.painted == [(ROW, index) for index in range(4)]
    assert painter.batches == [3, 1]
    assert [record["index"] for record in found] == [0, 1, 2, 3]
    assert [record["checks"]["right"] for record in found] == [True, True, False, True]
    assert [record["l1"] for record in found] == [0, 0, 0, 0]  # a source differs inside alone
    assert [record["autoencoder_l1"] for record in found] == pytest.approx([10 / 255] * 4)
    for record in found:
        item = draw_item(0, ROW, record["index"])
        with Image.open(tmp_path / "pictures" / record["picture"]) as picture:
            wanted = painters.source_of(item) if item.index == 2 else item.triplet.target
            assert picture.tobytes() == wanted.tobytes()


def test_a_stopped_run_goes_on_and_more_items_are_added(tmp_path):
    class Stopped(FakePainter):
        def paint(self, items):
            if self.painted:
                raise KeyboardInterrupt
            return super().paint(items)

    with pytest.raises(KeyboardInterrupt):
        run(Stopped(), tmp_path)
    painter = FakePainter()
    run(painter, tmp_path, items=5)
    assert painter.painted == [(ROW, 3), (ROW, 4)]
    again = FakePainter()
    assert len(run(again, tmp_path, items=4).rows[ROW]) == 4
    assert again.painted == []


def test_another_judge_judges_what_was_painted_and_damaged_pictures_are_painted_anew(
    tmp_path, monkeypatch
):
    first = run(FakePainter(), tmp_path).rows[ROW]
    monkeypatch.setattr(judge, "VERSION", judge.VERSION + 1)
    (tmp_path / "pictures" / first[1]["picture"]).write_bytes(b"no picture")
    painter = FakePainter()
    second = run(painter, tmp_path).rows[ROW]
    assert painter.painted == [(ROW, 1)]
    assert {one["key"] for one in first}.isdisjoint(one["key"] for one in second)
    assert [one["picture"] for one in first] == [one["picture"] for one in second]


def test_a_picture_that_was_removed_is_painted_again(tmp_path):
    first = run(FakePainter(), tmp_path, calibration=1)
    (tmp_path / "pictures" / first.rows[ROW][2]["picture"]).unlink()
    painter = FakePainter()
    second = run(painter, tmp_path, calibration=1)
    assert painter.painted == [(ROW, 2)]
    assert second.rows == first.rows
    assert (tmp_path / "pictures" / second.rows[ROW][2]["picture"]).is_file()
    again = FakePainter()
    run(again, tmp_path)
    assert again.painted == []


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "e"}, {"seed": 1}, {"steps": 21}, {"text_scale": 3.0}, {"image_scale": 2.0},
    ],
)  # fmt: skip
def test_a_key_is_of_all_that_a_picture_depends_on(other):
    def key(row=ROW, index=3, **settings):
        painter = FakePainter(**settings)
        return key_of(painter, row, index, painter.config.seed)

    assert key() == key(batch_size=7)
    assert len({key(), key(**other), key(index=4), key(row="edit-add")}) == 4


def test_stand_ins_try_the_judge(tmp_path):
    rows = ("subject-one", ROW)
    found = run(FakePainter(), tmp_path, rows, items=2, calibration=3)
    assert {who.name: list(each) for who, each in found.trials.items()} == {
        "restored": list(rows), "other": list(rows), "source": [ROW], "blur": list(rows),
        "source-blur": [ROW],
    }  # fmt: skip
    for who, several in found.trials.items():
        for records in several.values():
            assert len(records) == 2  # no more than items
            assert all("l1" not in record for record in records)
            is_right = who.name == "restored"
            assert [record["checks"]["right"] for record in records] == [is_right] * 2
    by_name = {who.name: who for who in stand_ins(FakePainter(), 0)}
    item = draw_item(0, ROW, 4)
    (other,) = by_name["other"].paint([item])
    assert other.tobytes() == draw_item(0, ROW, 5).triplet.target.tobytes()
    assert by_name["source"].paint([item])[0].tobytes() == painters.source_of(item).tobytes()


# ----------------------------------------------------------------------------------------------
# the report


def test_wilsons_interval_by_hand():
    """Of 3 in 4, z = 1.96: (.75 + .48 ± sqrt(.18 + .2306)) / 1.9604."""
    assert wilson(3, 4) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_shares_are_of_the_items_that_have_the_check():
    records = [{"checks": {"right": True}}, {"checks": {"right": False, "ground": True}}]
    assert share_of(records, "right")["share"] == 0.5
    assert share_of(records, "ground") == {
        "share": 1, "low": wilson(1, 1)[0], "high": 1, "n": 1,
    }  # fmt: skip
    assert share_of(records, "hue") is None
    # Student's interval of .1 and .3: 12.7062 * .1
    records = [{"checks": {}, "l1": 0.1}, {"checks": {}, "l1": 0.3}]
    assert summarise(records) == {"n": 2, "l1": pytest.approx({"mean": 0.2, "half": 1.27062})}


def record(right: bool, wording: str | None, l1: float | None = None, index: int = 0) -> dict:
    found = {"index": index, "wording": wording, "checks": {"right": right}, "picture": "a.png"}
    return found if l1 is None else found | {"l1": l1, "autoencoder_l1": 0.01}


def test_the_report_has_every_row_and_those_over_several(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "pictures" / "a.png")
    rows = {
        "subject-one": [record(True, None)],
        "edit-add": [record(True, "mark", 0.02), record(False, "plain", 0.04, 1)],
        "edit-move": [record(True, "mark", 0.06)],
        "subject-edit-add": [record(False, None, 0.5)],
    }
    (trial, *_) = stand_ins(FakePainter(), 0)
    found = Findings(rows, {trial: {"edit-add": [record(True, "mark")]}})
    text = write_report(found, FakePainter().settings, tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text + "\n"
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert list(lines)[2:9] == [
        "subject, one reference", "edit: add", "edit: move", "subject edit: add", "all edits",
        "all edits, with the mark", "all edits, without a mark",
    ]  # fmt: skip
    together = [cell.strip() for cell in lines["all edits"].split("|")[1:-1]]
    assert together[1:4] == ["3", "right ≥ 80%, L1 ≤ 0.03", "66.7% (20.8% to 93.9%)"]
    assert together[4:] == ["0.0400 ± 0.0497", "0.0100 ± 0.0000"]
    aims = {title: line.split("|")[3].strip() for title, line in lines.items()}
    for title in ("edit: move", "all edits, with the mark", "all edits, without a mark"):
        assert aims[title] == "right ≥ 80%"  # of a row, the autoencoder alone may be above .03
    assert aims["subject edit: add"] == "right ≥ 75%"
    assert "100.0% (34.2% to 100.0%)" in lines["all edits, with the mark"]
    assert "0.0% (0.0% to 79.3%) | 0.0400 | 0.0100" in lines["all edits, without a mark"]
    assert text.splitlines()[-1] == "| edit: add | 100.0% (20.7% to 100.0%) |"
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["rows"]["all edits"]["right"]["n"] == 3
    assert facts["rows"]["all edits"]["l1"]["mean"] == pytest.approx(0.04)
    assert facts["rows"]["all edits"]["aims"] == {"right": 0.8, "l1": 0.03}
    assert facts["rows"]["edit: move"]["aims"] == {"right": 0.8}
    assert facts["calibration"][trial.title]["edit: add"]["share"] == 1
    assert facts["items"]["edit-move"] == rows["edit-move"]
    assert facts["settings"]["guidance"]["edit"] == {
        "steps": 20, "text_scale": 5.5, "image_scale": 1.0,  # given, and the model's
    }  # fmt: skip


def test_wrong_pictures_of_a_sheet_are_told_in_red(tmp_path, monkeypatch):
    from toybox.mige.evaluation import report

    tiles = []
    draw = report.contact_sheet
    monkeypatch.setattr(
        report, "contact_sheet", lambda *asked: tiles.extend(asked[0]) or draw(*asked)
    )
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.png")
    wrong = record(False, None)
    wrong["checks"]["kind"] = False
    report.sheet("subject-edit-add", [wrong, record(True, None, index=1)], 0, tmp_path)
    for index, colour in ((0, "red"), (1, "black")):
        item = draw_item(0, "subject-edit-add", index)
        line = tiles[4 * index : 4 * index + 4]
        pictures = [*item.triplet.entities, item.triplet.target]
        assert [tile.picture.tobytes() for tile in line[:3]] == [p.tobytes() for p in pictures]
        assert line[item.triplet.source].caption == "source"
        assert line[2].caption == "target"
        assert line[3].picture == tmp_path / "a.png"
        assert line[3].colour == colour
        assert line[3].caption.startswith("[kind] ") == (index == 0)


# ----------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A toy MIGE of a few layers that has learned nothing."""
    config = ToyMigeConfig(width=32, blocks=1, text_layers=1, vision_layers=1, query_layers=2)
    vae, tokenizer = load_vae(), build_tokenizer()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(build_pipeline(build_parts(config, vae, tokenizer, 0), vae, tokenizer, 2), folder)
    return folder


def argv(model: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model", str(model), "--output", str(output), "--device", "cpu", "--items", "3",
        "--steps", "1", "--calibration", "1", "--only", "subject-two", "edit-ground", *more,
    ]  # fmt: skip


def test_the_command_paints_judges_and_reports(model, tmp_path, capsys, monkeypatch):
    main(argv(model, tmp_path / "report", "--batch_size", "2"))
    text = capsys.readouterr().out
    assert text == (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(facts["items"]) == {"subject-two", "edit-ground"}
    restored = facts["calibration"]["targets through the autoencoder"]
    assert [each["share"] for each in restored.values()] == [1, 1]
    for row in facts["items"].values():
        assert [each["checks"]["right"] for each in row] == [False] * 3  # it paints noise
    edits = facts["items"]["edit-ground"]
    assert [each["wording"] for each in edits] == ["mark", "plain", "mark"]
    assert all(0 < each["autoencoder_l1"] < 0.1 < each["l1"] for each in edits)
    pictures = {p: p.stat().st_mtime_ns for p in (tmp_path / "report" / "pictures").rglob("*.png")}
    assert len(pictures) == 6
    sheets = {path.name for path in (tmp_path / "report").glob("sheet-*.png")}
    assert sheets == {"sheet-subject-two.png", "sheet-edit-ground.png"}
    monkeypatch.setattr(running, "measure", None)  # nothing is measured again
    main(argv(model, tmp_path / "report", "--batch_size", "3"))
    assert capsys.readouterr().out == text
    assert {path: path.stat().st_mtime_ns for path in pictures} == pictures


def test_the_model_is_asked_with_the_items_own_guidance_and_noise(model):
    from mige.pipeline import MigePipeline

    config = PaintingConfig.from_settings(seed=7, steps=1, text_scale=2.0)
    pipeline = MigePipeline.from_pretrained(model)
    painter = MigePainter(pipeline, "d", config)
    several = [draw_item(7, "subject-edit-add", index) for index in (0, 1)]
    together = painter.paint(several)
    for item, picture in zip(several, together, strict=True):
        request = request_of(item)
        condition = pipeline.encode(request, 7)
        (alone,) = pipeline.paint([(request, condition, 7)], painter.guidance("subject_edit"))
        away = np.abs(np.asarray(picture, int) - np.asarray(alone, int))
        assert away.max() <= 2
    assert painter.guidance("subject_edit").text_scale == 2
    restored = painter.restore([several[0].triplet.target])
    assert judge.l1(restored[0], several[0].triplet.target) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "edit-paint"], "there is no row 'edit-paint'; give some of subject-one, "),
        (["--items", "0"], "--items is 0; give a whole number from 1 to 100000"),
        (["--steps", "0"], "--steps is 0; give a whole number from 1 to 1000"),
        (["--calibration", "-1"], "--calibration is -1; give a whole number from 0"),
        (["--text_scale", "nan"], "--text_scale is nan; give a number from 0"),
        (["--batch_size", "0"], "--batch_size is 0; give a whole number from 1"),
        (["--seed", "-1"], "the seed is -1; give a whole number from 0"),
        (["--device", "tpu"], "--device tpu is not available here"),
    ],
)
def test_options_that_make_no_sense(model, tmp_path, fails, options, message):
    told = fails(main, argv(model, tmp_path / "report", *options))
    assert message in told.err
    assert not (tmp_path / "report").exists()


def test_models_that_cannot_paint_the_items(model, tmp_path, fails, monkeypatch):
    assert "there is no" in fails(main, argv(tmp_path / "none", tmp_path / "out")).err
    monkeypatch.setattr(painters, "SIDE", 64)
    told = fails(main, argv(model, tmp_path / "out"))
    assert "paints 128 x 128 pixels, and the items have 64 x 64; give a toy MIGE" in told.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_records(model, tmp_path, fails):
    (tmp_path / "records.jsonl").write_text("what a day\n")
    told = fails(main, argv(model, tmp_path))
    assert "no record of an evaluation; move it away or give another --output" in told.err
