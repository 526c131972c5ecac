"""What pipeline.writing.backend promises, asked of every backend: a disk and a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from milan.core.paths import AnyPath, Url, files_below, names_in, read_file, size_of
from milan.errors import CacheError, ConfigError
from milan.images.views import ViewSpec
from milan.store.format import CHECK, GENERATION, LOG, LOGS, CacheSpec
from pipeline.writing.backend import Backend, Location, location_of, open_backend
from pipeline.writing.s3 import put
from pipeline.writing.shards import create_arrays, stage_shard

SPEC = CacheSpec(
    manifest="", rows=6, views=1, tokens=5, channels=4, codec="float16", shard_size=4,
    view_law=ViewSpec(8).law(), teacher={"weights": "abc"},
)  # fmt: skip


@pytest.fixture(params=["disk", "bucket"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    """A path or URL where nothing is."""
    if request.param == "disk":
        return tmp_path / "targets.zarr"
    request.getfixturevalue("s3")
    return Url(f"s3://models/{request.node.originalname}/targets.zarr")


@pytest.fixture
def location(where: AnyPath) -> Location:
    return location_of(where)


@pytest.fixture
def backend(location: Location) -> Iterator[Backend]:
    backend = location.open("run")
    yield backend
    backend.close()


def add_generation(backend: Backend) -> None:
    folder = backend.staging / "generation"
    folder.mkdir()
    create_arrays(folder, SPEC, {"kind": "test"}, {"table": np.ones(3, np.float32)})
    backend.add_generation(folder, GENERATION)


def values(block: int) -> dict[str, np.ndarray]:
    start, stop = SPEC.block_rows(block)
    return {
        name: np.full((stop - start, *array.shape[2:]), block + 1, array.dtype)
        for name, array in SPEC.view_arrays().items()
    }


def test_files(backend: Backend, where: AnyPath) -> None:
    """Created, replaced, removed; removing nothing is no error; names leave folders out."""
    assert backend.path == where
    assert backend.read("index.json") is None
    backend.write("index.json", b"one")
    assert backend.read("index.json") == b"one"
    backend.write("index.json", b"two")
    assert read_file(where / "index.json") == b"two"
    add_generation(backend)
    names = set(backend.file_names(GENERATION))
    arrays = set(SPEC.arrays())
    assert names == {"zarr.json", "table/zarr.json", "table/c/0"} | {
        f"{name}/zarr.json" for name in arrays
    }
    skipped = set(backend.file_names(GENERATION, {"table", "crop"}))
    assert skipped == {"zarr.json"} | {f"{name}/zarr.json" for name in arrays - {"crop"}}
    backend.remove("index.json")
    backend.remove("index.json")
    assert size_of(where / "index.json") is None


def test_one_process_has_the_lock(location: Location, where: AnyPath) -> None:
    """The second is refused until the first closes; staging goes with it, what is written stays."""
    first = location.open("first")
    first.write("zarr.json", b"{}")
    (first.staging / "scrap").write_bytes(b"x")
    with pytest.raises(CacheError, match="is in use by pid"):
        open_backend(where, "second")
    first.close()
    assert not first.staging.exists()
    second = open_backend(str(where), "second")
    assert second.read("zarr.json") == b"{}"
    assert list(second.staging.iterdir()) == []
    second.close()


def test_other_content_is_refused(where: AnyPath) -> None:
    """Nobody's files are overwritten."""
    store = open_backend(where, "run")
    store.write("thesis.tex", b"mine")
    store.close()
    with pytest.raises(CacheError, match="is a folder with other content"):
        open_backend(where, "other")
    assert read_file(where / "thesis.tex") == b"mine"


def test_a_generation_replaces_leftovers(backend: Backend, where: AnyPath) -> None:
    """Of a run that was killed while it added one."""
    backend.write("generations/zarr.json", b"{}")
    backend.write(f"{GENERATION}/leftover", b"x")
    add_generation(backend)
    assert size_of(where / GENERATION / "leftover") is None
    assert json.loads(read_file(where / GENERATION / "zarr.json"))["attributes"] == {"kind": "test"}
    assert list(backend.staging.iterdir()) == []


def test_a_shard_is_staged_and_committed(backend: Backend, where: AnyPath) -> None:
    """Its files are in the generation with the stated sizes, also where another run left some."""
    add_generation(backend)
    for attempt in ("0", "1"):  # the second as after a kill between commit and record
        backend.clear(GENERATION, list(SPEC.files(1, 0).values()))
        folder = backend.staging_folder(GENERATION, f"00001.{attempt}")
        files = stage_shard(folder, SPEC, 1, 0, values(1))
        assert [file["path"] for file in files] == list(SPEC.files(1, 0).values())
        backend.commit_files(folder, GENERATION, files)
        backend.drop_staging(folder)
        assert list(backend.staging.iterdir()) == []
        for file in files:
            assert size_of(where / GENERATION / file["path"]) == file["bytes"]
    staged = backend.staging_folder(GENERATION, "00000.0")
    files = stage_shard(staged, SPEC, 0, 0, values(0))
    files[-1]["bytes"] += 1
    with pytest.raises(CacheError, match="has changed since"):
        backend.commit_files(staged, GENERATION, files)


def test_the_log_is_complete_after_closing(location: Location, where: AnyPath) -> None:
    """A line an event."""
    backend = location.open("run")
    backend.log("one")
    backend.log("two")
    backend.close()
    logs = [where / LOG, where / LOGS / "run.jsonl"]
    assert [read_file(log) for log in logs if size_of(log)] == [b"one\ntwo\n"]


def test_a_location_is_asked_without_a_lock(
    location: Location, where: AnyPath, tmp_path: Path
) -> None:
    """Nothing is written, and no server is needed."""
    assert location.path == where
    free = location.free_bytes()
    assert free is None or free > 0
    assert location.scratch_parent().is_dir()
    assert location.relative_root(tmp_path / "photos") in (None, "../photos")
    assert location.relative_root(Url("s3://models/photos")) is None
    assert not where.exists()
    assert list(files_below(tmp_path)) == []


def test_a_check_leaves_nothing(location: Location, where: AnyPath) -> None:
    """Of what writing takes; a store that is there is not touched."""
    location.check()
    assert not where.exists()
    location.open("run").close()
    before = sorted(names_in(where))
    location.check()
    assert sorted(names_in(where)) == before


def test_what_a_killed_check_left_is_no_obstacle(location: Location, where: AnyPath) -> None:
    """A run that died between writing and removing; the next one removes it."""
    if isinstance(where, Path):
        (where / f"{CHECK}abc").mkdir(parents=True)
    else:
        put(where / f"{CHECK}abc", b"x", over=None)
    location.open("run").close()
    assert not [name for name in names_in(where) if name.startswith(CHECK)]


def test_a_url_without_a_backend_is_refused() -> None:
    """Stores are read from more places than they are written to."""
    told = r"cannot be written to memory://x/t\.zarr; expected: a path, or a URL"
    with pytest.raises(ConfigError, match=told):
        location_of("memory://x/t.zarr")
