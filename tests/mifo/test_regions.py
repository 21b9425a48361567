"""Masks and refined regions on grids small enough to work by hand."""

import pytest
import torch

from imagelab.boxes import Box
from imagelab.training.seeds import seed_for
from mifo.method import regions as module
from mifo.method.regions import (
    Refiner,
    RegionSet,
    TokenRoles,
    assign_clusters,
    box_regions,
    cross_mask,
    normalise_columns,
    pixel_groups,
    resize_regions,
    self_mask,
    soft_masks,
)

#: start, subject 0, a function word, subject 1 in two tokens, end, padding
TOKENS = TokenRoles(subjects=((1,), (3, 4)), filtered=(2,), end=5, length=7, leading=(1, 4))
#: pixel 0 is subject 0's, pixel 1 is shared, pixel 2 is subject 1's, pixel 3 is background
OVERLAPPING = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0]]]).bool()


def rows(text: str) -> torch.Tensor:
    """Rows of 0 and 1, as a bool matrix."""
    return torch.tensor([[int(digit) for digit in row] for row in text.split()]).bool()


# --- boxes as regions ------------------------------------------------------------------------


def test_box_regions_of_a_grid_that_is_not_square():
    regions = box_regions([Box(0, 0, 0.5, 1), Box(0.25, 0.5, 0.75, 1)], 2, 4)
    assert torch.equal(regions[0, 0], rows("1100 1100"))
    assert torch.equal(regions[0, 1], rows("0000 0110"))


def test_resized_regions_take_the_nearest_pixel():
    regions = torch.tensor([[[[1, 0, 0], [0, 0, 1]]]]).bool()
    assert torch.equal(resize_regions(regions, 4, 6)[0, 0], rows("110000 110000 000011 000011"))
    assert torch.equal(resize_regions(regions, 1, 3)[0, 0], rows("001"))


# --- masks -----------------------------------------------------------------------------------


def test_self_mask():
    apart = torch.tensor([[[1, 0, 0], [0, 1, 0]]]).bool()
    assert torch.equal(self_mask(apart)[0], rows("010 100 000"))


def test_self_mask_of_overlapping_boxes():
    # only the pixels that share no region are hidden from each other
    assert torch.equal(self_mask(OVERLAPPING)[0], rows("0010 0000 1000 0000"))


def test_self_mask_keeps_samples_apart():
    two = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 0]]]).bool()
    assert torch.equal(self_mask(two), torch.stack([rows("01 10"), rows("00 00")]))


def test_pixel_groups_of_overlapping_boxes():
    groups = pixel_groups(OVERLAPPING[0])
    seen = {tuple(queries.tolist()): keys.tolist() for queries, keys in groups.parts}
    assert seen == {(0,): [0, 1, 3], (1,): [0, 1, 2, 3], (2,): [1, 2, 3], (3,): [0, 1, 2, 3]}


@pytest.mark.parametrize("seed", range(5))
def test_pixel_groups_are_the_self_mask(seed):
    regions = torch.rand(3, 20, generator=torch.Generator().manual_seed(seed)) < 0.3
    groups = pixel_groups(regions)
    hidden = torch.ones(20, 20, dtype=torch.bool)
    for queries, keys in groups.parts:
        hidden[queries[:, None], keys] = False
    assert torch.equal(hidden, self_mask(regions[None])[0])
    in_a_row = torch.cat([queries for queries, _ in groups.parts])
    assert in_a_row[groups.order].tolist() == list(range(20))


def test_cross_mask_in_denoising():
    expected = rows("0011100 0010000 0110000 0111110")
    assert torch.equal(cross_mask(OVERLAPPING, TOKENS, guidance=False)[0], expected)


def test_cross_mask_in_guidance_shows_subjects_and_the_end_to_the_background():
    expected = rows("0011100 0010000 0110000 0010000")
    assert torch.equal(cross_mask(OVERLAPPING, TOKENS, guidance=True)[0], expected)


