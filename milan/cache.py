"""The target cache: its format, its identity, and reading from it.

    targets.zarr/index.json          written last: present means complete; the one file replaced
    targets.zarr/generations/000/    a complete Zarr v3 group with its own rows and views
        zarr.json                    attributes: spec, fingerprint, about, versions
        features/ [scale/] attention/ crop/
        manifest.parquet             a row an image
        records/00042.01.json        proves shard (block 42, view 1): rows, files, digests, reasons

Absence is found by records and sizes, never by reading a value; every chunk carries crc32c; the
reader refuses what is missing. This is the only module that uses tensorstore.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from milan.codecs import Codec, codec_of
from milan.errors import CacheError
from milan.manifest import Manifest
from milan.views import ViewSpec

FORMAT = "milan-targets"
VERSION = 1
INDEX = "index.json"
GENERATION = "generations/000"
LOG = "extract.log.jsonl"
"""Times, hosts, attempts: what varies between runs, outside what is proven."""


_reader: dict[str, int] = {}
"""The process that uses tensorstore, by `pid`: used again after a fork, it aborts the child."""


def canonical(value: Any) -> bytes:
    """The one JSON spelling that digests are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def record_name(block: int, view: int) -> str:
    """File name of the record of a shard, below `records/`."""
    return f"{block:05d}.{view:02d}.json"


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array: `chunk` is the unit of reading, `shard` (if any) a file of chunks."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None
    dtype: str
    fill: float
    dimensions: tuple[str, ...]

    def file(self, block: int, view: int) -> str:
        """Path of the file that holds (block, view), below the array (default key encoding)."""
        return "/".join(["c", str(block), str(view)] + ["0"] * (len(self.shape) - 2))


