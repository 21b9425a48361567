"""Figures show what they are given: curves, marks, masks and maps."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from imagelab.figures import plot_attention, plot_losses

NAN = float("nan")


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_losses(drawn, tmp_path):
    curves = {"loss": [4.0, 3.0, 2.0, 1.0] * 2, "signed": [-1.0, NAN] * 4, "none": [NAN] * 8}
    plot_losses(tmp_path / "a.png", curves, {"stage 1 → 2": 5, "reward → penalty": 2})
    (figure,) = drawn
    loss, signed = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["loss", "signed"]
    assert figure.get_suptitle() == "solid: stage 1 → 2; dotted: reward → penalty"
    dots, mean, solid, dotted = loss.lines
    assert dots.get_ydata().tolist() == curves["loss"]
    assert (mean.get_xdata()[0], mean.get_ydata()[0]) == (1, 3.5)  # of two steps
    assert [line.get_xdata()[0] for line in (solid, dotted)] == [5, 2]
    assert [line.get_linestyle() for line in (solid, dotted)] == ["-", ":"]
    assert (loss.get_yscale(), signed.get_yscale()) == ("log", "linear")
    assert signed.lines[0].get_xdata().tolist() == [0, 2, 4, 6]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"


def test_losses_without_marks_into_memory(drawn):
    file = io.BytesIO()
    plot_losses(file, {"loss": [1.0]})
    assert Image.open(file).format == "PNG" and drawn[0].get_suptitle() == ""


def test_attention(drawn, tmp_path):
    image = np.full((4, 6, 3), 100, np.uint8)
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :, :3] = masks[1, :, 3:] = True
    maps = np.random.default_rng(0).random((2, 4, 6))
    plot_attention(tmp_path / "a.png", image, masks, maps, [("a", "b"), ("c", "d")])
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["a", "b", "c", "d"]
    shown = panels[2].images[0].get_array()
    assert np.allclose(shown[0, 0], 0.6 * 100 / 255 + 0.3)  # outside its mask: faded grey
    assert np.allclose(shown[0, 5], 0.45 * 100 / 255 + 0.55 * np.array([86, 180, 233]) / 255)
    assert np.array_equal(panels[3].images[1].get_array(), maps[1])
