"""Parquet whose columns are not what they are named: one line each; what can be read is."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import CASES

from milan.core.paths import LFS_POINTER
from milan.errors import DataError
from milan.images import parquet
from milan.images.manifest import build_manifest
from milan.images.source import ImageSource

BYTES = [b"one", b"two", None]
PATHS = ["1.jpg", "2.jpg", None]


def images(data: Any = None, paths: Any = None) -> pa.Array:
    """The column `image`, of any types."""
    fields = {"bytes": pa.array(BYTES) if data is None else data}
    fields |= {"path": pa.array(PATHS) if paths is None else paths}
    return pa.StructArray.from_arrays(list(fields.values()), list(fields))


def not_utf8(kind: pa.DataType) -> pa.Array:
    """A column of text, by its type, with Latin-1 in it."""
    sizes = np.array([0, 1, 4, 5], np.int64 if kind == pa.large_string() else np.int32)
    buffers = [None, pa.py_buffer(sizes.tobytes()), pa.py_buffer(b"a\xe9\xe8\xe7b")]
    return pa.Array.from_buffers(kind, 3, buffers)


def write(path: Path, columns: list[tuple[str, Any]], meta: bytes | None = None) -> Path:
    table = pa.Table.from_arrays([c for _, c in columns], names=[name for name, _ in columns])
    pq.write_table(table.replace_schema_metadata({b"huggingface": meta} if meta else None), path)
    return path


def labelled(values: Any) -> list[tuple[str, Any]]:
    return [("image", images()), ("label", values)]


def captioned(values: Any) -> list[tuple[str, Any]]:
    return [("image", images()), ("caption", values)]


TWICE = pa.StructArray.from_arrays([pa.array(BYTES)] * 2, ["bytes", "bytes"])
REFUSED: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "bytes as text": ([("image", images(pa.array(["a", "b", "c"])))], "image.bytes of .* string"),
    "bytes as numbers": ([("image", images(pa.array([[1], [2], [3]])))], "is list<"),
    "paths as numbers": ([("image", images(paths=pa.array([1, 2, 3])))], "image.path of .* int64"),
    "paths as lists": ([("image", images(paths=pa.array([["a"], [], []])))], "image.path of .* li"),
    "labels that are not UTF-8": (
        labelled(pa.array([b"cat", b"d\xff", b"cat"]).view(pa.string())), "label of .* is not all",
    ),
    "labels as fractions": (labelled([0.5, 1.0, 2.0]), "label of .* not all class numbers"),
    "labels too large": (labelled([2**40, 1, 2]), "label of .* not all class numbers"),
    "labels as lists": (labelled([[1], [2], [3]]), "label of .* is list"),
    "labels as dates": (labelled([datetime.date(2020, 1, 1)] * 3), "label of .* is date32"),
    "labels as structs": (labelled([{"a": 1}] * 3), "label of .* is struct"),
    "captions as lists of numbers": (captioned([[1], [2], [3]]), "caption of .* is list"),
    "captions in lists": (captioned([[b"\xe9"], [b"b"], []]), "caption of .* not all text"),
    "captions as numbers": (captioned([1, 2, 3]), "caption of .* is int64"),
    "captions in bytes": (captioned([b"\xe9", b"b", b"c"]), "caption of .* not all text"),
    "captions not UTF-8": (captioned(not_utf8(pa.string())), "caption of .* not all text"),
    "large captions": (captioned(not_utf8(pa.large_string())), "caption of .* not all text"),
    "paths not UTF-8": ([("image", images(paths=not_utf8(pa.string())))], "image.path of .* not"),
    "images twice": ([("image", images())] * 2, "2 columns called 'image'"),
    "labels twice": (labelled([1, 2, 3]) + labelled([1, 2, 3])[1:], "2 columns called 'label'"),
    "captions twice": (
        captioned(["a"] * 3) + captioned(["b"] * 3)[1:], "2 columns called 'caption'",
    ),
    "bytes twice": ([("image", TWICE)], "2 columns called 'bytes'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_columns_that_are_not_what_they_are_named(case: str, tmp_path: Path) -> None:
    """The file and the column are named, and what to do."""
    columns, message = REFUSED[case]
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(DataError, match=message) as error:
        build_manifest(path, seed=0)
    assert "x.parquet" in str(error.value)
    assert error.value.expected
    assert error.value.fix


@pytest.mark.parametrize("case", ["10-bytes-list-uint8", "11-path-not-utf8"])
def test_files_that_people_had(case: str, tmp_path: Path) -> None:
    """One line."""
    with pytest.raises(DataError, match=r"a\.parquet") as error:
        build_manifest(CASES / case, seed=0)
    assert len(str(error.value).splitlines()) == 1


READ: dict[str, list[tuple[str, Any]]] = {
    "large bytes": [("image", images(pa.array(BYTES, pa.large_binary())))],
    "large paths": [("image", images(paths=pa.array(PATHS, pa.large_string())))],
    "categories of paths": [("image", images(paths=pa.array(PATHS).dictionary_encode()))],
    "paths in bytes": [("image", images(paths=pa.array([b"1.jpg", b"2.jpg", None])))],
    "no paths": [("image", images(paths=pa.nulls(3)))],
    "labels of any width": labelled(pa.array([1, 2, None], pa.uint8())),
    "labels from pandas": labelled([1.0, 2.0, None]),
    "labels that are null": labelled(pa.nulls(3)),
    "large captions": captioned(pa.array(["a", "b", None], pa.large_string())),
    "categories of captions": captioned(pa.array(["a", "b", None]).dictionary_encode()),
    "captions that are null": captioned(pa.nulls(3)),
    "captions as lists": captioned([["a"], ["b", " "], [None, " "]]),
    "other columns twice": [("image", images()), ("x", pa.array([1, 2, 3])), ("x", pa.nulls(3))],
}


@pytest.mark.parametrize("case", READ)
def test_other_types_of_the_same(case: str, tmp_path: Path) -> None:
    """What tools write for the same thing is read as it is."""
    path = write(tmp_path / "x.parquet", READ[case])
    manifest = build_manifest(path, seed=0)
    source = ImageSource(manifest, tmp_path)
    indices = manifest.table["index"].to_pylist()
    assert [source.read(row) for row in range(3) if indices[row] < 2] == [
        BYTES[i] for i in indices if i < 2
    ]
    names = {c for c, _ in READ[case]}
    if "label" in names and case != "labels that are null":
        assert [manifest.labels()[indices.index(i)] for i in range(3)] == [1, 2, -1]
    if "caption" in names and case != "captions that are null":
        assert [manifest.captions(0, 3)[indices.index(i)] for i in range(3)] == [["a"], ["b"], []]
    if "paths" in case and case != "no paths":
        assert "x.parquet/1.jpg" in manifest.table["key"].to_pylist()


def test_class_names_that_are_not_unicode(tmp_path: Path) -> None:
    """Halves of characters in JSON, and bytes that are no JSON at all."""
    for names in (b'"\\ud83d"', b'"caf\xe9"'):
        meta = b'{"info": {"features": {"label": {"names": [' + names + b"]}}}}"
        path = write(tmp_path / "x.parquet", labelled([0, 0, 0]), meta)
        with pytest.raises(DataError, match=r"class names? in .* not UTF-8"):
            build_manifest(path, seed=0)
    for names in ("5", '"cat"', "[1, 2]", "null", "{}"):
        meta = json.dumps({"info": {"features": {"label": {"names": json.loads(names)}}}}).encode()
        path = write(tmp_path / "x.parquet", labelled([0, 0, 0]), meta)
        assert build_manifest(path, seed=0).classes is None


def test_row_groups_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow reads no struct of more than 2 GiB at once; pieces must fit together."""
    data = [bytes([i]) * 1000 for i in range(50)]
    column = images(pa.array(data), pa.array([f"{i}.jpg" for i in range(50)]))
    path = write(tmp_path / "x.parquet", [("image", column)])
    monkeypatch.setattr(parquet, "_PIECE_BYTES", 7000)
    with parquet.parquet_below(tmp_path, path.name) as reader:
        pieces = parquet.read_bytes(reader, 0)
    assert 5 < pieces.num_chunks < 50
    assert pieces.to_pylist() == data
    manifest = build_manifest(path, seed=0)
    source = ImageSource(manifest, tmp_path)
    for row in range(50):
        assert source.read(row) == data[manifest.table["index"][row].as_py()]


