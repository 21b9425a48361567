"""The command that teaches toybox's MIGE to read: what learns, what is written, what is refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_toy_mige import SHORT, TINY, tiny_model, weights_of
from tiny_toybox import ctrl_c_in_step

from imagelab.errors import UserError
from imagelab.io.tensors import read_tensors
from imagelab.training.checkpoint import read_curves
from mige.pipeline import MigePipeline
from toybox.mige import pretraining
from toybox.mige.begin import main
from toybox.mige.config import HELP, BeginConfig
from toybox.mige.heads import ReadingHeads, ViewHeads
from toybox.mige.measures import LEAST, warning_of
from toybox.mige.pretraining import Pretraining
from toybox.mige.reading import look

pytestmark = pytest.mark.usefixtures("interruptible")
PARTS = ("transformer", "text_encoder", "vision_encoder", "qformer", "fusion")


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The command makes a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "ToyMigeConfig", lambda: TINY)
        yield


def command(folder, *more: str) -> list[str]:
    return ["--output", str(folder / "model"), "--work", str(folder / "work"), *SHORT, *more]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of a few steps."""
    folder = tmp_path_factory.mktemp("begun")
    main(command(folder))
    return folder


def test_the_model_paints_and_says_how_well_it_reads(begun):
    pipeline = MigePipeline.from_pretrained(begun / "model")
    picture = Image.fromarray(np.full((40, 40, 3), 90, np.uint8))
    painted = pipeline("a <image> on the grass", [picture], steps=1).images
    assert painted[0].size == (128, 128)
    told = json.loads((begun / "model" / "begin.json").read_text())
    assert told["settings"]["vision_steps"] == 4 and told["shape"]["text_width"] == 32
    assert told["parameters"]["fusion"] > 1000
    held_out = told["held_out"]
    assert held_out["caption_deviation"] == pytest.approx(1, abs=0.2)
    shares = set(held_out) - {"caption_deviation"}
    assert shares == {
        "view_kind", "view_hue", "kind", "hue", "source_kinds", "asked", "named_kinds",
        "named_hues", "cells", "between_pictures", "between_queries",
    }  # fmt: skip
    assert all(0 <= held_out[name] <= 1 for name in shares - {"cells"})
    assert held_out["cells"] < 1  # what is not explained has no bound
    assert (begun / "work" / "begin.png").is_file()


def test_each_stage_teaches_its_parts_and_no_others(begun):
    first = tiny_model(seed=BeginConfig().seed).parts
    learned = {part: weights_of(begun / "model", part) for part in PARTS}
    changed = {
        part: {
            name
            for name, value in first[part].state_dict().items()
            if name in learned[part] and not torch.equal(value, learned[part][name])
        }
        for part in PARTS
    }
    trunk = changed.pop("transformer")
    assert trunk == {
        "pos_embed.proj.weight", "pos_embed.proj.bias", "caption_projection.linear_1.weight",
        "caption_projection.linear_2.weight",
    }  # fmt: skip
    assert {"query_tokens", "projection.weight", "features.mix.weight"} <= changed["fusion"]
    assert "null_text" not in changed["fusion"]
    for part, layer in (
        ("text_encoder", "shared.weight"),
        ("qformer", "encoder.layer.0.crossattention.attention.key.weight"),
        ("vision_encoder", "post_layernorm.weight"),
        ("vision_encoder", "encoder.layers.0.self_attn.qkv.weight"),
    ):
        assert layer in changed[part]


def reading_stage(run: Pretraining, model):
    """The second stage, on a vision encoder that has not learned."""
    encoder, views = model.parts["vision_encoder"], ViewHeads(TINY.vision_width)
    readings = pretraining.observed(run, encoder, views, "train", run.config.triplets)
    heads = ReadingHeads(TINY.text_width, TINY.queries)
    return pretraining.stack_stage(run, model, heads, readings)


def test_the_vision_encoder_is_frozen_while_the_others_learn(begun):
    run = Pretraining(BeginConfig(views=8, triplets=8, batch=4), begun / "work", shape=TINY)
    model = tiny_model()
    stage = reading_stage(run, model)
    named = model.parts["vision_encoder"].named_parameters()
    learns = {name for name, parameter in named if parameter.requires_grad}
    assert learns == {"post_layernorm.weight", "post_layernorm.bias"}
    with stage.losses(0) as losses:
        losses["loss"].backward()
    assert all(p.grad is not None for p in stage.parameters)
    assert model.parts["vision_encoder"].post_layernorm.weight.grad.any()


def test_no_two_draws_of_a_step_share_a_seed(begun, monkeypatch):
    run = Pretraining(BeginConfig(views=8, triplets=8, batch=4), begun / "work", shape=TINY)
    model, drawn = tiny_model(), []
    stages = [
        pretraining.vision_stage(run, model, ViewHeads(TINY.vision_width)),
        reading_stage(run, model),
    ]
    seed_for = pretraining.seed_for
    monkeypatch.setattr(
        pretraining, "seed_for", lambda *where: drawn.append(seed_for(*where)) or drawn[-1]
    )
    for stage in stages:
        for step in (0, 1):
            with stage.losses(step):
                pass
    assert len(drawn) == len(set(drawn)) == 2 * 3  # views, how they move, and triplets


