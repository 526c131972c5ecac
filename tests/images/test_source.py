"""Images behind URLs: an S3 server on loopback gives the same rows, bytes, targets as a disk.

Errors of a remote store end in one line; one lost image ends in a reason.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem
from helpers import forget, run_here, tree
from s3 import allow, put_files
from s3_proxy import Proxy

from milan.core.paths import Url, as_path
from milan.data.dataset import open_cache
from milan.data.loader import training_loader
from milan.data.order import order_of
from milan.data.sampler import StepSampler
from milan.errors import DataError, ImageFault
from milan.images.manifest import Manifest, build_manifest, describe_source, resolve_data
from milan.images.source import ImageSource
from milan.images.splits import WantedSplit
from milan.store.cache import TargetCache
from pipeline.extract import extract_targets
from pipeline.repair import repair


def files_of(root: Path, prefix: str = "") -> dict[str, bytes]:
    return {prefix + p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.*")}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, photos: Path, s3: Proxy) -> Path:
    """`photos` as class folders, two tars and two Parquet files; the same under s3://sets.

    Members of the tars are in order of names, so that their rows are those of the folder.
    """
    root = tmp_path_factory.mktemp("sets")
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.jpg"))
    for name in names:
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes((photos / name).read_bytes())
    for kind in ("tars", "parquet"):
        (root / kind).mkdir()
    for part, some in enumerate((names[:10], names[10:])):
        with tarfile.open(root / f"tars/{part}.tar", "w") as tar:
            for name in some:
                tar.add(photos / name, name)
        rows = [
            {
                "image": {"bytes": (photos / name).read_bytes(), "path": name},
                "label": int(name[6]),
                "caption": name.upper(),
            }
            for name in some
        ]
        pq.write_table(
            pa.Table.from_pylist(rows), root / f"parquet/{part}.parquet", row_group_size=4
        )
    put_files("sets", files_of(root))
    return root


def check_bytes(manifest: Manifest, root: str, expected: list[bytes]) -> None:
    """Every row reads its own bytes, in any order, from several threads at once."""
    source = ImageSource(manifest, root)
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(len(manifest)), 3)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, rows)) == [expected[row] for row in rows]


# --- what a URL is --------------------------------------------------------------------------------


def test_what_is_a_path_and_what_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL keeps its text; file:// is a path, and so is all without a scheme."""
    monkeypatch.setenv("HOME", "/home/me")
    for text, path in {
        "a/b": "a/b", "~/x": "/home/me/x", "file:///a/b c": "/a/b c", "C:/x": "C:/x", "s3:": "s3:",
    }.items():  # fmt: skip
        assert as_path(text) == Path(path)
    for text, url in {
        "s3://b/x/": "s3://b/x",
        "S3://B/x//": "s3://B/x",
        "memory://": "memory://",
    }.items():
        assert as_path(text) == Url(url)
    root = as_path("s3://bucket")
    assert str(root / "a" / "b c.jpg") == "s3://bucket/a/b c.jpg"
    assert str((root / "a" / "b").parent) == "s3://bucket/a"
    assert (root / "a").parent == root == root.resolve()
    assert (root / "a" / "b.tar").name == "b.tar"
    assert str(as_path("memory://") / "a") == "memory://a"
    assert as_path(root) is root
    assert pickle.loads(pickle.dumps(root)) == root


def test_passwords_are_refused() -> None:
    """The URL is kept in the store and printed: neither it nor the error may hold a password."""
    with pytest.raises(DataError, match="a password in sftp://me") as error:
        as_path("sftp://me:secret@host/x")
    assert "secret" not in str(error.value)
    assert as_path("sftp://me@host/x") == Url("sftp://me@host/x")


def test_file_urls_are_read_as_paths(photos: Path) -> None:
    """They never pass through fsspec."""
    assert resolve_data(f"file://{photos}") == photos


