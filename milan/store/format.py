"""What a store is: its spec and identity, its arrays, its records and its index.

    targets.zarr/index.json          written last: present means complete; the one file replaced
    targets.zarr/generations/000/    a complete Zarr v3 group with its own rows and views
        zarr.json                    attributes: spec, fingerprint, about the teacher
        origin.json                  where and with which libraries it was made; in no digest
        features/ [scale/] attention/ crop/
        pixels/                      rendered views, if they are stored
        [text/ text_ids/ prototypes/] captions and class prompts (with --texts), of first views
        codec/ canary/ fidelity.json written before the first shard: codec tables, checks
        manifest.parquet             a row per image
        records/00042.01.json        of shard (block 42, view 1): rows, files, checksums, reasons
        shards.parquet               shard table: digest of each record, sizes of its files

Growth adds a generation and replaces the index; nothing else that is committed ever changes. Blocks
and views in names, records and arrays count from 0 inside their generation; the spec says where in
the whole it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from milan.core.paths import AnyPath, names_in, read_file
from milan.core.size import as_size, height_width
from milan.errors import CacheError
from milan.store.codecs import NO_TARGETS, codec_of

FORMAT = "milan-targets"
VERSION = 1
INDEX = "index.json"
GENERATIONS = "generations"
GENERATION = "generations/000"
"""The first generation of a store."""
MANIFEST = "manifest.parquet"
SHARDS = "shards.parquet"
FIDELITY = "fidelity.json"
ORIGIN = "origin.json"
PIXELS = "pixels"
"""The folder of stored views."""
TEXT, TEXT_IDS = "text", "text_ids"
"""The arrays of captions: the text tower's output, and the token ids."""
PROTOTYPES = "prototypes"
"""The group of class prompts: `features`, `ids`."""
CONTENT = ("codec/", f"{PROTOTYPES}/")
"""Which of a generation's small files are part of its content, as its records are."""
LOG = "extract.log.jsonl"
"""Times, hosts, attempts: what varies between runs; in no digest."""
LOGS = "extract.log"
"""The same in an object store, where nothing is appended to: an object a run."""
CHECK = ".milan-check-"
"""How the names begin of what is written to see whether a place can be written."""


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

    @property
    def of_views(self) -> bool:
        """Whether it has a value per view of an image; else one per image."""
        return self.dimensions[1] == "view"

    def file(self, block: int, view: int) -> str:
        """Path of the file of (block, view), below the array (default key encoding).

        Arrays without views are stored with the block's first view: 0 in their path as well.
        """
        return "/".join(["c", str(block), str(view)] + ["0"] * (len(self.shape) - 2))


