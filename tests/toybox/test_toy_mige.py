"""What toybox's MIGE is made of: sizes, words, prompts, and the folder that is written."""

import math

import pytest
import torch
from tiny_toy_mige import TINY, the_tokenizer, the_vae, tiny_parts, words_alone
from torch import nn

from imagelab.errors import UserError
from mige.data.checking import Limits
from mige.data.records import Record
from mige.folder import find_folder, read_settings, read_tokenizer
from mige.method.wording import MARK, TASKS, prompt_for
from mige.pipeline import MigePipeline
from toybox.mige.architecture import (
    GUIDANCE,
    PREFIXES,
    VAE,
    ToyMigeConfig,
    build_parts,
    build_pipeline,
    new_parameters,
    save,
)
from toybox.scenes.triplets import WORDS, draw_triplet


@pytest.fixture(scope="module")
def parts() -> dict:
    return build_parts(ToyMigeConfig(), the_vae(), the_tokenizer(), 0)


# ----------------------------------------------------------------------------------------------
# sizes, and how parts begin


def test_all_new_parts_take_15_mb_in_half_precision(parts):
    counts = new_parameters(parts)
    assert set(counts) == {"transformer", "text_encoder", "vision_encoder", "qformer", "fusion"}
    tables = parts["fusion"].null_text.numel()
    assert 10e6 < 2 * (sum(counts.values()) + tables) < 15e6


def test_the_classes_are_those_of_the_full_model(parts):
    assert [type(part).__name__ for part in parts.values()] == [
        "PixArtTransformer2DModel", "T5EncoderModel", "Blip2VisionModel", "Blip2QFormerModel",
        "InstructionFusion", "ContinuousDPMSolver",
    ]  # fmt: skip
    told = parts["scheduler"].config
    assert (told.beta_start, told.beta_end) == (0.00085, 0.012)
    assert (told.beta_schedule, told.prediction_type) == ("scaled_linear", "v_prediction")


def test_parts_that_read_begin_at_a_size_that_keeps_signals(parts):
    assert parts["fusion"].query_tokens.std() <= 0.05
    for name in ("qformer", "vision_encoder"):
        for layer in parts[name].modules():
            if isinstance(layer, nn.Linear):
                deviation = layer.weight.std().item()
                assert deviation == pytest.approx(layer.in_features**-0.5, rel=0.05)


def test_the_trunk_says_nothing_at_first_but_can_learn_to(parts):
    trunk = parts["transformer"]
    text, mask = torch.randn(1, 48, 128), torch.ones(1, 48)
    said = trunk(
        torch.randn(1, 24, 16, 16), encoder_hidden_states=text, timestep=torch.tensor([5.0]),
        encoder_attention_mask=mask,
    ).sample  # fmt: skip
    assert said.shape == (1, 24, 16, 16) and not said.any()
    said.sum().backward()
    assert trunk.proj_out.weight.grad.any()
    trunk.zero_grad()
    deviation = trunk.pos_embed.proj.weight.std().item()
    assert deviation == pytest.approx(math.sqrt(2 / (192 + 24 * 4)), rel=0.05)


def test_a_seed_fixes_all_parts_and_draws_nothing_from_the_common_stream():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = tiny_parts(0), tiny_parts(0), tiny_parts(1)
    assert torch.equal(torch.get_rng_state(), before)
    for name in new_parameters(one):
        first, again, else_ = (dict(each[name].state_dict()) for each in (one, same, other))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert any(not torch.equal(first[key], else_[key]) for key in first)


# ----------------------------------------------------------------------------------------------
# words and prompts


