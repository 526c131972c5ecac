"""Which images there are, in which order; where a name leads; that a row reads its own bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from milan.core import paths
from milan.errors import DataError, ImageFault
from milan.images import manifest as module
from milan.images.manifest import SCHEMA, Manifest, build_manifest, describe_source, resolve_data
from milan.images.source import ImageSource

CASES = Path(__file__).parent.parent / "cases"


def put(root: Path, *names: str) -> Path:
    """Files below `root`, each holding its own name; a listing never opens them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def keys(manifest: Manifest) -> list[str]:
    return manifest.table["key"].to_pylist()


def by_key(manifest: Manifest) -> dict[str, int]:
    return dict(zip(keys(manifest), manifest.labels().tolist(), strict=True))


def write(path: Path, rows: list[dict], meta: dict | None = None, **options: object) -> Path:
    """A Parquet file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if meta is not None:
        table = table.replace_schema_metadata({b"huggingface": json.dumps(meta).encode()})
    pq.write_table(table, path, **options)
    return path


def image(name: str | None, data: bytes | None = None) -> dict:
    return {"image": {"bytes": data or f"bytes of {name}".encode(), "path": name}}


# --- folders --------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    """The first folder below the root is the class, numbered in order of names."""
    put(tmp_path, "cat/1.jpg", "cat/deep/er/2.PNG", "ant/3.jpeg", "bee/4.webp")
    manifest = build_manifest(tmp_path, seed=0)
    assert manifest.classes == ["ant", "bee", "cat"]
    assert by_key(manifest) == {
        "cat/1.jpg": 2, "cat/deep/er/2.PNG": 2, "ant/3.jpeg": 0, "bee/4.webp": 1,
    }  # fmt: skip
    assert manifest.table.schema.equals(SCHEMA)
    assert keys(manifest) == manifest.table["path"].to_pylist()
    assert manifest.table["bytes"].to_pylist() == [len(key) for key in keys(manifest)]
    for column in ("group", "index", "offset"):
        assert manifest.table[column].null_count == 4


def test_images_beside_class_folders(tmp_path: Path) -> None:
    """Without folders there are no classes; a picture beside them takes away nobody else's."""
    manifest = build_manifest(put(tmp_path / "flat", "1.jpg", "2.jpg"), seed=0)
    assert (manifest.classes, by_key(manifest)) == (None, {"1.jpg": -1, "2.jpg": -1})
    manifest = build_manifest(CASES / "20-picture-beside-class-folders", seed=0)
    assert manifest.classes == ["cat", "dog"]
    assert by_key(manifest) == {"cat/0.jpg": 0, "contact-sheet.png": -1, "dog/1.jpg": 1}
    assert describe_source(manifest)[1:] == [
        "found: 3 files: 3 images",
        "without a class: 1 images, such as 'contact-sheet.png'",
    ]


def test_names_are_kept_as_they_are(tmp_path: Path) -> None:
    """Spaces, quotes, other alphabets, and two spellings of one letter."""
    names = ["a b/c d.jpg", "a b/ü.jpg", "a b/u\u0308.jpg", "猫/写真 🐈.png", 'a b/it\'s "x".jpg']
    assert sorted(keys(build_manifest(put(tmp_path, *names), seed=0))) == sorted(names)


