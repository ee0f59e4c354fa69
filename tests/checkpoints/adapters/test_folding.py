"""An adapter folded from its files is what PEFT's own layer does, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from fastlock.checkpoints.adapters.folding import fold_adapter
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.storage.places import files_in
from tests.helpers.adapters import base_model, loaded, read_adapter, save_adapter, shift
from tests.helpers.families import random_lock, tiny_model

STRENGTH = 6.0


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("adapters") / "base")


LORAS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 12},
}


@pytest.mark.parametrize("kind", LORAS)
def test_folds_as_peft_does(kind: str, base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["o_proj", "q_proj"], **LORAS[kind])
    directory = save_adapter(config, tmp_path / "adapter")
    checkpoint, lock = Checkpoint(files_in(base), str(base)), random_lock(tiny_model("llama"))
    folds = fold_adapter(read_adapter(directory), checkpoint, lock, STRENGTH)
    model = loaded(base, directory)
    for fold in folds:
        d = lock.displacement(STRENGTH)[fold.layer].dense(fold.site.num_heads * fold.site.head_dim)
        expected = shift(model, fold.layer, d)
        torch.testing.assert_close(fold.bias, expected, rtol=1e-12, atol=1e-12)
        assert fold.touched
        assert fold.gap > 0.1