# --- region sets -----------------------------------------------------------------------------


def test_region_set_of_boxes_rasterises_at_each_resolution():
    boxes = [Box(0, 0, 0.3, 1), Box(0.7, 0, 1, 1)]
    regions = RegionSet(boxes, TOKENS)
    for grid in ((2, 10), (3, 4), (1, 2)):
        assert torch.equal(regions.at(*grid), box_regions(boxes, *grid).flatten(2))


def test_region_set_of_refined_regions_resizes_them():
    source = box_regions([Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 0.5)], 2, 4)
    regions = RegionSet(source, TOKENS)
    for grid in ((2, 4), (4, 8), (1, 2)):
        assert torch.equal(regions.at(*grid), resize_regions(source, *grid).flatten(2))


def test_region_set_builds_each_mask_once(monkeypatch):
    built = []
    for name in ("box_regions", "self_mask", "cross_mask"):
        make = getattr(module, name)

        def counted(*arguments, name=name, make=make):
            built.append(name)
            return make(*arguments)

        monkeypatch.setattr(module, name, counted)
    regions = RegionSet([Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)], TOKENS)
    for _ in range(3):
        for grid in ((2, 4), (4, 2)):
            regions.self_mask(*grid)
            for guidance in (True, False):
                mask = regions.cross_mask(*grid, guidance)
                expected = cross_mask(regions.at(*grid), TOKENS, guidance)
                assert torch.equal(mask, expected)
    assert sorted(built) == ["box_regions"] * 2 + ["cross_mask"] * 4 + ["self_mask"] * 2


@pytest.mark.parametrize("kind", ["self", "guidance", "denoising"])
def test_region_set_biases_hide_what_its_masks_hide(kind):
    """Of two images with regions of their own; in denoising, after their unconditional halves."""
    source = box_regions([Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 0.5)], 2, 4)
    regions = RegionSet(torch.cat([source, source.flip(-1)]), TOKENS)
    samples = 2 if kind == "guidance" else 4
    bias = regions.bias(2, 4, kind, samples, torch.bfloat16)
    assert bias is regions.bias(2, 4, kind, samples, torch.bfloat16)
    assert bias.dtype == torch.bfloat16
    if kind == "self":
        expected = regions.self_mask(2, 4).repeat(2, 1, 1)
    else:
        expected = regions.cross_mask(2, 4, kind == "guidance")
    if kind == "denoising":
        expected = torch.cat([torch.zeros_like(expected), expected])
    assert torch.equal(bias == -torch.inf, expected[:, None])
    assert (bias[~expected[:, None]] == 0).all()


def test_biases_of_boxes_serve_all_samples_of_a_self_attention_layer():
    regions = RegionSet([Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)], TOKENS)
    assert regions.bias(2, 4, "self", 6, torch.float32).shape == (1, 1, 8, 8)
    assert regions.bias(2, 4, "denoising", 6, torch.float32).shape == (6, 1, 8, TOKENS.length)


# --- refinement ------------------------------------------------------------------------------


def test_normalised_columns():
    attention = torch.tensor([[0.1, 0.0], [0.4, 0.0], [0.2, 0.5]])
    expected = torch.tensor([[0.1, 0.0], [0.4, 0.0], [0.2, 0.5]]) / torch.tensor([0.40001, 0.50001])
    assert torch.allclose(normalise_columns(attention), expected)


def test_soft_masks():
    map_ = torch.tensor([[0.2], [1.0], [0.0], [0.4]])
    regions = torch.tensor([[True, True, True, False]])
    low, middle, high = 0.1192029, 0.5, 0.9996646  # sigmoids of -2, 0 and 8
    expected = [(middle - low) / (high - low), 1, 0, 0]
    assert soft_masks(map_, regions)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_each_subjects_soft_mask_reaches_from_0_to_1():
    """Of subjects of other strength, too: sigmoids of 8 and 0, and of 0 and -2."""
    map_ = torch.tensor([[1.0, 0.2], [0.2, 0.0]])
    soft = soft_masks(map_, torch.ones(2, 2).bool())
    assert soft.flatten().tolist() == pytest.approx([1, 0, 1, 0], abs=1e-6)


