"""A student whose weights are sharded (fsdp) is the student."""

from __future__ import annotations

import pytest
import sharded_worker
import torch
from sharded_worker import Step
from torch.distributed import HashStore

from milan.core.device import PRECISIONS
from milan.core.launch import launch
from milan.core.progress import NoProgress


def assert_half_where_products_are(seen: dict[str, torch.dtype], precision: str) -> None:
    """Weights of products travel in half precision; norms and sums between blocks do not."""
    assert seen == {
        "encoder.blocks.0.mlp.fc1": PRECISIONS[precision],
        "encoder.blocks.0.norm1": torch.float32,
        "decoder.blocks.1": torch.float32,
    }


@pytest.mark.parametrize(
    ("precision", "recompute", "deep"),
    [
        ("bf16", False, False),
        ("bf16", True, False),
        ("bf16", True, True),
        ("fp16", False, False),
    ],
)
def test_a_sharded_student_computes_what_autocast_does(
    precision: str, recompute: bool, deep: bool
) -> None:
    """To the bit on one rank, with one decoder: loss, gradients and what is kept stay float32."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        ours = Step(precision, recompute=recompute, deep=deep, size=1)
    finally:
        torch.distributed.destroy_process_group()
    bare = Step(precision, recompute=recompute, deep=deep)
    assert_half_where_products_are(ours.seen, precision)
    assert ours.dtypes == {torch.float32}
    assert [loss.dtype for loss in ours.losses] == 2 * [torch.float32]
    assert ours.losses == bare.losses
    assert ours.grads.keys() == bare.grads.keys()
    for name, grad in ours.grads.items():
        assert grad.dtype == torch.float32
        if deep:  # what comes from two decoders may be added in another order
            torch.testing.assert_close(grad, bare.grads[name], rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(grad, bare.grads[name]), name


@pytest.mark.soak
def test_two_ranks_average_in_float32(forked_ranks: None) -> None:
    """Each has half of every weight. Losses are those of a bare student on each rank's images, and
    gradients the average of its gradients, to the bit: no sum is made in half precision."""
    found = launch(
        sharded_worker.as_one_of, {"precision": "bf16"}, ranks=2,
        restarts=0, restart_arguments=dict, progress=NoProgress(),
    )  # fmt: skip
    bare = [Step("bf16", rank=rank) for rank in range(2)]
    assert bare[0].losses != bare[1].losses
    for ours, alone in zip(found, bare, strict=True):
        assert_half_where_products_are(ours["seen"], "bf16")
        assert ours["dtypes"] == {torch.float32}
        assert ours["losses"] == alone.losses
        assert ours["grads"].keys() == alone.grads.keys()
        for name, grad in ours["grads"].items():
            average = (bare[0].grads[name] + bare[1].grads[name]) / 2
            assert torch.equal(grad, average), name
