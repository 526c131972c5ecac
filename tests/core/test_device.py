"""Tests of milan.core.device: what a machine with GPUs does, seen from one without."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import torch
from counting import GPU as COUNTED
from counting import fake_gpu
from helpers import ROOT, Notes
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from milan.config import PretrainConfig
from milan.core.device import (
    MEAN,
    STD,
    Sender,
    copy_to,
    denormalise,
    normalise,
    pick_device,
    ranks_here,
    tf32,
)
from milan.core.distributed import process_group
from milan.errors import ConfigError
from milan.objectives.resample import resampled_attention, resampled_features
from milan.store.codecs import codec_of
from milan.training.build import resolve_defaults
from milan.training.loop import _StepResult

GPU = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda as it answers on a machine with two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("name", "index", "ranks"), [("auto", 0, 2), ("cuda", 0, 2), ("cuda:1", 1, 1)]
)
def test_a_gpu_has_its_index_from_the_start(
    two_gpus: None, name: str, index: int, ranks: int
) -> None:
    """What is kept by device is found again by a tensor's; a named GPU is the only one used."""
    device = pick_device(name)
    assert device == torch.device("cuda", index)
    assert ranks_here(name, device, None) == ranks


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, two_gpus: None) -> None:
    """One line, whether there are others or none."""
    with pytest.raises(ConfigError, match=r"--device cuda:2: .*expected: cuda:0 to cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device cuda: torch .* sees no GPU.*--device auto"):
        pick_device("cuda")


def test_bf16_by_emulation_is_no_support(monkeypatch: pytest.MonkeyPatch, two_gpus: None) -> None:
    """A card before Ampere takes fp16; torch says that it supports bf16, by emulation. Nobody else
    asks torch: not what measures how fast a card trains either."""
    config, seen = PretrainConfig("t.zarr"), []
    for capable, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported",
            lambda including_emulation=True, c=capable: including_emulation or c,
        )  # fmt: skip
        seen.append((resolve_defaults(config, GPU).precision, expected))
    assert all(ours == expected for ours, expected in seen)
    assert files_with(r"is_bf16_supported") == {"milan/training/build.py"}


def test_nothing_fake_is_kept() -> None:
    """An estimate runs on tensors without memory; a run after it in the same process is real."""
    features, attention = torch.randn(2, 17, 8), torch.rand(2, 16)
    codec = codec_of("int8").fitted(features.flatten(0, 1))
    codes, scale = codec.encode(features)
    assert scale is not None

    def estimate() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            on_gpu = [fake.from_tensor(t).to(GPU) for t in (codes, scale, features, attention)]
            assert codec.decode(*on_gpu[:2]).device == GPU
            assert resampled_features(on_gpu[2], 9, 1).device == GPU
            assert resampled_attention(on_gpu[3], 9, 1).device == GPU
            pixels = torch.zeros(1, 6, 6, 3, dtype=torch.uint8, device=GPU)
            assert normalise(pixels, MEAN, STD).device == GPU

    estimate()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is FakeTensor]