@dataclass(frozen=True)
class CacheSpec:
    """Everything that determines a generation's content; its digest is the fingerprint.

    Not in it, because they change no byte: batch size, workers, order of work, times, hosts.
    """

    manifest: str
    """Digest of keys and order of this generation's rows (Manifest.digest)."""
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
    first_row: int = 0
    """Of the whole store: the rows of earlier generations come before."""
    first_view: int = 0
    stored_views: str = "none"
    """Whether rendered views are stored beside their targets, and how: none, jpeg:95, webp."""
    texts: dict | None = None
    """The identity of the teacher's text tower (TextTower.identity), if its texts are stored."""
    version: int = VERSION

    @property
    def has_targets(self) -> bool:
        """Whether a teacher's features and attention are stored; else views and token ids alone."""
        return self.codec != NO_TARGETS.name

    @property
    def view_shape(self) -> tuple[int, int]:
        """(height, width) of a view in pixels."""
        return height_width(as_size(self.view_law["size"]))

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of every field."""
        return hashlib.sha256(canonical(asdict(self))).hexdigest()

    def differences(self, other: CacheSpec) -> list[str]:
        """'field: mine != other's' for each leaf that differs, nested names joined by dots."""
        fields, others = asdict(self), asdict(other)
        differences = []
        for key in fields:
            if (fields[key] is None) != (others[key] is None):  # its leaves would say no more
                differences.append(
                    f"{key}: " + ("without != with" if fields[key] is None else "with != without")
                )
                fields[key] = others[key] = None
        mine, theirs = _leaves(fields), _leaves(others)
        return differences + [
            f"{key}: {_short(mine.get(key))} != {_short(theirs.get(key))}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    def layer(self) -> bytes:
        """What the generations of a layer share: every field but the ranges of rows and views."""
        fields = asdict(self)
        ranged = ("manifest", "rows", "views", "first_row", "first_view")
        return canonical({key: value for key, value in fields.items() if key not in ranged})

    @property
    def blocks(self) -> int:
        """How many blocks of `shard_size` rows there are; each has one shard a view."""
        return -(-self.rows // self.shard_size)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return self.blocks * self.views

    def block_rows(self, block: int) -> tuple[int, int]:
        """First row and one past the last row of a block, counted inside the generation."""
        return block * self.shard_size, min(self.rows, (block + 1) * self.shard_size)

    def files(self, block: int, view: int) -> dict[str, str]:
        """The files of a shard by name: each array, and `pixels` if views are stored.

        Texts belong to rows: they are in the shard of a block's first view.
        """
        names = {
            name: f"{name}/{array.file(block, view)}"
            for name, array in self.arrays().items()
            if array.of_views or view == 0
        }
        if self.stored_views != "none":
            names[PIXELS] = self.pictures_file(block, view)
        return dict(sorted(names.items()))

    def pictures_file(self, block: int, view: int) -> str:
        """The file of a shard's stored views, where there are any."""
        return f"{PIXELS}/c/{block}/{view}"

    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays of a generation by name."""
        codec = codec_of(self.codec)
        n, k, t, s = self.rows, self.views, self.tokens, self.shard_size
        c = codec.width(self.channels)
        nan = float("nan")
        arrays = {
            "crop": ArraySpec((n, k, 5), (s, 1, 5), None, "int32", -1, ("row", "view", "number"))
        }
        if self.has_targets:
            arrays["features"] = ArraySpec(
                (n, k, t, c),
                (1, 1, t, c),
                (s, 1, t, c),
                codec.dtype,
                codec.fill,
                ("row", "view", "token", "code" if codec.coded else "channel"),
            )
            arrays["attention"] = ArraySpec(
                (n, k, t - 1),
                (1, 1, t - 1),
                (s, 1, t - 1),
                "float32",
                nan,
                ("row", "view", "patch"),
            )
        if codec.scaled:
            arrays["scale"] = ArraySpec(
                (n, k, t), (1, 1, t), (s, 1, t), "float32", nan, ("row", "view", "token")
            )
        if self.texts and self.first_view == 0:
            width = self.channels
            ids: tuple[int, ...] = (self.texts["context"],)
            names: tuple[str, ...] = ("row", "text_token")
            if self.has_targets:
                arrays[TEXT] = ArraySpec(
                    (n, width), (1, width), (s, width), "float32", nan, ("row", "channel")
                )
            else:  # of several captions, no text tower has seen them
                ids, names = (self.texts["captions"], *ids), ("row", "caption", "text_token")
            arrays[TEXT_IDS] = ArraySpec((n, *ids), (1, *ids), (s, *ids), "int32", -1, names)
        return arrays

    def view_arrays(self) -> dict[str, ArraySpec]:
        """The arrays with a value per view: all but the texts."""
        return {name: array for name, array in self.arrays().items() if array.of_views}

    def view_bytes(self) -> int:
        """Bytes of one stored view, shard indexes and checksums included."""
        total = 0
        for array in self.view_arrays().values():
            per_row = int(np.prod(array.shape[2:])) * np.dtype(array.dtype).itemsize
            total += per_row + (4 + 16 if array.shard else 0)
        return total

    def shard_bytes(self, rows: int, *, view: int) -> int:
        """Bytes of the files of one shard of `rows` good images, each with a caption if any is.

        The index of a shard file has an entry for each of `shard_size` rows, whatever `rows` is.
        """
        total = 0
        for array in (self.arrays() if view == 0 else self.view_arrays()).values():
            row = int(np.prod(array.shape[1 + array.of_views :])) * np.dtype(array.dtype).itemsize
            index = 16 * self.shard_size + 4
            total += rows * (row + 4) + index if array.shard else self.shard_size * row + 4
        return total

    def total_bytes(self) -> int:
        """Bytes of all shards if no image is bad: what a run writes, records and manifest apart.

        Stored views are estimated: about 5 bits a pixel as JPEG, 16 as WebP.
        """
        bits = {"none": 0.0, "webp": 16.0}.get(self.stored_views, 5.0)
        pictures = int(math.prod(self.view_shape) * bits / 8) * self.rows
        last = self.rows - (self.blocks - 1) * self.shard_size
        return sum(
            (self.blocks - 1) * self.shard_bytes(self.shard_size, view=view)
            + self.shard_bytes(last, view=view)
            + pictures
            for view in range(self.views if self.rows else 0)
        )


@dataclass(frozen=True)
class Entry:
    """A committed generation, as the index lists it."""

    path: str
    layer: str
    """Name of its teacher and codec, such as `ViT-B-16-quickgelu/int8`."""
    fingerprint: str
    digest: str
    """SHA-256 over the fingerprint, the codec's tables and all records: the content's identity."""
    rows: tuple[int, int]
    """First row and one past the last, in the whole store."""
    views: tuple[int, int]
    shards: int
    bytes: int
    """Of all shards."""
    bad: int
    """Images without targets."""
    files: dict[str, str]
    """SHA-256 of every file beside shards and records, by path inside the generation."""

    @property
    def number(self) -> int:
        """Of its folder: generations are numbered in the order in which they are begun."""
        return int(self.path.rpartition("/")[2])

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Entry:
        """An entry of index.json. Raises KeyError, TypeError, ValueError for what is none."""
        entry = cls(**{**value, "rows": tuple(value["rows"]), "views": tuple(value["views"])})
        sizes = (entry.shards, entry.bytes, entry.bad)
        numbers = (entry.number, *entry.rows, *entry.views, *sizes)
        texts = (entry.path, entry.layer, entry.fingerprint, entry.digest, *entry.files.values())
        if len(numbers) != 8 or not all(type(number) is int for number in numbers):
            raise ValueError("a number is missing")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name or digest is missing")
        return entry


@dataclass(frozen=True)
class Index:
    """The generations of a store, oldest first."""

    generations: tuple[Entry, ...]
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Layer -> rows, ascending, whose images are gone: they have targets, and are left out."""
    pruned: tuple[str, ...] = ()
    """Paths of generations that do not count any more, or not yet; their numbers stay taken."""

    @property
    def count(self) -> int:
        """How many generations were ever begun: the number of the next one, and what runs pin."""
        numbers = [int(path.rpartition("/")[2]) for path in self.pruned]
        return 1 + max([*numbers, *(entry.number for entry in self.generations)])

    def first(self, pinned: int | None) -> tuple[Entry, ...]:
        """The generations there are of the first `pinned` that were begun; all if None."""
        return tuple(e for e in self.generations if pinned is None or e.number < pinned)

    def to_bytes(self) -> bytes:
        """The content of index.json."""
        entries = [asdict(entry) for entry in self.generations]
        content = {"format": FORMAT, "version": VERSION, "generations": entries}
        dropped = {layer: rows for layer, rows in self.dropped.items() if rows}
        content |= {"dropped": dropped} if dropped else {}
        content |= {"pruned": list(self.pruned)} if self.pruned else {}
        return canonical(content | {"digest": hashlib.sha256(canonical(content)).hexdigest()})

    @classmethod
    def read(cls, store: AnyPath) -> Index:
        """The index of a finished store. Raises CacheError if it is absent, foreign or damaged."""
        if not (store / INDEX).exists():
            raise _unfinished(store)
        index = read_json(store / INDEX)
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CacheError(f"{store / INDEX} is not the index of a target cache", expected=FORMAT)
        _check_version(store, index.get("version"))
        try:
            entries = [Entry.parse(entry) for entry in index["generations"]]
            if not entries:
                raise ValueError("no generation")
            dropped = {
                str(layer): [int(row) for row in rows]
                for layer, rows in index.get("dropped", {}).items()
            }
            if any(row < 0 for rows in dropped.values() for row in rows):
                raise ValueError("a dropped row below 0")
            pruned = tuple(str(path) for path in index.get("pruned", []))
            if any(not path.rpartition("/")[2].isdecimal() for path in pruned):
                raise ValueError("a pruned generation without a number")
            stated = index.pop("digest", None)  # none in one from before it had a digest
            if stated is not None and stated != hashlib.sha256(canonical(index)).hexdigest():
                raise ValueError("its digest differs")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{store / INDEX} is damaged: {error}",
                expected="the index as it was written",
                fix="a copy of it; for a store that never grew, delete it and run the same "
                "extract-targets line: its shards stay",
            ) from None
        return cls(tuple(entries), dropped, pruned)


def content_digest(entries: Iterable[Entry]) -> str:
    """SHA-256 over the digests of a layer's generations, in their order: what runs refer to."""
    return hashlib.sha256(canonical([entry.digest for entry in entries])).hexdigest()


def _check_version(where: Any, version: Any) -> None:
    if version != VERSION:
        raise CacheError(
            f"{where} has format version {version}",
            expected=f"version {VERSION}",
            fix="pip install --upgrade milan-pretrain",
        )


def _unfinished(store: AnyPath) -> CacheError:
    first = store / GENERATION
    if not (first / "zarr.json").exists():
        if not store.exists():
            fix = f"milan extract-targets --data … --out {store}"
            return CacheError(f"no store at {store}", fix=fix)
        return CacheError(
            f"{store} is not a target cache: it has no {INDEX}", fix="the --out of an extraction"
        )
    spec, _ = read_group(first)
    done = sum(name.endswith(".json") for name in names_in(first / "records"))
    return CacheError(
        f"{store} is incomplete: {done} of {spec.shards} shards, no {INDEX}",
        fix="run the same extract-targets line again: it goes on where it stopped",
    )


def read_json(path: AnyPath) -> Any:
    """The JSON in a file of a store. Raises CacheError if it does not parse."""
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} is damaged or gone: {error}", expected="JSON") from None


