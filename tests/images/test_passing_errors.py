"""An error of the machine or the network is tried again, then ends the run by its name.

It never makes an image, a record or a shard bad.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import forget

from milan.core import retry
from milan.core.paths import LocalFiles, as_path, read_file, read_parts
from milan.core.progress import NoProgress
from milan.core.signals import Stop
from milan.data.changed_images import changed_images
from milan.data.dataset import open_cache
from milan.errors import CacheError, DataError, ImageFault, MachineError
from milan.evaluation.features import _centre_crop
from milan.evaluation.frozen import Frozen
from milan.evaluation.splits import LabelledSet
from milan.images import decode as decoding
from milan.images.decode import decode
from milan.images.manifest import build_manifest
from milan.images.pairing import FilesOfImages
from milan.images.source import ImageSource
from milan.store.cache import TargetCache
from milan.store.generation import system_errors
from pipeline.verify import GOOD, Audit, verify
from pipeline.writing.shard_table import ShardTable

TRIES = len(retry.PAUSES) + 1
NAMES = ["EMFILE", "ENFILE", "EACCES", "EPERM", "EIO", "ESTALE", "ENOMEM", "ETIMEDOUT", "EREMOTEIO"]


class Failing:
    """Raises `error` so many times wherever it is put in a function's place, then calls it."""

    def __init__(self, real: Callable[..., Any], error: BaseException, times: int) -> None:
        self.real, self.error, self.times, self.calls = real, error, times, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.real(*arguments, **options)


