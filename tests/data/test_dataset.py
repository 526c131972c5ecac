"""What training reads: the joining of pixels and targets, and images that changed."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from milan.core.rng import mask_noise
from milan.data import dataset as data
from milan.data.dataset import CachedDataset, open_cache
from milan.data.loader import Batch, training_loader
from milan.data.order import order_of
from milan.data.sampler import StepSampler
from milan.errors import CacheError, DataError
from milan.images.decode import decode
from milan.images.views import View, render, view_of
from milan.store import generation
from milan.store.cache import TargetCache
from milan.store.format import GENERATION
from milan.store.generation import Generation

# --- items ----------------------------------------------------------------------------------------


def test_items(store: Path, photos: Path, cache: TargetCache) -> None:
    """Shapes, types, and what they say: the store's targets and the pixels of the view's law."""
    dataset = open_cache(store)
    assert len(dataset) == 48
    manifest = cache.manifest
    for index in (0, 1, 17, 47, -1):
        item = dataset[index]
        row, view = divmod(index % 48, 2)
        assert (item["row"], item["view"]) == (row, view)
        assert item["label"] == int(manifest.key(row).split("/")[0][-1])
        image = decode((photos / manifest.key(row)).read_bytes())
        drawn = view_of(cache.view_spec, row, view=view, height=image.height, width=image.width)
        pixels = render(image, drawn, size=32)
        assert item["image"].dtype == torch.uint8
        assert np.array_equal(item["image"], pixels.transpose(2, 0, 1))
        targets = cache.read(np.array([row]), np.array([view]))
        assert targets.codes is not None
        assert targets.scale is not None
        channel = cache.codec.tables["channel"]
        expected = targets.codes[0] * targets.scale[0][:, None] * channel
        assert item["features"].dtype == item["attention"].dtype == torch.float32
        assert np.array_equal(item["features"].numpy(), expected)
        assert np.array_equal(item["attention"].numpy(), targets.attention[0])
        assert item["features"].shape == (17, 24)
        assert item["attention"].shape == (16,)
    for index in (48, -49):
        with pytest.raises(IndexError):
            dataset[index]


def test_stored_crops_are_the_laws(cache: TargetCache, photos: Path) -> None:
    """What training replays is what anyone can draw from the seed."""
    for row in range(cache.rows):
        with Image.open(photos / cache.manifest.key(row)) as image:
            width, height = image.size
        crops = cache.crops(np.full(2, row), np.arange(2))
        for view in range(2):
            drawn = view_of(cache.view_spec, row, view=view, height=height, width=width)
            assert View.of(crops[view]) == drawn


def test_in_a_plain_loader(store: Path) -> None:
    """One's own loop: shuffled, batched, all 48 views once."""
    dataset = open_cache(store)
    loader = DataLoader(
        dataset, batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    seen = []
    for batch in loader:
        assert batch["image"].shape[1:] == (3, 32, 32)
        assert batch["features"].shape[1:] == (17, 24)
        for i in range(len(batch["row"])):
            row, view = int(batch["row"][i]), int(batch["view"][i])
            assert torch.equal(batch["features"][i], dataset[2 * row + view]["features"])
            seen.append((row, view))
    assert len(seen) == len(set(seen)) == 48


def test_sent_to_another_process(store: Path) -> None:
    """Datasets and caches are pickled by spawned workers, opened or not."""
    dataset = open_cache(store)
    expected = dataset[5]
    size = len(pickle.dumps(dataset))
    assert size < 20_000, "a manifest of millions of rows must stay behind"
    assert not {"good", "labels", "source"} & dataset.__getstate__().keys()
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[5]["features"], expected["features"])
    cache = pickle.loads(pickle.dumps(dataset.cache))
    assert np.array_equal(cache.read([0], [1]).codes, dataset.cache.read([0], [1]).codes)
    assert cache.manifest.key(3) == dataset.cache.manifest.key(3)


@pytest.mark.parametrize("anew", [False, True], ids=["the same cache", "one opened in the child"])
def test_reading_after_a_fork_is_refused(store: Path, anew: bool) -> None:
    """tensorstore aborts the process, or hangs; what is said must say what to do instead."""
    cache = TargetCache(store)
    cache.read(np.array([0]), np.array([0]))
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a hang is a failure too
        code = 1
        try:
            (TargetCache(store) if anew else cache).read(np.array([1]), np.array([0]))
        except CacheError as error:
            code = 7 if "forkserver" in str(error) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    cache.read(np.array([1]), np.array([0]))


# --- the loader -----------------------------------------------------------------------------------


