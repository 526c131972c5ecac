"""A class number means one class, whichever files it comes from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from milan.errors import DataError
from milan.images.classes import ClassTable
from milan.images.manifest import Manifest, build_manifest
from milan.store.texts import Prototypes

CASES = Path(__file__).parent.parent / "cases"


def write(path: Path, labels: list[Any], names: list[str] | None) -> Path:
    """A Parquet file of images without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": b"x", "path": f"{i}.png"} for i in range(len(labels))]
    text = any(isinstance(label, str) for label in labels)
    kind = pa.string() if text else pa.int64()
    table = pa.table({"image": images, "label": pa.array(labels, kind)})
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    pq.write_table(table, path)
    return path


def named(manifest: Manifest) -> dict[str, str | None]:
    """Key -> name of its class."""
    names = [*(manifest.classes or []), None]
    keys = manifest.table["key"].to_pylist()
    return {key: names[label] for key, label in zip(keys, manifest.labels(), strict=True)}


def test_files_whose_class_names_are_ordered_differently() -> None:
    """Number 0 is a cat in one file and a dog in the other."""
    manifest = build_manifest(CASES / "02-classlabel-other-order", seed=0)
    assert manifest.classes == ["cat", "dog"]
    assert named(manifest) == {"a.parquet/0.0": "cat", "b.parquet/0.0": "dog"}


CAT_DOG = ["cat", "dog"]
FILES: dict[str, tuple[list[Any], list[str | None] | str]] = {
    "a class more, that sorts first": (
        [([0, 1], CAT_DOG), ([0, 1, 2], ["ant", "cat", "dog"])],
        ["cat", "dog", "ant", "cat", "dog"],
    ),
    "a class fewer": ([([2, 0], ["ant", "cat", "dog"]), ([0], ["dog"])], ["dog", "ant", "dog"]),
    "other classes": ([([0], ["cat"]), ([0], ["dog"])], CAT_DOG),
    "unknown labels": (
        [([0, -1, None], ["dog"]), ([-1, 1], CAT_DOG)], ["dog", None, None, None, "dog"]
    ),
    "labels in one file": ([([None, None], None), ([1], CAT_DOG)], [None, None, "dog"]),
    "a name twice, one order": ([([1], ["x", "x"]), ([0], ["x", "x", "y"])], ["x", "x"]),
    "a name twice, two orders": ([([0], ["x", "x"]), ([0], ["y", "x"])], "'x' has two numbers"),
    "numbers beside names": ([([0], CAT_DOG), ([1], None)], "1.parquet has class numbers alone"),
    "names beside numbers": ([([0], None), ([1], CAT_DOG)], "0.parquet has class numbers alone"),
    "a number without a name": ([([2], CAT_DOG)], "class 2 and names of 2 classes"),
    "names as text": (
        [(["dog", None, "", "10"], None), ([0], ["10"])], ["dog", None, None, "10", "10"]
    ),
    "names as text, of the file's own": ([(["dog", "cat"], ["dog", "ant", "cat"])], ["dog", "cat"]),
    "text beside ClassLabel": (
        [([1, 0], CAT_DOG), (["ant", "cat"], None)], ["dog", "cat", "ant", "cat"]
    ),
    "numbers as text": ([(["0", "1"], CAT_DOG)], CAT_DOG),
    "numbers as text beside names": ([([0], CAT_DOG), (["1"], None)], "class numbers alone"),
    "one name in two forms of Unicode": (
        [([0, 1], ["\xe9", "z"]), ([0, 1], ["z", "e\u0301"]), (["e\u0301"], None)],
        ["\xe9", "z", "z", "\xe9", "\xe9"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_share_one_table(case: str, tmp_path: Path) -> None:
    """Every image keeps the class that its own file names, or the files are refused."""
    files, expected = FILES[case]
    for i, (labels, names) in enumerate(files):
        write(tmp_path / f"{i}.parquet", labels, names)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            build_manifest(tmp_path, seed=0)
        return
    keys = [f"{i}.parquet/{j}.png" for i, (rows, _) in enumerate(files) for j in range(len(rows))]
    assert named(build_manifest(tmp_path, seed=0)) == dict(zip(keys, expected, strict=True))


def test_numbers_alone_stay_as_they_are(tmp_path: Path) -> None:
    """Without names a number is all there is; negative ones are unknown."""
    write(tmp_path / "a.parquet", [7, 0], None)
    write(tmp_path / "b.parquet", [7, -100], None)
    manifest = build_manifest(tmp_path, seed=0)
    assert manifest.classes is None
    assert sorted(manifest.labels().tolist()) == [-1, 0, 7, 7]


def test_folders_with_one_name_in_two_forms_of_unicode(tmp_path: Path) -> None:
    """Copied by two systems, they are one class, in stores from before too."""
    for path in ("\xe9/a.png", "e\u0301/b.png", "x/c.png"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(b"x")
    manifest = build_manifest(tmp_path, seed=0)
    assert manifest.classes == ["x", "\xe9"]
    assert set(named(manifest).values()) == {"x", "\xe9"}
    older = replace(manifest, classes=["x", "e\u0301"]).to_parquet()
    assert Manifest.read(pa.BufferReader(older)).classes == manifest.classes


def test_parts_of_a_store_share_one_table(tmp_path: Path) -> None:
    """Of a store that was grown before numbers were matched: by name, or unknown."""

    def part(labels: list[int], classes: list[str] | None) -> Manifest:
        path = write(tmp_path / "x.parquet", labels, None)
        return Manifest(build_manifest(path, seed=0).table, classes)

    first, second = part([0, 1, 0], CAT_DOG), part([0, 1, 2], ["ant", "cat", "dog"])
    joined = Manifest.join([first, second, part([1], None)])
    assert joined.classes == ["cat", "dog", "ant"]
    expected = [*first.labels(), *np.array([2, 0, 1])[second.labels()], -1]
    assert joined.labels().tolist() == expected
    assert Manifest.join([second], classes=["dog"]).classes == ["dog", "ant", "cat"]


def test_prototypes_follow_the_table() -> None:
    """Of generations that numbered classes by themselves: each class from the last that has it."""

    def part(classes: list[str], value: float) -> Prototypes:
        features = np.full((len(classes), 2), value, np.float32) + np.arange(len(classes))[:, None]
        return Prototypes(classes, features, np.zeros((len(classes), 1, 3), np.int32))

    table = ["cat", "dog", "ant", "bee"]
    joined = Prototypes.join([part(CAT_DOG, 10), part(["ant", "cat"], 20)], table)
    assert joined.classes == table
    assert joined.features[:3, 0].tolist() == [21, 11, 20]
    assert np.isnan(joined.features[3]).all()
    assert joined.ids[:, 0, 0].tolist() == [0, 0, 0, -1]


def test_an_error_leaves_the_table_as_it_was() -> None:
    """A part that is refused changes nothing for the next."""
    table, numbers = ClassTable(), pa.chunked_array([[0, 1]], pa.int32())
    table.add(numbers, CAT_DOG, "a")
    with pytest.raises(DataError):
        table.add(numbers, None, "b")
    assert table.add(numbers, ["dog", "ant"], "c").to_pylist() == [1, 2]
    assert table.names == ["cat", "dog", "ant"]
