"""Features of labelled images by a frozen network: computed once, by all ranks, for all protocols.

They lie in a folder, a file for 2,048 rows:

    runs/pretrain/frozen_features/3f09…/   named by all that determines them: network, images, view
      about.json                    the same in words
      00000.safetensors             features [b, F] float32 of the rows that can be read, the rows,
                                    digests of their images; why other rows cannot be read; crc32c

A file is whole or absent, so a killed evaluation goes on with the files that are there. Nothing
here is as large as a data set: whoever reads features maps one file after another.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from milan.core.atomic import cannot_write, digest_of, ensure_writable, lock_folder, write_json
from milan.core.device import copy_to
from milan.core.distributed import SINGLE, Ranks
from milan.core.machine import cpu_count, decoding_threads
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.core.units import format_bytes
from milan.core.waiting import Stopped, Wait
from milan.errors import DataError, ImageFault, none_readable
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.corruptions import Corruption
from milan.evaluation.frozen import Frozen
from milan.evaluation.splits import LabelledSet, Split
from milan.images.channels import centre_crop
from milan.images.decode import content_digest

FILE_ROWS = 2048
"""Rows of a file, and of a piece."""
_FORMAT = 1
_AHEAD = 3  # batches that are decoded while the network has one
_LOCK_WAIT = 20 * 60.0  # seconds; ranks wait for each other a little longer


@dataclass(frozen=True)
class Context:
    """Where an evaluation runs, and who listens."""

    device: torch.device
    ranks: Ranks = SINGLE
    progress: Progress = field(default_factory=NoProgress)
    stop: Stop = field(default_factory=Stop)

    def check_stop(self) -> None:
        """Raises Stopped on all ranks if one of them was asked to stop; all must call it."""
        if self.ranks.any_flags(int(self.stop.by is not None)):
            raise Stopped(self.stop.by or "a signal to another rank")


# --- where they lie -------------------------------------------------------------------------------


@contextmanager
def features_folder(config: EvaluationConfig, frozen: Frozen, context: Context) -> Iterator[Path]:
    """The folder in which the features of all data sets are, the same on all ranks.

    A temporary one for a network that nobody can name, and where `config.features` is none or the
    run's folder cannot be written. Raises DataError for a folder that was asked for and cannot.
    """
    kept = frozen.identity is not None and config.features != "none"

    def choose() -> tuple[Path, bool]:
        folder = Path(config.features or config.folder / "frozen_features")
        if kept:
            try:
                ensure_writable(folder)
                return folder, False
            except OSError as error:
                if config.features:
                    raise DataError(
                        f"{folder} cannot be written: {error.strerror}",
                        expected="a folder for features",
                        fix="another --features, or --features none",
                    ) from None
                context.progress.note(
                    f"features are not kept: {folder} cannot be written ({error.strerror}); "
                    "--features FOLDER keeps them elsewhere"
                )
        return Path(tempfile.mkdtemp(prefix="milan-features-")), True

    folder, temporary = context.ranks.on_rank0(choose)
    try:
        yield folder
    finally:
        if temporary and context.ranks.is_rank0:
            shutil.rmtree(folder, ignore_errors=True)


def features_of(
    frozen: Frozen,
    data: LabelledSet,
    folder: Path,
    config: EvaluationConfig,
    context: Context,
    *,
    file_rows: int | None = None,
    corruption: Corruption | None = None,
) -> Features:
    """Features of all rows of `data`: those in `folder`, computed where they are not there yet.

    Each rank computes its share; all must call this. Images are shown as their centre crop,
    corrupted if asked for. `file_rows` is for large features: the rows of a file, else FILE_ROWS.
    Raises DataError if none can be read, features are no numbers, or the disk is full; Stopped.
    """
    view = {"size": frozen.size, "crop_share": config.crop_share}
    view |= corruption.law if corruption else {}
    about: dict[str, Any] = {"format": _FORMAT, "network": frozen.identity, "view": view}
    about["images"] = data.identity_for(frozen.channels)
    about |= {"file_rows": file_rows} if file_rows else {}
    key = digest_of(about)
    place = folder / key[:24]
    with _locked(place, context):
        files = _Files(place, key, len(data.labels), file_rows or FILE_ROWS)
        absent = files.absent(context.ranks)
        if absent:
            words = about | {"of": frozen.name, "data": str(data.source)}
            context.ranks.on_rank0(lambda: _begin(place, words))
            _compute(frozen, data, files, absent, config, context, corruption)
        else:
            context.progress.note(f"features of {frozen.name}: those in {place}")
    context.ranks.wait()  # those of other ranks are there
    return Features(files, f"{data.source}")


def _begin(place: Path, about: dict[str, Any]) -> None:
    for part in place.glob(".*.part"):  # of a killed evaluation: the folder is locked
        part.unlink(missing_ok=True)
    write_json(place / "about.json", about)


@contextmanager
def _locked(place: Path, context: Context) -> Iterator[None]:
    """Two evaluations do not compute the same features twice: the second waits for the first."""
    locks: list[Any] = []

    def acquire() -> None:
        wait = Wait(
            f"the features in {place}, which another evaluation computes",
            limit=_LOCK_WAIT, error=DataError, progress=context.progress,
            fix="the same line, once it is done; or --features none",
        )  # fmt: skip
        while not locks and not context.stop.by:
            try:
                place.mkdir(parents=True, exist_ok=True)
                locks.append(lock_folder(place))
            except FileNotFoundError:  # another call was done with the folder, and removed it
                wait.check()
            except BlockingIOError:
                wait.check()
                time.sleep(0.2)
            except OSError:  # a file system without locks: double work, no harm
                return

    context.ranks.on_rank0(acquire)
    try:
        context.check_stop()
        yield
    finally:
        for lock in locks:
            lock.close()


# --- files ---------------------------------------------------------------------------------------


class File(NamedTuple):
    """One file; F features of b images."""

    features: torch.Tensor
    """[b, ...] as the network gives them, mapped from the file."""
    rows: np.ndarray
    """[b] int64, ascending."""
    digests: np.ndarray
    """[b] uint64: the first half of each image's content digest."""
    rejected: list[str]
    """Why other rows cannot be read."""