def test_constants_of_inference_serve_training() -> None:
    """Made in inference mode they would raise as soon as a gradient needs them."""
    pixels = torch.full((1, 2, 2, 3), 9, dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    with torch.inference_mode():
        normalise(pixels, mean, std)
    weight = torch.ones((), requires_grad=True)
    images = normalise(pixels, mean, std)
    (images * weight).sum().backward()
    assert torch.equal(denormalise(images, mean, std), pixels)


@pytest.mark.parametrize(("name", "waits"), [("cuda:1", False), ("mps:0", True), ("cpu", True)])
def test_only_cuda_copies_without_waiting(name: str, waits: bool) -> None:
    """A temporary may be freed before Apple's device has it."""

    class Spy:
        def to(self, device: torch.device, *, non_blocking: bool) -> bool:
            return non_blocking

    assert copy_to(Spy(), torch.device(name)) is not waits  # type: ignore[arg-type, comparison-overlap]


def test_nothing_else_copies_without_waiting() -> None:
    """But what events guard: what is trained and its figures, and batches in pinned buffers."""
    users = files_with(r"non_blocking=(?!False)")
    assert users == {"milan/core/device.py", "milan/core/transfer.py"}


def test_whoever_waits_for_a_gpu_says_for_which() -> None:
    """--device cuda:1: without a device torch waits for cuda:0, or asks it, and a time is wrong."""
    unnamed = r"(synchronize|current_stream|mem_get_info|max_memory_allocated|Stream)\(\)"
    assert files_with(rf"torch\.cuda\.{unnamed}") == set()
    assert files_with(r"torch\.device\(.cuda.[ )]") == set()


def files_with(pattern: str) -> set[str]:
    """The project's modules in whose text it is."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in ("milan", "pipeline", "stages", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(pattern, path.read_text())
    }


def test_no_part_of_a_batch_is_overwritten_while_kernels_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not those of other teachers either, which are tuples in the batch: torch is told of all."""
    told: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copies")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Kernels())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Kernels())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: told.append(tensor))

    class Kernels:
        def record(self, stream: object) -> None: ...

        def wait_event(self, event: object) -> None: ...

    parts = [torch.zeros(1) for _ in range(5)]
    sender = Sender(GPU)
    sent = sender.send((parts[0], (tuple(parts[1:3]), (parts[3], None)), None, parts[4]), tuple)
    sender.receive(sent)
    assert [any(one is part for one in told) for part in parts] == [True] * 5


@pytest.mark.parametrize(
    "offence",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.new_tensor([1.0, 2.0]),
    ],
)
def test_what_waits_for_a_gpu_is_seen(
    offence: Callable[[torch.Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the counter that other tests rely on: it counts, or the tensor without memory refuses."""
    with fake_gpu(monkeypatch) as (_, waits):
        x = torch.zeros(2, device=COUNTED)
        waits.found.clear()
        with suppress(DataDependentOutputException, DynamicOutputShapeException):
            offence(x)
            assert waits.found


def test_figures_are_awaited_on_the_stream_of_their_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--device cuda:1: an event on the stream of cuda:0 would be over at once."""
    recorded: list[torch.device] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            pass

        def record(self, stream: torch.device) -> None:
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    with FakeTensorMode():
        loss, norm = torch.zeros((), device=GPU), torch.zeros((), device=GPU)
        assert _StepResult.from_device(0, [], [loss], norm).ready
    assert recorded == [GPU]


def test_a_single_run_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What names no device, as an event or a kernel's workspace, belongs to the run's."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with process_group(None, GPU) as (_, device):
        assert (device, current) == (GPU, [GPU])


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_for_a_run_alone(on: bool) -> None:
    """A teacher in float32 in the same process computes as it did; CPUs never notice."""
    products = torch.backends.cuda.matmul
    before = products.allow_tf32, torch.get_float32_matmul_precision()
    with suppress(KeyError), tf32(GPU, on):
        assert products.allow_tf32 == torch.backends.cudnn.allow_tf32 == on
        assert torch.backends.mkldnn.matmul.fp32_precision != "tf32"
        raise KeyError
    assert (products.allow_tf32, torch.get_float32_matmul_precision()) == before
    with tf32(torch.device("cpu"), on):
        assert (products.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_tf32_is_said_where_float32_is_asked_for(two_gpus: None) -> None:
    """In a line that tells how to switch it off; bf16 has its own products, a CPU has none."""
    for device, precision, setting, expected in (
        (GPU, "fp32", True, True), (GPU, "fp32", False, False), (GPU, "bf16", True, False),
        (torch.device("cpu"), "fp32", True, False),
    ):  # fmt: skip
        notes = Notes()
        config = PretrainConfig(precision=precision, tf32=setting, batch_size=4)
        with tf32(device, resolve_defaults(config, device).tf32, notes):
            pass
        said = [line for line in notes.lines if "TF32" in line]
        assert bool(said) == expected
        assert all("--set tf32=false" in line for line in said)
