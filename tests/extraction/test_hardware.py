"""Tests of pipeline.extraction.hardware: what runs where, on machines that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from milan.errors import ConfigError
from pipeline.cluster import connect
from pipeline.config import ExtractConfig
from pipeline.extraction import hardware
from pipeline.extraction.hardware import Workers, hardware_of, plan_workers
from pipeline.extraction.plan import teacher_spec

CLUSTERS = {
    "cpu": [(16, 0), (8, 0)],
    "gpu": [(8, 0), *[(64, 8)] * 4],
}


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with so many GPUs, 12 cores, and the clusters above at their names."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(hardware, "cpu_count", lambda: 12)
    monkeypatch.setattr(connect, "cluster_nodes", lambda address: CLUSTERS[address])


@pytest.mark.parametrize(
    ("machine", "settings", "executor", "device", "precision", "workers"),
    [
        (0, {}, "local", "auto", "fp32", Workers(1, 12, None)),
        (1, {}, "local", "auto", "fp16", Workers(1, 12, None)),
        (4, {}, "ray", "cuda", "fp16", Workers(4, 3, None)),
        (4, {"device": "cuda:2"}, "local", "cuda:2", "fp16", Workers(1, 12, None)),
        (4, {"device": "cpu"}, "local", "cpu", "fp32", Workers(1, 12, None)),
        (4, {"executor": "local"}, "local", "auto", "fp16", Workers(1, 12, None)),
        (0, {"replicas": 3}, "ray", "auto", "fp32", Workers(3, 4, 4)),
        (0, {"address": "gpu"}, "ray", "cuda", "fp16", Workers(32, 8, None)),
        (0, {"address": "gpu", "device": "cpu"}, "ray", "cpu", "fp32", Workers(1, 8, 8)),
        (0, {"address": "gpu", "replicas": 4}, "ray", "cuda", "fp16", Workers(4, 16, None)),
        (2, {"address": "cpu", "replicas": 4}, "ray", "auto", "fp32", Workers(4, 4, 4)),
        (0, {"address": "gpu", "precision": "bf16"}, "ray", "cuda", "bf16", Workers(32, 8, None)),
    ],
    indirect=["machine"],
)
def test_device_and_precision_are_those_of_the_workers(
    machine: None, settings: dict[str, Any], executor: str, device: str, precision: str,
    workers: Workers,
) -> None:  # fmt: skip
    """A driver without GPUs uses those of its cluster, and the cores are shared node by node."""
    config = ExtractConfig("photos", **settings)
    chosen = hardware_of(config)
    assert chosen.executor == executor
    assert chosen.worker_device(config.device) == device
    assert teacher_spec(config, chosen).precision == precision
    assert plan_workers(config, chosen) == workers
    if "address" in settings and chosen.on_gpu:
        assert chosen.driver_device(config.device) == "auto"


@pytest.mark.parametrize(
    ("machine", "settings", "message"),
    [
        (4, {"device": "cuda:2", "executor": "ray"}, "CUDA_VISIBLE_DEVICES=2"),
        (0, {"device": "cuda:1", "address": "gpu"}, "Ray gives each worker a GPU of its own"),
        (0, {"device": "cuda", "address": "cpu"}, "the cluster at cpu has no GPU"),
        (1, {"replicas": 2, "executor": "local"}, "--executor ray"),
    ],
    indirect=["machine"],
)
def test_what_no_machine_can_do(machine: None, settings: dict[str, Any], message: str) -> None:
    """Refused before a teacher is loaded."""
    config = ExtractConfig("photos", **settings)
    with pytest.raises(ConfigError, match=message):
        plan_workers(config, hardware_of(config))