class _Files:
    """The files of one data set's features: file i has rows [size i, size (i + 1))."""

    def __init__(self, folder: Path, key: str, rows: int, size: int) -> None:
        self.folder, self.key = folder, key
        self.ranges = [np.arange(at, min(at + size, rows)) for at in range(0, rows, size)]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def absent(self, ranks: Ranks) -> list[int]:
        """The files that are not there, or not as they were written, the same on all ranks."""
        mine = range(ranks.rank, len(self.ranges), ranks.size)
        gathered = ranks.gather_objects([number for number in mine if not self._is_whole(number)])
        return sorted(number for _, numbers in gathered for number in numbers)

    def _is_whole(self, number: int) -> bool:
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            with safe_open(self.path(number), framework="pt") as file:
                about = file.metadata()
            content = self.read(number)
            return about["key"] == self.key and about["crc32c"] == _crc32c(content)
        return False

    def read(self, number: int) -> File:
        """Map a file. Raises OSError, SafetensorError."""
        with safe_open(self.path(number), framework="pt") as file:
            rows, digests = (file.get_tensor(name).numpy() for name in ("rows", "digests"))
            rejected = json.loads(file.metadata()["rejected"])
            features = file.get_tensor("features")
        return File(features, rows.copy(), digests.view(np.uint64).copy(), rejected)

    def write(self, number: int, content: File) -> None:
        """Write a file, whole or not at all. Raises DataError."""
        tensors = {
            "features": content.features,
            "rows": torch.from_numpy(content.rows),
            "digests": torch.from_numpy(content.digests.view(np.int64)),
        }
        about = {
            "key": self.key, "rejected": json.dumps(content.rejected), "crc32c": _crc32c(content)
        }  # fmt: skip
        path = self.path(number)
        part = path.with_name(f".{number:05d}.{socket.gethostname()}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                file.write(serialise(tensors, metadata=about))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            found, _ = cannot_write(self.folder, error) or (f"{path}: {error.strerror}", "")
            raise DataError(
                found,
                expected=f"{format_bytes(content.features.nbytes * len(self.ranges))} of room",
                fix="--features a folder with more room, or --features none",
            ) from None


def _crc32c(content: File) -> str:
    sum_ = google_crc32c.Checksum()
    for part in (content.features.numpy(), content.rows, content.digests):
        sum_.update(part.tobytes())
    return sum_.hexdigest().decode()


class Features:
    """Features of the images of one data set that can be read."""

    def __init__(self, files: _Files, source: str) -> None:
        """Reads what is small: 16 bytes an image. Raises DataError if another rank's are not here,
        or no image can be read."""
        self.files, self.source = files, source
        try:
            parts = [files.read(number) for number in range(len(files.ranges))]
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"features that were computed are not in {files.folder} ({error})",
                expected="a folder that all ranks share",
                fix="--features such a folder",
            ) from None
        self.rejected = [why for part in parts for why in part.rejected]
        self.rows = np.concatenate([part.rows for part in parts])
        """int64 [m], ascending: the images that can be read."""
        self.digests = np.concatenate([part.digests for part in parts])
        """uint64 [m]: equal for images of the same bytes."""
        self.width = max(part.features.shape[-1] for part in parts)
        if not len(self.rows):
            raise none_readable(str(source), self.rejected[0])

    def __len__(self) -> int:
        return len(self.files.ranges)

    def pieces(self, numbers: Sequence[int]) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Of each file, features [b, ...], mapped from it, and their rows [b] int64."""
        for number in numbers:
            content = self.files.read(number)
            yield content.features, content.rows


# --- computing ------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    """A batch of a file's rows, as it leaves the decoding threads."""

    rows: list[int]
    pixels: torch.Tensor
    """What the network takes: uint8 [b, H, W, 3], or its channels; pinned where the device is a
    GPU."""
    digests: list[int]
    rejected: list[str]


