"""The table and the sheets of a comparison, worked by hand."""

import numpy as np
import pytest
from PIL import Image
from test_tables import T1, T2, found, row

from experiments.comparison.report import difference, loss_sheet, table, write_comparison
from experiments.comparison.settings import Variant
from experiments.tables import other_there, right_boxes
from imagelab.evaluation.report import Mean

BASE = "models/big"
MIFO, NONE, REWARD = (Variant(BASE, "random", loss) for loss in ("mifo", "none", "reward"))
SEPARATIONS = {("mifo", "a"): [0.75, 0.5]}  # by loss and folder; 1 elsewhere


def about(loss, folder, task):
    """What a row says of its variant."""
    separation = SEPARATIONS.get((loss, folder), [1.0, 1.0])
    way = {"way": f"big-random-{loss}", "base": "big", "tokens": "random", "loss": loss}
    return way | {"folder": folder, "task": task, "separation": separation}


def boxed(loss, folder, *pictures, **more):
    return row(*pictures, there=[], **about(loss, folder, "boxed"), **more)


def unboxed(loss, folder, *there, task="unboxed", assets=(0, 1)):
    return found(*there, assets=assets, **about(loss, folder, task))


ROWS = [
    boxed("mifo", "a", "rr", "rh"),  # 3/4 right
    unboxed("mifo", "a", "xx", "x."),  # 3/4 there
    unboxed("mifo", "a", "xx", task="alone 0", assets=(0,)),  # there, with another
    unboxed("mifo", "a", ".x", task="alone 1", assets=(1,)),  # there, alone
    boxed("mifo", "b", "rr"),  # all right
    unboxed("mifo", "b", ".."),  # nobody
    unboxed("mifo", "b", "x.", task="alone 0", assets=(0,)),  # there, alone
    boxed("none", "a", "rk", "hh"),  # 1/4 right
    boxed("none", "b", "rh"),  # 1/2 right
    boxed("none", "c", "hh"),  # none right, of a folder that MIFO has not
]


def of(loss):
    return [each for each in ROWS if each["loss"] == loss and each["task"] == "boxed"]


def test_difference_is_by_folder():
    assert difference(of("none"), of("mifo"), right_boxes) == Mean(-0.5, 0.0)  # −1/2 in a, in b
    assert difference(of("mifo"), of("none"), right_boxes) == Mean(0.5, 0.0)
    assert difference(of("none")[2:], of("mifo"), right_boxes) is None
    three_and_one = [unboxed("x", "a", "xx", "xx", "xx", ".."), unboxed("x", "b", "..")]
    half = [unboxed("y", "b", "..", "xx"), unboxed("y", "a", "..")]
    three_and_one = [{**each, "assets": [0]} for each in three_and_one]
    half = [{**each, "assets": [0]} for each in half]
    mean, width = difference(three_and_one, half, other_there)  # 3/4 − 0 and 0 − 1/2
    assert (mean, width) == (0.125, pytest.approx(T1 * 0.625))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_table():
    head, _, *lines = table([MIFO, REWARD, NONE], ROWS).splitlines()
    assert len(lines) == 2  # reward has no rows
    first, second = (dict(zip(cells(head), cells(line), strict=True)) for line in lines)
    assert first == {
        "base": "big",
        "tokens": "random",
        "loss": "MIFO: reward, then penalty",
        "folders": "2",
        "boxes right": f"0.875 ± {T1 * 0.125:.3f}",  # 3/4 and 1
        "less mifo's": "–",
        "without boxes: there": f"0.375 ± {T1 * 0.375:.3f}",  # 3/4 and 0
        "alone: there": "1.000 ± 0.000",
        "alone: another there": f"0.250 ± {T1 * 0.25:.3f}",  # 1/2 and 0
        "attention on the own instance": f"0.812 ± {T1 * 0.1875:.3f}",  # 5/8 and 1
    }
    assert second["loss"] == "no attention loss"
    assert second["folders"] == "3"
    assert second["boxes right"] == f"0.250 ± {T2 * 0.25 / 3**0.5:.3f}"  # 1/4, 1/2, 0
    assert second["less mifo's"] == "-0.500 ± 0.000"
    assert second["without boxes: there"] == second["alone: there"] == "–"


