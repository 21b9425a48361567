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
from mifo.learning import plan
from mifo.learning import run as learning
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
    scales = []
    with monkeypatch.context() as patch:
        patch.setattr(learning, "_save", full_disk)
        fp16(1024.0)
        with pytest.raises(SystemExit):
            semantic_learning.main(argv)
    facts = read_facts(tmp_path / ".toys.work" / plan.CHECKPOINT)
    assert facts["scaler"]["scale"] == 1024 and facts["scaler"]["_growth_tracker"] == 3
    fp16(2.0)
    monkeypatch.setattr(learning, "_save", lambda _, run: scales.append(run.scaler.state_dict()))
    semantic_learning.main([*argv, "--resume"])
    assert scales == [facts["scaler"]]


def full_disk(*_):
    raise OSError("full")


@pytest.mark.parametrize("scale", [1024.0, 1.0])
def test_infinite_gradients_in_fp16(scale, fp16, learn_argv, tmp_path, monkeypatch, capsys):
    """Their steps are left out while the scale can fall; at 1 they are a failure."""
    step_loss = learning.step_loss

    def overflowing(*args):
        loss = step_loss(*args)
        loss.total.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(learning, "step_loss", overflowing)
    fp16(scale)
    runs = []
    monkeypatch.setattr(learning, "_save", lambda _, run: runs.append(run))
    argv = [*learn_argv, "--output_dir", str(tmp_path), "--finetune", "none"]
    if scale == 1:
        with pytest.raises(SystemExit):
            semantic_learning.main(argv)
        assert "not finite at step 0 of stage 1" in capsys.readouterr().err
        return
    semantic_learning.main(argv)
    (run,) = runs
    assert torch.equal(run.rows, run.plan.rows)
    assert run.scaler.get_scale() == scale / 2**3


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
