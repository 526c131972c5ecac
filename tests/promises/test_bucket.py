"""Stores in a bucket: the bytes of a store on a disk, whatever network and driver go through.

The server is moto in a process of its own (s3_server.py), behind a proxy that does what networks do
(s3_proxy.py).
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    EXTRACTION,
    FORK,
    STUDENT,
    make_photos,
    run_here,
    tree,
    until,
)

import milan
import pipeline.writing.lease
import pipeline.writing.s3
from milan.core.paths import Url, as_path, files_below, read_file, read_files
from milan.core.progress import NoProgress
from milan.data.dataset import open_cache
from milan.errors import CacheError, ConfigError, DataError
from milan.store.cache import TargetCache
from milan.store.format import INDEX
from pipeline.extract import extract_targets
from pipeline.verify import verify
from pipeline.writing.bucket import Bucket, BucketLocation
from pipeline.writing.lease import Lease
from pipeline.writing.s3 import delete, get, put

pytest.importorskip("moto", reason="pip install milan-pretrain[test]: buckets are not tested")
pytest.importorskip("s3fs", reason="pip install milan-pretrain[test]: buckets are not tested")
from s3 import allow
from s3_proxy import Proxy, Request

GENERATION = "generations/000"
REMOTE = "s3://models/shared/targets.zarr"


@pytest.fixture(autouse=True)
def no_faults(s3: Proxy) -> Iterator[None]:
    yield
    s3.fault = lambda request: None
    s3.seen.clear()


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A place for a store of its own."""
    return f"s3://models/{request.node.name}/targets.zarr"


@pytest.fixture(scope="module")
def settings(teacher_files: dict[str, str]) -> dict[str, Any]:
    """Those of the fixture `store`."""
    return {**teacher_files, **EXTRACTION}


@pytest.fixture(scope="module")
def puts(s3: Proxy, photos: Path, settings: dict[str, Any]) -> list[Request]:
    """`store` again, in a bucket: every PUT of it."""
    extract_targets(str(photos), out=REMOTE, **settings)
    return [r for r, _ in s3.seen if r.method == "PUT" and "targets.zarr" in r.path]


@pytest.fixture(scope="module")
def remote(puts: list[Request]) -> str:
    """That store; not to be changed."""
    return REMOTE


def is_shard(request: Request) -> bool:
    below = request.path.partition(f"{GENERATION}/")[2]
    return request.method == "PUT" and below.split("/")[1:2] == ["c"]


def remote_tree(url: str) -> dict[str, bytes]:
    """helpers.tree of a store in a bucket."""
    store = as_path(url)
    names = sorted(name for name, _ in files_below(store) if not name.startswith("extract.log"))
    return dict(zip(names, read_files(store, names), strict=True))


def same_store(url: str, local: Path) -> bool:
    """Byte for byte; only the origin tells where a store lies."""
    mine, theirs = remote_tree(url), tree(local)
    origins = {name for name in theirs if name.endswith("origin.json")}
    assert {n for n in mine if n.endswith("origin.json")} == origins
    return {k: v for k, v in mine.items() if k not in origins} == {
        k: v for k, v in theirs.items() if k not in origins
    }


def copied(remote: str, url: str) -> Url:
    """The shared store at a place of its own, to be damaged."""
    fs, source = Url(remote).at()
    fs.copy(f"{source}/", Url(url).at()[1], recursive=True)
    return Url(url)


# --- the same store -------------------------------------------------------------------------------


def test_the_bytes_are_those_of_a_disk(remote: str, store: Path, s3: Proxy) -> None:
    """Index, records, shards, manifest, tables; the lock is given back, the log tells the run."""
    assert same_store(remote, store)
    assert TargetCache(remote).digest == TargetCache(store).digest
    lock, _ = get(Url(remote) / ".lock")  # type: ignore[misc]
    assert json.loads(lock)["seconds"] == 0
    (log,) = files_below(Url(remote) / "extract.log")
    lines = read_file(Url(remote) / "extract.log" / log[0]).splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", *["commit"] * 3, "finish"]
    origin = json.loads(read_file(Url(remote) / GENERATION / "origin.json"))
    assert origin["data_root_from_store"] is None