# --- rows and bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tars", "parquet", "tars/0.tar", "parquet/1.parquet"])
@pytest.mark.parametrize("protocol", ["s3", "memory"])
def test_the_same_rows_and_bytes(sets: Path, kind: str, protocol: str) -> None:
    """Keys, order, sizes, labels, captions and bytes are those of the same files on a disk."""
    if protocol == "memory":
        fsspec.filesystem("memory").put(f"{sets}/", "/sets", recursive=True)
    local = build_manifest(resolve_data(str(sets / kind)), seed=1)
    source = resolve_data(f"{protocol}://sets/{kind}")
    assert isinstance(source, Url)
    remote = build_manifest(source, seed=1)
    assert remote.table.equals(local.table)
    assert remote.classes == local.classes
    assert remote.digest() == local.digest()
    root = sets / kind if (sets / kind).is_dir() else (sets / kind).parent
    assert str(remote.root) == f"{protocol}://sets/{root.name}"
    expected = [ImageSource(local, root).read(row) for row in range(len(local))]
    assert len(set(expected)) == len(local) > 0
    check_bytes(remote, str(remote.root), expected)


def test_http(sets: Path, s3: Proxy) -> None:
    """A file whose folder is never listed; of an image of a tar just its bytes are asked for."""
    put_files("public", files_of(sets / "tars"), "public-read")
    source = resolve_data(f"{s3.url}/public/0.tar")
    manifest = build_manifest(source, seed=0)
    assert manifest.digest() == build_manifest(sets / "tars/0.tar", seed=0).digest()
    local = ImageSource(manifest, sets / "tars")
    check_bytes(manifest, str(manifest.root), [local.read(row) for row in range(10)])
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/x cannot be read"):
        resolve_data("http://127.0.0.1:9/x")
    with pytest.raises(DataError, match=r"no data found"):
        resolve_data(f"{s3.url}/public/nix.tar")


@pytest.mark.usefixtures("s3")
def test_names_of_an_object_store() -> None:
    """Any text is a key; markers of folders are no images, nor is a neighbour's prefix ours."""
    names = [
        "a b/ü.jpg",
        "a[1]*/50%#?x.jpg",
        "猫/写真.png",
        "e//y.jpg",
        "v::1/z.jpg",
        'q/it\'s "x".jpg',
        "b/../up.jpg",
        "b/./same.jpg",
        "../out.jpg",
    ]
    files = {f"sub/{name}": name.encode() for name in names}
    files |= {"sub/": b"", "sub/a b/": b"", "sub/empty/": b"", "sub2/no.jpg": b"no"}
    files |= {"sub/.hidden/x.jpg": b"", "sub/a b/.x.jpg": b"", "sub/LICENSE": b""}
    put_files("names", files)
    source = resolve_data("s3://names/sub/")
    manifest = build_manifest(source, seed=0)
    assert sorted(manifest.table["key"].to_pylist()) == sorted(names)
    assert manifest.classes == sorted({name.split("/")[0] for name in names})
    assert describe_source(manifest)[1:] == [
        "found: 12 files: 9 images; left out: 2 hidden, 1 without extension"
    ]
    check_bytes(manifest, str(source), [manifest.key(row).encode() for row in range(len(names))])


def test_a_read_is_one_request(sets: Path, s3: Proxy) -> None:
    """Of a file, and of a stretch of a tar; requests are what object stores charge and wait for."""
    for kind in ("folder", "tars"):
        manifest = build_manifest(as_path(f"s3://sets/{kind}"), seed=0)
        source = ImageSource(manifest, f"s3://sets/{kind}")
        forget()  # a worker knows no listing
        source.read(0)
        s3.seen.clear()
        rows = (5, 3, 21)
        for row in rows:
            source.read(row)
        assert [request.method for request, _ in s3.seen] == ["GET"] * 3
        if kind == "tars":
            starts = [manifest.table["offset"][row].as_py() for row in rows]
            sizes = [manifest.table["bytes"][row].as_py() for row in rows]
            ranges = [f"bytes={a}-{a + n - 1}" for a, n in zip(starts, sizes, strict=True)]
            assert [request.headers["range"] for request, _ in s3.seen] == ranges


