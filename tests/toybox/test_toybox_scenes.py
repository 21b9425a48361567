"""The renderer: exact disjoint masks, true captions, repeatable pictures, the wanted hues."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from toybox.scenes.scenes import GROUNDS, Placement, Scene, caption, draw_scene, render
from toybox.scenes.toys import HUES, KINDS, Look, toy


def scene_of(seed: int, count: int | None = None) -> Scene:
    return draw_scene(np.random.default_rng(seed), count)


def coverage(scene: Scene, index: int, size: int) -> np.ndarray:
    """Share of each pixel that one toy covers, [h, w]: how little black and white grounds show."""
    alone = replace(scene, toys=(scene.toys[index],), ground=None)
    black, white = (
        np.asarray(render(replace(alone, colour=(v, v, v)), size)[0], dtype=np.int64)
        for v in (0, 255)
    )
    return 1 - (white - black).mean(axis=-1) / 255


@pytest.mark.parametrize("seed", range(6))
def test_masks_are_where_a_toy_covers_half_of_a_pixel(seed):
    scene = scene_of(seed, 1 + seed % 3)
    picture, masks = render(scene, 96)
    covers = np.stack([coverage(scene, i, 96) for i in range(len(scene.toys))])
    for index, mask in enumerate(masks):
        in_front = (covers[index + 1 :] > 0.5).any(axis=0)
        np.testing.assert_array_equal(mask, (covers[index] > 0.5) & ~in_front)
    bare, none = render(replace(scene, toys=()), 96)
    assert none.shape == (0, 96, 96)
    differs = (np.asarray(picture) != np.asarray(bare)).any(axis=-1)
    assert not differs[(covers < 0.002).all(axis=0)].any()
    assert differs[masks.any(axis=0)].mean() > 0.99


def test_a_toy_in_front_takes_its_pixels_from_the_one_behind():
    back, front = (
        Placement(Look(kind, 0), x, 0.5, 0.6) for kind, x in (("truck", 0.4), ("balloon", 0.6))
    )
    scene = Scene((back, front), None, (200, 200, 200), 0)
    _, masks = render(scene, 64)
    _, alone = render(replace(scene, toys=(back,)), 64)
    np.testing.assert_array_equal(masks[0], alone[0] & ~masks[1])
    assert masks[0].sum() < alone[0].sum()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_drawn_toys_all_show_and_masks_are_disjoint(count):
    for seed in range(20):
        _, masks = render(scene_of(seed, count), 64)
        assert masks.shape == (count, 64, 64)
        assert masks.sum(axis=0).max() == 1
        assert all(mask.sum() > 30 for mask in masks)


def tell_apart(text: str) -> tuple[list[tuple[str | None, str]], str | None]:
    """A caption's (colour, kind) pairs and ground, read with no help from the scene."""
    text = text.removeprefix("a photo of ")
    ground = next((phrase for phrase in GROUNDS if text.endswith(" " + phrase)), None)
    named = []
    for part in text.removesuffix(f" {ground}").split(" and "):
        article, *words = part.split()
        assert article == ("an" if words[0][0] in "aeiou" else "a")
        colour = words.pop(0) if words[0] in HUES else None
        named.append((colour, "_".join(words)))
    return named, ground


def test_every_word_of_a_caption_is_true():
    for seed in range(400):
        scene = scene_of(seed)
        worded = caption(scene, np.random.default_rng(seed))
        named, ground = tell_apart(worded.text)
        assert sorted(worded.toys) == list(range(len(scene.toys)))
        for (colour, kind), index in zip(named, worded.toys, strict=True):
            look = scene.toys[index].look
            assert kind == look.kind
            assert colour is None or HUES[colour] == look.hue
        assert ground is None or ground == scene.ground
        words = worded.text.split()
        for index, noun in zip(worded.toys, worded.nouns, strict=True):
            assert words[noun] == scene.toys[index].look.kind.split("_")[-1]


def test_bare_captions_leave_out_every_article_and_nothing_else():
    for seed in range(100):
        scene = scene_of(seed)
        worded = caption(scene, np.random.default_rng(seed), bare=1.0)
        words = worded.text.removeprefix("a photo of ").removesuffix(" on a wooden table").split()
        assert not {"a", "an"} & set(words)
        for index, noun in zip(worded.toys, worded.nouns, strict=True):
            assert worded.text.split()[noun] == scene.toys[index].look.kind.split("_")[-1]
    rng = np.random.default_rng(0)
    texts = [caption(scene_of(0, 1), rng, bare=0.25).text for _ in range(2000)]
    bare = [not {"a", "an"} & set(text.removeprefix("a photo of ").split()) for text in texts]
    assert np.mean(bare) == pytest.approx(1 / 4, abs=0.03)


