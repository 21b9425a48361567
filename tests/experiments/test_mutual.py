"""The trainings of toybox's MIGE: their lists, starts, painting in words, rows and table."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_toy_mige import TINY, the_tokenizer, the_vae, tiny_parts
from torch.nn import functional as F

from experiments.mutual import command
from experiments.mutual.errors import held_out_errors
from experiments.mutual.painting import WordsPainter, text_of
from experiments.mutual.report import error_table, share_over_items, table_of, write_mutual
from experiments.mutual.variants import VARIANTS, in_words, write_list, write_start
from imagelab.training.checkpoint import read_facts
from mige import features
from mige.config import PaintingConfig
from mige.data.features import open_features
from mige.data.records import RecordList
from mige.folder import load_parts
from mige.method.encoder import encode_text
from mige.method.instruction import Embedded, length_of
from mige.method.loss import Diffusion
from mige.train import parse_args
from mige.training.model import TrainedModel
from mige.training.samples import Facts, Samples
from toybox import triplets
from toybox.mige.architecture import build_pipeline, save
from toybox.mige.evaluation.items import ROWS, draw_item
from toybox.mige.evaluation.painters import request_of
from toybox.mige.train import RECIPE
from toybox.scenes.wording import noun


@pytest.fixture(scope="module")
def pipeline():
    return build_pipeline(tiny_parts(), the_vae(), the_tokenizer(), TINY.slots)


@pytest.fixture(scope="module")
def work(pipeline, tmp_path_factory):
    """begin, triplets and features."""
    folder = tmp_path_factory.mktemp("mutual")
    save(pipeline, folder / "begin")
    triplets.main(["--output", str(folder / "triplets"), "--count", "12", "--seed", "3"])
    features.main(
        ["--data", str(folder / "triplets/triplets.json"), "--model", str(folder / "begin")]
        + ["--output", str(folder / "features"), "--device", "cpu"]
    )
    return folder


@pytest.mark.parametrize(
    "prompt, plain, source, kinds, wanted",
    [
        ("make it blue in<imagehere>", "make it blue", 0, {}, "make it blue"),
        ("a<imagehere>and a<imagehere>", None, None, {0: "car", 1: "fox"}, "a car and a fox"),
        (
            "swap the fox in<imagehere>for<imagehere>", None, 0, {1: "tropical_fish"},
            "swap the fox in the picture for tropical fish",
        ),
        ("put<imagehere>into<imagehere>", None, 1, {0: "bear"}, "put bear into the picture"),
    ],
)  # fmt: skip
def test_words_stand_for_pictures(prompt, plain, source, kinds, wanted):
    assert in_words(prompt, plain, source, kinds) == wanted


def test_the_list_of_each_variant(work, tmp_path):
    whole = json.loads((work / "triplets/triplets.json").read_text())
    found = {}
    for name, variant in VARIANTS.items():
        write_list(variant, work / "triplets", tmp_path / "list.json")
        found[name] = json.loads((tmp_path / "list.json").read_text())
    assert found["together"] == found["longer"] == found["no_latents"] == whole
    for task in ("subject", "edit", "subject_edit"):
        assert found[task] == [record for record in whole if record["task"] == task] != []
    for before, after in zip(whole, found["no_pictures"], strict=True):
        assert after["entity_path"] == [] and "<imagehere>" not in after["multi_prompt"]
        same = before.keys() - {"entity_path", "multi_prompt"}
        assert {key: after[key] for key in same} == {key: before[key] for key in same}


def test_one_start_reads_no_latents(work, tmp_path):
    for name, reads in (("together", True), ("no_latents", False)):
        write_start(VARIANTS[name], work / "begin", tmp_path / name)
        fusion = load_parts(tmp_path / name)["fusion"]
        whole = load_parts(work / "begin")["fusion"]
        assert fusion.config.reads_latents is reads
        for key, value in whole.state_dict().items():
            assert torch.equal(fusion.state_dict()[key], value)
        # at the start no latents are mixed in, and both say the projection of LN(c)
        meaning, patches = 3 * torch.randn(1, 3, 32) + 1, torch.randn(1, 5, 32)
        wanted = fusion.projection(F.layer_norm(meaning, (32,), eps=1e-6))
        assert torch.allclose(fusion(meaning, patches), wanted, atol=1e-5)
        torch.nn.init.eye_(fusion.features.mix.weight)
        assert torch.allclose(fusion(meaning, patches), wanted, atol=1e-5) is not reads


@pytest.mark.parametrize("row", ["subject-two", "subject-edit-replace", "subject-edit-add"])
def test_words_name_what_each_picture_shows(row):
    for index in range(2):
        item = draw_item(0, row, index)
        shown = {toy.reference: toy.look.kind for toy in item.triplet.toys}
        words = item.triplet.prompt
        for place in range(len(item.triplet.entities)):
            name = "the picture" if place == item.triplet.source else noun(shown[place])
            words = words.replace("<imagehere>", f" {name} ", 1)
        assert text_of(item) == " ".join(words.split())


def test_what_is_painted_in_words(pipeline):
    """The instruction has no picture; the picture to edit is the same as with pictures."""
    painter = WordsPainter(pipeline, "d", PaintingConfig.from_settings(seed=0, steps=2), "m")
    item = draw_item(0, "subject-edit-replace", 0)
    whole = pipeline.encode(request_of(item), 0)
    found = painter._in_words(item, whole)
    assert torch.equal(found.source, whole.source) and found.has_source
    ids = pipeline.tokenizer("combine " + text_of(item)).input_ids  # with its end
    assert int(found.mask.sum()) == len(ids) == length_of([ids], 0) - 1
    wanted = encode_text(pipeline.text_encoder, embedded_of(pipeline, ids))
    assert torch.allclose(found.text[: len(ids)], wanted[: len(ids)], atol=1e-5)
    (picture,) = painter.paint([item])
    assert picture.size == (128, 128)
    assert painter.facts("edit-add") != WordsPainter.__mro__[1].facts(painter, "edit-add")


def embedded_of(pipeline, ids):
    table = pipeline.text_encoder.get_input_embeddings().weight
    return Embedded(table[torch.tensor(ids)], torch.ones(len(ids)))


def painted(variant: str, seed: int, index: int, right: bool, l1: float = 0.02, row="edit-add"):
    return {
        "variant": variant, "seed": seed, "row": row, "index": index, "task": "edit",
        "checks": {"right": right}, "l1": l1, "autoencoder_l1": 0.01,
    }  # fmt: skip


def test_the_table():
    """An item of two seeds counts once.

    Two of four of one seed: Wilson's interval is 15.0% to 85.0%. Eight of two seeds, one right in
    both and seven in one: Student's ± 2.3646 · .17678 / √8 around 9/16. One L1 of .06, seven of
    .02: ± 2.3646 · .014142 / √8 around .025.
    """
    rows = [painted("edit", 0, index, index < 2) for index in range(4)]
    rows += [painted("together", 0, index, True) for index in range(8)]
    rows += [painted("together", 1, index, not index, 0.02 if index else 0.1) for index in range(8)]
    assert table_of(rows).splitlines()[2:] == [
        "| all tasks together | 2 | – | 56.2% (41.5% to 71.0%) | – | 0.025 ± 0.012 (0.010) |",
        "| edits alone | 1 | – | 50.0% (15.0% to 85.0%) | – | 0.020 ± 0.000 (0.010) |",
    ]


def test_a_share_of_which_items_tell_little():
    """Four items that no seed has right: Wilson's interval, up to z² / (4 + z²)."""
    rows = [painted("together", seed, index, False) for index in range(4) for seed in range(3)]
    found = share_over_items(rows)
    assert found == {"share": 0, "low": 0, "high": pytest.approx(3.84146 / 7.84146), "n": 4}
    # two items of two seeds, 1 and .5: ± 12.7 · .25 around .75 is cut off
    rows = [painted("together", s, i, not (s and i)) for i in range(2) for s in range(2)]
    assert share_over_items(rows) == {"share": 0.75, "low": 0, "high": 1, "n": 2}
    # the same place of two rows is two items
    rows = [painted("together", 0, 5, True, row=row) for row in ("edit-add", "edit-move")]
    assert share_over_items(rows)["n"] == 2 and share_over_items([]) is None


