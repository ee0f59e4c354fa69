"""ProximalAdamW on two ranks: DTensors, gradients in buckets, distributed checkpoints; plainly and by the kernels."""

import pytest
import torch

from tests.helpers.ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    return run_on_ranks(
        out,
        "tests.finetuning.step_on_ranks",
        lambda rank: [str(rank)],
        lambda rank: {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
        weights_only=True,
    )


@pytest.mark.parametrize("how", ["fsdp", "ddp", "fsdp by kernels", "ddp by kernels"])
def test_ranks_together_do_what_one_does_alone(ranks, how) -> None:
    """The clipped norm and the drift are those of the whole, which no rank has."""
    truth = ranks[0]["alone"]
    assert truth["drift"] > 0.01
    for rank in ranks:
        assert rank[how]["kernels"] == (2 if "kernels" in how else 0)  # without an anchor, and with one
        assert rank[how]["drift"] == pytest.approx(truth["drift"], rel=1e-4)
        for name, weight in rank[how]["weights"].items():
            assert torch.allclose(weight, truth["weights"][name.removeprefix("module.")], rtol=0, atol=1e-6)
        for name, weight in ranks[0][how]["weights"].items():
            assert torch.equal(weight, rank[how]["weights"][name])


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_brings_the_anchor_back_or_says_that_it_is_lost(ranks, flatten) -> None:
    for rank in ranks:
        found = rank["checkpoints"][flatten]
        assert found["moved True"] == found["moved False"] == []
        assert found["loaded True"] == found["drift"] > 0.01
        assert found["pull"] == 0.5
        assert "an anchor was saved, and it was not loaded. Call anchor()" in found["loaded False"]
