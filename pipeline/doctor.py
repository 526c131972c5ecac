"""`milan doctor`: will an extraction and a pretraining work here, asked in seconds.

Each check calls what extraction and pretraining call at their own start, and leaves nothing behind.
What fails there is a finding here: what was found, and what to type.
"""

from __future__ import annotations

import multiprocessing
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from timm.models.vision_transformer import Block

from milan.core.device import autocast, pick_device, try_device
from milan.core.machine import cpu_count, free_memory, open_files
from milan.core.paths import AnyPath, is_local
from milan.core.progress import NoProgress, Progress
from milan.core.units import format_bytes
from milan.data.feeding import Feeding, Loading, Workers, loader_cores, workers_with_files
from milan.data.loader import check_locks
from milan.errors import MilanError
from milan.images.manifest import Manifest, build_manifest, resolve_data
from milan.images.splits import WantedSplit
from milan.training.build import precision_of
from milan.version import __version__
from pipeline.cluster.node import versions
from pipeline.config import ExtractConfig
from pipeline.estimate.decoding import decoding_of
from pipeline.estimate.throughput import scratch
from pipeline.extraction.hardware import Hardware
from pipeline.extraction.plan import teacher_spec
from pipeline.teachers.load import FAMILIES
from pipeline.teachers.weights import find_weights, go_offline
from pipeline.writing.backend import location_of

OK, WARNING, FAILS = "ok", "look", "FAILS"
_LISTING = 5.0  # seconds in which the data have to be listed
_NODES = 12.0  # seconds in which every node of a cluster has to answer
_LEAST_MEMORY, _LEAST_DISK = 4 << 30, 5 << 30
_DRIVER = Path("/proc/driver/nvidia/version")  # there if a GPU's driver is loaded
# The published ViT-B/16 student: (width, heads, tokens, blocks) of its encoder and its decoder.
_STUDENT = ((768, 12, 50, 12), (512, 16, 197, 8))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: str
    """OK; WARNING: it works, but look at it; FAILS: something will not work."""
    found: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def diagnose(config: ExtractConfig, *, progress: Progress | None = None) -> list[Finding]:
    """Look at this machine and what `config` names; its `data` may be empty. Writes nothing.

    Errors are findings.
    """
    progress = progress or NoProgress()
    data = _Data(config)
    checks: dict[str, Check] = {
        "software": _software,
        "device": lambda: _device(config.device),
        "memory and cores": _memory,
        "open files": _descriptors,
        "shared memory": _shared_memory,
        "store": lambda: _store(config.out),
        "teacher": lambda: _teacher(config),
        "data": data.listed,
        "data loading": lambda: data.loading(config.device),
        "cluster": lambda: _cluster(config, data.root),
    }
    findings: list[Finding] = []
    progress.begin("look", len(checks), "checks")
    for done, (what, check) in enumerate(checks.items(), 1):
        try:
            findings += check()
        except MilanError as error:
            expected = f" (expected: {error.expected})" if error.expected else ""
            findings.append(Finding(what, FAILS, error.found + expected, error.fix))
        except OSError as error:
            findings.append(Finding(what, FAILS, str(error)))
        progress.advance(done)
    progress.end()
    return findings


# --- this machine ---------------------------------------------------------------------------------


def _software() -> Iterator[Finding]:
    here = versions()
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    text = f"milan {__version__}, Python {here['python']}, torch {torch.__version__} ({cuda})"
    yield Finding("software", OK, f"{text}, ray {here['ray']}, {platform.system()}")


def _device(name: str) -> Iterator[Finding]:
    if _DRIVER.exists() and not torch.cuda.is_available():
        yield Finding(
            "device",
            FAILS if name.startswith("cuda") else WARNING,
            f"a GPU's driver is loaded, and torch {torch.__version__} cannot use it",
            "a torch that fits the driver (pytorch.org)"
            + ("" if torch.version.cuda else "; this one was built without CUDA"),
        )
    device = pick_device(name)
    count = torch.cuda.device_count() if device.type == "cuda" and ":" not in name else 1
    for number in range(count):
        each = torch.device("cuda", number) if count > 1 else device
        try_device(each)
        text = f"{each} computes"
        if each.type == "cuda":
            about = torch.cuda.get_device_properties(each)
            free, _ = torch.cuda.mem_get_info(each)
            text += f": {about.name}, {format_bytes(about.total_memory)}, {format_bytes(free)} free"
        yield Finding("device", OK, text)


def _memory() -> Iterator[Finding]:
    free, cores = free_memory(), cpu_count()
    little = free < _LEAST_MEMORY
    yield Finding(
        "memory and cores", WARNING if little else OK,
        f"{format_bytes(free)} are free, {cores} cores may be used",
        "end other programs, or a smaller --batch-size and --num-workers" if little else "",
    )  # fmt: skip


def _descriptors() -> Iterator[Finding]:
    cores = loader_cores()
    allowed = workers_with_files(cores)
    few = allowed < cores
    yield Finding(
        "open files", WARNING if few else OK,
        f"{open_files():,} are allowed, enough for {max(0, allowed):,} loader workers",
        f"ulimit -n 65536, for {cores} loader workers" if few else "",
    )  # fmt: skip


def _shared_memory() -> Iterator[Finding]:
    workers = loader_cores()
    check_locks(multiprocessing.get_context("forkserver"), workers)
    folder = Path("/dev/shm")
    free = f", {format_bytes(shutil.disk_usage(folder).free)} free" if folder.is_dir() else ""
    yield Finding("shared memory", OK, f"room for the locks of {workers} loader workers{free}")