def test_what_is_looked_at_and_measured(begun, monkeypatch):
    """Pictures are seen by the encoder that has learned; nothing is measured on what is learned."""
    config = BeginConfig.from_settings(
        views=8, vision_steps=4, triplets=8, stack_steps=4, batch=4, held_out=6, warmup=1
    )
    given = {}

    def watch(name: str) -> None:
        called = getattr(pretraining, name)
        monkeypatch.setattr(
            pretraining, name, lambda *args: given.update({name: args}) or called(*args)
        )

    for name in ("measure_views", "stack_stage", "measure"):
        watch(name)
    done = pretraining.pretrain(Pretraining(config, begun / "work", shape=TINY))

    def pixels(file: str) -> torch.Tensor:
        return read_tensors(begun / "work" / f"{file}.safetensors", "")[0]["pixels"]

    assert torch.equal(given["measure_views"][2]["pixels"], pixels("views_test_6"))
    assert torch.equal(given["measure"][2].data["pixels"], pixels("triplets_test_6"))
    learned = given["stack_stage"][3]
    assert torch.equal(learned.data["pixels"], pixels("triplets_train_8"))
    seen = look(done.parts["vision_encoder"], learned.data["pixels"])
    assert torch.equal(learned.seen, seen)


def test_a_run_that_was_stopped_ends_as_an_unbroken_one(begun, tmp_path):
    for step in (2, 1):  # of the vision encoder, then of the others
        with ctrl_c_in_step(step):
            main(command(tmp_path))
        assert not (tmp_path / "model").exists()
    main(command(tmp_path))
    for part in PARTS:
        first, second = (weights_of(each / "model", part) for each in (begun, tmp_path))
        assert all(torch.equal(first[name], second[name]) for name in first)
    curves = read_curves(tmp_path / "work" / "stack.safetensors")
    asked = ("kind", "hue", "kinds", "cells", "words", "asked")
    names = ["loss", *(f"stack {name}" for name in asked)]
    assert {name: len(values) for name, values in curves.items()} == dict.fromkeys(names, 4)


def test_reading_is_learned(begun):
    """Eight triplets again and again: what is asked of them is soon answered."""
    config = BeginConfig(views=8, triplets=8, batch=8, stack_steps=60, stack_rate=5e-3, warmup=1)
    run = Pretraining(config, begun / "work", shape=TINY)
    stage = reading_stage(run, tiny_model())
    losses = []
    for step in range(60):
        with stage.losses(step) as found:
            stage.optimizer.zero_grad()
            found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters, 1.0)
        stage.optimizer.step()
        losses.append({name: value.item() for name, value in found.items()})
    for name in losses[0]:
        first, last = (np.mean([each[name] for each in part]) for part in (losses[:5], losses[-5:]))
        assert last < 0.7 * first, name


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--batch", "0"), "--batch is 0; give a whole number from 1 to 100000"),
        (("--seed", "-1"), "the seed is -1; give a whole number"),
        (("--cooldown", "nan"), "--cooldown is nan; give a number from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense(more, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command(tmp_path, *more))
    assert ended.value.code == 2 and told in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_batches_that_the_processes_cannot_share(tmp_path):
    processes = SimpleNamespace(count=3, is_first=True)
    with pytest.raises(UserError, match="^--batch 32 cannot be shared over 3 processes; give a m"):
        pretraining.begin(BeginConfig(), tmp_path / "M", tmp_path / "W", processes)
    assert not any(tmp_path.iterdir())


def test_a_model_is_replaced_where_asked_to(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "begun")
    record = tmp_path / "begun" / "model" / "begin.json"
    wanted = record.read_bytes()
    record.write_text("{}")
    main(command(tmp_path / "begun", "--overwrite"))
    assert record.read_bytes() == wanted


def test_folders_that_hold_other_things(begun, tmp_path, capsys):
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, options), *SHORT])
        assert ended.value.code == 2
        return capsys.readouterr().err

    model, work, new = begun / "model", begun / "work", tmp_path / "new"
    assert "holds a model; replace it with --overwrite" in refused(
        "--output", model, "--work", work
    )
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    assert "letters is no model folder of MIGE, so it is not replaced" in refused(
        "--output", tmp_path / "letters", "--work", work
    )
    assert "holds other files (a.txt); give another --work" in refused(
        "--output", new, "--work", tmp_path / "letters"
    )
    assert f"lies in --output {new}" in refused("--output", new, "--work", new / "work")
    with pytest.raises(SystemExit):
        main(["--output", str(new), "--work", str(work), *SHORT, "--batch", "8"])
    told = capsys.readouterr().err
    assert "was begun with other settings (--batch 4); go on with those" in told
    assert not new.exists()


def test_every_setting_has_its_words():
    assert list(HELP) == list(BeginConfig().settings())


def test_what_is_not_good_enough_is_told():
    assert warning_of("kind", 0.5) == ", and should be 0.98 or more"
    assert not warning_of("kind", 0.98) and not warning_of("asked", 0.1)
    assert set(LEAST) == {"kind", "hue", "between_pictures", "between_queries"}