@pytest.mark.soak
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
def test_a_row_group_of_more_than_2_gib(kind: pa.DataType, tmp_path: Path) -> None:
    """In one group, of either type; takes 6 GB of memory."""
    big = [bytes([i]) * (400 << 20) for i in range(6)]
    chunks = [images(pa.array([data], kind), pa.array([f"{i}.jpg"])) for i, data in enumerate(big)]
    table = pa.table({"image": pa.chunked_array(chunks)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=6, compression="zstd")
    with pq.ParquetFile(tmp_path / "x.parquet") as reader:
        assert reader.metadata.num_row_groups == 1
        assert reader.metadata.row_group(0).total_byte_size > 2**31
    del table, chunks
    manifest = build_manifest(tmp_path, seed=0)
    source = ImageSource(manifest, tmp_path)
    for row in range(6):
        assert source.read(row) == big[manifest.table["index"][row].as_py()]


def test_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    """A clone without `git lfs pull`: of Parquet and of a tar."""
    for name in ("a.parquet", "a.tar"):
        path = tmp_path / name
        path.write_bytes(LFS_POINTER + b"v1\noid sha256:4d7a\nsize 12345\n")
        with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            build_manifest(path, seed=0)


def test_a_caption_of_half_a_character_in_json(tmp_path: Path) -> None:
    """It is counted as unreadable, as other annotations are."""
    folder = tmp_path / "sample"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"x")
    (folder / "1.json").write_text('{"caption": "\\ud83d"}')
    shutil.make_archive(str(tmp_path / "a"), "tar", folder)
    manifest = build_manifest(tmp_path / "a.tar", seed=0)
    assert manifest.captions(0, 1) == [[]]