def read_group(generation: AnyPath) -> tuple[CacheSpec, dict]:
    """Spec and other attributes of a generation's group. Raises CacheError if it is damaged."""
    return parse_group(generation, read_group_file(generation))


def read_group_file(generation: AnyPath) -> bytes:
    """A generation's zarr.json. Raises CacheError."""
    try:
        return read_file(generation / "zarr.json")
    except OSError as error:
        path = generation / "zarr.json"
        raise CacheError(f"{path} is damaged or gone: {error}", expected="JSON") from None


def parse_group(generation: AnyPath, data: bytes) -> tuple[CacheSpec, dict]:
    """Spec and other attributes in a generation's zarr.json. Raises CacheError if damaged."""
    try:
        group = json.loads(data)
    except ValueError as error:
        raise CacheError(
            f"{generation / 'zarr.json'} is damaged or gone: {error}", expected="JSON"
        ) from None
    attributes = group.get("attributes") if isinstance(group, dict) else None
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise CacheError(f"{generation} is a Zarr group of another kind", expected=FORMAT)
    _check_version(generation, attributes.get("version"))
    try:
        spec = CacheSpec(**attributes["spec"])
        stated, _ = attributes["fingerprint"], attributes["about"]["name"]
    except (KeyError, TypeError) as error:
        raise CacheError(f"{generation / 'zarr.json'} is damaged: {error}") from None
    # Of the spec as it is written, so that a later version's new fields do not change it.
    if hashlib.sha256(canonical(attributes["spec"])).hexdigest() != stated:
        raise CacheError(
            f"{generation / 'zarr.json'} is damaged: its spec does not have the stated fingerprint"
        )
    return spec, attributes


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        leaves: dict[str, Any] = {}
        for key, inner in value.items():
            leaves |= _leaves(inner, f"{prefix}{key}.")
        return leaves
    return {prefix[:-1]: list(value) if isinstance(value, tuple) else value}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "…" + text[-8:]