def test_every_shard_is_put_once(puts: list[Request]) -> None:
    """In one request, on a condition and with its digest; then its record, the index last."""
    shards = [request for request in puts if is_shard(request)]
    assert len(shards) == len({request.path for request in shards}) == 3 * 2 * 4
    for request in puts:
        assert request.headers["x-amz-checksum-sha256"]
        assert "if-none-match" in request.headers or "if-match" in request.headers
    for request in shards:
        assert request.headers["if-none-match"] == "*"
    order = [r.path.split("targets.zarr/")[1] for r in puts if ".lock" not in r.path]
    for block in range(3):
        for view in range(2):
            record = order.index(f"{GENERATION}/records/{block:05d}.{view:02d}.json")
            for name in ("attention", "crop", "features", "scale"):
                start = f"{GENERATION}/{name}/c/{block}/{view}"
                part = next(path for path in order if path.startswith(start))
                assert order.index(part) < record < order.index(INDEX)


@pytest.mark.soak
def test_a_worker_of_ray_uploads(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str, store: Path
) -> None:
    """The same bytes from a worker in a process of its own."""
    under_ray = {**settings, "executor": "ray", "replicas": 1, "num_workers": 1}
    extract_targets(str(photos), out=url, **under_ray)
    assert same_store(url, store)


@pytest.mark.soak
def test_stored_views_and_bad_images(
    s3: Proxy, settings: dict[str, Any], url: str, tmp_path: Path
) -> None:
    """Pictures in files of their own; a shard without any; the list of bad images."""
    photos = make_photos(tmp_path / "photos", count=3)
    for path in sorted(photos.rglob("*.jpg"))[:1]:
        path.write_bytes(b"no picture")
    some = {**settings, "store_views": "jpeg:95", "shard_size": 1}
    with pytest.raises(
        DataError, match=r"1 of 3 images are rejected .* the list is s3://.*bad-images"
    ):
        extract_targets(str(photos), out=url, **some)
    again = extract_targets(str(photos), out=url, max_bad="1", **some)
    assert again["images_per_second"] is None
    extract_targets(str(photos), out=str(tmp_path / "t.zarr"), max_bad="1", **some)
    assert same_store(url, tmp_path / "t.zarr")
    near, far = open_cache(tmp_path / "t.zarr"), open_cache(url)
    assert len(near) == len(far) == 4
    assert all((near[i]["image"] == far[i]["image"]).all() for i in range(4))


@pytest.mark.soak
def test_a_store_grows(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str, tmp_path: Path
) -> None:
    """More images and more views: two generations more, as on a disk."""
    for out in (url, str(tmp_path / "t.zarr")):
        for more in ({"limit": 8, "views": 1}, {"limit": 14, "views": 2}):
            extract_targets(str(photos), out=out, **{**settings, **more})
    assert same_store(url, tmp_path / "t.zarr")
    assert len(TargetCache(url).generations) == 3
    with pytest.raises(CacheError, match="a store only grows"):
        extract_targets(str(photos), out=url, **{**settings, "limit": 14, "views": 1})


# --- reading --------------------------------------------------------------------------------------


def losses(cache: str | Path, out: Path, **more: Any) -> list[Any]:
    figures = milan.pretrain(
        str(cache), out=str(out), **STUDENT, epochs=1, batch_size=8, lr=1e-3, log_every=1, **more
    )
    assert figures["step"] == 3
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.soak
def test_training_is_the_same(remote: str, store: Path, tmp_path: Path) -> None:
    """By two loader workers from the bucket, and from local copies of its shards."""
    expected = losses(store, tmp_path / "near", num_workers=0)
    assert losses(remote, tmp_path / "far", num_workers=2) == expected
    limit = 3 * max(int(g.sizes().clip(0).sum(1).max()) for g in TargetCache(remote).generations)
    copies = {"local": str(tmp_path / "copies"), "cache_limit": str(limit)}
    assert losses(remote, tmp_path / "staged", num_workers=1, **copies) == expected
    assert len(list((tmp_path / "copies").glob("*/shards/?.?"))) == 3
    moved = TargetCache(remote)
    moved.use_local(tmp_path / "copies", limit)
    rows = np.arange(8)
    near = TargetCache(store).read(rows, rows * 0)
    assert (moved.read(rows, rows * 0).codes == near.codes).all()


