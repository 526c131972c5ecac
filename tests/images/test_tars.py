"""WebDataset tars: which rows they give, that each reads its own bytes, what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from milan.errors import DataError, ImageFault
from milan.images.manifest import SCHEMA, Manifest, build_manifest, describe_source
from milan.images.source import ImageSource

CASES = Path(__file__).parent.parent / "cases"


def write(path: Path, members: list[tuple[str, bytes]], **options: int) -> Path:
    """A tar of (name, bytes) in this order; a name may come twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def named(*names: str) -> list[tuple[str, bytes]]:
    """Members that hold their own names."""
    return [(name, name.encode()) for name in names]


def rows(manifest: Manifest) -> dict[str, dict]:
    return {row["key"]: row for row in manifest.table.to_pylist()}


def bytes_of(manifest: Manifest, root: Path) -> dict[str, bytes]:
    source = ImageSource(manifest, root)
    return {manifest.key(row): source.read(row) for row in range(len(manifest))}


def test_rows_of_a_tar(tmp_path: Path) -> None:
    """A row an image: where it lies in the file, its label and its caption."""
    members = named("0001.jpg", "b/0002.seg.PNG", "b/0002.jpg", "0003.webp", "0004.jpg", "5.jpg")
    members += [("0001.cls", b"3\n"), ("0001.txt", " a cät\n".encode())]
    members += [("b/0002.json", json.dumps({"caption": "two", "label": 7, "url": "x"}).encode())]
    members += [("0003.json", json.dumps({"caption": "no", "cls": 1}).encode())]
    members += [("0003.cls", b"2"), ("0003.txt", b"yes"), ("0004.CLS", b"-1"), ("5.json", b"[1]")]
    path = write(tmp_path / "train.tar", members)
    manifest = build_manifest(path, seed=0)
    assert manifest.table.schema.equals(SCHEMA)
    assert manifest.classes is None
    unknown = manifest.key(int(np.flatnonzero(manifest.labels() < 0)[0]))
    assert describe_source(manifest)[1:] == [
        "found: 15 files: 7 labels and captions, 6 images, 1 .tar; left out: 1 .json without a "
        "class number or caption",
        f"without a class: 2 images, such as {unknown!r}",
    ]
    told = {key: (row["label"], row["caption"]) for key, row in rows(manifest).items()}
    assert told == {
        "train.tar/0001.jpg": (3, "a cät"),
        "train.tar/b/0002.seg.PNG": (7, "two"),
        "train.tar/b/0002.jpg": (7, "two"),
        "train.tar/0003.webp": (2, "yes"),
        "train.tar/0004.jpg": (-1, None),
        "train.tar/5.jpg": (None, None),
    }
    for key, row in rows(manifest).items():
        name = key.removeprefix("train.tar/").encode()
        assert row["path"] == "train.tar"
        assert row["bytes"] == len(name)
        assert path.read_bytes()[row["offset"] : row["offset"] + row["bytes"]] == name
        assert row["group"] is row["index"] is None
    for key, data in bytes_of(manifest, tmp_path).items():
        assert key == f"train.tar/{data.decode()}"


def test_kept_in_a_store(tmp_path: Path) -> None:
    """Offsets and captions come back as they were; the digest is of keys and their order."""
    write(tmp_path / "d/x.tar", [*named("1.jpg", "2.jpg"), ("1.txt", b"caption")])
    manifest = build_manifest(tmp_path / "d", seed=0)
    (tmp_path / "manifest.parquet").write_bytes(manifest.to_parquet())
    read = Manifest.read(tmp_path / "manifest.parquet")
    assert read.table.equals(manifest.table)
    assert read.to_parquet() == manifest.to_parquet()
    (tmp_path / "d").rename(tmp_path / "moved")
    assert build_manifest(tmp_path / "moved", seed=0).digest() == manifest.digest()
    assert build_manifest(tmp_path / "moved", seed=1).digest() != manifest.digest()