@pytest.mark.usefixtures("s3")
def test_what_changes_is_seen() -> None:
    """fsspec keeps listings: a second extraction in one process would go by the first's."""
    put_files("splits", {"train/c/1.jpg": b"1", "val/c/2.jpg": b"2"})
    assert str(build_manifest(as_path("s3://splits"), seed=0).root) == "s3://splits/train"
    put_files("splits", {"train2/c/3.jpg": b"3"})
    manifest = build_manifest(as_path("s3://splits"), seed=0)
    assert (str(manifest.root), len(manifest), manifest.classes) == ("s3://splits", 2, ["c"])
    put_files("grows", {"a/1.jpg": b"1"})
    assert len(build_manifest(as_path("s3://grows"), seed=0)) == 1
    assert not as_path("s3://grows/b").exists()
    put_files("grows", {"b/2.jpg": b"2", "b/empty.jpg": b""})
    assert as_path("s3://grows/b").is_dir()
    manifest = build_manifest(as_path("s3://grows"), seed=0)
    assert len(manifest) == 3
    source = ImageSource(manifest, "s3://grows")
    assert sorted(source.read(row) for row in range(3)) == [b"", b"1", b"2"]


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.soak)])
def test_readers_may_be_sent(sets: Path, method: str) -> None:
    """To workers however they are started, also after the sender has read."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        for kind in ("tars", "parquet"):
            manifest = build_manifest(as_path(f"s3://sets/{kind}"), seed=0)
            source = ImageSource(manifest, f"s3://sets/{kind}")
            expected = [source.read(row) for row in range(4)]
            assert list(pool.map(source.read, range(4))) == expected
            assert source.read(0) == expected[0]


def test_a_fork_connects_anew(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec refuses what was opened before a fork; it knows it by the process's number."""
    source = ImageSource(build_manifest(as_path("s3://sets/tars"), seed=0), "s3://sets/tars")
    expected = source.read(3)
    held, _ = source.root.at()  # type: ignore[union-attr]
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    with pytest.raises(RuntimeError, match="fork"):
        held.cat_file("sets/tars/0.tar")
    assert source.read(3) == expected


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("s3")
def test_where_a_name_leads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--data-root and $MILAN_DATA may be URLs; a set that is cut into splits means its train."""
    put_files("lake", {f"x/imagenet/{part}/c/1.jpg": b"1" for part in ("train", "val")})
    put_files("lake", {"x/plain/c/1.jpg": b"1"})
    monkeypatch.chdir(tmp_path)
    source = resolve_data("imagenet", "s3://lake/x")
    assert str(source) == "s3://lake/x/imagenet"
    for wanted, root in ((None, "train"), ("val", "val")):
        manifest = build_manifest(source, seed=0, split=WantedSplit(wanted))
        assert (str(manifest.root), len(manifest)) == (f"s3://lake/x/imagenet/{root}", 1)
    assert str(resolve_data("plain", "s3://lake/x/")) == "s3://lake/x/plain"
    monkeypatch.setenv("MILAN_DATA", "s3://lake/x")
    assert str(resolve_data("plain")) == "s3://lake/x/plain"
    with pytest.raises(DataError, match=r"at: nix, s3://lake/x/nix;"):
        resolve_data("nix")


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.fixture
def afresh(s3: Proxy) -> Iterator[None]:
    """Connections are made anew here, and again after it."""
    forget()
    yield
    forget()


@pytest.mark.usefixtures("afresh", "sets")
def test_errors_end_in_one_line(port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No bucket, folder, permission, server, protocol: what was found, expected, what to type."""

    def refused(url: str, *said: str) -> None:
        ran = run_here("extract-targets", "--data", url, "--out", tmp_path / "x.zarr")
        assert ran.code == 1
        assert len(ran.err.strip().splitlines()) == 1, ran.err
        for text in (url[:9], "expected: ", *said):
            assert text in ran.err

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # a dead server is tried once: tests need not wait
    refused("s3://no-such-bucket/x", "no data found", "bucket")
    refused("s3://sets/nix", "no data found", "bucket")
    refused("s3://sets/tars/0.tar/x", "no data found")
    refused("s4://sets/tars", "Protocol not known")
    allow(port, "0")
    try:
        refused("s3://sets/folder", "Forbidden", "AWS_PROFILE")
    finally:
        allow(port, "inf")
    forget()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    refused("s3://sets/folder", "Could not connect", "127.0.0.1:9", "AWS_ENDPOINT_URL")