def test_names_that_are_not_utf8_are_refused_by_name(tmp_path: Path) -> None:
    """They could not be written to a manifest; files that are no images do not matter."""
    put(tmp_path, "1.jpg")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_bytes(b"")
    build_manifest(tmp_path, seed=0)
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    with pytest.raises(DataError, match=r"udcff\.jpg' is not UTF-8"):
        build_manifest(tmp_path, seed=0)
    (tmp_path / os.fsdecode(b"\xff.jpg")).unlink()
    path = write(tmp_path / "p" / "x", [image("1")])
    path = path.rename(tmp_path / "p" / os.fsdecode(b"\xff.parquet"))
    with pytest.raises(DataError, match=r"udcff\.parquet' is not UTF-8"):
        build_manifest(tmp_path, seed=0)
    path.unlink()
    names = {"info": {"features": {"label": {"names": ["\ud800"]}}}}
    path = write(tmp_path / "p" / "x.parquet", [image("1") | {"label": 0}], names)
    with pytest.raises(DataError, match=r"class name in .*x\.parquet: '\\ud800' is not UTF-8"):
        build_manifest(path, seed=0)


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    """Left out, and told; hidden files and folders are not looked into. The line reconciles."""
    put(tmp_path, "c/1.jpg", "c/a.txt", "c/b.TXT", "c/LICENSE", "c/d.tar.gz", "c/e.")
    put(tmp_path, "c/.hidden.jpg", ".git/2.jpg", "c/.thumbs/3.jpg", "c/x.jpg/4.txt")
    put(tmp_path, os.fsdecode(b"c/a.\xff"), "c/a.\n", "c/IMG.of a long summer")
    (tmp_path / "c" / "link").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "empty.jpg").mkdir()
    manifest = build_manifest(tmp_path, seed=0)
    assert keys(manifest) == ["c/1.jpg"]
    assert describe_source(manifest.head(1)) == [
        f"data: {tmp_path}",
        "found: 14 files: 1 images; left out: 5 without extension, 3 .txt, 3 hidden, 1 .gz, "
        "1 links to a folder that is listed",
    ]
    put(tmp_path, *[f"c/a.{i}" for i in range(40)])
    line = describe_source(build_manifest(tmp_path, seed=0))[1]
    assert line.startswith("found: 54 files: 1 images; left out: 5 without extension, ")
    assert line.endswith("33 of 33 other kinds")


def test_links_are_followed_once(tmp_path: Path) -> None:
    """A loop would never end; a folder with two names would give its images twice."""
    put(tmp_path / "data", "b/1.jpg", "b/c/2.jpg")
    put(tmp_path / "elsewhere", "3.jpg")
    root = tmp_path / "data"
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b")
    (root / "a").symlink_to(root / "b")  # listed by its own name, not by the link's
    (root / "z").symlink_to(tmp_path / "elsewhere")
    (root / "y").symlink_to(tmp_path / "elsewhere")  # of two links the first
    (root / "y2").symlink_to(root / "y")
    (root / "b" / "4.jpg").symlink_to(tmp_path / "elsewhere" / "3.jpg")
    manifest = build_manifest(root, seed=0)
    assert sorted(keys(manifest)) == ["b/1.jpg", "b/4.jpg", "b/c/2.jpg", "y/3.jpg"]
    assert manifest.classes == ["b", "y"]


def test_dangling_links_are_rows(tmp_path: Path) -> None:
    """An image that should be there is a row with a reason, not a hole in the numbering."""
    put(tmp_path, "c/1.jpg")
    (tmp_path / "c" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "c" / "self.jpg").symlink_to("self.jpg")
    manifest = build_manifest(tmp_path, seed=0)
    sizes = dict(zip(keys(manifest), manifest.table["bytes"].to_pylist(), strict=True))
    assert sizes == {"c/1.jpg": 7, "c/gone.jpg": 0, "c/self.jpg": 0}
    source = ImageSource(manifest, tmp_path)
    reasons = {}
    for row, key in enumerate(keys(manifest)):
        try:
            source.read(row)
        except ImageFault as fault:
            reasons[key] = fault.reason
    assert reasons == {"c/gone.jpg": "missing", "c/self.jpg": "unreadable"}


class Listing:
    """os.scandir in an order of our own."""

    def __init__(self, path: object, turn: Callable[[list], list]) -> None:
        with os.scandir(path) as entries:  # type: ignore[call-overload]
            self.entries = turn(sorted(entries, key=lambda entry: entry.name))

    def __enter__(self) -> Iterator[os.DirEntry]:
        return iter(self.entries)

    def __exit__(self, *_: object) -> None:
        pass