def test_commands_take_urls(remote: str, store: Path, tmp_path: Path) -> None:
    """inspect, verify, visualise: what they say of a bucket is what they say of a disk."""
    near, far = run_here("inspect", store), run_here("inspect", remote)
    assert far.code == 0
    assert far.out == near.out
    told = run_here("verify", remote, "--audit", 5)
    assert (told.code, "good" in told.out) == (0, True)
    sheet = run_here("visualise", remote, "--out", tmp_path / "sheet.png", "--images", 2)
    assert sheet.code == 0
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_what_is_not_there_is_told(s3: Proxy, remote: str, photos: Path, url: str) -> None:
    """No store, half a store, no bucket, no such kind of place."""
    for where, said in {
        "s3://models/nix.zarr": "no store at s3://models/nix.zarr",
        "s3://no-such-bucket/t.zarr": "no store at s3://no-such-bucket/t.zarr",
        f"{remote}/{GENERATION}": "is not a target cache",
    }.items():
        told = run_here("inspect", where)
        assert told.code == 1
        assert said in told.err
        assert told.err.count("\n") == 1
    half = copied(remote, url)
    delete(half / INDEX)
    delete(half / GENERATION / "records/00001.00.json")
    with pytest.raises(CacheError, match="is incomplete: 5 of 6 shards"):
        TargetCache(half)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.soak
def test_damage_is_found_and_mended(
    remote: str, store: Path, url: str, s3: Proxy, tmp_path: Path
) -> None:
    """A flipped bit, an object cut short, one gone, a lost record: made again, and no other."""
    damaged = copied(remote, url)
    root = damaged / GENERATION

    def change(name: str, data: bytes) -> None:
        held = get(root / name)
        assert held
        assert put(root / name, data, over=held[1].etag)

    name = "features/c/0/0/0/0"
    data = bytearray(read_file(root / name))
    data[100] ^= 4
    change(name, bytes(data))
    cache = TargetCache(damaged)
    with pytest.raises(CacheError, match=r"features of row \d, view 0 \(shard 00000.00\)") as error:
        cache.read(np.arange(8), np.zeros(8, int))
    assert error.value.fix == f"milan repair {url}"
    cache.use_local(tmp_path / "copies", 10**9)
    with pytest.raises(CacheError, match="features/c/0/0/0/0 is damaged"):
        cache.read(np.arange(8), np.zeros(8, int))
    change("attention/c/1/0/0", read_file(root / "attention/c/1/0/0")[:-9])
    delete(root / "crop/c/1/1/0")
    delete(root / "records/00002.01.json")
    with pytest.raises(CacheError, match="1 files missing and 1 of the wrong size"):
        TargetCache(damaged).check_files()
    verdict = verify(damaged)  # does not read the flipped bit
    assert [(b, v) for _, b, v in verdict.shards] == [(1, 0), (1, 1), (2, 1)]
    s3.seen.clear()
    assert run_here("repair", url).code == 0
    assert remote_tree(url) == remote_tree(remote)
    put_again = {
        r.path.split("000/")[1] for r, _ in s3.seen if r.method == "PUT" and "/c/" in r.path
    }
    assert len(put_again) == 16


@pytest.mark.soak
def test_a_server_that_is_down_is_no_damage(remote: str, s3: Proxy) -> None:
    """Else repair would throw away good shards. One line says what happened."""
    cache = TargetCache(remote)
    s3.fault = lambda request: "503" if "/records/" in request.path else None
    with pytest.raises(DataError, match=r"records/00000\.00\.json cannot be read"):
        cache.read(np.arange(2), np.zeros(2, int))
    told = run_here("verify", remote)
    assert told.code == 1
    assert told.err.count("\n") == 1


# --- one writer -----------------------------------------------------------------------------------


def test_a_second_writer_is_refused(remote: str, photos: Path, settings: dict[str, Any]) -> None:
    """And told who writes; when he is done the place is free."""
    lease = Lease(Url(remote), "first")
    with pytest.raises(CacheError, match=rf"is in use by pid {os.getpid()} on .* ends in \d+ s"):
        extract_targets(str(photos), out=remote, **settings)
    lease.close()
    summary = extract_targets(str(photos), out=remote, **settings)
    assert summary["images_per_second"] is None


