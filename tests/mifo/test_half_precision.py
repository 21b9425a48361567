"""Half precision on the CPU: the real commands, beside the same run in float32."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import semantic_learning
import semantic_synthesis
from imagelab.models.stable_diffusion import load_base
from imagelab.training.checkpoint import read_facts
from imagelab.training.loop import Trainer
from mifo.learning import plan, run, stages
from mifo.learning.places import CHECKPOINT
from mifo.tokens import add_asset_tokens, initial_rows


def rows_of(folder) -> torch.Tensor:
    """The learned rows [assets, width] of a learned folder."""
    return torch.cat([load_file(folder / f"asset{i}.safetensors")[f"<asset{i}>"] for i in (0, 1)])


@pytest.fixture
def fp16(monkeypatch):
    """Lets fp16 be learned with on the CPU, where it is slow and refused; sets its first scale."""
    monkeypatch.setattr(plan, "choose_precision", lambda *_: torch.float16)
    scaler = torch.amp.GradScaler

    def start(scale):
        monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, init_scale=scale))

    return start


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_learning(precision, learn_argv, learned_dir, small_sd, tmp_path, request):
    """Losses within 1%; the rows move the same way (cosine above 0.99)."""
    if precision == "float16":
        request.getfixturevalue("fp16")
    argv = [*learn_argv, "--mixed_precision", "bf16", "--output_dir", str(tmp_path)]
    semantic_learning.main(argv)
    folders = learned_dir / "toys", tmp_path / "toys"
    full, half = (json.loads((folder / "manifest.json").read_text()) for folder in folders)
    assert (full["precision"], half["precision"]) == ("float32", precision)
    for name, loss in full["final_losses"].items():
        assert half["final_losses"][name] == pytest.approx(loss, rel=1e-2)
    base = load_base(str(small_sd))
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, 2)
    begun = initial_rows(base.tokenizer, base.text_encoder, ids, (), seed=1)
    moved = [(rows_of(folder) - begun).flatten() for folder in folders]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99


def test_the_scale_of_fp16_goes_on(fp16, learn_argv, tmp_path, monkeypatch):
    """A resumed run has the scale of its checkpoint, not the one that a run starts with."""
    argv = [*learn_argv, "--output_dir", str(tmp_path), "--finetune", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_result", full_disk)
        fp16(1024.0)
        with pytest.raises(SystemExit):
            semantic_learning.main(argv)
    facts = read_facts(tmp_path / ".toys.work" / CHECKPOINT)
    assert facts["scaler"]["scale"] == 1024 and facts["scaler"]["_growth_tracker"] == 3
    fp16(2.0)
    seen = []
    monkeypatch.setattr(
        run, "Trainer", lambda *args, **more: seen.append(Trainer(*args, **more)) or seen[0]
    )
    semantic_learning.main([*argv, "--resume"])
    assert seen[0].scaler.state_dict() == facts["scaler"]


def full_disk(*_):
    raise OSError("full")


def overflow_above(limit, monkeypatch) -> list[float]:
    """Gradients are infinite while the scale is above a limit; returns the scales of all tries."""
    learning_loss, scales = stages.learning_loss, []

    def overflowing(*args):
        loss = learning_loss(*args)

        def spoil(gradient):
            scales.append(gradient.item())
            return gradient * float("inf") if gradient.item() > limit else gradient

        loss.total.register_hook(spoil)
        return loss

    monkeypatch.setattr(stages, "learning_loss", overflowing)
    return scales


def test_a_step_that_overflows_in_fp16_is_repeated(fp16, learn_argv, tmp_path, monkeypatch):
    """All three steps of stage 1 are made, the first one at the third try."""
    scales = overflow_above(256.0, monkeypatch)
    updates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *args, **more: updates.append(1) or step(*args, **more)
    )
    fp16(1024.0)
    argv = [*learn_argv, "--output_dir", str(tmp_path), "--finetune", "none"]
    semantic_learning.main(argv)
    assert scales == [1024.0, 512.0, 256.0, 256.0, 256.0]
    assert len(updates) == 3


def test_infinite_gradients_at_a_scale_of_1_are_a_failure(
    fp16, learn_argv, tmp_path, monkeypatch, capsys
):
    overflow_above(0.0, monkeypatch)
    fp16(4.0)
    argv = [*learn_argv, "--output_dir", str(tmp_path), "--finetune", "none"]
    with pytest.raises(SystemExit) as stop:
        semantic_learning.main(argv)
    assert stop.value.code == 1
    assert "not finite at step 0 of stage 1" in capsys.readouterr().err


def test_synthesis(learned_dir, tmp_path):
    """The same picture: its values, 0 to 255, differ by less than 2 on average."""
    pictures = []
    for precision in ("no", "bf16"):
        folder = tmp_path / precision
        options = f"""--models_dir {learned_dir} --model_id toys --output_path {folder} --seed 7
            --num_images 1 --num_inference_steps 4 --guidance_steps 2 --guidance_iterations 2
            --device cpu --mixed_precision {precision}""".split()
        semantic_synthesis.main([*options, "--prompt", "a photo of <asset0> and <asset1>"])
        with Image.open(folder / "toys" / "0000.png") as picture:
            pictures.append(np.asarray(picture.convert("RGB")).astype(float))
    assert np.abs(pictures[0] - pictures[1]).mean() < 2
    assert pictures[1].std() > 5