@dataclass(frozen=True)
class CacheSpec:
    """Everything that determines a store's content; its digest is the fingerprint.

    Not in it, because they change no byte: batch size, workers, order of work, times, hosts.
    """

    manifest: str
    """Digest of keys and order (Manifest.digest)."""
    rows: int
    views: int
    tokens: int
    """T = 1 + N: the class token, then the patches in raster order."""
    channels: int
    """C, the joint width of the teacher."""
    codec: str
    shard_size: int
    view_law: dict
    teacher: dict
    """Weights digest, architecture, normalisation, image size, precision."""
    version: int = VERSION

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of every field."""
        return hashlib.sha256(canonical(asdict(self))).hexdigest()

    def differences(self, other: CacheSpec) -> list[str]:
        """'field: mine != other's' for each leaf that differs, nested names joined by dots."""
        mine, theirs = _leaves(asdict(self)), _leaves(asdict(other))
        return [
            f"{key}: {_short(mine.get(key))} != {_short(theirs.get(key))}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    @property
    def blocks(self) -> int:
        """How many blocks of `shard_size` rows there are; each has one shard a view."""
        return -(-self.rows // self.shard_size)

    def block_rows(self, block: int) -> tuple[int, int]:
        """First row and one past the last row of a block."""
        return block * self.shard_size, min(self.rows, (block + 1) * self.shard_size)

    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays of a generation by name."""
        codec = codec_of(self.codec)
        n, k, t, c, s = self.rows, self.views, self.tokens, self.channels, self.shard_size
        nan = float("nan")
        arrays = {
            "features": ArraySpec(
                (n, k, t, c),
                (1, 1, t, c),
                (s, 1, t, c),
                codec.dtype,
                codec.fill,
                ("row", "view", "token", "channel"),
            ),
            "attention": ArraySpec(
                (n, k, t - 1),
                (1, 1, t - 1),
                (s, 1, t - 1),
                "float32",
                nan,
                ("row", "view", "patch"),
            ),
            "crop": ArraySpec((n, k, 5), (s, 1, 5), None, "int32", -1, ("row", "view", "number")),
        }
        if codec.scaled:
            arrays["scale"] = ArraySpec(
                (n, k, t), (1, 1, t), (s, 1, t), "float32", nan, ("row", "view", "token")
            )
        return arrays

    def view_bytes(self) -> int:
        """Bytes of one stored view, shard indexes and checksums included."""
        total = 0
        for array in self.arrays().values():
            per_row = int(np.prod(array.shape[2:])) * np.dtype(array.dtype).itemsize
            total += per_row + (4 + 16 if array.shard else 0)
        return total

    def total_bytes(self) -> int:
        """Bytes of all shards: what a run will write, records and manifest apart."""
        return self.view_bytes() * self.rows * self.views


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= _leaves(inner, f"{prefix}{key}.")
        return found
    return {prefix[:-1]: list(value) if isinstance(value, tuple) else value}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "…" + text[-8:]


def read_json(path: Path) -> Any:
    """The JSON in a file of a store. Raises CacheError if it does not parse."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} is damaged or gone: {error}", expected="JSON") from None


def read_group(generation: Path) -> tuple[CacheSpec, dict]:
    """Spec and other attributes of a generation's group."""
    attributes = read_json(generation / "zarr.json").get("attributes", {})
    if attributes.get("format") != FORMAT:
        raise CacheError(f"{generation} is a Zarr group of another kind", expected=FORMAT)
    if attributes.get("version") != VERSION:
        raise CacheError(
            f"{generation} has format version {attributes.get('version')}",
            expected=f"version {VERSION}",
            fix="pip install --upgrade milan-pretrain",
        )
    spec = CacheSpec(**attributes["spec"])
    if spec.fingerprint() != attributes["fingerprint"]:
        raise CacheError(
            f"{generation / 'zarr.json'} is damaged: its spec has not the fingerprint it states"
        )
    return spec, attributes


@dataclass
class Targets:
    """What the teacher said of B views, still encoded; numpy arrays."""

    attention: np.ndarray
    """[B, N] float32, > 0."""
    codes: np.ndarray | None = None
    """[B, T, C] in the codec's dtype; None if not asked for."""
    scale: np.ndarray | None = field(default=None)
    """[B, T] float32, for codecs that scale."""


class TargetCache:
    """A finished store, opened for reading; safe to send to another process, not to fork.

    Opening checks the index, the fingerprint and the size of every file, and refuses a store that
    is absent, incomplete, foreign or damaged. Arrays open in the process that first reads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        generation = index["generations"][0]
        self.root = self.path / generation["path"]
        self.spec, self.attributes = read_group(self.root)
        if self.spec.fingerprint() != generation["fingerprint"]:
            raise CacheError(f"{self.path}: index and {generation['path']} are of different stores")
        self.digest: str = generation["digest"]
        """SHA-256 over all records: the identity of the content, which runs refer to."""
        self.bad: dict[int, str] = {int(row): why for row, why in generation["bad"].items()}
        """Rows without targets, with the reason."""
        self._records: dict[str, str] = generation["records"]
        self._check_files(generation["files"])
        self.view_spec = ViewSpec.from_law(self.spec.view_law)
        self.codec: Codec = codec_of(self.spec.codec)
        self._arrays: dict[str, Any] = {}

    def __getstate__(self) -> dict:
        # Handles stay behind; the manifest is read again where it is needed.
        state = {k: v for k, v in self.__dict__.items() if k != "manifest"}
        return state | {"_arrays": {}}

    @property
    def rows(self) -> int:
        """Rows of the manifest, the bad ones included."""
        return self.spec.rows

    @property
    def views(self) -> int:
        """K, stored views of each image."""
        return self.spec.views

    @property
    def grid(self) -> int:
        """Patches along an edge of the teacher's grid."""
        return round((self.spec.tokens - 1) ** 0.5)

    @cached_property
    def manifest(self) -> Manifest:
        """The images of the store, in row order."""
        manifest = Manifest.read(self.root / "manifest.parquet")
        if manifest.digest() != self.spec.manifest:
            raise CacheError(f"{self.root / 'manifest.parquet'} is damaged or of another store")
        return manifest

    def good_rows(self) -> np.ndarray:
        """Rows that have targets, ascending, int64."""
        good = np.ones(self.rows, bool)
        good[list(self.bad)] = False
        return np.flatnonzero(good)

    def read(self, rows: np.ndarray, views: np.ndarray, *, features: bool = True) -> Targets:
        """Targets of (rows[i], views[i]), each an int array [B]. Raises CacheError by shard."""
        names = ["attention"] + (["features"] if features else [])
        names += ["scale"] if features and self.codec.scaled else []
        got = dict(zip(names, self._read(names, rows, views), strict=True))
        if not (got["attention"] > 0).all():
            worst = int(np.argmin((got["attention"] > 0).all(axis=1)))
            raise CacheError(
                f"{self.path}: row {rows[worst]}, view {views[worst]} has attention that is not > 0"
            )
        return Targets(got["attention"], got.get("features"), got.get("scale"))

    def crops(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B, 5] int32: top, left, height, width, flip of each stored view."""
        return self._read(["crop"], rows, views)[0]

    def record(self, row: int, view: int) -> dict:
        """The commit record of the shard that holds (row, view), proven by the index."""
        return self._record(record_name(row // self.spec.shard_size, view))

    def checksum(self, row: int, view: int) -> int:
        """crc32c of the pixels that the teacher saw."""
        record = self.record(row, view)
        return record["pixels"][row - record["rows"][0]]

    @property
    def _record(self) -> Any:
        # A record is read once a shard visit, not once a row; 256 of them are a few MB.
        if "_record_cache" not in self._arrays:
            self._arrays["_record_cache"] = lru_cache(maxsize=256)(self._load_record)
        return self._arrays["_record_cache"]

    def _load_record(self, name: str) -> dict:
        data = (self.root / "records" / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != self._records[name]:
            raise CacheError(f"record {name} of {self.path} is damaged", expected="its digest")
        return json.loads(data)

    def _read(self, names: list[str], rows: np.ndarray, views: np.ndarray) -> list[np.ndarray]:
        rows, views = np.asarray(rows), np.asarray(views)
        futures = [self._array(name)[rows, views].read() for name in names]
        try:
            return [future.result() for future in futures]
        except (ValueError, RuntimeError, OSError):
            pass
        # Something in the batch is damaged: find out which row, and say so.
        for row, view in zip(rows.tolist(), views.tolist(), strict=True):
            for name in names:
                try:
                    self._array(name)[row, view].read().result()
                except (ValueError, RuntimeError, OSError) as error:
                    block = row // self.spec.shard_size
                    raise CacheError(
                        f"{self.path}: {name} of row {row}, view {view} "
                        f"(shard {record_name(block, view)[:-5]}) cannot be read: {error}",
                        expected="a chunk whose crc32c agrees",
                        fix="delete that shard's file and run the same extract-targets line again",
                    ) from None
        raise CacheError(f"{self.path}: a batch could not be read, though each row of it can")

    def _array(self, name: str) -> Any:
        if _reader.setdefault("pid", os.getpid()) != os.getpid():
            raise CacheError(
                f"{self.path}: a cache was read before this process was forked",
                expected="loader workers started by forkserver or spawn",
                fix='DataLoader(..., multiprocessing_context="forkserver")',
            )
        if name not in self._arrays:
            self._arrays[name] = _open_array(self.root / name)
        return self._arrays[name]

    def _check_files(self, sizes: dict[str, int]) -> None:
        missing, wrong = [], []
        for name, size in sizes.items():
            try:
                if os.stat(self.root / name).st_size != size:
                    wrong.append(name)
            except FileNotFoundError:
                missing.append(name)
        if missing or wrong:
            first = (missing + wrong)[0]
            raise CacheError(
                f"{self.path} is damaged: {len(missing)} files missing and {len(wrong)} of the "
                f"wrong size, the first is {first}",
                fix="run the same extract-targets line again: it makes them anew",
            )


def _read_index(store: Path) -> dict:
    if not store.exists():
        raise CacheError(
            f"no store at {store}", fix="milan extract-targets --data … --out " + str(store)
        )
    if not (store / INDEX).exists():
        if (store / GENERATION / "zarr.json").exists():
            spec, _ = read_group(store / GENERATION)
            records = store / GENERATION / "records"
            done = len(list(records.glob("*.json"))) if records.exists() else 0
            raise CacheError(
                f"{store} is incomplete: {done} of {spec.blocks * spec.views} shards, no {INDEX}",
                fix="run the same extract-targets line again: it goes on where it stopped",
            )
        raise CacheError(f"{store} is not a target cache: it has no {INDEX}")
    index = read_json(store / INDEX)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CacheError(f"{store / INDEX} is not the index of a target cache", expected=FORMAT)
    generations = index.get("generations") or []
    if index.get("version") != VERSION or len(generations) != 1:
        raise CacheError(
            f"{store} has format version {index.get('version')} and {len(generations)} generations",
            expected=f"version {VERSION} and one generation",
            fix="pip install --upgrade milan-pretrain",
        )
    return index


def _open_array(path: Path) -> Any:
    import tensorstore

    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path.resolve()) + "/"},
            # A chunk that is not there is an error, never a fill value.
            "fill_missing_data_reads": False,
            # The store is immutable: what was read once need not be looked at again.
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        },
        read=True,
        open=True,
        # Small on purpose: it holds the shard indexes, of which a window of shards needs a few.
        context=tensorstore.Context(
            {"cache_pool": {"total_bytes_limit": 64 << 20}, "data_copy_concurrency": {"limit": 2}}
        ),
    ).result()
