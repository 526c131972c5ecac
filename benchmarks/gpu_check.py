"""Whether a GPU computes what the CPU does, is not kept waiting, and how fast it trains.

    make gpu-check            or  python -m benchmarks.gpu_check [--skip speed] [--device cuda]

One GPU, at most ten minutes, no network. Prints a table and writes benchmarks/results/gpu.json.
Each part stands alone: one that fails is a row of the table, and the others go on. Data and teacher
are the demo's; for speed a ViT-B/16 with random weights. Beside torch, torchvision, timm, numpy and
tensorstore it needs open_clip_torch, zarr, pyarrow, safetensors, google-crc32c, pillow, simplejpeg,
matplotlib and rich; not Ray, typer, faiss or tensorboard.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import milan
from benchmarks.measure import RESULTS, noise_photos
from benchmarks.step import Case, case
from milan.config import PretrainConfig
from milan.core.device import PRECISIONS, Idle, Sender, autocast, copy_to, pick_device, tf32
from milan.core.distributed import Ranks, parallelise
from milan.core.progress import NoProgress
from milan.errors import MilanError, TrainError
from milan.objectives.base import Prediction
from milan.objectives.features import FeatureRegression
from milan.store.codecs import codec_of
from milan.training.checkpoint import Writer
from milan.training.compilation import StepLoss
from milan.training.estimate import estimate_run
from milan.training.loop import _StepResult
from milan.training.memory import peak_bytes
from pipeline.extract import extract_targets
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec

DEMO = Path(__file__).resolve().parents[1] / "demo"
CPU = torch.device("cpu")


class Row(NamedTuple):
    """A line of the table."""

    part: str
    what: str
    value: float | str
    bound: float | None = None
    """Largest value that is good; None: a figure without a verdict."""
    good: bool | None = None


@dataclass
class Check:
    """What the parts share."""

    device: torch.device
    folder: Path
    small: bool
    """Sizes for a test without a GPU."""
    rows: list[Row] = field(default_factory=list)

    def at_most(self, part: str, what: str, value: float, bound: float) -> None:
        """A value with a bound."""
        self.rows.append(Row(part, what, value, bound, bool(value <= bound)))

    def true(self, part: str, what: str, good: bool, value: str = "") -> None:
        """A statement."""
        self.rows.append(Row(part, what, value or ("yes" if good else "NO"), None, good))

    def figure(self, part: str, what: str, value: float | str) -> None:
        """A figure."""
        self.rows.append(Row(part, what, value))

    @property
    def batch(self) -> int:
        """Images a step of `run`."""
        return 16 if self.small else 128

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def store(self) -> str:
        """Targets of four batches of the demo's images; made once."""
        out = self.folder / "targets.zarr"
        if not (out / "index.json").exists():
            extract_targets(
                str(DEMO / "data/train.parquet"), out=str(out), executor="local",
                limit=4 * self.batch, shard_size=2 * self.batch, yes=True,
                teacher=str(DEMO / "teacher/config.json"), device=str(self.device),
                pretrained=str(DEMO / "teacher/model.safetensors"),
            )  # fmt: skip
        return str(out)

    def run(self, name: str, **settings: Any) -> dict[str, Any]:
        """A small pretraining of 20 steps, or as `settings` say."""
        return milan.pretrain(self.store(), **self.settings(name) | settings)

    def settings(self, name: str) -> dict[str, Any]:
        """Those of `run`."""
        return {
            "out": str(self.folder / name), "model": "vit_tiny_patch16_224", "epochs": 5,
            "model_args": {"patch_size": 4, "embed_dim": 96, "depth": 2}, "batch_size": self.batch,
            "num_workers": 0,
            "decoder": {"embed_dim": 64, "depth": 2, "num_heads": 4}, "device": str(self.device),
            "log_every": 1, "save_every": 1000, "compile": "off", "held_out": 0.0,
            "report_to": "none", "progress": NoProgress(),
        }  # fmt: skip

    def losses(self, name: str) -> list[float]:
        """Of the steps in a run's log."""
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    a, b = ours.detach().float().cpu(), theirs.detach().float().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


# --- parts ----------------------------------------------------------------------------------------


def parity(check: Check) -> None:
    """The CPU's masks, pixels, codes, losses and gradients; float32 without TF32, and with it."""
    with tf32(check.device, False):
        _parity(check)
    _, _, loss, grads = _gradients(check, CPU, "fp32")
    with tf32(check.device, True):
        _, _, far_loss, far_grads = _gradients(check, check.device, "fp32")
    error = max(relative(far, near) for far, near in zip(far_grads, grads, strict=True))
    check.at_most("parity", "loss, fp32 in TF32", relative(far_loss, loss), 1e-3)
    check.at_most("parity", "gradients, fp32 in TF32", error, 2e-2)