def test_order_is_not_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ext4, NFS and a copy of the data list folders in different orders."""
    put(tmp_path / "data", *[f"{c}/{i}.jpg" for c in "abc" for i in range(7)])
    put(tmp_path / "elsewhere", "1.jpg", "2.jpg")
    for name in ("l", "m", "n"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "0").symlink_to(tmp_path / "data" / "b")
    expected = build_manifest(tmp_path / "data", seed=3)
    real = os.scandir

    class Os:
        """The module `os` as the manifest sees it, with a scandir that turns the order."""

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

    generator = np.random.default_rng(0)
    turns: list[Callable[[list], list]] = [
        lambda entries: entries,
        lambda entries: entries[::-1],
        lambda entries: [entries[i] for i in generator.permutation(len(entries))],
    ]
    for turn in turns:
        turned = Os()
        turned.scandir = lambda path, turn=turn: Listing(path, turn)  # type: ignore[attr-defined]
        monkeypatch.setattr(paths, "os", turned)
        assert build_manifest(tmp_path / "data", seed=3).to_parquet() == expected.to_parquet()
    assert os.scandir is real


def test_order_is_not_pythons(tmp_path: Path) -> None:
    """Another process with another hash seed gives the same rows, byte for byte."""
    put(tmp_path, *[f"{c}/{i}.jpg" for c in "abcdef" for i in range(5)])
    code = (
        "import sys; from pathlib import Path; from milan.images.manifest import build_manifest\n"
        "sys.stdout.buffer.write(build_manifest(Path(sys.argv[1]), seed=1).to_parquet())"
    )
    expected = build_manifest(tmp_path, seed=1).to_parquet()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout == expected


def test_classes_are_mixed(tmp_path: Path) -> None:
    """A shard of one class would make epochs of one class at a time; the order is the seed's."""
    put(tmp_path, *[f"{c}/{i:03d}.jpg" for c in "abcd" for i in range(50)])
    manifest = build_manifest(tmp_path, seed=0)
    for first in range(0, 200, 40):
        counts = np.bincount(manifest.labels()[first : first + 40], minlength=4)
        assert counts.min() >= 3
    assert keys(manifest) == keys(build_manifest(tmp_path, seed=0))
    assert keys(manifest) != keys(build_manifest(tmp_path, seed=1))
    assert sorted(keys(manifest)) == sorted(keys(build_manifest(tmp_path, seed=1)))


def test_order_is_frozen(tmp_path: Path) -> None:
    """Row numbers address every draw: this order must be the same for ever."""
    manifest = build_manifest(put(tmp_path, *[f"{i}.jpg" for i in range(8)]), seed=0)
    assert "".join(key[0] for key in keys(manifest)) == "53724106"
    path = write(tmp_path / "p" / "x.parquet", [image(f"{i}") for i in range(8)], row_group_size=3)
    assert "".join(key[-1] for key in keys(build_manifest(path, seed=0))) == "43601257"


def test_limit_is_a_prefix(tmp_path: Path) -> None:
    """A trial run meets the first images of the full one."""
    put(tmp_path, *[f"{c}/{i}.jpg" for c in "ab" for i in range(9)])
    full = build_manifest(tmp_path, seed=2)
    assert keys(build_manifest(tmp_path, seed=2, limit=5)) == keys(full)[:5]
    assert build_manifest(tmp_path, seed=2, limit=5).classes == full.classes
    assert len(build_manifest(tmp_path, seed=2, limit=1000)) == 18


def test_digest_is_of_keys_and_order(tmp_path: Path) -> None:
    """A moved folder is the same data; a renamed, added or reordered image is not."""
    put(tmp_path / "a", *[f"c/{i}.jpg" for i in range(6)])
    digest = build_manifest(tmp_path / "a", seed=0).digest()
    shutil.copytree(tmp_path / "a", tmp_path / "moved" / "b")
    assert build_manifest(tmp_path / "moved" / "b", seed=0).digest() == digest
    assert build_manifest(tmp_path / "a", seed=1).digest() != digest
    assert build_manifest(tmp_path / "a", seed=0, limit=5).digest() != digest
    (tmp_path / "a" / "c" / "3.jpg").rename(tmp_path / "a" / "c" / "3b.jpg")
    assert build_manifest(tmp_path / "a", seed=0).digest() != digest


