"""WebDataset tars: lists their images by the headers; each image is then one read at an offset.

A sample is what members of one name up to the first dot belong to (`0001.jpg`, `0001.cls`): the
rule of WebDataset. Every image of a sample is a row of its own. The label is that of `.cls`, else
`cls` or `label` of `.json`; the caption that of `.txt`, else `caption` or `captions` of `.json`.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from milan.core.paths import LFS_POINTER
from milan.errors import DataError
from milan.images.formats import extensions, kind_of_extension, lfs_pointer

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
"""Names of tars that are compressed as a whole."""
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_ANNOTATIONS = (".cls", ".txt", ".json")
BETWEEN_CAPTIONS = "\x1e"
"""The record separator of ASCII: it stands between several captions of an image."""
_SMALL = 1 << 20  # bytes of a label or caption member that is read while listing


@dataclass
class Tar:
    """The images of a tar: an entry per image in each list, in the order of the file."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Of the image's first byte in the file."""
    sizes: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    annotations: int = 0
    """How many members are labels and captions of these images."""
    places: dict[str, int] = field(default_factory=dict)
    """Name -> number of the images so far, kept up where there are hard links."""
    ignored: Counter[str] = field(default_factory=Counter)
    """All other members but folders, by extension, or why they are left out."""


def file_kind(name: str) -> str:
    """What a file without a row is counted as: its extension."""
    _, dot, extension = name.rpartition("/")[2].rpartition(".")
    known = dot and 0 < len(extension) <= 10 and extension.isprintable()
    return kind_of_extension(f".{extension.lower()}") if known else "without extension"


def packed(path: str) -> DataError:
    """Why a compressed tar is no source."""
    return DataError(
        f"{path} is a compressed tar: an image in it cannot be read without all before it",
        expected="plain .tar files (JPEGs do not get smaller)",
        fix="gunzip it, or its like; then the same line",
    )


def read_tar(file: BinaryIO, path: str) -> Tar:
    """The images of the tar `file`, called `path` in errors. Reads headers and small members only.

    Raises DataError for a tar that is compressed, cut short or damaged, and OSError.
    """
    tar = Tar()
    facts: dict[str, dict[str, Any]] = {}  # sample -> annotations of .cls, .txt, .json
    annotated: Counter[str] = Counter()  # sample -> members that they are from
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                _take(tar, facts, annotated, member, file)
                # tarfile keeps every member: a gigabyte for a million images.
                archive.members.clear()  # type: ignore[attr-defined]
            _check_end(file, archive.offset)
    except (tarfile.TarError, ValueError, EOFError) as error:
        file.seek(0)
        head = file.read(len(LFS_POINTER))
        if head.startswith(_MAGIC):
            raise packed(path) from None
        if head == LFS_POINTER:
            raise lfs_pointer(path) from None
        raise DataError(
            f"{path} is no tar, or cut short or damaged: {error}",
            expected="a whole tar",
            fix="fetch or write it again",
        ) from None
    pictured = {_split(name)[0] for name in tar.names}
    tar.annotations = sum(n for sample, n in annotated.items() if sample in pictured)
    tar.ignored["labels and captions without an image"] = annotated.total() - tar.annotations
    for name in tar.names:
        annotations = facts.get(_split(name)[0], {})
        tar.labels.append(annotations.get(".cls", annotations.get("label")))
        tar.captions.append(annotations.get(".txt", annotations.get("caption")))
    tar.ignored = +tar.ignored
    return tar


def joined_captions(captions: Iterable[str | None]) -> str:
    """The captions of an image that say something, as one text (`Manifest.captions`)."""
    return BETWEEN_CAPTIONS.join(text for text in captions if text and text.strip())


def _split(name: str) -> tuple[str, str]:
    """Sample and extension: at the first dot of the last part of the path."""
    folder, slash, last = name.rpartition("/")
    first, dot, rest = last.partition(".")
    return folder + slash + first, dot + rest


def _take(
    tar: Tar,
    facts: dict[str, dict[str, Any]],
    annotated: Counter[str],
    member: tarfile.TarInfo,
    file: BinaryIO,
) -> None:
    name = _without_dots(member.name)
    if member.isdir():
        return
    if any(part.startswith(".") and part != ".." for part in name.split("/")):
        tar.ignored["hidden"] += 1  # as in folders
        return
    sample, extension = _split(name)
    kind = extension.lower()
    if member.islnk() and name.lower().endswith(extensions()):
        _take_link(tar, name, _without_dots(member.linkname))
    elif not member.isreg() or member.issparse():
        tar.ignored["links and special files"] += 1
    elif name.lower().endswith(extensions()):
        tar.names.append(name)
        tar.offsets.append(member.offset_data)
        tar.sizes.append(member.size)
    elif kind in _ANNOTATIONS:
        data = b""
        if member.size <= _SMALL:
            file.seek(member.offset_data)
            data = file.read(member.size)
        try:
            if member.size > _SMALL or len(data) < member.size:
                raise ValueError("too long, or cut short")
            if fact := _facts(kind, data):
                facts.setdefault(sample, {}).update(fact)
                annotated[sample] += 1
            else:
                tar.ignored[f"{kind} without a class number or caption"] += 1
        except (ValueError, RecursionError):
            tar.ignored[f"unreadable {kind}"] += 1
    else:
        tar.ignored[file_kind(name)] += 1


def _without_dots(name: str) -> str:
    """A member's name. `.` changes no path; `..` does, but nothing is unpacked here."""
    return "/".join(part for part in name.split("/") if part != ".")


def _take_link(tar: Tar, name: str, target: str) -> None:
    """An image under a second name: tar writes the later names of a file as hard links."""
    if len(tar.places) < len(tar.names):
        first = len(tar.places)
        tar.places.update({n: i for i, n in enumerate(tar.names[first:], first)})
    place = tar.places.get(target)
    if place is None:
        tar.ignored["links and special files"] += 1
        return
    tar.names.append(name)
    tar.offsets.append(tar.offsets[place])
    tar.sizes.append(tar.sizes[place])


def _facts(kind: str, data: bytes) -> dict[str, Any]:
    """The annotations in a member: label, caption. Raises ValueError if it cannot be parsed.

    JSON may have any content: only a class number and a caption are taken, under known names.
    """
    text = data.decode()
    if kind == ".txt":
        return {kind: text.strip()}
    if kind == ".cls":
        return {kind: _class_number(int(text))}
    values = json.loads(text)
    if not isinstance(values, dict):
        return {}
    facts: dict[str, Any] = {}
    caption = values.get("caption", values.get("captions"))
    several = caption if isinstance(caption, list) else [caption]
    if several and all(isinstance(caption, str) for caption in several):
        caption = joined_captions(several)
        caption.encode()  # JSON can spell what is not Unicode: half of a surrogate pair
        facts["caption"] = caption
    for name in ("label", "cls"):
        if type(values.get(name)) is int:
            facts["label"] = _class_number(values[name])
    return facts


def _class_number(number: int) -> int:
    if not -1 <= number < 2**31:  # -1: unknown, as in Hugging Face's sets
        raise ValueError(f"class {number}")
    return number


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raise ValueError unless the tar ends at `offset` as a tar does: by zeros, to the file's end.

    tarfile takes any block that is no header for the end. A tar cut between two members, damaged
    in the middle, or joined to another would lose the rest in silence.
    """
    file.seek(offset)
    if len(rest := file.read(512)) < 512:
        raise ValueError(f"it ends at byte {offset} without an end mark")
    while rest:
        if rest.count(0) < len(rest):
            raise ValueError(f"there is more data after its end at byte {offset}")
        rest = file.read(1 << 20)