def _compute(
    frozen: Frozen,
    data: LabelledSet,
    files: _Files,
    absent: list[int],
    config: EvaluationConfig,
    context: Context,
    corruption: Corruption | None,
) -> None:
    """Compute this rank's share of the `absent` files. Raises Stopped: whole files stay."""
    ranks, progress = context.ranks, context.progress
    mine = absent[ranks.rank :: ranks.size]
    total = sum(len(rows) for rows in files.ranges)
    done = total - sum(len(files.ranges[number]) for number in absent)
    what = f"features of {frozen.name}" + (f", {corruption}" if corruption else "")
    progress.begin(what, total, "images", done=done)
    ranges = [files.ranges[i] for i in mine]
    batches = decoded(data, ranges, frozen, config, context, corruption)
    written: Future | None = None
    # Whatever ends this, what was handed to the writer is written.
    with closing(batches), ThreadPoolExecutor(1) as writer:
        for turn in range(-(-len(absent) // ranks.size)):
            together = absent[turn * ranks.size : (turn + 1) * ranks.size]

            def seen(count: int, before: int = done, times: int = len(together)) -> None:
                progress.advance(before + count * times)

            if turn < len(mine):
                content = content_of(next(batches), frozen, context, seen)
                if written:
                    written.result()
                elif content:
                    _check_room(files, len(absent), content)
                written = writer.submit(files.write, mine[turn], content) if content else None
            context.check_stop()
            done += sum(len(files.ranges[number]) for number in together)
            progress.advance(done)
        if written:
            written.result()
    progress.end()


def content_of(
    batches: Iterator[Decoded], frozen: Frozen, context: Context, seen: Callable[[int], None]
) -> File | None:
    """The network's answer to a file's batches, None after a stop signal.

    The device is waited for once, at the end. Raises DataError for features that are no numbers.
    """
    parts, rows, digests, rejected = [], list[int](), list[int](), list[str]()
    for batch in batches:
        if batch.rows:
            with torch.inference_mode():
                parts.append(frozen.features(copy_to(batch.pixels, context.device)))
        rows += batch.rows
        digests += batch.digests
        rejected += batch.rejected
        seen(len(rows) + len(rejected))
        if context.stop.by:
            return None
    features = torch.cat(parts).cpu().contiguous() if parts else torch.empty(0, 0)
    if not torch.isfinite(features).all():
        bad = rows[int((~torch.isfinite(features).all(dim=1)).nonzero()[0, 0])]
        raise DataError(
            f"{frozen.name} gives features that are no numbers (NaN or infinite), first for row "
            f"{bad}",
            expected="a network whose training went well",
            fix="another --checkpoint; log.jsonl in the run's folder has the losses",
        )
    return File(features, np.array(rows, np.int64), np.array(digests, np.uint64), rejected)


def _check_room(files: _Files, absent: int, content: File) -> None:
    """Raises DataError if the disk is smaller than what will be written."""
    needed, free = absent * content.features.nbytes, shutil.disk_usage(files.folder).free
    if needed > free:
        raise DataError(
            f"features take {format_bytes(needed)}, and {files.folder} has room for "
            f"{format_bytes(free)}",
            expected="room for all of them",
            fix="--features a folder on a larger disk",
        )


def decoded(
    data: LabelledSet,
    files: list[np.ndarray],
    frozen: Frozen,
    config: EvaluationConfig,
    context: Context,
    corruption: Corruption | None = None,
) -> Generator[Iterator[Decoded], None, None]:
    """The batches of each file; some are decoded ahead, in threads, while the device works."""
    threads = decoding_threads(cpu_count() // context.ranks.on_node)
    pool = ThreadPoolExecutor(config.num_workers or threads)
    pinned = context.device.type == "cuda"
    load = partial(_centre_crop, data, frozen, config.crop_share, corruption)
    blank = frozen.blank(torch.device("cpu"))

    def begin(rows: list[int]) -> tuple[list[int], torch.Tensor, list[Future]]:
        shape = len(rows), *blank.shape[1:]
        pixels = torch.empty(shape, dtype=blank.dtype, pin_memory=pinned)
        filled = zip(rows, pixels.numpy(), strict=True)
        return rows, pixels, [pool.submit(load, row, place) for row, place in filled]

    batches = deque(
        (number, rows[at : at + config.batch_size].tolist())
        for number, rows in enumerate(files)
        for at in range(0, len(rows), config.batch_size)
    )
    ahead: deque[tuple[int, tuple]] = deque()

    def of_file(number: int) -> Iterator[Decoded]:
        while True:
            while batches and len(ahead) < _AHEAD:
                of, rows = batches.popleft()
                ahead.append((of, begin(rows)))
            if not ahead or ahead[0][0] != number:
                return
            yield _finished(data.keys, *ahead.popleft()[1])

    try:
        for number in range(len(files)):
            yield of_file(number)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(keys: Any, rows: list[int], pixels: torch.Tensor, futures: list[Future]) -> Decoded:
    answers = [future.result() for future in futures]
    good = [i for i, answer in enumerate(answers) if isinstance(answer, int)]
    why = zip(rows, answers, strict=True)
    rejected = [f"{keys[row].as_py()}: {a}" for row, a in why if isinstance(a, str)]
    if rejected:
        pixels = pixels[good]
    return Decoded([rows[i] for i in good], pixels, [answers[i] for i in good], rejected)


def _centre_crop(
    of: LabelledSet,
    frozen: Frozen,
    share: float,
    corruption: Corruption | None,
    row: int,
    pixels: np.ndarray,
) -> int | str:
    """Fill `pixels` with an image as the network takes it; half of its content digest, or why
    not."""
    law = frozen.channels
    try:
        data, beside = of.images.read(row), of.beside.read(row, law)
        pixels[:] = centre_crop(law, data, beside, share=share, size=frozen.size)
    except ImageFault as fault:
        return str(fault)
    digest = int(content_digest(data)[:16], 16)
    if corruption:
        pixels[:] = corruption.apply(pixels, digest)
    return digest


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """The images of a split that can be read: features and labels."""

    features: Features
    places: np.ndarray
    """int64 [m], ascending: which of features.rows."""
    labels: np.ndarray
    """int64 [m]"""

    @classmethod
    def of(cls, features: Features, split: Split) -> Labelled:
        """Those of `split`, with its labels."""
        positions = np.flatnonzero(np.isin(features.rows, split.rows))
        return cls(features, positions, split.of.labels[features.rows[positions]])

    def __len__(self) -> int:
        return len(self.places)

    @property
    def digests(self) -> np.ndarray:
        """uint64 [m]"""
        return self.features.digests[self.places]


class Piece(NamedTuple):
    """Some images of a split, on the device."""

    x: torch.Tensor
    """[b, F] float32; patches [b, N, E] float16"""
    y: torch.Tensor
    """[b] int64"""
    first: int
    """Which of the split's images the first is; the others follow."""


class Share:
    """A rank's share of a split's features, piece by piece, as often as they are asked for.

    `change` is applied to each piece on the device. Changed pieces are kept there up to `memory`
    bytes; others are read again. So memory does not grow with the number of images.
    """

    def __init__(
        self,
        labelled: Labelled,
        context: Context,
        *,
        change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        memory: int = 0,
        of: Ranks | None = None,
        files: int | None = None,
    ) -> None:
        """`of`: whose share; default: this rank's. SINGLE's is all of it. With `files` only the
        images of so many files, a sample."""
        self.labelled, self.device, self.change = labelled, context.device, change
        self.room, self._kept = memory, dict[int, Piece]()
        self._rows = labelled.features.rows[labelled.places]
        ranks = of or context.ranks
        count = len(labelled.features)
        self._mine = range(ranks.rank, min(count, files or count), ranks.size)

    def __iter__(self) -> Iterator[Piece]:
        absent = [number for number in self._mine if number not in self._kept]
        fresh = self.labelled.features.pieces(absent)
        for number in self._mine:
            piece = self._kept.get(number) or self._piece(number, *next(fresh))
            if len(piece.x):
                yield piece

    def _piece(self, number: int, features: torch.Tensor, rows: np.ndarray) -> Piece:
        known = self._rows
        if not len(rows):
            return Piece(features, torch.empty(0, dtype=torch.int64), 0)
        first, last = np.searchsorted(known, [rows[0], rows[-1] + 1])
        if last - first < len(rows):
            features = features[torch.from_numpy(np.searchsorted(rows, known[first:last]))]
        y = torch.from_numpy(self.labelled.labels[first:last])
        x = self.change(copy_to(features, self.device))
        piece = Piece(x, copy_to(y, self.device), int(first))
        if x.nbytes <= self.room:
            self.room -= x.nbytes
            self._kept[number] = Piece(x.clone() if x is features else x, *piece[1:])
        return piece
