"""The predicted peak of memory, against what a process really took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

STEP = Path(__file__).parent / "memory_worker.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"batch_size": 64, "micro_batch": 32}, marks=pytest.mark.soak),
        pytest.param({"batch_size": 64}, marks=pytest.mark.soak),
        pytest.param({"batch_size": 64, "precision": "bf16"}, marks=pytest.mark.soak),
        pytest.param({"batch_size": 128, "checkpoint_activations": True}, marks=pytest.mark.soak),
    ],
    ids=["accumulated", "fp32", "bf16", "recomputed"],
)
def test_prediction_is_near_the_truth(settings: dict) -> None:
    """Near what the kernel says that a process took at most, if it gives back what it frees.

    By default it does not: malloc keeps what is freed below its threshold, so as not to ask again.
    That is told beside it; it depends on the order of sizes, not on the step's memory.
    """
    predicted, measured = _taken(settings, {"MALLOC_MMAP_THRESHOLD_": "16384"})
    _, default = _taken(settings, {})
    print(
        f"{settings}: predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB "
        f"({predicted / measured:.2f}), with malloc's default {default / 1e6:.0f} MB "
        f"({predicted / default:.2f})"
    )
    assert 0.95 < predicted / measured < 1.2
    assert default > 0.95 * predicted


def _taken(settings: dict, environment: dict[str, str]) -> tuple[int, int]:
    """(bytes predicted, bytes measured) in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(STEP), json.dumps(settings)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=600,  # bf16 is very slow on CPUs that have no instructions for it
    )
    assert done.returncode == 0, done.stderr
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    return predicted, measured