def test_what_captions_leave_out_and_scenes_repeat():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(3000)]
    worded = [caption(scene, rng).text for scene in scenes]
    read = [tell_apart(text) for text in worded]
    several = [[toy.look.kind for toy in s.toys] for s in scenes if len(s.toys) > 1]
    assert np.mean([named[0][0] is None for named, _ in read]) == pytest.approx(1 / 3, abs=0.03)
    assert np.mean([ground is not None for _, ground in read]) == pytest.approx(1 / 4, abs=0.03)
    assert np.mean([t.startswith("a photo of") for t in worded]) == pytest.approx(1 / 3, abs=0.03)
    assert np.mean([len(set(kinds)) == 1 for kinds in several]) == pytest.approx(1 / 4, abs=0.04)
    assert all(len(set(kinds)) in (1, len(kinds)) for kinds in several)


@pytest.mark.parametrize(
    ("odds", "shares"), [((5, 3, 2), (0.5, 0.3, 0.2)), ((1, 3, 0), (0.25, 0.75, 0))]
)
def test_how_many_toys_follows_the_odds(odds, shares):
    rng = np.random.default_rng(0)
    counts = np.bincount([len(draw_scene(rng, odds=odds).toys) for _ in range(2000)], minlength=4)
    assert counts[1:] / 2000 == pytest.approx(shares, abs=0.03)


def test_a_hue_between_the_named_ones_is_not_named():
    scene = replace(scene_of(0, 1), ground=None)
    scene = replace(scene, toys=(replace(scene.toys[0], look=Look("car", 200)),))
    texts = {caption(scene, np.random.default_rng(seed)).text for seed in range(30)}
    assert texts == {"a car", "a photo of a car"}


def test_the_same_seed_gives_the_same_bytes():
    for seed in range(5):
        (first, masks), (second, again) = (render(scene_of(seed), 64) for _ in range(2))
        assert first.tobytes() == second.tobytes()
        assert masks.tobytes() == again.tobytes()
    assert render(scene_of(0), 64)[0].tobytes() != render(scene_of(1), 64)[0].tobytes()


@pytest.mark.parametrize(("width", "height"), [(48, 48), (160, 160), (120, 80)])
def test_a_scene_renders_alike_at_any_size(width, height):
    scene = scene_of(4, 2)
    picture, masks = render(scene, width, height)
    assert picture.size == (width, height)
    assert picture.mode == "RGB"
    for placed, mask in zip(scene.toys, masks, strict=True):
        rows, columns = np.nonzero(mask)
        side = placed.size * min(width, height)
        assert abs((columns.min() + columns.max() + 1) / 2 - placed.x * width) < 0.15 * side + 1
        assert abs((rows.min() + rows.max() + 1) / 2 - placed.y * height) < 0.15 * side + 1
        assert 0.7 * side < max(np.ptp(rows), np.ptp(columns)) + 1 <= side + 1


def mean_hue(picture: Image.Image) -> float:
    """The mean hue in degrees, colourful pixels counting most."""
    alpha = np.asarray(picture.getchannel("A")) > 127
    hsv = np.asarray(picture.convert("RGB").convert("HSV"), dtype=np.float64)[alpha] / 255
    vectors = hsv[:, 1] * hsv[:, 2] * np.exp(2j * np.pi * hsv[:, 0])
    return float(np.rad2deg(np.angle(vectors.sum())))


#: Degrees by which the mean may lie off the commonest hue; a frog's hues spread most.
OFF = dict.fromkeys(KINDS, 13) | {"frog": 24}


@pytest.mark.parametrize("kind", KINDS)
def test_recolouring_puts_the_hues_around_the_wanted_angle(kind):
    for wanted in (0, 52, 199, 275):
        found = mean_hue(toy(Look(kind, wanted)).convert("RGBA"))
        assert abs((found - wanted + 180) % 360 - 180) < OFF[kind]


def test_gains_make_a_toy_paler_and_darker():
    def mean(look, channel):
        return np.asarray(toy(look).convert("RGBA").convert("RGB").convert("HSV"))[
            ..., channel
        ].mean()

    look = Look("car", 199)
    assert mean(replace(look, saturation=0.6), 1) < 0.8 * mean(look, 1)
    assert mean(replace(look, value=0.6), 2) < 0.8 * mean(look, 2)


def test_an_unknown_kind_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="kind 'unicorn'; choose one of balloon"):
        toy(Look("unicorn", 0))
