"""The shipped weights: plain diffusers draws with them, and they are as good as is said."""

import json

import pytest
import torch

from mifo.models import load_base, toybox_folder
from toybox.config import TrainConfig
from toybox.evaluate import grounding, load_pipeline
from toybox.model import ToyboxConfig
from toybox.scenes import HUES, KINDS
from toybox.train import psnr

RECORD = json.loads((toybox_folder() / "record.json").read_text())


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(toybox_folder())


def test_it_fits_in_the_repository():
    size = sum(path.stat().st_size for path in toybox_folder().rglob("*") if path.is_file())
    assert size < 25e6


def test_plain_diffusers_draws_what_the_prompt_says_no_matter_how_badly(pipeline):
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    red, blue = pipeline(
        ["a red cat", "a blue cat"], num_inference_steps=12, generator=draw, output_type="np"
    ).images
    assert red.shape == (128, 128, 3)
    assert red.std() > 0.02
    # The same noise: what differs is the word, and the toy has its colour.
    assert (red - blue)[..., 0].max() > 0.2
    assert (blue - red)[..., 2].max() > 0.2


def test_the_vocabulary_knows_every_word_of_the_scenes(pipeline):
    for word in " ".join([*KINDS, *HUES]).replace("_", " ").split():
        assert len(pipeline.tokenizer(word).input_ids) == 3, word


def test_autoencoder_is_as_good_as_recorded(pipeline):
    config = TrainConfig(kinds=tuple(RECORD["train"]["kinds"]))
    assert psnr(pipeline.vae, config, ToyboxConfig(), count=16) > RECORD["psnr_db"] - 1


def test_object_words_attend_to_their_objects(pipeline):
    found = grounding(pipeline, 128, seed=0, scenes=12, kinds=RECORD["train"]["kinds"])
    assert found["auc"] > 0.85


def test_mifo_loads_it_by_name():
    base = load_base("toybox")
    assert (base.resolution, base.multiple) == (128, 16)
    config = json.loads((toybox_folder() / "vae/config.json").read_text())
    assert base.vae.config.scaling_factor == config["scaling_factor"] != 0.18215