def test_every_word_is_one_piece():
    tokenizer = the_tokenizer()
    words = [*WORDS, *" ".join(PREFIXES.values()).split()]
    for word in words:
        assert tokenizer(word, add_special_tokens=False).tokens() == [f"▁{word}"]
    assert tokenizer("a big dog", add_special_tokens=False).tokens() == [
        "▁a", "▁", "b", "i", "g", "▁dog",
    ]  # fmt: skip
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize("task", TASKS)
def test_training_and_inference_read_one_prompt(task):
    for text in (f"a{MARK}and a{MARK}", f"into{MARK}put{MARK}", f"{MARK} at the top", "A red Dog."):
        trained = prompt_for(task, text, PREFIXES, for_training=True)
        assert trained == prompt_for(task, text, PREFIXES)
        assert trained.split()[0].split("<")[0] in ("compose", "edit", "combine")
        assert trained.split()[0].split("<")[0] not in WORDS


def test_prompts_fit_with_room_for_a_persons_own_words(monkeypatch):
    """Of 20,000 the longest takes 34 tokens; here are fewer, and that one."""
    words_alone(monkeypatch)
    config = ToyMigeConfig()
    sizes = config.slots, PREFIXES, the_tokenizer(), config.queries
    drawn = [draw_triplet(0, "train", index) for index in range(600)]
    records = {
        Record(each.task, "t", ("e",) * len(each.entities), None, each.prompt) for each in drawn
    }
    assert len(records) > 300
    limits = Limits(*sizes, 34)
    assert not [problem for record in records for problem in limits.problems(record)]
    longest = Record(
        "subject", "t", ("e", "e"), None,
        f"a picture of a{MARK}at the bottom and a{MARK}at the top on a wooden table",
    )  # fmt: skip
    assert not list(limits.problems(longest))
    assert list(Limits(*sizes, 33).problems(longest)) == [
        " takes 34 tokens with its pictures, and the model reads 33"
    ]
    assert config.text_length >= 34 + 14


# ----------------------------------------------------------------------------------------------
# the folder


def test_the_folder_is_a_whole_model_with_toyboxs_own_autoencoder(tmp_path):
    parts = tiny_parts()
    folder = tmp_path / "model"
    save(
        build_pipeline(parts, the_vae(), the_tokenizer(), TINY.slots), folder, {"a.json": {"b": 1}}
    )
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (folder / "vae" / file).read_bytes() == (VAE / file).read_bytes()
    assert (folder / "a.json").is_file()
    pipeline = MigePipeline.from_pretrained(folder)
    assert (pipeline.size.width, pipeline.size.height) == (128, 128)
    assert pipeline.config.slots == 2 and not pipeline.config.round_timesteps
    assert pipeline.config.prefixes == PREFIXES and pipeline.config.guidance == GUIDANCE
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    for name in new_parameters(parts):
        loaded, saved = getattr(pipeline, name).state_dict(), parts[name].state_dict()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    text = "replace the tropical fish in xylophone"
    assert read_tokenizer(folder / "tokenizer")(text).input_ids == the_tokenizer()(text).input_ids


def test_a_folder_takes_the_place_of_what_may_be_replaced_alone(tmp_path):
    """Whatever was there when the command began."""
    pipeline = build_pipeline(tiny_parts(), the_vae(), the_tokenizer(), TINY.slots)
    folder, note = tmp_path / "model", tmp_path / "model" / "notes.txt"
    save(pipeline, folder, {"begin.json": {"a": 1}})
    with pytest.raises(UserError, match="model holds a model; replace it with --overwrite"):
        save(pipeline, folder)
    note.touch()
    with pytest.raises(UserError, match="model holds notes.txt, which would be removed"):
        save(pipeline, folder, overwrite=True)
    assert note.is_file() and (folder / "begin.json").is_file()
    note.unlink()

    class Slow:
        def save_pretrained(self, aside):
            pipeline.save_pretrained(aside)
            note.touch()

    with pytest.raises(UserError, match="model holds notes.txt, which would be removed"):
        save(Slow(), folder, overwrite=True)
    note.unlink()
    save(pipeline, folder, overwrite=True)
    assert not (folder / "begin.json").exists()


def test_the_one_that_ships_says_how_it_is_sampled():
    assert read_settings(find_folder("toybox"))["guidance"] == GUIDANCE