def _parity(check: Check) -> None:
    draw = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(64, 64, generator=draw))
    book = torch.randn(16, 256, 4, generator=draw)
    quantised = codec_of("pq:16").restored({"rotation": rotation.numpy(), "codebook": book.numpy()})
    indexes = torch.randint(0, 256, (8, 50, 16), dtype=torch.uint8, generator=draw)
    with autocast(check.device, "fp16"):  # its tables stay float32
        far_features = quantised.decode(indexes.to(check.device), None)
    error = relative(far_features, quantised.decode(indexes, None))
    check.at_most("parity", "pq decoded, under autocast", error, 1e-6)
    for name in ("int8", "float16"):
        features = torch.randn(8, 50, 64)
        codec = codec_of(name).fitted(features.flatten(0, 1))
        codes, scale = codec.encode(features)
        far_scale = None if scale is None else scale.to(check.device)
        here, there = codec.decode(codes, scale), codec.decode(codes.to(check.device), far_scale)
        check.at_most("parity", f"{name} decoded", relative(there, here), 1e-6)
        again, _ = codec.encode(features.to(check.device))
        steps = (again.cpu().float() - codes.float()).abs().max()
        limit = 1.0 if name == "int8" else 0.0  # one step, where a value lies between two
        check.at_most("parity", f"{name} encoded, steps", float(steps), limit)
    for precision in ("fp32", "bf16", "fp16"):
        results = [_gradients(check, device, precision) for device in (CPU, check.device)]
        (mask, images, loss, grads), (far_mask, far_images, far_loss, far_grads) = results
        if precision == "fp32":
            check.true("parity", "masks are identical", torch.equal(mask, far_mask.cpu()))
            check.at_most("parity", "pixels", relative(far_images, images), 1e-6)
        bounds = (1e-5, 1e-3) if precision == "fp32" else (5e-2, 5e-2)
        error = max(relative(far, near) for far, near in zip(far_grads, grads, strict=True))
        check.at_most("parity", f"loss, {precision}", relative(far_loss, loss), bounds[0])
        check.at_most("parity", f"gradients, {precision}", error, bounds[1])
    spec: dict[str, Any] = {"name": str(DEMO / "teacher/config.json")}
    spec |= {"pretrained": str(DEMO / "teacher/model.safetensors")}
    pixels = np.random.default_rng(0).integers(0, 256, (32, 28, 28, 3), dtype=np.uint8)
    half = "fp16" if check.device.type == "cuda" else "bf16"
    near, _ = load_teacher(TeacherSpec(**spec, precision="fp32"), device="cpu").targets(pixels)
    teacher = load_teacher(TeacherSpec(**spec, precision=half), device=str(check.device))
    check.at_most("parity", f"teacher, {half}", relative(teacher.targets(pixels)[0], near), 2e-2)


def _gradients(check: Check, device: torch.device, precision: str) -> tuple[Any, ...]:
    """(mask, images, loss, gradients) of one micro-batch; the same on every device."""
    torch.manual_seed(0)
    built = _case(check, CPU, precision, micro=8)
    student, batch = built.student.to(device), built.batch.to(device)
    objective = built.settings.objective(built.targets)
    with autocast(device, precision):
        prediction = objective.predict(student, batch)
        loss = objective.loss(prediction)
    loss.backward()
    # Whole layers: a single small gradient is mostly rounding.
    grads = [p.grad for p in student.parameters() if p.grad is not None and p.ndim > 1]
    return prediction.mask.boolean(), prediction.images, loss, grads


def _case(check: Check, device: torch.device, precision: str, **more: Any) -> Case:
    """ViT-B/16 as published, or a small one."""
    micro = more.pop("micro")
    if check.small:
        more |= {
            "model": "vit_tiny_patch16_224", "model_args": {"patch_size": 32, "depth": 2},
            "decoder": {"embed_dim": 64, "depth": 1, "num_heads": 2},
        }  # fmt: skip
    patch = 32 if check.small else 16
    return case(precision, micro, "ViT-B/16", patch, device, micro=micro, **more)


class _Guard(NoProgress):
    """Forbids waiting for the device between two steps of a run."""

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        self.cuda, self.first, self.last = device.type == "cuda", first, last
        self.guarded = 0

    def advance(self, done: int, figures: str = "") -> None:
        """After each step."""
        if self.cuda and done in (self.first, self.last):
            torch.cuda.set_sync_debug_mode("error" if done == self.first else "default")
        self.guarded = max(self.guarded, min(done, self.last) - self.first)