def test_folders_that_cannot_be_listed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their images would be missing in silence; root may list everything, so the system says no."""
    put(tmp_path, "a/1.jpg", "b/2.jpg")
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"/b cannot be read: EACCES \(Permission") as error:
        build_manifest(tmp_path, seed=0)
    assert error.value.fix


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    """What is there instead is told."""
    with pytest.raises(DataError, match="holds nothing"):
        build_manifest(tmp_path, seed=0)
    put(tmp_path, "a.txt", "b.txt", "c.csv", "d/e")
    with pytest.raises(DataError, match=r"2 \.txt") as error:
        build_manifest(tmp_path, seed=0)
    assert "1 without extension" in str(error.value)
    with pytest.raises(DataError, match="is a file"):
        build_manifest(tmp_path / "a.txt", seed=0)
    put(tmp_path, "one.jpg")
    with pytest.raises(DataError, match="is one image") as error:
        build_manifest(tmp_path / "one.jpg", seed=0)
    assert error.value.fix == f"--data {tmp_path}"


# --- Parquet --------------------------------------------------------------------------------------

NAMES = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}}}


def test_parquet_file(tmp_path: Path) -> None:
    """Labels, captions and class names come along; null paths get a key of their place."""
    rows = [image(f"{i}.jpg") | {"label": i % 3, "caption": f"number {i}"} for i in range(5)]
    rows += [image(None, b"x") | {"label": None, "caption": None}]
    path = write(tmp_path / "train.parquet", rows, NAMES, row_group_size=4)
    manifest = build_manifest(path, seed=0)
    assert manifest.table.schema.equals(SCHEMA)
    assert manifest.classes == ["ant", "bee", "cat"]
    name = "train.parquet"  # in every key: another file may come beside it
    assert by_key(manifest) == {f"{name}/{i}.jpg": i % 3 for i in range(5)} | {f"{name}/1.1": -1}
    captions = dict(zip(keys(manifest), manifest.table["caption"].to_pylist(), strict=True))
    numbers = {f"{name}/{i}.jpg": f"number {i}" for i in range(5)}
    assert captions == numbers | {f"{name}/1.1": None}
    places = zip(*(manifest.table[c].to_pylist() for c in ("group", "index")), strict=True)
    assert sorted(places) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert set(manifest.table["path"].to_pylist()) == {"train.parquet"}
    assert manifest.root == tmp_path


def test_parquet_folder(tmp_path: Path) -> None:
    """Files of a folder are one data set; keys name the file, so equal paths do not clash."""
    for part in ("a", "sub/b"):
        write(tmp_path / f"{part}.parquet", [image("1.jpg"), image("2.jpg")])
    write(tmp_path / ".cache" / "c.parquet", [image("9.jpg")])
    (tmp_path / "README.md").write_text("")
    expected = ["a.parquet/1.jpg", "a.parquet/2.jpg", "sub/b.parquet/1.jpg", "sub/b.parquet/2.jpg"]
    manifest = build_manifest(tmp_path, seed=0)
    assert sorted(keys(manifest)) == expected
    assert (manifest.labels() == -1).all()
    assert manifest.classes is None
    assert manifest.root == tmp_path


def test_parquet_in_a_folder_called_parquet(tmp_path: Path) -> None:
    """Spark names its folders like files."""
    write(tmp_path / "train.parquet" / "part-0.parquet", [image("1.jpg")])
    assert keys(build_manifest(tmp_path, seed=0)) == ["train.parquet/part-0.parquet/1.jpg"]
    inside = build_manifest(tmp_path / "train.parquet", seed=0)
    assert keys(inside) == ["part-0.parquet/1.jpg"]


def test_parquet_rows_are_mixed_across_groups(tmp_path: Path) -> None:
    """A file sorted by class must not give shards of one class."""
    rows = [image(f"{i:03d}") | {"label": i // 50} for i in range(200)]
    manifest = build_manifest(write(tmp_path / "x.parquet", rows, row_group_size=10), seed=0)
    assert sorted(keys(manifest)) == [f"x.parquet/{i:03d}" for i in range(200)]
    for first in range(0, 200, 40):
        assert np.bincount(manifest.labels()[first : first + 40], minlength=4).min() >= 3
    limited = build_manifest(tmp_path / "x.parquet", seed=0, limit=7)
    assert keys(limited) == keys(manifest)[:7]


def test_parquet_windows_keep_groups_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past a window's bytes, rows are shuffled within it only: a reader holds few groups."""
    monkeypatch.setattr(module, "_WINDOW_BYTES", 1)
    rows = [image(f"{i:03d}") for i in range(40)]
    manifest = build_manifest(write(tmp_path / "x.parquet", rows, row_group_size=10), seed=0)
    groups = np.array(manifest.table["group"].to_pylist()).reshape(4, 10)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:, 0].tolist()) == [0, 1, 2, 3]
    assert sorted(keys(manifest)) == [f"x.parquet/{i:03d}" for i in range(40)]


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    """A key is an image's name in every report: two images cannot share one."""
    path = write(tmp_path / "x.parquet", [image("1.jpg"), image("2.jpg"), image("1.jpg")])
    with pytest.raises(DataError, match=r"1 keys stand for several images.*'x\.parquet/1\.jpg'"):
        build_manifest(path, seed=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"picture": b"x"}], "picture binary"),
        ([{"image": b"x"}], "image binary"),
        ([{"image": {"path": "x"}}], "struct<path"),
        ([image("x") | {"label": 2**40}], "class numbers"),
        ([image("x") | {"caption": [1, 2]}], "caption of"),
    ],
    ids=["no image", "plain bytes", "no bytes", "label large", "captions"],
)
def test_other_schemas_are_refused(tmp_path: Path, rows: list[dict], message: str) -> None:
    """What was found is said, not a library's traceback."""
    path = write(tmp_path / "x.parquet", rows)
    with pytest.raises(DataError, match=message) as error:
        build_manifest(path, seed=0)
    assert str(path) in str(error.value)


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    """By the name of the file."""
    path = write(tmp_path / "x.parquet", [image("x")])
    path.write_bytes(path.read_bytes()[:-20])
    for source in (path, tmp_path):
        with pytest.raises(DataError, match=r"x\.parquet cannot be read"):
            build_manifest(source, seed=0)