@pytest.mark.usefixtures("afresh")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs is an extra of ours; what other protocols need, fsspec says."""
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match="Install s3fs") as error:
        resolve_data("s3://sets/folder")
    assert error.value.fix == "pip install 'milan-pretrain[s3]'"
    monkeypatch.delitem(_registry, "gs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://sets needs a package .*gcsfs"):
        resolve_data("gs://sets/folder")


def test_broken_remote_files_are_refused(sets: Path) -> None:
    """By name, as local ones are."""
    tar, parquet = (sets / "tars/0.tar").read_bytes(), (sets / "parquet/0.parquet").read_bytes()
    put_files("broken", {
        "tar/0.tar": tar[:30_000], "parquet/0.parquet": parquet[:-20], "gz/0.tar.gz": b"",
        "zip/0.tar": b"\x1f\x8b" + tar, "text/a.txt": b"x",
    })  # fmt: skip
    for kind, message in {
        "tar": r"s3://broken/tar/0\.tar is no tar, or cut short",
        "parquet": r"s3://broken/parquet/0\.parquet cannot be read: ",
        "gz": r"s3://broken/gz/0\.tar\.gz is a compressed tar",
        "zip": r"s3://broken/zip/0\.tar is a compressed tar",
        "text": r"no images in s3://broken/text \(it holds 1 \.txt\)",
    }.items():
        with pytest.raises(DataError, match=message):
            build_manifest(as_path(f"s3://broken/{kind}"), seed=0)


def test_one_image_gone(sets: Path) -> None:
    """A reason in its record, which names the file and does not vary between runs."""
    import boto3

    put_files("gone", files_of(sets))
    for kind, key in {
        "folder": "class 0/bild 00 ü.jpg",
        "tars": "1.tar",
        "parquet": "1.parquet",
    }.items():
        source = as_path(f"s3://gone/{kind}")
        manifest = build_manifest(source, seed=0)
        row = manifest.table["path"].to_pylist().index(key)
        boto3.client("s3").delete_object(Bucket="gone", Key=f"{kind}/{key}")
        reader = ImageSource(manifest, source)
        with pytest.raises(ImageFault) as fault:
            reader.read(row)
        assert str(fault.value) == f"missing: {key}"
        other = next(r for r in range(24) if manifest.table["path"][r].as_py() != key)
        assert reader.read(other)


class Faulty(MemoryFileSystem):
    """A store whose library raises what it likes, of paths that hold `broken`."""

    protocol = "faulty"
    store: dict = {}  # noqa: RUF012 - the class's own, apart from memory://
    pseudo_dirs = [""]  # noqa: RUF012
    broken = ""
    find = AbstractFileSystem.find  # folder by folder, as on other than object stores

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def _meet(self, path: str) -> None:
        if Faulty.broken and Faulty.broken in path:
            raise RuntimeError("token 4711 has expired")

    def cat_file(self, path: str, **options: object) -> bytes:  # type: ignore[override]
        self._meet(path)
        return super().cat_file(path, **options)

    def info(self, path: str, **options: object) -> dict:
        self._meet(path)
        return super().info(path, **options)

    def ls(self, path: str, **options: object) -> list:  # type: ignore[override]
        if Faulty.broken and path.endswith(Faulty.broken):
            raise PermissionError(path)
        return super().ls(path, **options)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    """Three images in two class folders of faulty://set."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        Faulty().pipe_file(f"/set/{name}", name.encode())
    monkeypatch.setattr(Faulty, "broken", "")
    return Faulty


