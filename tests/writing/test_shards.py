"""Tests of pipeline.writing.shards: a shard's files are what zarr would write."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import numpy as np
import pytest
import zarr

from milan.images.views import ViewSpec
from milan.store.format import CacheSpec
from pipeline.writing.shards import create_arrays, stage_shard


def spec_of(codec: str, *, rows: int = 11) -> CacheSpec:
    """Shards of 8 rows and 2 views: [17, 32] features."""
    return CacheSpec(
        manifest="", rows=rows, views=2, tokens=17, channels=32, codec=codec, shard_size=8,
        view_law=ViewSpec(8).law(), teacher={},
    )  # fmt: skip


def block_of(spec: CacheSpec, block: int, *, absent: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Values of a block's rows; those `absent` are fill, and others hold a fill value here and
    there."""
    start, stop = spec.block_rows(block)
    generator = np.random.default_rng(block)
    arrays = {}
    for name, array in spec.view_arrays().items():
        shape, kind = (stop - start, *array.shape[2:]), np.dtype(array.dtype)
        integers = kind.kind in "iu"
        numbers = generator.integers(0, 99, shape) if integers else generator.standard_normal(shape)
        arrays[name] = numbers.astype(kind)
        arrays[name][0].flat[::3] = array.fill
        arrays[name][list(absent)] = array.fill
    return arrays


@pytest.mark.parametrize("codec", ["int8", "float16", "pq:16"])
@pytest.mark.parametrize(("block", "absent"), [(0, ()), (0, (2, 7)), (1, (1,)), (1, (0, 1, 2))])
def test_the_bytes_are_those_of_zarr(
    codec: str, block: int, absent: tuple[int, ...], tmp_path: Path
) -> None:
    """Whole and partial blocks, rows without a chunk, shards without any row."""
    spec = spec_of(codec)
    arrays = block_of(spec, block, absent=absent)
    (tmp_path / "ours").mkdir()
    files = stage_shard(tmp_path / "ours", spec, block, 1, arrays)
    create_arrays(tmp_path / "zarr", spec, {}, {})
    for name, values in arrays.items():
        array = zarr.open_array(tmp_path / "zarr" / name, config={"write_empty_chunks": False})
        array[slice(*spec.block_rows(block)), 1] = values
    ours, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "ours", tmp_path / "zarr")
    )
    theirs = {path: data for path, data in theirs.items() if path.name != "zarr.json"}
    assert ours == theirs
    # The crops of rejected images are all 0, which is no fill value that could be left out.
    assert {file["path"] for file in files} == {p.as_posix() for p in ours}


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """With the system's number, and the folder's name."""
    spec, (soft, hard) = spec_of("float16"), resource.getrlimit(resource.RLIMIT_FSIZE)
    arrays = block_of(spec, 0, absent=())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # python ignores the signal
    try:
        with pytest.raises(OSError, match="File too large") as error:
            stage_shard(tmp_path, spec, 0, 0, arrays)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path))
