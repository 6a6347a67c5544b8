"""The comparison of recipes for the context of a batch runs, on a few images and batches."""

import re
from pathlib import Path

import context_recipes
import pytest
import torch

from it3_lightning.networks import SmallCNN


def test_a_line_for_each_recipe_has_gains_on_every_stream(
    idx_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    states = {f"network.{k}": v for k, v in SmallCNN(1, 10, 28).state_dict().items()}
    (tmp_path / "models").mkdir()
    kept = tmp_path / "models" / "seed_0_perturbed.ckpt"
    torch.save({"fingerprint": "", "states": states}, kept)
    few = ["--root", str(idx_images), "--steps", "3", "--batches", "1", "--validation", "40"]
    context_recipes.main([str(tmp_path), *few])
    title, _, base, em, *recipes = capsys.readouterr().out.strip().splitlines()
    assert title.count("|") - 2 == 2 * len(context_recipes.STREAMS)
    assert len(re.findall(r" \d+\.\d ", base)) == 2 * len(context_recipes.STREAMS)
    assert em.startswith("| EM of class frequencies | ")
    names = [line.split("|")[1].strip() for line in recipes]
    assert [name for name in names if ", third" not in name] == [
        recipe.name for recipe in context_recipes.RECIPES
    ]
    assert all(
        len(re.findall(r"[+-]\d+\.\d", line)) == 2 * len(context_recipes.STREAMS)
        for line in [em, *recipes]
    )