def test_what_a_protocol_raises_is_no_fault_of_the_image(faulty: type[Faulty]) -> None:
    """Of one image or of all: else an hour without network would be a thousand bad images."""
    manifest = build_manifest(as_path("faulty://set"), seed=0)
    source = ImageSource(manifest, "faulty://set")
    for broken in ("2.jpg", "/"):
        faulty.broken = broken
        for row in range(3):
            if broken in f"/{manifest.key(row)}":
                with pytest.raises(DataError, match=r"be read: EIO \(RuntimeError: token 4711"):
                    source.read(row)
            else:
                assert source.read(row) == manifest.key(row).encode()


def test_remote_folders_that_cannot_be_listed_are_refused(faulty: type[Faulty]) -> None:
    """fsspec leaves them out by itself: their images would be missing in silence."""
    assert len(build_manifest(as_path("faulty://set"), seed=0)) == 3
    faulty.broken = "/b"
    with pytest.raises(DataError, match=r"faulty://set cannot be read: EACCES \(/set/b\)"):
        build_manifest(as_path("faulty://set"), seed=0)


def test_extraction_ends_when_the_store_is_gone(
    faulty: type[Faulty], photos: Path, teacher_files: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the middle of a run: one error, no bad images, and the same line goes on."""
    for name, data in files_of(photos, "/photos/").items():
        faulty().pipe_file(name, data)
    whole = fsspec.get_filesystem_class("faulty").cat_file
    reads = 0

    def cat_file(self: Faulty, path: str, **options: object) -> bytes:
        nonlocal reads
        reads += 1
        faulty.broken = "/" if reads > 12 else ""
        return whole(self, path, **options)

    settings = {"out": str(tmp_path / "x.zarr"), "views": 1, "shard_size": 8, "batch_size": 7}
    monkeypatch.setattr(Faulty, "cat_file", cat_file)
    with pytest.raises(DataError, match=r"faulty://photos/.* cannot be read: EIO"):
        extract_targets("faulty://photos", executor="local", **settings, **teacher_files)
    monkeypatch.setattr(Faulty, "cat_file", whole)
    faulty.broken = ""
    summary = extract_targets("faulty://photos", executor="local", **settings, **teacher_files)
    assert summary["bad"] == {}


# --- end to end -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(
    sets: Path, teacher_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Stores of tars and Parquet on disk, and of all three kinds under s3://."""
    root = tmp_path_factory.mktemp("stores")
    made = {}
    for kind in (f"{sets}/tars", f"{sets}/parquet", "s3://sets/folder", "s3://sets/tars",
                 "s3://sets/parquet"):  # fmt: skip
        name = kind if kind.startswith("s3") else Path(kind).name
        made[name] = root / name.replace("/", "-") / "targets.zarr"
        extract_targets(
            kind, out=str(made[name]), views=2, shard_size=8, batch_size=7, executor="local",
            **teacher_files,
        )  # fmt: skip
    return made


def shards(store: Path) -> dict[str, bytes]:
    """Arrays and records: what the teacher said, and the digests of images and views."""
    wanted = ("features/", "scale/", "attention/", "crop/", "records/")
    files = {name.removeprefix("generations/000/"): data for name, data in tree(store).items()}
    return {name: data for name, data in files.items() if name.startswith(wanted)}


def test_stores_are_the_same_to_the_byte(stores: dict[str, Path], store: Path) -> None:
    """The same images in the same order, from wherever: the same pixels, targets and records."""
    for name in ("s3://sets/folder", "tars", "s3://sets/tars"):
        assert shards(stores[name]) == shards(store), name
    assert len(shards(store)) > 4 * 6
    assert shards(stores["s3://sets/parquet"]) == shards(stores["parquet"]) != shards(store)
    assert TargetCache(stores["s3://sets/folder"]).digest == TargetCache(store).digest


def test_they_are_read_back_from_where_they_lie(
    stores: dict[str, Path], store: Path, sets: Path
) -> None:
    """Pixels are checked against the teacher's; a store finds its URL again, and may be told it."""
    local = open_cache(store)
    expected = [local[i] for i in range(len(local))]
    for name in ("s3://sets/folder", "tars", "s3://sets/tars"):
        dataset = open_cache(stores[name])
        assert dataset.roots[0][1].resolve() == as_path(name if name[:2] == "s3" else sets / name)
        for mine, theirs in zip((dataset[i] for i in range(48)), expected, strict=True):
            for part in ("image", "features", "attention"):
                assert torch.equal(mine[part], theirs[part])
    for name, elsewhere in (("s3://sets/tars", str(sets / "tars")), ("tars", "s3://sets/tars")):
        moved = open_cache(stores[name], data_root=elsewhere)
        assert str(moved.roots[0][1]) == elsewhere
        assert torch.equal(moved[5]["image"], expected[5]["image"])
    parquet = open_cache(stores["s3://sets/parquet"])
    assert torch.equal(parquet[7]["image"], open_cache(stores["parquet"])[7]["image"])
    with pytest.raises(DataError, match=r"not below s3://sets/nix"):
        TargetCache(store).find_data_roots("s3://sets/nix")
    origin = json.loads((stores["s3://sets/tars"] / "generations/000/origin.json").read_bytes())
    assert origin["data_root"] == "s3://sets/tars"
    assert origin["data_root_from_store"] is None


def test_a_shard_is_made_again_from_where_its_images_lie(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """Repair finds the URL in the store, and the bytes are those that were there."""
    damaged = tmp_path / "targets.zarr"
    shutil.copytree(stores["s3://sets/tars"], damaged)
    shard = damaged / "generations/000/features/c/1/0/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    repair(damaged)
    assert shard.read_bytes() == whole
    TargetCache(damaged)


@pytest.mark.soak
def test_training_reads_them_in_workers(stores: dict[str, Path], store: Path) -> None:
    """The loader's own processes connect anew; the stream is that of the local folder."""
    streams = []
    for path, workers in ((store, 0), (stores["s3://sets/tars"], 1)):
        dataset = open_cache(path)
        order = order_of(dataset.cache, seed=0, batch_size=8)
        sampler = StepSampler(order, start=0, stop=order.steps, micro=8)
        loader = training_loader(dataset, sampler, features=True, num_workers=workers)
        streams.append(list(loader))
    for mine, theirs in zip(*streams, strict=True):
        tensors = [pair for pair in zip(mine, theirs, strict=True) if torch.is_tensor(pair[0])]
        assert len(tensors) > 5
        assert all(torch.equal(*pair) for pair in tensors)
    assert len(streams[0]) == 3


def test_labels_and_captions_come_along(sets: Path) -> None:
    """Of class folders by name, of Parquet by column; each with its own image."""
    folder = build_manifest(as_path("s3://sets/folder"), seed=0)
    parquet = build_manifest(as_path("s3://sets/parquet"), seed=0)
    assert sorted(folder.labels().tolist()) == sorted(parquet.labels().tolist())
    for row in range(24):
        name = parquet.key(row).split("/", 1)[1]
        assert parquet.table["caption"][row].as_py() == name.upper()
        assert folder.labels()[folder.table["key"].to_pylist().index(name)] == parquet.labels()[row]
