"""Exchanging assets at some noise levels or in some layers: what the UNet is given, the table."""

import json
import shutil

import pytest
import torch

from experiments import exchange
from experiments.exchange import Part, exchanged, parts_of, shows_other, table
from imagelab.attention import attention_layers
from imagelab.models.stable_diffusion import load_base
from toybox.scenes.toys import Look

TINY = ["--num_inference_steps", "2", "--guidance_steps", "1", "--pictures", "1", "--device", "cpu"]
BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


@pytest.fixture(scope="module")
def base():
    return load_base("toybox", offline=True)


@pytest.fixture(scope="module")
def prompts(base):
    """States of the empty prompt, and of one prompt in two orders, [1, k, d] each."""
    texts = ["", "a photo of fox and cat", "a photo of cat and fox"]
    with torch.no_grad():
        return [base.encode_text([text]) for text in texts]


@pytest.fixture
def predict(base):
    latents = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def predict(timestep, *states):
        batch = latents.expand(len(states), -1, -1, -1)
        return base.predict(batch, torch.tensor(timestep), torch.cat(states))

    return predict


def run(work, *more):
    exchange.main(["--work", str(work), *TINY, *more])


def rows_of(work):
    return [json.loads(line) for line in (work / "exchange.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------
# what the UNet is given


def test_parts_are_nowhere_everywhere_noise_levels_and_blocks(base):
    parts = parts_of(base.unet)
    assert [part.name for part in parts[:2]] == ["nowhere", "everywhere"]
    assert [part.name for part in parts[2:7]] == [
        "t from 1000 to 800", "t from 800 to 600", "t from 600 to 400", "t from 400 to 200",
        "t from 200 to 0",
    ]  # fmt: skip
    assert [(part.low, part.high) for part in parts[7:10]] == [(0.6, 1), (0.4, 1), (0.2, 1)]
    assert [part.name for part in parts[10:]] == BLOCKS


def test_exchanged_everywhere_is_the_other_prompt(base, prompts, predict):
    empty, own, other = prompts
    with exchanged(base.unet, Part(), own, other):
        found = predict(500, empty, own)
        alone = predict(500, own)  # as guidance calls it
    assert torch.equal(found, predict(500, empty, other))
    assert torch.equal(alone, predict(500, other))
    assert torch.equal(predict(500, own), predict(500, own))  # no hook is left
    assert not torch.equal(predict(500, own), alone)


def test_exchanged_nowhere_is_the_own_prompt(base, prompts, predict):
    _, own, other = prompts
    with exchanged(base.unet, Part(0, 0), own, other):
        found = [predict(timestep, own) for timestep in (1, 999)]
    assert torch.equal(torch.cat(found), torch.cat([predict(1, own), predict(999, own)]))


def test_a_part_that_exchanges_nothing_is_an_error(base, prompts, predict):
    empty, own, other = prompts
    refused = pytest.raises(RuntimeError, match="nothing was exchanged everywhere")
    with refused, exchanged(base.unet, Part(), own + 1e-6, other):
        predict(500, empty, own)


@pytest.mark.parametrize(
    "timestep, is_inside", [(399, False), (400, True), (599, True), (600, False)]
)
def test_noise_levels_are_half_open(base, prompts, predict, timestep, is_inside):
    _, own, other = prompts
    with exchanged(base.unet, Part(0.4, 0.6), own, other):
        found = predict(timestep, own)
        predict(500, own)
    assert torch.equal(found, predict(timestep, other if is_inside else own))


def test_only_the_layers_of_a_block_read_the_other_prompt(base, prompts, predict):
    _, own, other = prompts
    seen = {}

    def look(name):
        def hook(_, inputs, keywords):
            seen[name] = keywords["encoder_hidden_states"].clone()

        return hook

    layers = attention_layers(base.unet, "cross")
    with exchanged(base.unet, Part(block="up_blocks.1"), own, other):
        hooks = [
            layer.register_forward_pre_hook(look(name), with_kwargs=True)
            for name, layer in layers.items()
        ]
        predict(500, own)
        for hook in hooks:
            hook.remove()
    assert set(seen) == set(layers)
    for name, states in seen.items():
        assert torch.equal(states, other if name.startswith("up_blocks.1.") else own), name


# ----------------------------------------------------------------------------------------------
# what is counted


def test_a_box_shows_the_other_asset_by_its_kind_and_hue():
    looks = [Look("fox", 100), Look("fox", 140)]
    seen = {"kind": "fox", "cover": 0.5, "hue": 138.0, "error": 38.0, "is_right": False}
    assert shows_other(seen, 0, looks)
    assert not shows_other(seen, 1, looks)
    assert not shows_other(seen | {"hue": 102.0}, 0, looks)
    assert not shows_other(seen | {"kind": "cat"}, 0, looks)


def test_the_table_counts_boxes():
    right, wrong = {"is_right": True}, {"is_right": False}
    rows = [
        {"part": "a", "judged": [[right, wrong]], "exchanged": [[False, True]]},
        {"part": "a", "judged": [[wrong, right]], "exchanged": [[False, False]]},
        {"part": "b", "judged": [[right, right]], "exchanged": [[False, False]]},
    ]
    assert table(rows).splitlines()[2:] == ["| a | 2 | 1 | 1 |", "| b | 2 | 0 | 0 |"]


# ----------------------------------------------------------------------------------------------
# the command


def test_learned_folders_are_painted_once(copied, capsys, monkeypatch):
    shutil.rmtree(copied / "learned/toybox-random-mifo/kind3_001")
    few = [Part(0, 0), Part()]
    monkeypatch.setattr(exchange, "parts_of", lambda unet: few)
    run(copied)
    rows = rows_of(copied)
    assert [row["folder"] for row in rows] == ["kind2_000"] * 2
    assert len({row["key"] for row in rows}) == len(rows)
    assert [row["part"] for row in rows] == ["nowhere", "everywhere"]
    shown = capsys.readouterr().out
    assert (copied / "exchange.md").read_text() == shown
    assert len(shown.splitlines()) == 2 + 2
    painted = {}
    for row in rows:
        [path] = row["pictures"]
        assert path == f"exchange {row['part']}-{row['key']}/00.png"
        painted[row["key"]] = copied / "pictures/toybox-random-mifo" / row["folder"] / path
    pictures = {key: path.read_bytes() for key, path in painted.items()}
    assert len(set(pictures.values())) == 2
    run(copied, "--num_inference_steps", "3")  # whose pictures replace none
    assert len(rows_of(copied)) == 4
    assert {key: path.read_bytes() for key, path in painted.items()} == pictures
    monkeypatch.setattr(exchange.TaskPainter, "run", None)  # all rows are there
    run(copied)
    assert rows_of(copied)[:2] == rows


def test_what_is_not_there_or_makes_no_sense_is_refused(tmp_path, capsys):
    for more, text in (([], "nothing that was learned"), (["--pictures", "0"], "--pictures is 0")):
        with pytest.raises(SystemExit):
            run(tmp_path, *more)
        assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