@pytest.mark.parametrize(
    "meta", [{}, {"info": {"features": []}}, [], {"info": {"features": {"label": {}}}}]
)
def test_strange_metadata_gives_no_class_names(tmp_path: Path, meta: dict) -> None:
    """Class names are a courtesy; without them labels are numbers."""
    path = write(tmp_path / "x.parquet", [image("x") | {"label": 4}], meta)
    manifest = build_manifest(path, seed=0)
    assert manifest.classes is None
    assert by_key(manifest) == {"x.parquet/x": 4}


# --- kept in a store ------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    """What a store keeps is what was listed; its bytes are a pure function of it."""
    folder = build_manifest(put(tmp_path / "f", "ä/1.jpg", "b/2.jpg", "b/3.jpg"), seed=0)
    rows = [image(f"{i}") | {"label": i, "caption": "é"} for i in range(3)]
    parquet = build_manifest(write(tmp_path / "x.parquet", rows, NAMES), seed=0)
    for manifest in (folder, parquet, folder.head(2)):
        path = tmp_path / "manifest.parquet"
        path.write_bytes(manifest.to_parquet())
        read = Manifest.read(path)
        assert read.table.equals(manifest.table)
        assert read.classes == manifest.classes
        assert read.digest() == manifest.digest()
        assert read.to_parquet() == manifest.to_parquet() == path.read_bytes()


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    """Pages carry checksums: a label must not change in silence."""
    rows = [image(f"{i}") | {"label": i} for i in range(50)]
    good = build_manifest(write(tmp_path / "x.parquet", rows), seed=0)
    data = good.to_parquet()
    path = tmp_path / "m.parquet"
    for at in range(4, len(data) - 8, 37):
        broken = bytearray(data)
        broken[at] ^= 4
        path.write_bytes(broken)
        try:
            read = Manifest.read(path)
        except (DataError, OSError, pa.ArrowException):
            continue
        assert read.table.equals(good.table), f"byte {at}"


def test_other_parquet_is_no_manifest(tmp_path: Path) -> None:
    """A file of the same name from elsewhere."""
    path = write(tmp_path / "manifest.parquet", [{"key": "a"}])
    with pytest.raises(DataError, match="is not a manifest"):
        Manifest.read(path)


# --- names ----------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no $MILAN_DATA."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MILAN_DATA", raising=False)
    return folder