def waits(check: Check) -> None:
    """Twenty steps in which nothing waits for the device."""
    guard = _Guard(check.device, 5, 25)
    try:
        more = {"log_every": 1000, "batch_size": check.batch // 8, "epochs": 1, "progress": guard}
        check.run("waits", **more)
        check.true("waits", "twenty steps without a synchronisation", guard.guarded == 20)
    finally:
        if check.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def late(check: Check) -> None:
    """A loss that is read late is the loss; one that is not finite is named."""
    square = torch.randn(2048 if not check.small else 64, device=check.device).diag()
    equal = True
    for step in range(20):
        for _ in range(20):
            square = square @ square.clamp(-1, 1)
        loss = square.mean() + step
        result = _StepResult.from_device(step, [None], [loss], loss)
        late_value = result.loss.item()
        equal &= late_value == loss.item()
    check.true("late", "a loss read late equals a blocking read", equal)
    try:
        check.run("nan", objective="benchmarks.gpu_check:Spoilt")
        check.true("late", "a NaN is named", False, "the run went on")
    except TrainError as error:
        check.true(
            "late", "a NaN is named", "loss of step 7 is nan" in str(error), error.found[:60]
        )


class Spoilt(FeatureRegression):
    """MILAN's objective, not a number at its eighth call."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.calls = 0

    def loss(self, prediction: Prediction) -> torch.Tensor:
        """The eighth is NaN."""
        self.calls += 1
        return super().loss(prediction) * (float("nan") if self.calls == 8 else 1.0)


def copies(check: Check) -> None:
    """What is copied beside the device's work arrives whole: batches, and checkpoints from it."""
    cuda, device = check.device.type == "cuda", check.device
    equal = []
    square = torch.randn(4096 if not check.small else 64, device=device).diag()
    sender, idle = Sender(device), Idle(device)
    for step in range(50):
        for _ in range(5):
            square = square @ square.clamp(-1, 1)  # the kernels that a copy runs beside
        batch = torch.full((64, 224, 224, 3), step, dtype=torch.uint8)
        batch = batch.pin_memory() if cuda else batch
        with idle.measured():
            sent = sender.send((batch,), lambda parts: tuple(copy_to(p, device) for p in parts))
            (there,) = sender.receive(sent)
        equal.append((there == step).all())
        del batch, sent, there  # their memory may be given out again, to the next one
    check.true("copies", "fifty batches on a stream of their own", bool(torch.stack(equal).all()))
    check.true("copies", "the device's clock tells how long it waited", idle.seconds >= 0)
    student = _case(check, device, "fp32", micro=4).student
    before = {name: tensor.cpu().clone() for name, tensor in student.state_dict().items()}
    optimiser = torch.optim.SGD(student.parameters())
    run = check.folder / "copied"
    run.mkdir()
    writer = Writer(run, student, optimiser, keep=1)
    began = time.perf_counter()
    writer.save(1, {"scaler": {}, "losses": [0.0, 0]})
    waited = time.perf_counter() - began
    with torch.no_grad():
        for parameter in student.parameters():  # the next step, while it is written
            parameter.zero_()
    writer.wait()
    took = time.perf_counter() - began
    saved = load_file(run / "checkpoints/step-00000001/model.safetensors")
    same = all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    check.true("copies", "a checkpoint is what was trained when it began", same)
    check.figure("copies", "share of a checkpoint that training waits", waited / took)


def resume(check: Check) -> None:
    """Killed and resumed, in half precisions, and on another device."""
    for precision in ("bf16", "fp16"):
        whole, killed = f"whole-{precision}", f"killed-{precision}"
        more = {"precision": precision, "save_every": 4, "epochs": 10}
        check.run(whole, **more)
        in_the_middle = _kill(check, killed, more)
        check.true("resume", f"it was killed in the middle, {precision}", in_the_middle)
        check.run(killed, **more)
        ours, theirs = check.losses(killed), check.losses(whole)
        error = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        check.at_most("resume", f"killed and resumed, {precision}", error, 1e-3)
    for device, steps in ((str(check.device), 7), ("cpu", 7), (str(check.device), None)):
        done = check.run("devices", device=device, stop_after=steps, precision="auto")
    check.run("device", precision="auto")
    moved, stayed = check.losses("devices")[-1], check.losses("device")[-1]
    check.true("resume", "GPU, CPU and GPU again", bool(done["finished"]))
    check.at_most("resume", "its last loss", abs(moved - stayed) / stayed, 5e-2)


def _kill(check: Check, name: str, more: dict[str, Any]) -> bool:
    """Start a run in a process of its own, and kill it after a few steps; whether that was so."""
    settings = check.settings(name) | more
    del settings["progress"]
    script = f"import milan; milan.pretrain({check.store()!r}, **{settings!r})"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    log, end = check.folder / name / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and '"step": 9,' in log.read_text()):
        if process.poll() is not None or time.monotonic() > end:
            break
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and '"step": 9,' in log.read_text()