# --- the store and the teacher --------------------------------------------------------------------


def _store(out: str) -> Iterator[Finding]:
    location = location_of(out)
    location.check()
    tried = "rename, fsync and lock" if location.has_folders else "credentials, conditional PUT"
    free = location.free_bytes()
    little = free is not None and free < _LEAST_DISK
    size = "" if free is None else f", {format_bytes(free)} free"
    yield Finding(
        "store", WARNING if little else OK, f"{location.path}: {tried} work{size}",
        "`milan plan` says what a store takes" if little else "",
    )  # fmt: skip


def _teacher(config: ExtractConfig) -> Iterator[Finding]:
    if config.offline:
        go_offline()
    spec = teacher_spec(config, Hardware("local", (), on_gpu=False))
    family = next(family for family in FAMILIES if family.accepts(spec.name))
    if family.weights is None:
        yield Finding("teacher", WARNING, f"{spec.name}: known only once it is loaded")
        return
    yield Finding("teacher", OK, find_weights(family.weights(spec), offline=config.offline))


# --- data -----------------------------------------------------------------------------------------


class _Data:
    """The images, if any are named."""

    def __init__(self, config: ExtractConfig) -> None:
        self.config = config
        self.root: AnyPath | None = None
        self.manifest: Manifest | None = None

    def listed(self) -> Iterator[Finding]:
        """Where they are, and how many, if that can be said in time."""
        config = self.config
        if not config.data:
            yield Finding("data", OK, "none named", "--data looks at them too")
            return
        source = self.root = resolve_data(config.data, config.data_root)
        result: list[Manifest | MilanError] = []

        def build() -> None:
            try:
                wanted = WantedSplit(config.split)
                result.append(build_manifest(source, seed=config.seed, split=wanted))
            except MilanError as error:
                result.append(error)

        began = time.perf_counter()
        lister = Thread(target=build, daemon=True, name="list")
        lister.start()
        lister.join(_LISTING)
        if not result:
            yield Finding("data", OK, f"{source}: listing takes longer than {_LISTING:g} s")
            return
        if isinstance(result[0], MilanError):
            raise result[0]
        self.manifest = result[0]
        seconds = time.perf_counter() - began
        yield Finding("data", OK, f"{source}: {len(self.manifest):,} images, {seconds:.1f} s")

    def loading(self, device_name: str) -> Iterator[Finding]:
        """What a core loads of them against what the device trains on."""
        if self.manifest is None:
            return
        try:
            device = pick_device(device_name)
        except MilanError:  # it has a finding of its own
            return
        decoding = decoding_of(self.manifest, self.manifest.root, self.config.view_spec(224))
        if decoding is None:
            yield Finding(
                "data loading", FAILS, "none of the first images can be decoded",
                "milan plan --data … lists why",
            )  # fmt: skip
            return
        rate = student_rate(device)
        seconds = decoding.stored if self.config.store_views != "none" else decoding.original
        workers = Workers(loader_cores(), "cores")
        stored = self.config.store_views != "none"
        feeding = Feeding(Loading(1000, 1000 * seconds, 1000 * seconds), workers, 1, stored, rate)
        words = feeding.words()
        slow = words.startswith("slower")
        verdict, _, remedy = words.partition("; try: ")
        yield Finding("data loading", WARNING if slow else OK, f"{verdict} (ViT-B/16)", remedy)


def student_rate(device: torch.device) -> float:
    """Images/s that `device` trains the published ViT-B/16 student on, from a block of each half.

    Forward and backward pass, without the embedding, the update of the weights and the loss.
    """
    precision = precision_of("auto", device)
    images = 64 if device.type == "cuda" else 2
    total = 0.0
    for width, heads, tokens, blocks in _STUDENT:
        block = Block(width, heads, qkv_bias=True).to(device)
        x = torch.randn(images, tokens, width, device=device)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            with autocast(device, precision):
                loss = block(x).float().square().mean()
            loss.backward()
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        total += blocks * min(seconds[1:])
    return images / total


# --- a cluster ------------------------------------------------------------------------------------


def _cluster(config: ExtractConfig, data: AnyPath | None) -> Iterator[Finding]:
    if not config.address:
        return
    from pipeline.cluster.connect import RemoteClass, ask_every_node

    location = location_of(config.out)
    shown: dict[str, str] = {}
    with scratch(location) as folder:
        if location.has_folders:
            shown[str(folder)] = str(location.path)
        if data is not None:
            shown[str(data.absolute() if is_local(data) else data)] = str(data)
        asked = RemoteClass("pipeline.cluster.node", "Node", {})
        answers = ask_every_node(config.address, asked, "look", [*shown], seconds=_NODES)
    here = versions()
    for host, answer in answers.items():
        yield _node(host, answer, here, shown)


def _node(host: str, answer: Any, here: dict[str, str], shown: dict[str, str]) -> Finding:
    what = f"node {host}"
    if isinstance(answer, MilanError):
        return Finding(what, FAILS, answer.found, "install the same milan there, and look at Ray")
    there, unseen = answer
    if differ := [f"{n} {there[n]}, here {here[n]}" for n in here if there.get(n) != here[n]]:
        return Finding(what, FAILS, "; ".join(differ), "install the same versions there")
    if unseen:
        names = ", ".join(shown[path] for path in unseen)
        return Finding(
            what, FAILS, f"does not see {names}", "a disk that all machines share, or a bucket"
        )
    seen = f", sees {', '.join(shown.values())}" if shown else ""
    return Finding(what, OK, f"the same milan, Python, torch and Ray{seen}")