def test_order_is_frozen(tmp_path: Path) -> None:
    """Row numbers address every draw: over all tars, the same for ever."""
    for part in ("b", "a"):
        write(tmp_path / f"{part}.tar", named(*[f"{i}.jpg" for i in range(4)]))
    keys = build_manifest(tmp_path, seed=0).table["key"].to_pylist()
    # The order of 8 files of a folder, in tests/images/test_manifest.py: 5 3 7 2 4 1 0 6.
    assert [f"{key[0]}{key[6]}" for key in keys] == ["b1", "a3", "b3", "a2", "b0", "a1", "a0", "b2"]
    assert build_manifest(tmp_path, seed=0, limit=3).table["key"].to_pylist() == keys[:3]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_kept_as_they_are(tmp_path: Path, form: int) -> None:
    """Long ones, other alphabets, two spellings of one letter, `./` of GNU tar."""
    long = "/".join(["n" * 60] * (3 if form == tarfile.USTAR_FORMAT else 8)) + "/0.jpg"
    names = [
        long,
        "猫/写真 🐈.png",
        "a b/ü.jpg",
        "a b/u\u0308.jpg",
        "v1.5/x.y.jpg",
        'it\'s "x".jpg',
    ]
    members = [*named(*names), ("./dot/7.jpg", b"dot/7.jpg"), ("./dot/7.cls", b"7")]
    write(tmp_path / "ü 1.tar", members, format=form)
    manifest = build_manifest(tmp_path, seed=0)
    expected = {f"ü 1.tar/{name}": name.encode() for name in [*names, "dot/7.jpg"]}
    assert bytes_of(manifest, tmp_path) == expected
    assert rows(manifest)["ü 1.tar/dot/7.jpg"]["label"] == 7


