"""`--mixed_precision bf16` on the CPU: the real commands, beside the same run in float32."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import semantic_learning
import semantic_synthesis
from mifo.models import load_base
from mifo.tokens import add_asset_tokens, initial_rows


def rows_of(folder) -> torch.Tensor:
    """The learned rows [assets, width] of a learned folder."""
    return torch.cat([load_file(folder / f"asset{i}.safetensors")[f"<asset{i}>"] for i in (0, 1)])


def test_learning(learn_argv, learned_dir, small_sd, tmp_path):
    """Losses within 1%; the rows move the same way (cosine above 0.99)."""
    argv = [*learn_argv, "--mixed_precision", "bf16", "--output_dir", str(tmp_path)]
    semantic_learning.main(argv)
    folders = learned_dir / "toys", tmp_path / "toys"
    full, half = (json.loads((folder / "manifest.json").read_text()) for folder in folders)
    assert (full["precision"], half["precision"]) == ("float32", "bfloat16")
    for name, loss in full["final_losses"].items():
        assert half["final_losses"][name] == pytest.approx(loss, rel=1e-2)
    base = load_base(str(small_sd))
    ids = add_asset_tokens(base.tokenizer, base.text_encoder, 2)
    begun = initial_rows(base.tokenizer, base.text_encoder, ids, (), seed=1)
    moved = [(rows_of(folder) - begun).flatten() for folder in folders]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99


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