def test_a_flat_map_makes_an_empty_soft_mask():
    assert soft_masks(torch.full((3, 1), 0.5), torch.ones(1, 3).bool()).tolist() == [[0, 0, 0]]


BOXES = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 0]]).bool()


def test_clusters_go_to_the_subject_they_overlap_best():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    soft = torch.tensor([[1, 0.5, 0.1, 0, 0, 0, 0, 0], [0, 0, 0.2, 0.1, 0.4, 0, 0, 0]])
    # cluster 0: 1.5 / min(2, 1.6) for subject 0
    # cluster 1: .1 / 1.6 and .3 / min(2, .7) = .43 for subject 1
    # cluster 2: .4 / min(3, .7) for subject 1, small as its soft mask is
    # cluster 3: nothing
    regions = assign_clusters(labels, soft, BOXES, clusters=4)
    assert torch.equal(regions, rows("11000000 00111110"))


def test_clusters_below_the_threshold_are_background():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    soft = torch.tensor([[1, 1, 1, 0.9, 0, 0, 0, 0], [0, 0, 0.8, 0.8, 0.4, 0, 0, 0.1]])
    # cluster 1: .5 / min(4, 2.1) = .24 for subject 1
    assert torch.equal(assign_clusters(labels, soft, BOXES, 2), rows("11110000 00001111"))
    raised = assign_clusters(labels, soft, BOXES, 2, threshold=0.25)
    assert torch.equal(raised, rows("11000000 00111110"))  # and subject 1 has its box again


def test_an_empty_subject_gets_its_box_back_from_the_others():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    soft = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0.0]])
    regions = assign_clusters(labels, soft, BOXES, clusters=2)
    assert torch.equal(regions, rows("11000000 00111110"))


def test_a_box_given_back_leaves_every_other_subject_some_pixels():
    """The boxes are nested, and all that is found belongs to the inner one."""
    boxes = rows("00110000 01111110")
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])
    found = torch.tensor([0, 0, 1.0, 1, 0, 0, 0, 0])
    soft = torch.stack([found, torch.zeros(8)])
    assert torch.equal(assign_clusters(labels, soft, boxes, clusters=2), boxes)
    nothing = torch.zeros(2, 8)
    for order in ([0, 1], [1, 0]):
        given_back = assign_clusters(labels, nothing, boxes[order], clusters=2)
        assert given_back.any(dim=-1).all()