def test_names_that_are_not_utf8_are_refused_by_name(tmp_path: Path) -> None:
    """They could not be written to a manifest."""
    with tarfile.open(
        tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        tar.addfile(tarfile.TarInfo("ÿ.jpg"))
    with pytest.raises(DataError, match=r"udcff\.jpg' is not UTF-8"):
        build_manifest(tmp_path, seed=0)


def test_what_gives_no_row_is_counted(tmp_path: Path) -> None:
    """Left out, and told, but folders; the line reconciles."""
    members = named(
        "1.jpg", "1.npy", "1.feat.npy", "2.npy", "LICENSE", "3.cls", "._1.jpg", ".a/4.jpg"
    )
    members += [("1.cls", b"cat"), ("1.txt", b"\xff"), ("1.json", b"{")]
    members += [("6.json", b"[" * 99999), ("7.json", b'{"caption": "\\ud800"}'), ("8.cls", b"8")]
    members += [("5.jpg", b"5"), ("5.cls", b"9" * 12), ("5.txt", b"x" * (1 << 20) + b"x")]
    path = write(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, "1.jpg"),
            ("hard.jpg", tarfile.LNKTYPE, "./5.jpg"),
            ("none.jpg", tarfile.LNKTYPE, "0.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    (tmp_path / "README.md").write_text("")
    manifest = build_manifest(tmp_path, seed=0)
    assert rows(manifest).keys() == {"x.tar/1.jpg", "x.tar/5.jpg", "x.tar/hard.jpg"}
    found = bytes_of(manifest, tmp_path)
    assert found["x.tar/hard.jpg"] == found["x.tar/5.jpg"]  # a second name of the same file
    assert {row["label"] for row in rows(manifest).values()} == {None}
    assert {row["caption"] for row in rows(manifest).values()} == {None}
    assert describe_source(manifest)[1:] == [
        "found: 22 files: 3 images, 1 .tar; left out: 3 .npy, 3 unreadable .cls, "
        "3 unreadable .json, 2 hidden, 2 links and special files, 2 unreadable .txt, 1 .md, "
        "1 labels and captions without an image, 1 without extension"
    ]


def test_tars_of_no_image(tmp_path: Path) -> None:
    """What is there instead is told; an empty tar is a tar."""
    write(tmp_path / "x.tar", named("1.npy", "1.txt"))
    write(tmp_path / "empty.tar", [])
    with pytest.raises(
        DataError, match=r"1 labels and captions without an image, 1 \.npy|1 \.npy, 1 labels"
    ):
        build_manifest(tmp_path, seed=0)


def test_a_folder_of_tars(tmp_path: Path) -> None:
    """Found at any depth; images or Parquet files beside them are the data set instead."""
    for name in ("b/2.tar", "b/a/1.TAR", ".cache/3.tar"):
        write(tmp_path / name, named("c/1.jpg", "c/2.jpg"))
    manifest = build_manifest(tmp_path, seed=0)
    expected = {f"{tar}/c/{i}.jpg": f"c/{i}.jpg" for tar in ("b/2.tar", "b/a/1.TAR") for i in "12"}
    assert {k: v.decode() for k, v in bytes_of(manifest, tmp_path).items()} == expected
    (tmp_path / "b" / "x.jpg").write_bytes(b"x")
    manifest = build_manifest(tmp_path, seed=0)
    assert rows(manifest).keys() == {"b/x.jpg"}
    assert describe_source(manifest)[1] == "found: 4 files: 1 images; left out: 2 .tar, 1 hidden"


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    """`..` and `.` are parts of names like any other: nothing is unpacked, and nothing dropped."""
    manifest = build_manifest(CASES / "04-tar-relative-names", seed=0)
    assert rows(manifest).keys() == {
        "mixed.tar/../imgs/0.jpg", "mixed.tar/../imgs/1.jpg", "mixed.tar/2.jpg"
    }  # fmt: skip
    names = ["../a/1.jpg", "a/./2.jpg", "./././3.jpg", "a/../4.jpg", "/abs/5.jpg", "..x/6.jpg"]
    members = [*named(*names), ("../a/1.cls", b"1"), ("a/2.cls", b"2")]
    write(tmp_path / "x.tar", members)
    manifest = build_manifest(tmp_path, seed=0)
    kept = {"../a/1.jpg": 1, "a/2.jpg": 2, "3.jpg": None, "a/../4.jpg": None, "/abs/5.jpg": None}
    assert {key.removeprefix("x.tar/"): row["label"] for key, row in rows(manifest).items()} == kept
    line = "found: 9 files: 5 images, 2 labels and captions, 1 .tar; left out: 1 hidden"
    assert describe_source(manifest)[1] == line
    assert bytes_of(manifest, tmp_path)["x.tar/a/2.jpg"] == b"a/./2.jpg"


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    """tar itself would let the later one win."""
    write(tmp_path / "x.tar", [("a/1.jpg", b"1"), ("a/2.jpg", b"2"), ("./a/1.jpg", b"3")])
    with pytest.raises(DataError, match=r"1 keys stand for several.*'x\.tar/a/1\.jpg'"):
        build_manifest(tmp_path, seed=0)


def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    """tarfile takes a cut between two members for the end: the rest would be lost in silence."""
    path = write(tmp_path / "x.tar", [("1.jpg", b"1" * 700), ("1.cls", b"1"), ("2.jpg", b"2")])
    whole = path.read_bytes()
    end = 512 + 1024 + 1024 + 1024  # four headers and their padded bytes, then the end mark
    assert not any(whole[end:])
    for length in [*range(0, end + 512, 128), 513, 1211, 1212, end - 1, end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.tar is no tar, or cut short or damaged"):
            build_manifest(path, seed=0)
    path.write_bytes(whole[: end + 512])
    assert len(build_manifest(path, seed=0)) == 2


def test_a_damaged_tar_is_refused(tmp_path: Path) -> None:
    """So is one with a header overwritten, one joined to another, and what is no tar at all."""
    path = write(tmp_path / "x.tar", named("1.jpg", "2.jpg", "3.jpg"))
    whole = path.read_bytes()
    damaged = whole[:1024] + b"\x55" * 512 + whole[1536:]
    for data in (damaged, whole + whole, b"<html>no such object</html>" * 100):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"x\.tar is no tar, or cut short or damaged") as error:
            build_manifest(path, seed=0)
        assert error.value.fix


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path: Path, mode: str) -> None:
    """By name or by content: nothing in them can be read by offset."""
    for name in (f"x.tar.{mode}", "y.tar"):
        folder = tmp_path / name[0]
        folder.mkdir()
        with tarfile.open(folder / name, f"w:{mode}") as tar:  # type: ignore[call-overload]
            tar.addfile(tarfile.TarInfo("1.jpg"))
        for source in (folder, folder / name):
            with pytest.raises(DataError, match=r"is a compressed tar") as error:
                build_manifest(source, seed=0)
            assert error.value.fix
    write(tmp_path / "x" / "plain.tar", named("1.jpg"))
    with pytest.raises(DataError, match=rf"x\.tar\.{mode} is a compressed tar"):
        build_manifest(tmp_path / "x", seed=0)


def test_only_headers_are_read(tmp_path: Path) -> None:
    """An image behind 5 GB, a hole on the disk: found at once, and beyond 32-bit offsets."""
    path = tmp_path / "x.tar"
    hole = 5 << 30
    with open(path, "wb") as file:
        for name, size in (("0.bin", hole), ("1.jpg", 5)):
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf())
            if size == hole:
                file.seek(hole, 1)
        file.write(b"image".ljust(512, b"\0") + bytes(1024))
    manifest = build_manifest(path, seed=0)
    assert rows(manifest)["x.tar/1.jpg"]["offset"] == hole + 1024 > 2**32
    assert bytes_of(manifest, tmp_path) == {"x.tar/1.jpg": b"image"}


def test_tars_that_changed(tmp_path: Path) -> None:
    """Cut or gone since the listing: a reason, no other image's bytes."""
    path = write(tmp_path / "x.tar", [("0.jpg", b""), ("1.jpg", b"1" * 5000)])
    manifest = build_manifest(path, seed=0)
    row = next(r for r in range(2) if manifest.key(r) == "x.tar/1.jpg")
    source = ImageSource(manifest, tmp_path)
    assert source.read(1 - row) == b""
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ImageFault, match=r"ends within the image") as fault:
        source.read(row)
    assert fault.value.reason == "unreadable"
    path.rename(tmp_path / "y.tar")
    with pytest.raises(ImageFault) as fault:
        source.read(row)
    assert fault.value.reason == "missing"