def test_where_a_name_leads(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path, else below --data-root, else $MILAN_DATA, else ./data; each only if nothing wins."""
    put(here, "data/imagenet/c/1.jpg")
    assert resolve_data("imagenet").resolve() == here / "data/imagenet"
    put(tmp_path / "env", "imagenet/train/c/1.jpg")
    monkeypatch.setenv("MILAN_DATA", str(tmp_path / "env"))
    assert resolve_data("imagenet") == tmp_path / "env/imagenet"
    put(tmp_path / "root", "imagenet/c/1.jpg")
    root = str(tmp_path / "root")
    assert resolve_data("imagenet", root) == tmp_path / "root/imagenet"
    put(here, "imagenet/c/1.jpg")
    assert resolve_data("imagenet", root).resolve() == here / "imagenet"
    assert resolve_data(str(tmp_path / "env" / "imagenet" / "train"), root).name == "train"


def test_a_missing_name_lists_where_it_was_sought(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place, in order; an absolute path is only itself."""
    with pytest.raises(DataError, match=r"looked at: imagenet, data/imagenet;"):
        resolve_data("imagenet")
    monkeypatch.setenv("MILAN_DATA", "/nowhere/else")
    with pytest.raises(DataError, match=r"looked at: imagenet, /nowhere/else/imagenet;"):
        resolve_data("imagenet")
    with pytest.raises(DataError, match=r"looked at: imagenet, /data/of/it/imagenet;"):
        resolve_data("imagenet", "/data/of/it")
    with pytest.raises(DataError, match=r"looked at: /nowhere/imagenet;") as error:
        resolve_data("/nowhere/imagenet", "/data/of/it")
    assert "--data-root" in error.value.fix


# --- the bytes of a row ---------------------------------------------------------------------------


def check_bytes(manifest: Manifest, root: Path, expected: dict[str, bytes]) -> None:
    """Every row reads its own bytes, in any order and from several threads at once."""
    source = ImageSource(manifest, root)
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(len(manifest)), 8))
    with ThreadPoolExecutor(8) as pool:
        for row, data in zip(rows, pool.map(source.read, rows.tolist()), strict=True):
            assert data == expected[manifest.key(int(row))]


def test_bytes_of_files(tmp_path: Path) -> None:
    """A row off by one would pair an image with another's targets."""
    names = [f"{c} ü/{i}.jpg" for c in "ab" for i in range(10)]
    put(tmp_path, *names)
    check_bytes(build_manifest(tmp_path, seed=0), tmp_path, {n: n.encode() for n in names})


@pytest.mark.parametrize("held", [1, 1 << 20])
def test_bytes_of_parquet_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    """Of several files and row groups, with many groups held or one at a time."""
    from milan.images import source as sources

    monkeypatch.setattr(sources, "_CACHE_BYTES", held)
    expected = {}
    for part in ("a", "b"):
        rows = [image(f"{i}.jpg", f"{part}{i}".encode()) for i in range(23)]
        write(tmp_path / f"{part}.parquet", rows, row_group_size=5)
        expected |= {f"{part}.parquet/{i}.jpg": f"{part}{i}".encode() for i in range(23)}
    check_bytes(build_manifest(tmp_path, seed=0), tmp_path, expected)


def test_bytes_that_are_gone(tmp_path: Path) -> None:
    """Files removed or cut, rows without bytes: a reason, no traceback."""
    put(tmp_path / "f", "c/1.jpg", "c/2.jpg")
    manifest = build_manifest(tmp_path / "f", seed=0)
    shutil.rmtree(tmp_path / "f/c")
    (tmp_path / "f/LICENSE").touch()
    for row in (0, 1):
        with pytest.raises(ImageFault) as fault:
            ImageSource(manifest, tmp_path / "f").read(row)
        assert fault.value.reason == "missing"
    (tmp_path / "f/LICENSE").unlink()
    with pytest.raises(DataError, match="empty or gone"):  # a disk that is not mounted
        ImageSource(manifest, tmp_path / "f").read(0)

    rows = [image("a"), {"image": {"bytes": None, "path": "b"}}, {"image": None}]
    path = write(tmp_path / "x.parquet", rows)
    manifest = build_manifest(path, seed=0)
    row = {manifest.key(r).removeprefix("x.parquet/"): r for r in range(3)}
    assert ImageSource(manifest, tmp_path).read(row["a"]) == b"bytes of a"
    for key in ("b", "0.2"):
        with pytest.raises(ImageFault, match=r"image\.bytes is null") as fault:
            ImageSource(manifest, tmp_path).read(row[key])
        assert fault.value.reason == "missing"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ImageFault) as fault:
        ImageSource(manifest, tmp_path).read(0)
    assert fault.value.reason == "unreadable"
    path.rename(tmp_path / "y.parquet")
    with pytest.raises(ImageFault) as fault:
        ImageSource(manifest, tmp_path).read(0)
    assert fault.value.reason == "missing"