def clear_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Cross [1, 6, 1] and self [1, 6, 6] maps of a row of three pairs of pixels.

    The subject is seen at the first pair; each pair attends to itself.
    """
    cross = torch.tensor([0.9, 0.8, 0.1, 0.1, 0.0, 0.0])[None, :, None]
    self_ = torch.kron(torch.eye(3), torch.full((2, 2), 0.5))[None]
    return cross, self_


def test_refiner_finds_the_subject_within_its_box():
    box = Box(0, 0, 0.67, 1)  # the first four pixels
    refiner = Refiner((1, 6), [box], seeds=[3])
    cross, self_ = clear_maps()
    refiner.add("cross", cross)
    refiner.add("self", self_)
    current = box_regions([box], 1, 6).flatten(2)
    refined = refiner.refine(current, 15)
    assert refined.shape == (1, 1, 1, 6)
    assert torch.equal(refined[0, 0], rows("110000"))
    first = refiner.centres[0]
    assert torch.equal(refiner.refine(refined.flatten(2), 20), refined)
    assert first.shape == (3, 6) and refiner.centres[0] == pytest.approx(first)


def test_refiner_starts_from_its_last_centres_with_a_seed_for_image_and_step(monkeypatch):
    import sklearn.cluster

    starts, seeds = [], []

    class KMeans(sklearn.cluster.KMeans):
        def __init__(self, n_clusters, **options):
            starts.append((options["init"], options["n_init"]))
            seeds.append(options["random_state"])
            super().__init__(n_clusters, **options)

    monkeypatch.setattr(sklearn.cluster, "KMeans", KMeans)
    refiner = Refiner((1, 6), [Box(0, 0, 0.67, 1)], seeds=[3, 4])
    cross, self_ = clear_maps()
    refiner.add("cross", cross.repeat(2, 1, 1))
    refiner.add("self", self_.repeat(2, 1, 1))
    current = refiner.boxes[None]
    refiner.refine(current, 15)
    centres = list(refiner.centres)
    refiner.refine(current, 20)
    expected = [seed_for(seed, "clusters", step) % 2**32 for step in (15, 20) for seed in (3, 4)]
    assert seeds == expected
    assert starts[:2] == [("k-means++", 100)] * 2
    assert all(init is last and n == 1 for (init, n), last in zip(starts[2:], centres, strict=True))


def test_every_clustering_leaves_its_centres_to_the_next(monkeypatch):
    import sklearn.cluster

    starts = []

    class KMeans(sklearn.cluster.KMeans):
        def __init__(self, n_clusters, **options):
            starts.append(options["init"])
            super().__init__(n_clusters, **options)

    monkeypatch.setattr(sklearn.cluster, "KMeans", KMeans)
    refiner = Refiner((1, 6), [Box(0, 0, 0.67, 1)], seeds=[3])
    cross, self_ = clear_maps()
    refiner.add("cross", cross)
    refiner.add("self", self_)
    refiner.refine(refiner.boxes[None], 15)
    refiner.add("self", torch.full((1, 6, 6), 0.5))  # the mean: 0.5 within a pair, else 0.25
    refiner.refine(refiner.boxes[None], 20)
    refiner.refine(refiner.boxes[None], 25)
    # each centre is the row of a pair, its columns divided by their maximum of 0.5
    for start, elsewhere in zip(starts[1:], (0, 0.5), strict=True):
        pairs = start[start[:, ::2].argmax(1).argsort()]
        expected = torch.kron(torch.eye(3), torch.ones(1, 2)).clamp_min(elsewhere)
        assert pairs == pytest.approx(expected.numpy(), abs=1e-4)


def test_refiner_means_over_all_that_it_took_in():
    refiner = Refiner((1, 2), [Box(0, 0, 1, 1)], seeds=[0])
    for value in (0.2, 0.4, 0.9):
        refiner.add("cross", torch.tensor([[[value], [1 - value]]]))
    refiner.add("self", torch.eye(2)[None])
    assert refiner.mean("cross").flatten().tolist() == pytest.approx([0.5, 0.5])
    assert torch.equal(refiner.mean("self"), torch.eye(2)[None])


def test_refiner_clusters_each_image_by_itself():
    """The second image's subject is at the other end; each gets what it would get alone."""
    box = Box(0, 0, 1, 1)
    cross, self_ = clear_maps()
    both = Refiner((1, 6), [box], seeds=[3, 4])
    both.add("cross", torch.cat([cross, cross.flip(1)]))
    both.add("self", torch.cat([self_, self_]))
    refined = both.refine(both.boxes[None], 15)
    assert torch.equal(refined[:, 0, 0], rows("110000 000011"))


def test_a_map_of_fewer_pixels_than_clusters_is_refined():
    boxes = [Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)]
    refiner = Refiner((1, 4), boxes, seeds=[0])
    refiner.add("cross", torch.tensor([[[0.9, 0.1], [0.8, 0.1], [0.1, 0.8], [0.1, 0.9]]]))
    refiner.add("self", torch.eye(4)[None])
    refined = refiner.refine(box_regions(boxes, 1, 4).flatten(2), 15)
    assert torch.equal(refined[0, :, 0], rows("1100 0011"))
