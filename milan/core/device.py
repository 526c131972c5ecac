"""Device, precision, copies to the device, and the normalisation of pixels."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from milan.core.machine import cpu_count
from milan.core.progress import Progress
from milan.errors import ConfigError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's normalisation: the student's, and the published teacher's input."""
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is CUDA, else Apple's MPS, else the CPU.

    It has the index that its tensors have (cuda:0, mps:0): what is kept by device is found again.
    Raises ConfigError if this machine has no such device.
    """
    fix = "--device auto or cpu"
    if name == "auto":
        other = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else other
    try:
        device = torch.device(name)
        if device.type != "cuda":
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError(f"--device {name}: {first}", fix=fix) from None
    # Without a tensor: a process that only starts ranks needs no memory on a GPU.
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch {torch.__version__} sees no GPU", fix=fix)
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: there is no GPU of that number",
            expected=f"cuda:0 to cuda:{torch.cuda.device_count() - 1}",
            fix=fix,
        )
    return torch.device("cuda", index)


def device_name(device: torch.device, ranks: int) -> str:
    """What speeds were measured on, such as "CPU with 2 cores" or "8 x NVIDIA H200"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU with {cpu_count()} cores" if device.type == "cpu" else device.type.upper()
    return f"{ranks} x {name}" if ranks > 1 else name


def try_device(device: torch.device) -> None:
    """Compute something small on `device`. Raises ConfigError if this torch cannot.

    A GPU may be there, and torch may have been built without kernels for it, or another process
    may have all of its memory.
    """
    try:
        ones = torch.ones(32, 32, device=device)
        works = float((ones @ ones).sum()) == 32.0**3
        why = "" if works else "it computes wrong numbers"
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0][:200]
    if why:
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
        raise ConfigError(
            f"{device} cannot be used: {why} ({built})",
            fix="a torch that fits the GPU and its driver (pytorch.org), or --device cpu",
        )


def ranks_here(name: str, device: torch.device, count: int | None) -> int:
    """How many ranks this machine gets: one a GPU, or `count` if that many were asked for.

    `name` is the setting that `device` was picked by: one with a number is one GPU. Raises
    ConfigError for more than there are.
    """
    every = device.type == "cuda" and ":" not in name
    visible = torch.cuda.device_count() if every else 1
    if count is None:
        return visible
    if device.type == "cuda" and count > visible:
        raise ConfigError(f"devices {count}", expected=f"at most the {visible} GPUs here")
    return count


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; from pinned memory to CUDA the copy does not wait.

    To no other device: a temporary that is copied to Apple's without waiting may be freed before
    it has arrived.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def copy_to_host(tensor: torch.Tensor, copy: torch.Tensor | None = None) -> torch.Tensor:
    """`tensor` in `copy`, or in new memory of the host; from CUDA in pinned pages.

    From CUDA it does not wait: the copy may be read once `reached(device)` has happened.
    """
    cuda = tensor.device.type == "cuda"
    if copy is None:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
    return copy.copy_(tensor, non_blocking=cuda)


def reached(device: torch.device, *, timed: bool = False) -> torch.cuda.Event | None:
    """An event that happens when `device` has done what is queued on its current stream.

    None on all devices but CUDA: there copies to the host have arrived when they return.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=timed)
    event.record(torch.cuda.current_stream(device))
    return event


class Idle:
    """For how long a device had nothing to do in certain stretches of the host's work.

    On CUDA by the device's own clock: from the end of what is queued before a stretch to the start
    of what is queued after it. Work of the host that the device does not wait for counts nothing.
    Elsewhere the host is what computes, or waits for it: its clock tells.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._seconds = device, 0.0
        self._stretches: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Counts what is done inside."""
        began, before = time.perf_counter(), reached(self.device, timed=True)
        yield
        after = reached(self.device, timed=True)
        if before and after:
            self._stretches.append((before, after))
        else:
            self._seconds += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Of the stretches that are over on the device too; does not wait for it."""
        while self._stretches and self._stretches[0][1].query():
            before, after = self._stretches.popleft()
            self._seconds += before.elapsed_time(after) / 1000
        return self._seconds


