"""The shipped weights: plain diffusers draws with them, and they are as good as is said."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from imagelab.models.stable_diffusion import load_base
from toybox.classifier.network import SCENE, hue_names, load_classifier, to_input
from toybox.scenes.toys import HUES, KINDS
from toybox.stable_diffusion import FOLDER
from toybox.stable_diffusion.architecture import ToyboxConfig
from toybox.stable_diffusion.config import TrainConfig
from toybox.stable_diffusion.evaluate import grounding
from toybox.stable_diffusion.train import psnr

RECORD = json.loads((FOLDER / "record.json").read_text())


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(FOLDER)


def test_it_fits_in_the_repository():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 25e6


def test_plain_diffusers_draws_what_the_prompt_says(pipeline):
    hues = ["red", "green", "blue", "pink"]
    pictures = pipeline(
        [f"a {hue} cat" for hue in hues],
        num_inference_steps=12,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(0) for _ in hues],  # the same noise for all
    ).images
    assert {picture.size for picture in pictures} == {(128, 128)}
    seen = load_classifier().read(to_input(pictures, SCENE))
    right = [found == hue for found, hue in zip(hue_names(seen.hue), hues, strict=True)]
    assert sum(right) >= 3
    assert [KINDS[kind] for kind in seen.kind()].count("cat") >= 3


def test_the_vocabulary_knows_every_word_of_the_scenes(pipeline):
    for word in " ".join([*KINDS, *HUES]).replace("_", " ").split():
        assert len(pipeline.tokenizer(word).input_ids) == 3, word


def test_autoencoder_is_as_good_as_recorded(pipeline):
    """On the very scenes that the record tells of."""
    config = TrainConfig(**RECORD["train"])
    assert psnr(pipeline.vae, config, ToyboxConfig()) == pytest.approx(RECORD["psnr_db"], abs=0.05)


def test_object_words_attend_to_their_objects(pipeline):
    found = grounding(pipeline, 128, seed=0, scenes=12, kinds=RECORD["train"]["kinds"])
    assert found["auc"] > 0.85


def test_mifo_loads_it_by_name():
    base = load_base("toybox")
    assert (base.resolution, base.multiple) == (128, 16)
    config = json.loads((FOLDER / "vae/config.json").read_text())
    assert base.vae.config.scaling_factor == config["scaling_factor"] != 0.18215