def test_differences_are_from_the_same_base_and_tokens():
    kind = [{**each, "tokens": "kind", "way": "big-kind-none"} for each in of("none")]
    ours = [{**each, "tokens": "kind", "way": "big-kind-mifo"} for each in of("mifo")[:1]]
    _, _, line = table([Variant(BASE, "kind", "none")], [*of("mifo"), *kind]).splitlines()
    assert cells(line)[4:6] == [f"0.250 ± {T2 * 0.25 / 3**0.5:.3f}", "–"]
    _, _, line = table([Variant(BASE, "kind", "none")], [*of("mifo"), *kind, *ours]).splitlines()
    assert cells(line)[5] == "-0.500"  # of one folder, without an interval


# ----------------------------------------------------------------------------------------------
# what is written


@pytest.fixture
def painted(tmp_path):
    """Two folders whose photos and first pictures have a colour each; their rows."""
    rows = []
    for folder, photo in (("a", "blue"), ("b", "yellow")):
        (tmp_path / "folders" / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64), photo).save(tmp_path / "folders" / folder / "img.jpg")
        for loss, ground in (("mifo", "green"), ("none", "black")):
            for task in ("unboxed", "boxed"):
                place = tmp_path / "pictures" / f"big-random-{loss}" / folder / task
                place.mkdir(parents=True)
                for number in range(2):
                    colour = ground if (task, number) == ("boxed", 0) else "purple"
                    Image.new("RGB", (48, 48), colour).save(place / f"{number:02d}.png")
            names = ["boxed/00.png", "boxed/01.png"]
            pictures = ("rr", "hh") if loss == "mifo" else ("rh", "hh")
            boxes = [[0.0, 0.0, 0.25, 0.25], [0.75, 0.75, 1.0, 1.0]]
            rows.append(boxed(loss, folder, *pictures, boxes=boxes, pictures=names))
            others = {"boxes": [], "pictures": ["unboxed/00.png", "unboxed/01.png"]}
            rows.append(unboxed(loss, folder, "xx", "xx") | others)
    return tmp_path, rows


def test_sheet_has_the_photo_and_the_first_boxed_picture_of_each_loss(painted):
    work, rows = painted
    drawn = np.asarray(loss_sheet(rows, work)).astype(int)
    assert drawn.shape[1] == 3 * (144 + 4) - 4
    tall = (drawn.shape[0] + 4) // 2
    names = {"blue": (0, 0, 255), "yellow": (255, 255, 0), "green": (0, 128, 0), "black": (0, 0, 0)}
    for line, colours in enumerate((("blue", "green", "black"), ("yellow", "green", "black"))):
        for column, colour in enumerate(colours):
            middle = drawn[72 + line * tall, 72 + 148 * column]
            np.testing.assert_allclose(middle, names[colour], atol=3)
    below = drawn[144 : tall - 4]  # the captions of the first line, on white
    is_red = (below[..., 0] > 200) & (below[..., 1] < 100)
    assert is_red[:, 2 * 148 :].any()  # one of none's boxes is wrong
    assert not is_red[:, : 2 * 148].any()


def test_what_is_written(painted):
    work, rows = painted
    kind = Variant(BASE, "kind", "mifo")
    text = write_comparison([MIFO, NONE, kind], rows, work, {"big-kind-mifo, a": "no disk."})
    assert text.splitlines()[-1] == "big-kind-mifo, a failed: no disk."
    assert (work / "comparison.md").read_text() == text + "\n"
    assert [path.name for path in work.glob("*.jpg")] == ["sheet_big_random.jpg"]
    with Image.open(work / "sheet_big_random.jpg") as sheet:
        assert sheet.width == 3 * 148 - 4


def test_nothing_but_failures_is_told(tmp_path):
    text = write_comparison([MIFO], [], tmp_path, {"big-random-mifo, a": "no disk."})
    head, rule, _, failed = text.splitlines()
    assert failed == "big-random-mifo, a failed: no disk."
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.md"]