def groups(check: Check) -> None:
    """One rank under DDP and FSDP2 against the bare model."""
    cuda = check.device.type == "cuda"
    address = f"file://{check.folder}/rendezvous"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=address, rank=0, world_size=1)
    try:
        for precision, bound in (("fp32", 1e-4), ("bf16", 1e-2)):
            bare = _losses(check, None, precision)
            for kind in ("ddp", "fsdp"):
                losses = _losses(check, kind, precision)
                error = max(abs(a - b) / b for a, b in zip(losses, bare, strict=True))
                check.at_most("groups", f"{kind}, five steps in {precision}", error, bound)
    finally:
        dist.destroy_process_group()


def _losses(check: Check, kind: str | None, precision: str) -> list[float]:
    torch.manual_seed(0)
    built = _case(check, check.device, precision, micro=8)
    student, network = built.student, built.student
    if kind:  # as one of several: a single rank has no wrapper
        network = parallelise(student, Ranks(size=2), kind, precision)  # type: ignore[assignment]
    optimiser = torch.optim.SGD(student.parameters(), lr=0.01)
    objective, losses = built.settings.objective(built.targets), []
    for _ in range(5):
        with autocast(check.device, precision):
            loss = StepLoss(objective, network, objective.loss)(built.batch.to(check.device))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def speed(check: Check) -> None:
    """ViT-B/16: images/s, share of this GPU's rate of products, memory against the prediction."""
    precision = "bf16" if check.device.type == "cuda" else "fp32"
    rate = _product_rate(check, precision)
    check.figure("speed", f"products, {precision}, TFLOP/s", rate / 1e12)
    for micro in (4,) if check.small else (64, 128, 256):
        for compiled in ("off", "on"):
            if compiled == "on" and check.device.type != "cuda":
                continue
            name = f"{micro} images, {'compiled' if compiled == 'on' else 'eager'}"
            built = _case(check, check.device, precision, micro=micro, compile=compiled)
            _speed(check, built, micro, rate, name)
            del built
            if check.device.type == "cuda":
                torch.cuda.empty_cache()
            torch._dynamo.reset()


def _speed(check: Check, built: Case, micro: int, rate: float, name: str) -> None:
    cuda, device = check.device.type == "cuda", check.device
    predicted = peak_bytes(built.student, built.settings, built.targets, device, micro)
    step = built.run(micro)
    for _ in range(3):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(3 if check.small else 10):
        began = time.perf_counter()
        step()
        check.wait()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    objective = built.settings.objective(built.targets)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        StepLoss(objective, built.student, objective.loss)(built.batch.to(device))
    work = 3 * counter.get_total_flops()
    check.figure("speed", f"{name}, images/s", micro / seconds)
    check.figure("speed", f"{name}, share of the product rate", work / seconds / rate)
    if cuda and "eager" in name:
        taken = torch.cuda.max_memory_allocated(device)
        check.at_most("speed", f"{name}, memory error", abs(taken / predicted - 1), 0.1)


def _product_rate(check: Check, precision: str) -> float:
    """Operations a second of large square products."""
    size = 512 if check.small else 8192
    a = torch.randn(size, size, device=check.device, dtype=PRECISIONS[precision] or torch.float32)
    times = []
    for _ in range(10):
        check.wait()
        began = time.perf_counter()
        a @ a
        check.wait()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def dry_run(check: Check) -> None:
    """What --dry-run says of a run, against the run."""
    settings = check.settings("dry") | {"epochs": 20, "log_every": 1000}
    del settings["progress"]
    rows = dict(estimate_run(PretrainConfig(check.store(), **settings)))
    said = float(rows["images/s"].split(",")[0].replace(",", ""))
    took = check.run("dry", epochs=20, log_every=1000)["images_per_second"]
    check.at_most("dry-run", "images/s, difference", abs(said / took - 1), 0.2)