def batches(dataset: CachedDataset, workers: int, *, features: bool = True) -> list[Batch]:
    """Two epochs in micro-batches of 4, from step 1."""
    cache = dataset.cache
    steps = order_of(cache, seed=3, batch_size=8)
    sampler = StepSampler(steps, start=1, stop=6, micro=4)
    loader = training_loader(dataset, sampler, features=features, num_workers=workers)
    loaded = list(loader)
    # What it took is counted, but for each process's first batch.
    assert loader.loading.images == 4 * (len(loaded) - max(1, workers))
    assert loader.loading.seconds > 0
    assert 0 < loader.loading.core_seconds < 10
    return loaded


@pytest.fixture(scope="module")
def alone(store: Path) -> list[Batch]:
    """The batches as this process makes them."""
    return batches(open_cache(store), 0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(store: Path, alone: list[Batch], workers: int) -> None:
    """Every tensor of every batch, in order; also where this process has read the cache before."""
    dataset = open_cache(store)
    _ = dataset[0]
    got = batches(dataset, workers)
    assert len(got) == len(alone) == 10
    for a, b in zip(got, alone, strict=True):
        for name, x, y in zip(Batch._fields, a, b, strict=True):
            if name in ("ids", "texts", "channels", "others", "drops"):  # for those that ask
                assert not x, name
                assert not y, name
                continue
            assert x.dtype == y.dtype, name
            assert torch.equal(x, y), name


def test_what_a_batch_holds(alone: list[Batch], cache: TargetCache) -> None:
    """Targets as stored, noise at its address, pixels not yet normalised."""
    for index, batch in enumerate(alone):
        epoch = (index // 2 + 1) // 3
        rows, views = batch.rows.numpy(), batch.views.numpy()
        targets = cache.read(rows, views)
        assert batch.codes is not None
        assert batch.scale is not None
        assert np.array_equal(batch.codes, targets.codes)
        assert np.array_equal(batch.scale, targets.scale)
        assert np.array_equal(batch.attention, targets.attention)
        expected = mask_noise(3, np.full(4, epoch), rows, views, 16)
        assert np.array_equal(batch.noise, expected)
        assert batch.pixels.shape == (4, 32, 32, 3)
        assert batch.pixels.dtype == torch.uint8
    assert len({tuple(b.noise[0].tolist()) for b in alone}) == 10


def test_without_features(store: Path, alone: list[Batch]) -> None:
    """The pixel baseline reads no features; everything else is the same."""
    for a, b in zip(batches(open_cache(store), 0, features=False), alone, strict=True):
        assert a.codes is None
        assert a.scale is None
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in Batch._fields[:5])
        assert a.to(torch.device("cpu")).codes is None


def test_what_a_reader_holds(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums of a stated number of shards, whatever the store's size; 72 KB for 1,024 rows."""
    monkeypatch.setattr(generation, "_CACHED_CHECKSUMS", 2)
    cache = TargetCache(store)
    cache.read(np.repeat(np.arange(24), 2), np.tile(np.arange(2), 24))
    checksums = cache.generations[0]._checksums
    assert list(checksums) == [(2, 0), (2, 1)]
    cache.read(np.array([16, 0]), np.array([0, 0]))
    assert list(checksums) == [(2, 0), (0, 0)] or list(checksums) == [(0, 0), (2, 0)]
    held = checksums[0, 0]
    arrays = [held.pixels, held.digests, *held.crc32c.values()]
    assert len(arrays) == 6
    assert sum(array.nbytes for array in arrays) / 8 * 1024 == 72 * 1024


# --- images that changed --------------------------------------------------------------------------


@pytest.fixture
def copied(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos that a test may change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def test_changed_images_are_named(store: Path, copied: Path, cache: TargetCache) -> None:
    """Gone, cut short, another picture of the same size: never trained on with old targets."""
    dataset = open_cache(store, data_root=str(copied))
    key = cache.manifest.key(4)
    path = copied / key
    whole = path.read_bytes()
    _ = dataset[8]

    def message() -> str:
        with pytest.raises(DataError) as error:
            dataset[8]
        assert repr(key) in str(error.value)
        assert "row 4" in str(error.value)
        assert str(copied) in str(error.value)
        return str(error.value)

    path.unlink()
    assert "has changed since extraction: missing" in message()
    path.write_bytes(b"")
    assert "has changed since extraction: empty" in message()
    path.write_bytes(whole[: len(whole) // 2])
    assert "has changed since extraction: truncated" in message()
    with Image.open(io.BytesIO(whole)) as image:
        size = image.size
    with Image.open(copied / cache.manifest.key(5)) as other:
        other.resize(size).save(path, quality=60)
    assert path.stat().st_size < len(whole)
    path.write_bytes(path.read_bytes().ljust(len(whole), b"\0"))  # no size gives it away
    assert "has changed since extraction: it renders to other pixels" in message()
    _ = dataset[10]
    path.write_bytes(whole)
    _ = dataset[8]


def test_exchanged_images_are_seen(store: Path, copied: Path, cache: TargetCache) -> None:
    """Two files under each other's names: both are pictures, neither is the right one."""
    a, b = (copied / cache.manifest.key(row) for row in (2, 3))
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)
    dataset = open_cache(store, data_root=str(copied))
    for row in (2, 3):
        with pytest.raises(DataError, match=f"row {row}"):
            dataset[2 * row]


def test_pixels_are_what_counts(store: Path, copied: Path, cache: TargetCache) -> None:
    """A comment added to a file changes no pixel of it: the targets are still right."""
    path = copied / cache.manifest.key(4)
    whole = path.read_bytes()
    comment = b"\xff\xfe\x00\x06note"
    path.write_bytes(whole[:2] + comment + whole[2:])
    dataset = open_cache(store, data_root=str(copied))
    assert torch.equal(dataset[8]["image"], open_cache(store)[8]["image"])


def test_another_decoder_is_told_apart(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the same and the pixels are not: it is the machine, not the data."""
    dataset = open_cache(store)
    _ = dataset[3]
    monkeypatch.setattr(data, "render", lambda *a, **k: render(*a, **k) ^ 1)
    with pytest.raises(DataError, match="is unchanged, but it renders to other pixels") as error:
        dataset[3]
    assert "Pillow" in error.value.fix


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_at_a_changed_image(
    store: Path, copied: Path, cache: TargetCache, workers: int
) -> None:
    """The error names the image, from a loader worker too, and is one of ours."""
    key = cache.manifest.key(6)
    (copied / key).unlink()
    with pytest.raises(DataError) as error:
        batches(open_cache(store, data_root=str(copied)), workers)
    assert repr(key) in str(error.value)
    assert "Traceback" not in str(error.value)


# --- where the images lie -------------------------------------------------------------------------


def test_a_project_may_move_as_a_whole(
    store: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Store and images moved together are found from the store, from any working folder."""
    root = tmp_path / "new place"
    moved = root / store.parent.name / store.name
    shutil.copytree(store, moved)
    shutil.copytree(photos, root / photos.name)
    assert TargetCache(moved).find_data_roots()[0][1].resolve() == root / photos.name
    monkeypatch.chdir(moved.parent)
    relative = open_cache(store.name)
    assert relative.roots[0][1].resolve() == root / photos.name
    assert torch.equal(relative[3]["image"], open_cache(store)[3]["image"])


def test_a_store_may_move_alone(store: Path, photos: Path, tmp_path: Path) -> None:
    """Then the absolute place of the images, as recorded, still holds."""
    moved = tmp_path / "a" / "b" / "c.zarr"
    shutil.copytree(store, moved)
    assert open_cache(moved).roots[0][1] == photos.resolve()


def test_images_may_move(store: Path, copied: Path, tmp_path: Path) -> None:
    """--data-root says where, and is believed over the record; wrong, it is refused."""
    assert open_cache(store, data_root=str(copied)).roots[0][1] == copied
    with pytest.raises(DataError, match=f"not below {tmp_path}") as error:
        open_cache(store, data_root=str(tmp_path))
    assert "--data-root" in error.value.fix
    assert "class " in error.value.expected


def test_a_store_without_its_origin(store: Path, photos: Path, tmp_path: Path) -> None:
    """It names folders and may be left out of a published store: then --data-root is needed."""
    bare = tmp_path / "t.zarr"
    shutil.copytree(store, bare)
    (bare / GENERATION / "origin.json").unlink()
    with pytest.raises(CacheError, match=r"origin\.json"):
        open_cache(bare)
    assert open_cache(bare, data_root=str(photos)).pixels(np.array([3]), np.array([1])).any()


def test_images_that_are_nowhere(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place looked at is told."""
    cache = TargetCache(store)
    gone = {"data_root": "/nowhere/images", "data_root_from_store": "../not here"}
    monkeypatch.setattr(Generation, "origin", gone)
    with pytest.raises(DataError, match=r"not below .*/not here, nor /nowhere/images") as error:
        cache.find_data_roots()
    assert "--data-root" in error.value.fix
