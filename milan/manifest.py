"""The manifest: which images there are, in which order; a row an image, frozen before the first.

Made from a listing alone (names and sizes; of Parquet files the footers and the small columns),
never from the pixels: three million files are not read before the first batch. Rows are permuted
by a seed, so that a shard is not one class. A row number is an image's identity everywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from milan import draws
from milan.errors import DataError
from milan.images import EXTENSIONS

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique name of the image: its path below the root, as POSIX
        ("path", pa.string()),  # the file below the root that holds it
        ("group", pa.int32()),  # Parquet: row group; null for an image file
        ("index", pa.int32()),  # Parquet: row in that group; null for an image file
        ("bytes", pa.int64()),  # size as listed; null where the listing does not say
        ("label", pa.int32()),  # class number, null if unknown
        ("caption", pa.string()),
    ]
)
# Parquet row groups are shuffled in windows of about this many bytes: a reader holds one window.
_WINDOW_BYTES = 256 << 20


@dataclass(frozen=True)
class Manifest:
    """An ordered table of images. `table` has SCHEMA's columns; row i is image i."""

    table: pa.Table
    classes: list[str] | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    """Files that were no images by name: extension -> count. Told, never dropped in silence."""

    def __len__(self) -> int:
        return self.table.num_rows

    def key(self, row: int) -> str:
        """The unique name of the image in `row`."""
        return self.table["key"][row].as_py()

    def digest(self) -> str:
        """SHA-256 over keys in their order; the root folder is not in it."""
        sha = hashlib.sha256()
        for key in self.table["key"].to_pylist():
            sha.update(key.encode() + b"\n")
        return sha.hexdigest()

    def labels(self) -> np.ndarray:
        """[rows] int64; -1 where there is none."""
        column = self.table["label"].combine_chunks().fill_null(-1)
        return column.to_numpy(zero_copy_only=False).astype(np.int64)

    def head(self, limit: int) -> Manifest:
        """The first `limit` rows of the same order."""
        return Manifest(self.table.slice(0, limit), self.classes, self.ignored)

    def to_parquet(self) -> bytes:
        """The file that a store keeps; a pure function of the rows and class names."""
        meta = {"milan_classes": json.dumps(self.classes)} if self.classes else None
        sink = io.BytesIO()
        pq.write_table(
            self.table.replace_schema_metadata(meta),
            sink,
            compression="zstd",
            write_page_checksum=True,
        )
        return sink.getvalue()

    @classmethod
    def join(cls, parts: list[Manifest]) -> Manifest:
        """Parts of one order, one after the other; class names of the last that has any."""
        names = [part.classes for part in parts if part.classes]
        table = pa.concat_tables([p.table.replace_schema_metadata(None) for p in parts])
        return cls(table, names[-1] if names else None)

    def take(self, rows: np.ndarray) -> Manifest:
        """These rows, in this order."""
        return Manifest(self.table.take(pa.array(rows)), self.classes, self.ignored)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of a store."""
        table = pq.read_table(path, page_checksum_verification=True)
        if not table.schema.equals(SCHEMA, check_metadata=False):
            raise DataError(f"{path} is not a manifest", expected=f"columns {SCHEMA.names}")
        meta = (table.schema.metadata or {}).get(b"milan_classes")
        return cls(table, json.loads(meta) if meta else None)


def resolve_data(name: str, root: str | None = None) -> Path:
    """The folder or file that `--data name` means.

    An existing path wins; else a name means a folder below the data root: `root`, else
    $MILAN_DATA, else ./data; of that its part `train`, where there is one. Of a path that is cut
    into train, val, ... and nothing else the part `train` is meant too.
    Raises DataError listing every place looked at.
    """
    places = [Path(name).expanduser()]
    if places[0].exists():
        return _training_part(places[0])
    if not places[0].is_absolute():
        base = Path(root or os.environ.get("MILAN_DATA") or "data").expanduser()
        places += [base / name / "train", base / name]
    for place in places[1:]:
        if place.exists():
            return place
    raise DataError(
        f"no data found for --data {name}; looked at: " + ", ".join(str(p) for p in places),
        expected="an image folder, a Parquet file or a folder of Parquet files",
        fix="give a path, or name the folder that holds it with --data-root or $MILAN_DATA",
    )


def _training_part(place: Path) -> Path:
    """`place`, or its folder `train` where it is cut into splits: those are no classes."""
    if not place.is_dir():
        return place
    folders = {e.name for e in os.scandir(place) if e.is_dir() and not e.name.startswith(".")}
    splits = {"train", "val", "valid", "validation", "test"}
    return place / "train" if "train" in folders and folders <= splits else place


def build_manifest(source: Path, *, seed: int, limit: int | None = None) -> Manifest:
    """List `source` and freeze the order of its images.

    `source`: a tree of class folders, a folder of images, a Parquet file, or a folder of Parquet
    files in the Hugging Face image schema. `limit` keeps the first rows of the same permutation.
    Raises DataError if there are no images, a key twice, or a name that is not UTF-8.
    """
    parquet = _parquet_files(source)
    manifest = _list_parquet(source, parquet, seed) if parquet else _list_folder(source, seed)
    if not len(manifest):
        names = ", ".join(f"{n} {ext}" for ext, n in manifest.ignored.items()) or "nothing"
        raise DataError(
            f"no images in {source} (it holds {names})",
            expected="files ending in " + " ".join(EXTENSIONS) + ", or Parquet files",
        )
    keys = manifest.table["key"].to_pylist()
    if len(set(keys)) < len(keys):
        twice = [key for key, n in Counter(keys).items() if n > 1]
        raise DataError(
            f"{len(twice)} keys stand for several images, the first is {twice[0]!r}",
            expected="a name of its own for every image: unique paths, or null, in Parquet",
        )
    if limit is not None:
        if limit < 1:
            raise DataError(f"--limit {limit}", expected="at least 1 image")
        manifest = manifest.head(limit)
    return manifest


# --- folders ------------------------------------------------------------------------------------


def _list_folder(root: Path, seed: int) -> Manifest:
    if root.is_file():
        if not root.name.lower().endswith(EXTENSIONS):
            raise DataError(f"{root} is a file", expected="a folder of images, or a Parquet file")
        raise DataError(f"{root} is one image", expected="a folder", fix=f"--data {root.parent}")
    ignored: Counter[str] = Counter()
    found: list[tuple[str, int]] = []
    for path, size in _walk(root):
        if path.lower().endswith(EXTENSIONS):
            found.append((path, size))
        else:
            ignored[os.path.splitext(path)[1].lower() or "without extension"] += 1
    found.sort()
    for path, _ in found:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"file name {path!r} is not UTF-8", expected="UTF-8 names", fix="rename the file"
            ) from None
    # An image directly in the root means a plain folder; otherwise its subfolders are the classes.
    flat = any("/" not in path for path, _ in found)
    classes = None if flat else sorted({path.split("/", 1)[0] for path, _ in found})
    number = {name: i for i, name in enumerate(classes or [])}
    order = draws.permutation(seed, draws.MANIFEST, (0,), len(found))
    rows = [found[i] for i in order]
    paths = [path for path, _ in rows]
    nulls = [None] * len(rows)
    table = pa.table(
        [
            paths,
            paths,
            nulls,
            nulls,
            [size for _, size in rows],
            [number[p.split("/", 1)[0]] for p in paths] if classes else nulls,
            nulls,
        ],
        schema=SCHEMA,
    )
    return Manifest(table, classes, dict(ignored))


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """(path below root as POSIX, size) of every file; follows links, once each, hides dot files.

    A folder that has several names is listed by its own, else by the first in order of names:
    whatever order the file system lists it in.
    """
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        if not folders:
            links.sort(reverse=True)
        below = folders.pop() if folders else links.pop()
        folder = root / below
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{below}/{entry.name}" if below else entry.name
                try:
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(path)
                        continue
                    size = entry.stat().st_size
                except OSError:
                    size = 0  # a link to nothing, or to itself: a row with a reason, not a hole
                yield path, size


# --- Parquet ------------------------------------------------------------------------------------


def _parquet_files(source: Path) -> list[str]:
    """Names of the Parquet files that make up `source`, relative to `parquet_root(source)`."""
    if source.is_file():
        return [source.name] if source.suffix == ".parquet" else []
    found = (p for p in source.rglob("*.parquet") if p.is_file())
    files = sorted(p.relative_to(source).as_posix() for p in found)
    return [f for f in files if not any(part.startswith(".") for part in f.split("/"))]


def data_root(source: Path) -> Path:
    """The folder that manifest paths are relative to."""
    return source.parent if source.is_file() else source


def _list_parquet(source: Path, files: list[str], seed: int) -> Manifest:
    root = data_root(source)
    groups: list[tuple[int, pa.Table]] = []  # (bytes, rows) of each row group
    classes = None
    for name in files:
        try:
            reader = pq.ParquetFile(root / name)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{root / name} cannot be read: {error}") from None
        schema = reader.schema_arrow
        image = schema.field("image").type if "image" in schema.names else pa.null()
        if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise DataError(
                f"{root / name} has columns {', '.join(f'{f.name} {f.type}' for f in schema)}",
                expected="the Hugging Face image schema: a column image{bytes, path}",
            )
        classes = classes or _class_names(schema.metadata)
        has_path = image.get_field_index("path") >= 0
        columns = ["image.path"] if has_path else []
        columns += [c for c in ("label", "caption") if c in schema.names]
        for group in range(reader.metadata.num_row_groups):
            meta = reader.metadata.row_group(group)
            n = meta.num_rows
            part = reader.read_row_group(group, columns=columns)
            nulls = [None] * n
            paths = part["image"].combine_chunks().field("path").to_pylist() if has_path else nulls
            prefix = "" if len(files) == 1 else f"{name}/"
            keys = [f"{prefix}{p if p else f'{group}.{i}'}" for i, p in enumerate(paths)]
            try:
                labels = part["label"].cast(pa.int32()) if "label" in columns else nulls
                captions = part["caption"].cast(pa.string()) if "caption" in columns else nulls
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"a column of {root / name} cannot be used: {error}",
                    expected="`label` as class numbers, `caption` as text",
                ) from None
            table = pa.table(
                [keys, [name] * n, [group] * n, list(range(n)), nulls, labels, captions],
                schema=SCHEMA,
            )
            groups.append((meta.total_byte_size, table))
    # Groups are permuted, then rows within windows of groups: well mixed, yet a shard touches few
    # groups, so that a reader need not decode a whole file for one image.
    order = draws.permutation(seed, draws.MANIFEST, (1,), len(groups))
    tables, window, held = [SCHEMA.empty_table()], [], 0
    for position, g in enumerate(order):
        window.append(groups[g][1])
        held += groups[g][0]
        if held >= _WINDOW_BYTES or position == len(order) - 1:
            rows = pa.concat_tables(window)
            inner = draws.permutation(seed, draws.MANIFEST, (2, len(tables)), rows.num_rows)
            tables.append(rows.take(pa.array(inner)))
            window, held = [], 0
    return Manifest(pa.concat_tables(tables).combine_chunks(), classes)


def _class_names(metadata: dict | None) -> list[str] | None:
    raw = (metadata or {}).get(b"huggingface")
    if not raw:
        return None
    try:
        return json.loads(raw)["info"]["features"]["label"]["names"] or None
    except (ValueError, KeyError, TypeError):
        return None