class _Memory(NoProgress):
    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, {}  # type: ignore[var-annotated]

    def advance(self, done: int, figures: str = "") -> None:
        if done in (50, 200):
            cuda = self.device.type == "cuda"
            self.bytes[done] = torch.cuda.memory_allocated(self.device) if cuda else 1


def memory(check: Check) -> None:
    """Two hundred small steps leave nothing behind."""
    watched = _Memory(check.device)
    more = {"batch_size": check.batch // 8, "epochs": 7, "log_every": 1000, "progress": watched}
    check.run("memory", **more)
    growth = watched.bytes[200] / watched.bytes[50] - 1
    check.at_most("memory", "growth from step 50 to step 200", growth, 0.01)


def extraction(check: Check) -> None:
    """Generated JPEGs: the share of the time in which the teacher computes."""
    images = 8 if check.small else 512
    photos = noise_photos(check.folder / "photos", images)
    busy, events, targets = [0.0], list[Any](), Teacher.targets
    cuda, free = check.device.type == "cuda", [0]

    def timed(self: Teacher, pixels: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return targets(self, pixels)  # the sample for the codec, before the first block
        if not cuda:
            began = time.perf_counter()
            result = targets(self, pixels)
            busy[0] += time.perf_counter() - began
            return result
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        guarded = len(events) > 3  # constants are on the device by then
        torch.cuda.set_sync_debug_mode("error" if guarded else "default")
        try:
            result = targets(self, pixels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        free[0] += guarded
        events[-1][1].record()
        return result

    name = "ViT-B-32-quickgelu" if check.small else "ViT-B-16-quickgelu"
    Teacher.targets = timed  # type: ignore[method-assign]
    try:
        done = extract_targets(
            str(photos), out=str(check.folder / "photos.zarr"), pretrained="none", teacher=name,
            executor="local", device=str(check.device), shard_size=128, yes=True,
        )  # fmt: skip
    finally:
        Teacher.targets = targets  # type: ignore[method-assign]
    if cuda:
        check.wait()
        busy[0] = sum(first.elapsed_time(last) for first, last in events) / 1000
        check.true("extraction", "batches of the teacher that wait for nothing", free[0] > 0,
                   f"{free[0]}")  # fmt: skip
    check.figure("extraction", "views/s", done["images_per_second"])
    check.figure(
        "extraction",
        "share of the time that the teacher computes",
        busy[0] / done["seconds"],
    )


PARTS: dict[str, Callable[[Check], None]] = {
    "parity": parity, "waits": waits, "late": late, "copies": copies, "resume": resume,
    "groups": groups,
    "speed": speed, "dry-run": dry_run, "memory": memory, "extraction": extraction,
}  # fmt: skip


# --- the table ------------------------------------------------------------------------------------


def run_parts(check: Check, names: list[str]) -> dict[str, float]:
    """Run the parts; returns the seconds of each. One that raises is a row that is not good."""
    seconds = {}
    for name in names:
        began = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            PARTS[name](check)
        except Exception as error:  # whatever it is: the other parts go on
            text = str(error).strip().splitlines() or [""]
            check.true(name, "ran to its end", False, f"{type(error).__name__}: {text[0]}"[:120])
            if not isinstance(error, MilanError):
                traceback.print_exc()
        seconds[name] = round(time.perf_counter() - began, 1)
    return seconds


def write(check: Check, seconds: dict[str, float], out: Path) -> bool:
    """Print the table and write it as JSON; returns whether all is good."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "what", "value", "at most", "verdict")
    for row in check.rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:.4g}"
        bound = "" if row.bound is None else f"{row.bound:g}"
        verdict = {None: "", True: "good", False: "BAD"}[row.good]
        table.add_row(row.part, row.what, value, bound, verdict)
    Console(width=120).print(table)
    cuda = check.device.type == "cuda"
    result = {
        "command": "make gpu-check",
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(check.device) if cuda else platform.processor(),
        "torch": torch.__version__,
        "seconds": seconds,
        "rows": [row._asdict() for row in check.rows],
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return all(row.good is not False for row in check.rows)


def main() -> None:
    """Check, print, and exit with 1 if something is not good."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--device", default="cuda")
    flags.add_argument("--skip", nargs="+", default=[], choices=list(PARTS), metavar="PART")
    flags.add_argument("--small", action="store_true", help="sizes for a try without a GPU")
    flags.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check = Check(pick_device(args.device), Path(folder), args.small)
        if check.device.type == "cuda":
            torch.cuda.set_device(check.device)
        seconds = run_parts(check, [name for name in PARTS if name not in args.skip])
        good = write(check, seconds, args.out)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