def test_an_expired_lock_is_taken_over(
    s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time, by the server's clock; a renewed one is not. Its owner gives up before."""
    monkeypatch.setattr(pipeline.writing.lease, "SECONDS", 5.0)
    first = Lease(Url(url), "first")
    until(lambda: first.renewals > 0)
    first.check()
    s3.fault = lambda request: "503" if request.method == "PUT" else None
    with pytest.raises(CacheError, match="is in use by"):
        Lease(Url(url), "second")
    until(lambda: first.lost)
    s3.fault = lambda request: None
    with pytest.raises(CacheError, match="could not be renewed for 5 s"):
        first.check()

    def taken() -> Lease | None:
        with suppress(CacheError):
            return Lease(Url(url), "second")
        return None

    second = until(taken)
    first.close()  # takes nothing from the second
    with pytest.raises(CacheError, match="is in use by"):
        Lease(Url(url), "third")
    second.check()
    second.close()


def test_a_renewal_counts_from_when_it_was_first_sent(
    s3: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives, the answer is lost, and sending it again fails for a while."""
    monkeypatch.setattr(pipeline.writing.lease, "SECONDS", 8.0)
    lease = Lease(Url(url), "run")
    before, arrived = lease.until, list[float]()

    def lost_once(request: Request) -> str | None:
        if request.method != "PUT":
            return None
        arrived.append(pipeline.writing.lease._now())
        return {1: "lost", 2: "503", 3: "503"}.get(len(arrived))

    s3.fault = lost_once
    until(lambda: lease.until > before or lease.lost)
    assert arrived[-1] > arrived[0] + 1  # by the next turn
    assert lease.until < arrived[0] + 6
    lease.check()
    lease.close()


class Thief(NoProgress):
    """Takes the lock away in the middle of an extraction."""

    def __init__(self, url: str) -> None:
        self.where, self.stolen = Url(url) / ".lock", False

    def advance(self, done: int, figures: str) -> None:
        if not self.stolen and figures.startswith(("1/", "2/")):
            self.stolen = True
            until(self.steal)  # a renewal may come between
            time.sleep(2.5)

    def steal(self) -> str | None:
        held = get(self.where)
        assert held
        return put(self.where, b'{"owner": "a thief", "seconds": 60}', over=held[1].etag)


def test_a_lost_lock_ends_the_run(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record and no index is put after it; the thief's lock stays."""
    monkeypatch.setattr(pipeline.writing.lease, "SECONDS", 6.0)
    with pytest.raises(CacheError, match=r"the lock of .* was taken over by a thief"):
        extract_targets(str(photos), out=url, progress=Thief(url), **settings)
    assert len([n for n in remote_tree(url) if "/records/" in n]) == 2
    assert INDEX not in remote_tree(url)
    lock, _ = get(Url(url) / ".lock")  # type: ignore[misc]
    assert b"a thief" in lock


def test_what_another_wrote_is_not_overwritten(s3: Proxy, url: str) -> None:
    """Neither what was read before, nor what was not there."""
    bucket = Bucket(Url(url), "run")
    bucket.write("a", b"mine")
    bucket.write("a", b"mine")  # the same: an answer was lost
    with pytest.raises(CacheError, match="was changed by another process"):
        bucket.write("a", b"other")
    assert bucket.read("a") == b"mine"
    bucket.write("a", b"other")
    delete(Url(url) / "a")
    with pytest.raises(CacheError, match="was changed by another process"):
        bucket.write("a", b"mine")
    bucket.close()


def test_a_zombie_changes_nothing(s3: Proxy, url: str, tmp_path: Path) -> None:
    """A worker of a run that is over puts the same bytes, or fails; it never replaces."""
    (tmp_path / "c").mkdir()
    staged = tmp_path / "c" / "0"
    for data in (b"first", b"first"):
        staged.write_bytes(data)
        BucketLocation(Url(url)).upload(tmp_path, [{"path": "c/0"}])
    staged.write_bytes(b"other")
    with pytest.raises(FileExistsError, match="is there already, with other bytes"):
        BucketLocation(Url(url)).upload(tmp_path, [{"path": "c/0"}])
    assert read_file(Url(url) / "c/0") == b"first"


# --- killed ---------------------------------------------------------------------------------------


def drive(data: str, out: str, settings: dict[str, Any], last_step: int, scratch: str) -> None:
    """An extraction in this process, which kills itself before its PUT or DELETE `last_step`."""
    tempfile.tempdir = scratch  # what it leaves there
    steps = 0
    for module, name in (
        (pipeline.writing.bucket, "put"),
        (pipeline.writing.bucket, "delete"),
        (pipeline.writing.lease, "put"),
    ):
        real = getattr(pipeline.writing.s3, name)

        def step(*arguments: Any, real: Callable = real, **more: Any) -> Any:
            nonlocal steps
            if steps == last_step and not arguments[0].text.endswith(".lock"):
                os.kill(os.getpid(), signal.SIGKILL)
            steps += not arguments[0].text.endswith(".lock")
            return real(*arguments, **more)

        setattr(module, name, step)
    extract_targets(data, out=out, **settings)


def killed_at(
    steps: list[int], photos: Path, out: str, settings: dict[str, Any], scratch: Path
) -> None:
    """Runs that die at these steps, one after the other; then one that is left alone."""
    for last_step in steps:
        run = FORK.Process(target=drive, args=(str(photos), out, settings, last_step, str(scratch)))
        run.start()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        delete(Url(out) / ".lock")  # as if a minute had passed
    assert INDEX not in remote_tree(out)
    extract_targets(str(photos), out=out, **settings)


@pytest.mark.soak
def test_a_killed_driver_is_no_obstacle(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str, store: Path, tmp_path: Path
) -> None:
    """Killed among the files of a shard; what the dead left is no part of it."""
    killed_at([36], photos, url, settings, tmp_path)
    assert same_store(url, store)


@pytest.mark.soak
def test_a_driver_killed_at_every_step(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str, store: Path, tmp_path: Path
) -> None:
    """Every PUT and DELETE of an undisturbed run, and then three in a row, drawn by a seed."""
    s3.seen.clear()
    extract_targets(str(photos), out=f"{url}/clean", **settings)
    steps = sum(r.method in ("PUT", "DELETE") and ".lock" not in r.path for r, _ in s3.seen) - 1
    draw = np.random.default_rng(0)
    for step in range(steps):
        killed_at([step], photos, f"{url}/{step}", settings, tmp_path)
        assert same_store(f"{url}/{step}", store)
    for turn in range(10):
        few = draw.integers(0, 12, 3).tolist()
        killed_at(few, photos, f"{url}/three/{turn}", settings, tmp_path)
        assert same_store(f"{url}/three/{turn}", store)


# --- networks -------------------------------------------------------------------------------------


def test_faults_that_pass(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str, store: Path
) -> None:
    """Once each, at PUTs of all kinds: what failed is sent again, and nothing is wrong."""
    faults = {
        ".lock": ["lost", "500"],
        "/manifest.parquet": ["503", "cut"],
        "/features/c/0/0": ["corrupt"],
        "/features/c/1/0": ["lost"],
        "/features/c/2/0": ["cut"],
        "/attention/c/2/1": ["503"],
        "/records/00000.01": ["cut"],
        "/records/00001.00": ["lost"],
        "/shards.parquet": ["corrupt"],
        INDEX: ["lost"],
    }

    def once(request: Request) -> str | None:
        left = next((f for part, f in faults.items() if part in request.path), [])
        return left.pop(0) if request.method == "PUT" and left else None

    s3.fault = once
    extract_targets(str(photos), out=url, **settings)
    assert not any(faults.values())
    assert same_store(url, store)


@pytest.mark.parametrize("fault", ["500", pytest.param("corrupt", marks=pytest.mark.soak)])
def test_faults_that_stay(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str, store: Path, fault: str
) -> None:
    """One clear error, nothing wrong in the store; afterwards the same line ends as ever."""
    bad = "/features/c/1/0"
    s3.fault = lambda request: fault if is_shard(request) and bad in request.path else None
    with pytest.raises(DataError, match=r"features/c/1/0/0/0 cannot be written: ") as error:
        extract_targets(str(photos), out=url, **settings)
    there = remote_tree(url)
    assert INDEX not in there
    assert not any(bad in name or "records/00001" in name for name in there)
    if fault == "corrupt":
        assert "did not match the calculated checksum" in str(error.value)
        s3.fault = lambda request: None
        extract_targets(str(photos), out=url, **settings)
        assert same_store(url, store)


def test_reading_goes_through_faults(remote: str, store: Path, s3: Proxy) -> None:
    """A request in five fails, of records, metadata and chunks alike."""
    count = 0

    def some(request: Request) -> str | None:
        nonlocal count
        count += 1
        return ("503", "lost")[count % 2] if count % 5 == 2 else None

    s3.fault = some
    rows = np.arange(6)
    got = TargetCache(remote).read(rows, rows % 2)
    near = TargetCache(store).read(rows, rows % 2)
    assert (got.codes == near.codes).all()
    assert (got.attention == near.attention).all()
    assert any(fault for _, fault in s3.seen)


def test_a_server_without_conditions_is_refused(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str
) -> None:
    """It would let two drivers write one store."""
    s3.fault = lambda request: "deaf"
    with pytest.raises(CacheError, match="ignores the conditions of a PUT"):
        extract_targets(str(photos), out=url, **settings)


def test_no_bucket_and_no_right(
    s3: Proxy, port: int, remote: str, photos: Path, teacher_files: dict[str, str]
) -> None:
    """One line, exit code 1."""
    line = ["extract-targets", "--data", photos, "--teacher", teacher_files["teacher"],
            "--pretrained", teacher_files["pretrained"], "--executor", "local"]  # fmt: skip
    for out, said in {
        "s3://no-such-bucket/t.zarr": "The specified bucket does not exist",
        "gs://models/t.zarr": "expected: a path, or a URL of s3://",
    }.items():
        told = run_here(*line, "--out", out)
        assert (told.code, told.err.count("\n")) == (1, 1)
        assert said in told.err
    allow(port, "0")
    try:
        for command, what in (
            ([*line, "--out", "s3://models/t.zarr"], "written"), (["inspect", remote], "read")
        ):  # fmt: skip
            told = run_here(*command)
            assert (told.code, told.err.count("\n")) == (1, 1)
            assert f"cannot be {what}: " in told.err
            assert "AWS_SECRET_ACCESS_KEY" in told.err
    finally:
        allow(port, "1000000000")


# --- places and plans -----------------------------------------------------------------------------


def test_other_content_is_left_alone(s3: Proxy, remote: str, url: str) -> None:
    """A folder of something else, an object in the store's place."""
    put(Url(url) / "photo.jpg", b"x", over=None)
    with pytest.raises(CacheError, match="is a folder with other content"):
        Bucket(Url(url), "run")
    with pytest.raises(CacheError, match="is an object"):
        Bucket(Url(url) / "photo.jpg", "run")
    Bucket(Url(remote), "run").close()


def test_a_plan_writes_nothing(
    s3: Proxy, photos: Path, settings: dict[str, Any], url: str, store: Path
) -> None:
    """milan plan and --dry-run: objects instead of files, and no free space to speak of."""
    summary = extract_targets(str(photos), out=url, dry_run=True, **settings)
    planned = dict(summary["costs"]["Planned"])
    assert planned["store"] == url
    assert "objects" in planned
    assert "free on its disk" not in planned
    assert dict(summary["costs"]["Extraction"])["the disk writes"] == "unknown"
    inside = url.removeprefix("s3:/")  # the bucket itself may be made for this test
    assert not [r for r, _ in s3.seen if inside in r.path and r.method not in ("GET", "HEAD")]
    assert list(files_below(Url(url))) == []
    with pytest.raises(ConfigError, match=r"written to memory://x/t\.zarr"):
        extract_targets(str(photos), out="memory://x/t.zarr", **settings)


@pytest.mark.soak
def test_a_restored_image_becomes_a_row(tmp_path: Path, url: str, settings: dict[str, Any]) -> None:
    """The finished store of a bucket grows by it, and no object is replaced but the index."""
    data = make_photos(tmp_path / "photos", count=3)
    path = sorted(data.rglob("*.jpg"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    line = {**settings, "out": url, "views": 1, "max_bad": "1"}
    extract_targets(str(data), **line)
    before = remote_tree(url)
    path.write_bytes(whole)
    assert extract_targets(str(data), **line)["bad"] == {}
    now = remote_tree(url)
    assert {name for name in before if now.get(name) != before[name]} == {INDEX, "bad-images.csv"}
    assert len(TargetCache(url).good_rows()) == 3
