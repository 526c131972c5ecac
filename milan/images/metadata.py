"""Pictures whose pixels are whole behind damaged metadata: the same file with its pixels alone.

Pillow reads metadata before pixels, and gives a picture up for a wrong checksum of a comment or a
pointer to a page that is not there. Sources: PNG 3rd edition, 5 and 11; TIFF 6.0, 2 and 8; BigTIFF.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

_PNG = b"\x89PNG\r\n\x1a\n"
_XMP = b"XML:com.adobe.xmp\0"  # the keyword of a text that may hold an orientation
# What an image needs; without EXIF, GPS, XMP, ICC, IPTC, dates, names and private tags.
_TIFF_TAGS = {
    254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322,
    323, 324, 325, 332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532,
}  # fmt: skip
_WIDTH, _HEIGHT, PHOTOMETRIC = 256, 257, 262
_BITS, _SAMPLES = 258, 277
_OFFSETS = {273, 324, 513}  # of strips, tiles, an old JPEG


def pixels_only(data: bytes) -> bytes | None:
    """The picture without what its pixels do not need; None for what cannot be cut so.

    Orientation is kept where it is intact. An animation is not cut: it has no one picture.
    """
    if data.startswith(_PNG):
        return _png(data)
    page = TiffPage.first(data)
    return page.alone() if page else None


def _png(data: bytes) -> bytes | None:
    kept, at, kind = [_PNG], len(_PNG), b""
    while kind != b"IEND":
        if at + 12 > len(data):
            return None
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        chunk = data[at : at + 12 + size]
        at += 12 + size
        if kind in (b"acTL", b"fcTL", b"fdAT"):
            return None
        critical = kind[:1].isupper() or kind == b"tRNS"
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        turns = kind == b"eXIf" or (kind == b"iTXt" and chunk[8:].startswith(_XMP))
        if critical or (turns and intact):
            kept.append(chunk)
    return b"".join(kept)


@dataclass(frozen=True)
class TiffPage:
    """The directory of a TIFF's first page, where it is whole."""

    data: bytes
    order: str
    """`<` or `>`, as struct writes it."""
    big: bool
    """A BigTIFF, with 64-bit offsets."""
    entries: list[bytes]
    following: int
    """Where the next page's directory should be; 0 after the last page."""

    @classmethod
    def first(cls, data: bytes) -> TiffPage | None:
        """The first page of a file's bytes; None if they are no TIFF or its directory is cut."""
        order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        version = int.from_bytes(data[2:4], "little" if order == "<" else "big")
        if not order or version not in (42, 43):
            return None
        big = version == 43
        begin, number = (8, "Q") if big else (4, "I")
        if len(data) < 16:
            return None
        return cls._at(data, order, big, struct.unpack_from(order + number, data, begin)[0])

    @classmethod
    def _at(cls, data: bytes, order: str, big: bool, at: int) -> TiffPage | None:
        size, head, number = (20, "Q", "Q") if big else (12, "H", "I")
        try:
            count = struct.unpack_from(order + head, data, at)[0]
            begin = at + struct.calcsize(head)
            end = begin + size * count
            (following,) = struct.unpack_from(order + number, data, end)
        except (struct.error, OverflowError):
            return None
        entries = [data[i : i + size] for i in range(begin, end, size)]
        return cls(data, order, big, entries, following)

    def pages(self) -> int:
        """How many pages there are from this one on; a pointer to no page ends the file."""
        page: TiffPage | None = self
        count, seen = 0, set()
        while page and {_WIDTH, _HEIGHT} <= page.tags() and page.tags() & _OFFSETS:
            count += 1
            if not page.following or page.following in seen:
                break
            seen.add(page.following)
            page = self._at(self.data, self.order, self.big, page.following)
        return count

    def tags(self) -> set[int]:
        """The numbers of its entries."""
        return {self._tag(entry) for entry in self.entries}

    def value(self, tag: int, default: int) -> int:
        """The (first) number of a short entry whose value lies in it; `default` without one."""
        entry = next((e for e in self.entries if self._tag(e) == tag), None)
        if entry is None:
            return default
        kind, at = struct.unpack_from(self.order + "H", entry, 2)[0], 12 if self.big else 8
        return struct.unpack_from(self.order + {1: "B", 4: "I"}.get(kind, "H"), entry, at)[0]

    def samples(self) -> str:
        """Its samples in words, as far as the directory holds them."""
        number = self.value(_SAMPLES, 1)
        fits = number <= (4 if self.big else 2)  # else the entry has only their place
        bits = f" of {self.value(_BITS, 1)} bits" if fits else ""
        return f"{number} sample{'s' if number > 1 else ''}{bits}"

    def _tag(self, entry: bytes) -> int:
        return struct.unpack_from(self.order + "H", entry)[0]

    def alone(self, *, photometric: int | None = None) -> bytes:
        """The file with this page alone, and of its tags those that its pixels need.

        `photometric` replaces what the samples mean (PhotometricInterpretation). The directory
        is written to the end, for a longer one in its place might cover pixels.
        """
        kept = [entry for entry in self.entries if self._tag(entry) in _TIFF_TAGS]
        size, head, number = (20, "Q", "Q") if self.big else (12, "H", "I")
        if photometric is not None:
            kept = [entry for entry in kept if self._tag(entry) != PHOTOMETRIC]
            form = f"{self.order}HH{number}H"
            kept.append(struct.pack(form, PHOTOMETRIC, 3, 1, photometric).ljust(size, b"\0"))
            kept.sort(key=self._tag)
        data = self.data + bytes(-len(self.data) % 8)
        offset = struct.pack(self.order + number, len(data))
        begin = 8 if self.big else 4
        count = struct.pack(self.order + head, len(kept))
        directory = count + b"".join(kept) + bytes(len(offset))
        return data[:begin] + offset + data[begin + len(offset) :] + directory