class Sent(NamedTuple):
    """A batch on its way to a device."""

    batch: Any
    """As it was on the host, in pinned memory: it is kept until it has arrived."""
    moved: Any
    """Its copy, of which nothing may be read yet."""
    arrived: torch.cuda.Event | None


class Sender:
    """Copies batches to a device; on CUDA beside its work, on a stream of their own.

    A batch is a tuple of tensors, of tuples of them, and more. Those in pinned memory are copied
    while the kernels of the batch before run. No memory is used again too early: torch's allocators
    wait for the streams that they are told of, here for that of the kernels, and when pinned pages
    are freed for that of the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: Any, move: Callable[[Any], Any]) -> Sent:
        """Begin to copy a batch, by `move`."""
        if self.stream is None:
            return Sent(batch, move(batch), None)
        with torch.cuda.stream(self.stream):
            moved = move(batch)
            return Sent(batch, moved, reached(self.device))

    def receive(self, sent: Sent) -> Any:
        """The copy, for what is queued on the current stream from now on."""
        if sent.arrived:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent.arrived)
            for part in tree_leaves(sent.moved):  # a batch of several teachers has tuples in it
                if isinstance(part, torch.Tensor):
                    part.record_stream(current)
        return sent.moved


def device_constant(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator: `make(*key)` gives a tensor; decorated, it takes a device first.

    Each is made on the CPU and copied to a device once; making it there would wait for all work
    queued on the device.
    """
    copies: dict[tuple[Hashable, ...], torch.Tensor] = {}

    @wraps(make)
    def on(device: torch.device, *key: Any) -> torch.Tensor:
        return kept_copy(copies, (device, *key), lambda: make(*key), device)

    return on


def kept_copy(
    copies: dict[Any, torch.Tensor],
    key: Hashable,
    make: Callable[[], torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    """copies[key], after the first call `make()` on `device`. A fake tensor is not kept.

    One made in inference mode would be of no use to training, so none is.
    """
    if key in copies:
        return copies[key]
    with torch.inference_mode(False):
        tensor = copy_to(make(), device)
    if type(tensor) is torch.Tensor:
        copies[key] = tensor
    return tensor


def has_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64; Apple's does not."""
    return device.type != "mps"


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """What torch draws on the CPU inside follows from `seed`; what it draws later is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def manual_seed(seed: int, device: torch.device) -> None:
    """torch.manual_seed for what is drawn on `device`.

    torch's own also keeps each call, with its stack, for a GPU that nobody has used yet.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast for `precision` (fp32, bf16, fp16) on `device`; nothing for fp32."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r}", expected=", ".join(PRECISIONS))
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What a product casts `x` to: autocast's dtype inside autocast, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@contextmanager
def tf32(device: torch.device, on: bool, progress: Progress | None = None) -> Iterator[None]:
    """Inside, CUDA multiplies float32 in TF32 if `on` (10 bits of mantissa, float32's range).

    Sums stay float32. `progress` is told. Products on other devices are not touched; how it was
    comes back.
    """
    if device.type != "cuda":
        yield
        return
    if on and progress:
        progress.note(
            "fp32: products in TF32, of 10 bits; --set tf32=false multiplies in float32, slower"
        )
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = on
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W], (x / 255 - mean) / std, on the same device."""
    scale, shift = _scale_and_shift(pixels.device, tuple(mean), tuple(std))
    return torch.addcmul(shift, pixels.float(), scale).permute(0, 3, 1, 2).contiguous()


def network_input(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """What a network takes, float32 [B, C, H, W]: pixels, uint8 [B, H, W, 3], are normalised;
    channels of files, float32 [B, H, W, C], are so already."""
    if pixels.is_floating_point():
        return pixels.permute(0, 3, 1, 2).contiguous()
    return normalise(pixels, mean, std)


@device_constant
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """[2, 3]: normalised = scale * pixel + shift."""
    return torch.tensor([(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]).T


def denormalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """The pixels, uint8 [B, H, W, 3], that `normalise` would give as `images` [B, 3, H, W]."""
    scale, shift = torch.tensor([std, mean], device=images.device)
    colours = images.float().permute(0, 2, 3, 1) * scale + shift
    return (255 * colours).round().clamp(0, 255).to(torch.uint8)