def system(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


@pytest.fixture
def kinds(photos: Path, tmp_path: Path) -> dict[str, ImageSource]:
    """The same images as files, in a tar and in Parquet."""
    shutil.copytree(photos, tmp_path / "files")
    shutil.make_archive(str(tmp_path / "tars/a"), "tar", photos)
    rows = [{"image": {"bytes": p.read_bytes(), "path": p.name}} for p in photos.rglob("*.jpg")]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet/a.parquet")
    roots = [tmp_path / kind for kind in ("files", "tars", "parquet")]
    return {root.name: ImageSource(build_manifest(root, seed=0), root) for root in roots}


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_read_when_the_error_has_passed(
    name: str, kinds: dict[str, ImageSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as there are pauses; then the run ends, and says which error it was."""
    for kind, source in kinds.items():
        for times in (TRIES - 1, TRIES):
            source._groups_read.clear()
            with monkeypatch.context() as patch:
                if kind == "parquet":
                    failing = Failing(pq.ParquetFile, system(name), times)
                    patch.setattr(pq, "ParquetFile", failing)
                else:
                    failing = failing_reads(patch, system(name), times)
                if times < TRIES:
                    assert source.read(3)
                else:
                    with pytest.raises(DataError, match=f"cannot be read: {name} ") as error:
                        source.read(3)
                    assert error.value.fix
                assert failing.calls == TRIES


def failing_reads(patch: pytest.MonkeyPatch, error: BaseException, times: int) -> Failing:
    """So many reads of files fail from now on."""
    failing = Failing(LocalFiles.read_below, error, times)
    patch.setattr(LocalFiles, "read_below", lambda *a, **options: failing(*a, **options))
    return failing


@pytest.mark.parametrize("name", ["ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG"])
def test_what_the_system_says_of_a_file_is_its_own_fault(
    name: str, kinds: dict[str, ImageSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: a missing file does not come back."""
    failing = failing_reads(monkeypatch, system(name), 1)
    with pytest.raises(ImageFault) as fault:
        kinds["files"].read(0)
    assert fault.value.reason == ("missing" if name in ("ENOENT", "ENOTDIR") else "unreadable")
    assert failing.calls == 1


@pytest.mark.parametrize("error", [MemoryError(), system("EMFILE")], ids=["memory", "EMFILE"])
def test_decoding_is_tried_again(
    error: BaseException, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that another process took for a moment makes no picture unreadable."""
    data = next(photos.rglob("*.jpg")).read_bytes()
    for times in (TRIES - 1, TRIES):
        failing = Failing(decoding.open_picture, error, times)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "open_picture", failing)
            if times < TRIES:
                assert decode(data).mode == "RGB"
            else:
                with pytest.raises(DataError, match=r"ENOMEM|EMFILE"):
                    decode(data)


def test_a_disk_that_is_gone_makes_no_image_missing(
    kinds: dict[str, ImageSource], tmp_path: Path
) -> None:
    """What a mount leaves behind is an empty folder."""
    shutil.rmtree(tmp_path / "files")
    for make in (False, True):
        if make:
            (tmp_path / "files").mkdir()
        with pytest.raises(DataError, match="empty or gone"):
            kinds["files"].read(0)


# --- stores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EMFILE", "EIO", "ESTALE"])
def test_records_that_cannot_be_read_are_no_damage(
    name: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair of it would throw good shards away."""
    at = np.array([0]), np.array([0])
    for times in (TRIES - 1, 10**6):
        cache = TargetCache(store)
        cache.generations[0].shards  # noqa: B018 - read before
        with monkeypatch.context() as patch:
            failing_reads(patch, system(name), times)
            if times < TRIES:
                assert len(cache.read(*at).attention) == 1
                continue
            with pytest.raises(DataError, match=rf"records/.* cannot be read: {name} "):
                cache.read(*at)
            with pytest.raises(DataError, match=f"cannot be read: {name}"):
                verify(store)
            with pytest.raises(DataError, match=f"cannot be read: {name}"):
                ShardTable(cache.spec).read_records(cache.root)
    assert verify(store, deep=True).code == GOOD


@pytest.mark.parametrize("reader", ["training", "changed images", "probe", "audit"])
def test_whoever_reads_images_ends(
    reader: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None says that an image has changed, leaves it out, or calls the store another's."""
    dataset = open_cache(store)
    at = np.arange(4), np.zeros(4, int)
    dataset.pixels(*at)
    readers: dict[str, Callable[[], Any]] = {
        "training": lambda: dataset.pixels(*at),
        "changed images": lambda: changed_images(
            dataset, at[0], stop=Stop(), progress=NoProgress()
        ),
        "probe": lambda: _centre_crop(labelled, network, 0.875, None, 0, square),
        "audit": lambda: verify(store, audit=Audit(4)),
    }
    images, labels = dataset.source, dataset.labels
    keys, beside = dataset.cache.manifest.table["key"], FilesOfImages(None, [], of=store)
    labelled = LabelledSet(store, images, labels, "", keys, None, beside)
    square, network = np.empty((32, 32, 3), np.uint8), Frozen(torch.flatten, 32, "none")
    failing = Failing(LocalFiles.read_below, system("EIO"), 10**6)
    real = LocalFiles.read_below

    def read_below(files: Any, root: Path, below: str, **options: Any) -> bytes:
        return (failing if below.endswith(".jpg") else real)(files, root, below, **options)

    monkeypatch.setattr(LocalFiles, "read_below", read_below)
    with pytest.raises(MachineError, match=r"\.jpg cannot be read: EIO"):
        readers[reader]()


TENSORSTORE = {
    "EMFILE": "RESOURCE_EXHAUSTED: Error opening: Too many open files [os_error_code='24']",
    "EIO": "UNKNOWN: Error reading local file: Input/output error [os_error_code='5']",
    "EIO (UNAVAILABLE": "UNAVAILABLE: connection reset by peer",
    "EIO (UNKNOWN: 500": "UNKNOWN: 500 [http_response_code='500'] [body='x']",
}


@pytest.mark.parametrize("name", TENSORSTORE)
def test_shards_that_cannot_be_read_are_no_damage(
    name: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tensorstore raises ValueError for everything; what it says tells them apart."""
    cache = TargetCache(store)
    generation, at = cache.generations[0], (np.array([0, 3]), np.array([0, 1]))
    expected = cache.read(*at)
    for times in (TRIES - 1, TRIES):
        failing = Failing(type(generation).array, ValueError(TENSORSTORE[name]), times)
        with monkeypatch.context() as patch:
            patch.setattr(type(generation), "array", lambda g, n, f=failing: f(g, n))
            if times < TRIES:
                assert np.array_equal(cache.read(*at).attention, expected.attention)
            else:
                with pytest.raises(DataError, match="cannot be read: " + name.replace("(", r"\(")):
                    cache.read(*at)


def test_damage_is_still_damage(store: Path, tmp_path: Path) -> None:
    """A chunk that is gone or flipped is not waited for."""
    copy = shutil.copytree(store, tmp_path / "copy.zarr")
    cache = TargetCache(copy)
    cache.read(np.array([0]), np.array([0]))
    next((copy / "generations/000/attention/c").rglob("0")).parent.mkdir(exist_ok=True)
    shutil.rmtree(copy / "generations/000/attention/c")
    with pytest.raises(CacheError):
        TargetCache(copy).read(np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match="DATA_LOSS"), system_errors():
        raise ValueError("DATA_LOSS: CRC-32C checksum verification failed")
    with pytest.raises(OSError, match="NOT_FOUND") as error, system_errors():
        raise ValueError("NOT_FOUND: no chunk [os_error_code='2']")
    assert not retry.passes(error.value)


def test_open_files_really_run_out(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system itself: what it raises, here and in tensorstore, is understood."""
    import resource

    dataset = open_cache(store)
    assert dataset[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[Any] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, hard))
    try:
        with suppress(OSError):
            while True:
                held.append(open("/dev/null"))  # noqa: SIM115
        with pytest.raises(DataError, match=r"EMFILE .*ulimit -n"):
            dataset.source.read(1)
        dataset.cache.generations[0]._open.clear()
        with pytest.raises(DataError, match=r"EMFILE .*ulimit -n"):
            dataset.cache.read(np.array([0]), np.array([0]))
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert dataset[0]


# --- servers --------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """HTTP on loopback, as wrong as it is told to be."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.status, self.failures = folder, True, 0, 0
        self.short = 0
        Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server = self.server
        path = server.folder / self.path.lstrip("/")
        if server.failures and body:
            server.failures -= 1
            return self.send_error(server.status)
        if not path.is_file():
            return self.send_error(404)
        data, asked = path.read_bytes(), self.headers.get("Range")
        size = len(data)
        if asked and server.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(size, int(last) + 1) if last else size
            data = data[int(first) : end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        else:
            self.send_response(200)
        if body and server.short:
            server.short -= 1
            data = data[:-1]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def http(kinds: dict[str, ImageSource], tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    forget()
    server = Server(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def url(server: Server, name: str) -> Any:
    return as_path(f"http://127.0.0.1:{server.server_address[1]}/{name}")


def test_a_server_without_ranges_is_named(http: Server, tmp_path: Path) -> None:
    """A tar and Parquet, while they are listed and when an image is read; no image is blamed."""
    for name in ("tars/a.tar", "parquet/a.parquet"):
        http.ranges = True
        where = url(http, name)
        manifest = build_manifest(where, seed=0)
        source = ImageSource(manifest, where.parent)
        assert source.read(0) == ImageSource(manifest, (tmp_path / name).parent).read(0)
        http.ranges = False
        source._groups_read.clear()
        with pytest.raises(DataError, match="whole files where a part is requested") as error:
            source.read(0)
        assert error.value.fix
        with pytest.raises(DataError, match="whole files where a part is requested"):
            build_manifest(where, seed=0)


def test_too_few_bytes_are_asked_for_again(http: Server, tmp_path: Path) -> None:
    """Until the server has sent them all; what stays short is no fault of the image."""
    where = url(http, "tars/a.tar")
    source = ImageSource(build_manifest(where, seed=0), where.parent)
    expected = source.read(0)
    http.short = TRIES - 1
    assert source.read(0) == expected
    http.short = TRIES
    with pytest.raises(DataError, match=r"EIO \([\d,]+ of [\d,]+ bytes arrived\)"):
        source.read(0)
    http.short = TRIES
    with pytest.raises(DataError, match="bytes arrived"):
        read_file(where, first=0, size=100)
    parts = [(3, 10), (0, 4), (7, 0)]
    pieces = [read_file(where, first=first, size=size) for first, size in parts]
    http.short = TRIES - 1
    assert read_parts(where, parts) == pieces
    assert read_parts(tmp_path / "tars/a.tar", parts) == pieces
    http.short = 2 * TRIES
    with pytest.raises(DataError, match="bytes arrived"):
        read_parts(where, parts)


@pytest.mark.parametrize(("status", "name"), [(500, "EIO"), (503, "EIO"), (429, "EIO")])
def test_what_a_server_answers_is_no_fault_of_the_image(
    status: int, name: str, http: Server
) -> None:
    """It may be overloaded for a moment."""
    where = url(http, "tars/a.tar")
    source = ImageSource(build_manifest(where, seed=0), where.parent)
    expected = source.read(0)
    http.status, http.failures = status, TRIES - 1
    assert source.read(0) == expected
    http.failures = 10**6
    with pytest.raises(DataError, match=f"{name} .*{status}"):
        source.read(0)


def test_a_server_that_does_not_answer_at_all(http: Server) -> None:
    """A port that nobody listens at any more."""
    where = url(http, "tars/a.tar")
    source = ImageSource(build_manifest(where, seed=0), where.parent)
    http.shutdown()
    http.server_close()
    forget()
    with pytest.raises(DataError, match="cannot be read: ECONNREFUSED"):
        source.read(0)