def test_rows_go_to_the_variant_of_their_folder(tmp_path):
    for folder in ("subject-0", "subject_edit-0", "subject_edit-12"):
        (tmp_path / folder).mkdir()
        row = {"row": "subject-one", "index": 0, "task": "subject", "checks": {"right": True}}
        (tmp_path / folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert "An item counts once: " in write_mutual(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("subject", 0), ("subject_edit", 0), ("subject_edit", 12),
    ]  # fmt: skip


def test_the_table_of_errors():
    """Of two triplets: 0.3 and 0.1 for 0.2 and 0.1, a rise of 0.05 over 0.15, ± 12.7 · 0.05."""
    errors = [
        {"variant": name, "seed": seed, "task": "edit", "place": place, "error": error}
        for name, seed, place, error in (
            ("together", 0, 4, 0.1), ("together", 1, 4, 0.3), ("together", 0, 7, 0.1),
            ("no_latents", 0, 4, 0.3), ("no_latents", 0, 7, 0.1),
        )
    ]  # fmt: skip
    assert error_table(errors).splitlines()[2:] == [
        "| all tasks together | – | 0.1500 | – |",
        "| without the autoencoder's features | – | 0.2000 (+33.3% ± 423.5) | – |",
    ]
    assert error_table([]) == ""


def test_errors_are_those_of_each_triplet_alone(work):
    """The same noise and steps, whatever else is in the list's batches."""
    model, root = work / "begin", work / "triplets"
    args = (root, work / "features", 3, "cpu")
    found = held_out_errors(model, root / "triplets.json", *args)
    assert [each["place"] for each in found] == list(range(12))
    parts = load_parts(model)
    trained = TrainedModel(
        parts, Diffusion.of(parts["scheduler"]), end=1, round_timesteps=False
    ).eval()
    samples = Samples(
        RecordList(root / "triplets.json"), np.arange(12), open_features(args[1], model), root,
        Facts.of(model), 3, 12, 1, 5, 1,
    )  # fmt: skip
    (batch,) = samples[0]  # place 5 alone
    batch = replace(batch, draws=torch.ones(1))
    with torch.no_grad():
        errors = [
            trained(replace(batch, timesteps=torch.tensor([step]))).mse.item()
            for step in (100, 300, 500, 700, 900)
        ]
    assert found[5]["task"] == batch.tasks[0]
    assert found[5]["error"] == pytest.approx(sum(errors) / 5, rel=1e-5)


def test_the_command_goes_on_where_it_was(work, tmp_path, monkeypatch, fails, capsys):
    """One update each, two rows; then nothing is trained or painted anew."""
    some = {name: ROWS[name] for name in ("subject-one", "edit-recolour")}
    monkeypatch.setattr("toybox.mige.evaluation.items.ROWS", some)
    monkeypatch.setattr("toybox.mige.evaluate.ROWS", some)
    argv = ["--work", str(tmp_path / "W"), "--steps", "1", "--items", "1", "--device", "cpu"]
    argv += ["--variants", "edit", "no_pictures", "--held_out", "6"]
    in_words, write = [], WordsPainter._in_words

    def written(self, item, whole):
        in_words.append(item.row)
        return write(self, item, whole)

    monkeypatch.setattr(WordsPainter, "_in_words", written)
    for name in ("begin", "triplets", "features"):
        argv += [f"--{name}", str(work / name)]
    command.main(argv)
    table = capsys.readouterr().out
    assert in_words == [*some]  # of the variant without pictures, and of no other
    facts = read_facts(tmp_path / "W/edit-0/run/checkpoint.safetensors")
    assert facts["settings"]["seed"] == 0
    rows = [json.loads(line) for line in (tmp_path / "W/rows.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["task"]) for row in rows] == [
        ("edit", "edit"), ("no_pictures", "subject"), ("no_pictures", "edit"),
    ]  # fmt: skip
    assert all(row["l1"] > 0 for row in rows if row["task"] == "edit")
    assert "| edits alone | 1 | – | " in table and "| edits alone | – | 0." in table
    lines = (tmp_path / "W/errors.jsonl").read_text().splitlines()
    errors = [json.loads(line) for line in lines]
    places = {
        name: {row["place"] for row in errors if row["variant"] == name}
        for name in ("edit", "no_pictures")
    }
    assert places["no_pictures"] == set(range(6)) > places["edit"] != set()
    monkeypatch.setattr(command, "train", None)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))
    argv[argv.index("--begin") + 1] = "~/begin"
    command.main(argv)
    assert table_of(rows) in capsys.readouterr().out
    settings = tmp_path / "W/settings.json"
    known = json.loads(settings.read_text())
    assert known.pop("training_batch") == 16
    settings.write_text(json.dumps(known))  # of an earlier version
    command.main(argv)
    capsys.readouterr()
    told = fails(command.main, [*argv, "--steps", "2"]).err
    assert "was made with --steps 1; go on with that, or give another --work" in told
    shutil.copytree(work / "begin", tmp_path / "other")
    index = tmp_path / "other/model_index.json"
    index.write_text(index.read_text().replace('"compose "', '"composed "'))
    told = fails(command.main, [*argv, "--begin", str(tmp_path / "other")]).err
    assert "was made with another --begin; go on with that, or give another --work" in told


@pytest.mark.parametrize("name, steps", [("together", 5), ("longer", 15)])
def test_what_a_training_is_told(tmp_path, monkeypatch, name, steps):
    """One three times as long sees as many samples of each task as those of one task."""
    words = ["--begin", "b", "--triplets", "t", "--features", "f", "--steps", "5"]
    _, options = command.parse_args([*words, "--training_batch", "128", "--workers", "2"])
    told = []
    monkeypatch.setattr("mige.train.main", told.extend)
    command.train(options, name, tmp_path, 3)
    _, given = parse_args(told)
    assert (given.steps, given.seed, given.workers) == (steps, 3, 2)
    assert given.batch_size == given.micro_batch_size == 128
    assert given.learning_rate == pytest.approx(2 * RECIPE["learning_rate"])
    assert given.ema == RECIPE["ema"]


def test_bad_input(tmp_path, fails):
    argv = ["--begin", "b", "--triplets", str(tmp_path), "--features", "f"]
    told = fails(command.main, [*argv, "--work", str(tmp_path / "W")]).err
    assert "triplets.json; `python -m toybox.triplets` writes it" in told
    for name in ("items", "training_batch"):
        assert f"--{name} is 0" in fails(command.main, [*argv, f"--{name}", "0"]).err
