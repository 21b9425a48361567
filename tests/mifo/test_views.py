"""The views that learning draws: their distribution and the order of the draws."""

from collections import Counter

import torch

from mifo.learning.views import View, sample_view
from mifo.tokens import asset_token, view_prompt


def test_views_are_uniform_and_reproducible():
    count, draws = 3, 6000
    generator = torch.Generator().manual_seed(0)
    views = [sample_view(count, generator) for _ in range(draws)]
    tally = Counter(view.assets for view in views)
    # 3 ordered views of size 1, 6 of size 2, 6 of size 3; every size has a third of the draws.
    assert len(tally) == 15
    for assets, seen in tally.items():
        expected = draws / 3 / {1: 3, 2: 6, 3: 6}[len(assets)]
        assert abs(seen - expected) < 5 * expected**0.5
    flips = sum(view.flip for view in views)
    assert abs(flips - draws / 2) < 5 * (draws / 4) ** 0.5

    torch.manual_seed(1)  # the global generator has no say
    generator = torch.Generator().manual_seed(0)
    assert [sample_view(count, generator) for _ in range(50)] == views[:50]


def test_the_documented_order_of_draws():
    generator, again = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(20):
        size = int(torch.randint(1, 6, (), generator=again))
        assets = tuple(torch.randperm(5, generator=again).tolist()[:size])
        flip = bool(torch.randint(0, 2, (), generator=again))
        assert sample_view(5, generator) == View(assets, flip)


def test_prompts():
    assert asset_token(12) == "<asset12>"
    assert view_prompt((2, 0)) == "a photo of <asset2> and <asset0>"
    assert view_prompt((1,)) == "a photo of <asset1>"
