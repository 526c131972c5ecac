"""Which files are opened as pictures, what others are called, pixels behind damaged metadata."""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from helpers import CASES, ROOT
from PIL import EpsImagePlugin, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from milan.errors import ImageFault
from milan.images import formats
from milan.images.decode import decode

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:x="1"/></rdf:RDF>'


def noise(height: int = 12, width: int = 16) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or noise()).save(file, kind, **options)
    return file.getvalue()


# --- formats --------------------------------------------------------------------------------------


def test_postscript_starts_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name: it is not even given to the plug-in that would."""
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("an interpreter was started")
    )
    data = (CASES / "16-eps-named-jpg/postscript.jpg").read_bytes()
    assert Image.open(io.BytesIO(data)).format == "EPS", "Pillow would"
    with pytest.raises(ImageFault, match="unsupported: PostScript"):
        decode(data)


def test_pillow_opens_pictures_in_one_place() -> None:
    """A second place would be a second list of formats, or none."""
    calls = {
        path.relative_to(ROOT).as_posix(): re.findall(r"Image\.open\(.*", path.read_text())
        for room in ("milan", "pipeline", "stages", "demo", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
    }
    for path, lines in calls.items():
        assert all("formats=" in line for line in lines), path
        if path.split("/")[0] in ("milan", "pipeline", "stages"):
            assert len(lines) == (path == "milan/images/formats.py"), path


OTHERS = {
    "PDF": b"%PDF-1.7\n",
    "Photoshop": b"8BPS\0\1",
    "JPEG XL": b"\xff\x0a\x7f\0",
    "JPEG XL in boxes": b"\0\0\0\x0cJXL \r\n\x87\n",
    "camera raw": b"II*\0\x10\0\0\0CR\2\0",
    "camera raw (Canon)": b"\0\0\0\x18ftypcrx \0\0\0\1",
    "camera raw (Fujifilm)": b"FUJIFILMCCD-RAW 0201",
    "a video": b"\0\0\0\x18ftypisom\0\0\0\1",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_picture_is_called_what_it_is(kind: str) -> None:
    """Not `not an image`: the owner must know what to do about it."""
    with pytest.raises(ImageFault, match="unsupported") as fault:
        decode(OTHERS[kind] + bytes(400))
    assert kind.split(" in ")[0] in fault.value.detail


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("tags", [{50706: 1}, {254: 1, 330: 8}], ids=["DNG", "NEF, ARW"])
def test_the_preview_of_a_raw_is_not_the_picture(order: str, tags: dict[int, int]) -> None:
    """Pillow sees a TIFF in it: a thumbnail of the photograph."""
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    assert decode(tiff(grey, 1, order)).size == (7, 5)
    with pytest.raises(ImageFault, match="camera raw"):
        decode(tiff(grey, 1, order, more=tags))


def heic(*brands: bytes) -> bytes:
    head = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return struct.pack(">I", 4 + len(head)) + head + bytes(100)


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(formats, "find_spec", lambda _: None)
    formats.has_heif.cache_clear()
    yield
    formats.has_heif.cache_clear()


@pytest.mark.usefixtures("without_heif")
def test_heic_without_the_plug_in() -> None:
    """It is named, with what to install; its files are not taken for images here."""
    for data in (heic(b"heic", b"mif1"), heic(b"mif1", b"heic"), heic(b"hevc", b"msf1")):
        with pytest.raises(ImageFault, match=r"HEIC: pip install 'milan-pretrain\[heic\]'"):
            decode(data)
    with pytest.raises(ImageFault) as fault:
        decode(heic(b"mif1", b"avif"))
    assert "HEIC" not in str(fault.value)
    assert ".heic" not in formats.extensions()
    assert formats.kind_of_extension(".heic") == ".heic (HEIC: pip install 'milan-pretrain[heic]')"
    assert formats.kind_of_extension(".nef") == ".nef (camera raw)"
    assert formats.kind_of_extension(".csv") == ".csv"


def test_heic_with_the_plug_in() -> None:
    """As other pictures: upright once, cut files are refused, the primary picture is taken."""
    reason = "pip install milan-pretrain[heic]: HEIC is not tested"
    heif = pytest.importorskip("pillow_heif", reason=reason)
    heif.register_heif_opener()
    assert {".heic", ".heif"} <= set(formats.extensions())
    smooth = noise(3, 4).resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved("HEIF", smooth, quality=95, exif=exif.tobytes())
    image = decode(data)
    assert image.size == (48, 64)
    turned = np.asarray(smooth.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(np.asarray(image) - turned).mean() < 4
    small = smooth.resize((16, 16))
    assert decode(saved("HEIF", smooth, save_all=True, append_images=[small])).size == (64, 48)
    with pytest.raises(ImageFault):
        decode(data[: len(data) // 2])


def test_other_pictures_that_pillow_knows() -> None:
    """Parquet has no names: what a set contains may be of any common format."""
    for kind in ("JPEG2000", "AVIF"):
        if kind in formats._formats(False):
            assert decode(saved(kind)).size == (16, 12)


# --- damaged metadata -----------------------------------------------------------------------------


def test_whole_pixels_behind_damaged_exif() -> None:
    """A file that people have, and every program shows."""
    data = (CASES / "15-metadata-damaged-pixels-whole/exif.png").read_bytes()
    assert decode(data).size == (48, 40)


def described() -> dict[str, bytes]:
    """Files of every kind with all the metadata that Pillow writes."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "Maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    texts = PngInfo()
    texts.add_text("a", "b" * 50)
    texts.add_text("c", "d" * 90, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=True)
    return {
        "jpeg": saved("JPEG", exif=exif, icc_profile=icc, xmp=XMP, comment=b"hello"),
        "mpo": saved("MPO", exif=exif, save_all=True, append_images=[noise(4, 4)]),
        "png": saved("PNG", exif=exif, icc_profile=icc, pnginfo=texts, dpi=(72, 72)),
        "deep png": deep_png(exif),
        "webp": saved("WEBP", exif=exif, icc_profile=icc, xmp=XMP, lossless=True),
        "tiff": saved("TIFF", exif=exif, icc_profile=icc, dpi=(72, 72)),
        "tiff lzw": saved("TIFF", exif=exif, icc_profile=icc, compression="tiff_lzw"),
    }


def deep_png(exif: Image.Exif) -> bytes:
    """Of 16 bits, which torchvision decodes."""
    grey = Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 341)
    return saved("PNG", grey, exif=exif, dpi=(72, 72))


def metadata(kind: str, data: bytes) -> Iterator[tuple[int, int]]:
    """Where they are: the first byte and that behind the last of each piece."""
    if kind in ("jpeg", "mpo"):
        at = 2
        while data[at + 1] != 0xDA:
            size = int.from_bytes(data[at + 2 : at + 4], "big")
            if data[at + 1] >= 0xE0:
                yield at + 4, at + 2 + size
            at += 2 + size
    elif "png" in kind:
        at = 8
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            if data[at + 4 : at + 5].islower():
                yield at + 8, at + 12 + size
            at += 12 + size
    elif kind == "webp":
        at = 12
        while at < len(data):
            size = int.from_bytes(data[at + 4 : at + 8], "little")
            if data[at : at + 4] in (b"EXIF", b"XMP ", b"ICCP"):
                yield at + 8, at + 8 + size
            at += 8 + size + size % 2
    else:
        at = int.from_bytes(data[4:8], "little")
        (count,) = struct.unpack_from("<H", data, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            if struct.unpack_from("<H", data, entry)[0] in (271, 282, 296, 34665, 34675):
                yield entry + 2, entry + 12
        yield at + 2 + 12 * count, at + 6 + 12 * count  # where the next page is


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of each damage
@pytest.mark.parametrize("kind", described())
def test_metadata_that_are_damaged_anyhow(kind: str) -> None:
    """EXIF, ICC, XMP, texts, the previews of an MPO, a next page that is not there."""
    data, generator = described()[kind], np.random.default_rng(0)
    expected = np.asarray(decode(data))
    pieces = list(metadata(kind, data))
    assert len(pieces) >= 2
    for first, last in pieces:
        for turn in range(8):
            broken = bytearray(data)
            if turn < 2:
                broken[first:last] = bytes([255 * turn]) * (last - first)
            else:
                for at in generator.integers(first, last, turn):
                    broken[at] = generator.integers(256)
            if "png" in kind and turn % 2:  # its checksum is that of what is there
                body = bytes(broken[first - 4 : last - 4])
                broken[last - 4 : last] = struct.pack(">I", zlib.crc32(body))
            try:
                got = np.asarray(decode(bytes(broken)))
            except ImageFault as fault:
                pytest.fail(f"{kind} at {first}, {turn}: {fault}")
            assert np.array_equal(got, expected)
    assert np.array_equal(np.asarray(decode(data + b"\0" * 9 + b"more")), expected)


def test_an_intact_orientation_survives_other_damage() -> None:
    """A wrong checksum of a comment is no reason to lay a photograph on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved("PNG", exif=exif, dpi=(72, 72))
    at = data.index(b"pHYs")
    assert decode(data[: at + 4] + b"\7" + data[at + 5 :]).size == (12, 16)
    texts = PngInfo()
    turned = XMP.decode().replace('tiff:x="1"', 'tiff:Orientation="6"')
    texts.add_itxt("XML:com.adobe.xmp", turned)
    data = saved("PNG", pnginfo=texts, dpi=(72, 72))
    at = data.index(b"pHYs")
    assert decode(data[: at + 4] + b"\7" + data[at + 5 :]).size == decode(data).size == (12, 16)
    data = saved("TIFF", exif=exif, dpi=(72, 72))
    at = len(data) - 4 if data.endswith(bytes(4)) else data.index(bytes(4), 8)
    directory = int.from_bytes(data[4:8], "little")
    at = directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0]
    assert decode(data[:at] + b"\xff\xff\xff\x00" + data[at + 4 :]).size == (12, 16)


def test_damage_hides_no_page_and_no_frame() -> None:
    """A file of several pictures has none that is the picture, whatever else is wrong with it."""
    pages = saved("TIFF", save_all=True, append_images=[noise(), noise()])
    second = int.from_bytes(pages[4:8], "little")
    at = second + 2 + 12 * struct.unpack_from("<H", pages, second)[0]
    third = int.from_bytes(pages[at : at + 4], "little")
    at = third + 2 + 12 * struct.unpack_from("<H", pages, third)[0]
    with pytest.raises(ImageFault, match="2 pages"):
        decode(pages[:at] + b"\xff\xff\xff\x00" + pages[at + 4 :])
    frames = saved("PNG", save_all=True, append_images=[noise().rotate(90)], dpi=(72, 72))
    at = frames.index(b"pHYs")
    with pytest.raises(ImageFault):
        decode(frames[: at + 4] + b"\7" + frames[at + 5 :])


def test_half_of_a_damaged_file_is_still_none() -> None:
    """Pixels must be whole; that metadata may be damaged excuses nothing else."""
    for kind, data in described().items():
        first, last = next(metadata(kind, data))
        broken = data[:first] + b"\xff" * (last - first) + data[last:]
        cut = len(data) // 3 if kind == "mpo" else len(data) - 40
        if kind.startswith("tiff"):
            continue  # its directory is at its end
        with pytest.raises(ImageFault):
            decode(broken[:cut])


# --- kinds of TIFF --------------------------------------------------------------------------------


def tiff(
    samples: np.ndarray,
    photometric: int | None,
    order: str = "<",
    *,
    sample_format: int = 1,
    alpha: int | None = None,
    more: dict[int, int] | None = None,
) -> bytes:
    """A TIFF of samples [H, W] or [H, W, C] in their own type, by hand."""
    values = np.atleast_3d(samples)
    height, width, channels = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = values.dtype.itemsize * 8
    tags: dict[int, list[int]] = {
        256: [width], 257: [height], 258: [bits] * channels, 259: [1], 273: [8], 277: [channels],
        278: [height], 279: [len(data)], 339: [sample_format] * channels,
    }  # fmt: skip
    tags |= {262: [photometric]} if photometric is not None else {}
    tags |= {338: [alpha]} if alpha is not None else {}
    tags |= {tag: [value] for tag, value in (more or {}).items()}
    data += bytes(len(data) % 2)
    at = 8 + len(data)
    entries, behind = b"", b""
    for tag, numbers in sorted(tags.items()):
        value = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(value) > 4:
            place = at + 2 + 12 * len(tags) + 4 + len(behind)
            value, behind = struct.pack(order + "I", place), behind + value
        entries += struct.pack(order + "HHI", tag, 3, len(numbers)) + value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4) + behind


def test_white_is_zero_as_in_eight_bits() -> None:
    """The same picture in 16 and in 8 bits: the same pixels."""
    folder = CASES / "U1-tiff16-white-is-zero"
    deep, twin = (np.asarray(decode((folder / n).read_bytes())) for n in ("wiz16.tif", "wiz8.tif"))
    assert np.array_equal(deep, twin)
    assert deep[0, 0, 0] == 255
    assert deep[-1, -1, 0] == 0


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1, None])
def test_black_is_black_in_every_depth(order: str, photometric: int | None) -> None:
    """White or black may be zero, in any depth and byte order, with alpha and without."""
    grey = np.random.default_rng(0).permutation(256)[:35].astype(np.uint8).reshape(5, 7)
    grey[0, :2] = 0, 255
    expected = grey if photometric else 255 - grey
    kinds = {
        "8": (grey, 1),
        "16": (grey.astype(np.uint16) * 257, 1),
        "12 in 16": (grey.astype(np.uint16) * 16 + grey // 16, 1),
        "fractions": (grey / np.float32(255), 3),
        "signed 32": (grey.astype(np.int32) * 257, 2),
    }
    if order == "<":
        kinds["unsigned 32"] = (grey.astype(np.uint32) * 0x01010101, 1)
    for kind, (samples, sample_format) in kinds.items():
        got = decode(tiff(samples, photometric, order, sample_format=sample_format))
        assert np.abs(np.asarray(got)[..., 0].astype(int) - expected).max() <= 1, kind
    for alpha in (0, 2):
        two = np.stack([grey, np.full_like(grey, 128)], axis=2)
        got = decode(tiff(two, photometric, order, alpha=alpha))
        assert np.array_equal(np.asarray(got)[..., 0], expected), alpha


def test_kinds_that_pillow_cannot_read_are_named() -> None:
    """`not-an-image` would be untrue."""
    deep = np.zeros((5, 7, 2), np.uint16)
    with pytest.raises(ImageFault, match="unsupported: TIFF of 2 samples of 16 bits"):
        decode(tiff(deep, 1, alpha=2))
    with pytest.raises(ImageFault, match="unsupported: TIFF of 1 sample of 64 bits"):
        decode(tiff(deep[..., 0].astype(np.float64), 1, sample_format=3))


def test_sixteen_bits_of_ink_and_of_ppm() -> None:
    """As RGB in TIFF: refused where only dark high bytes would be left."""
    full = np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(np.uint16)
    assert decode(tiff(full, 5)).size == (7, 5)
    with pytest.raises(ImageFault, match="16-bit colour in a TIFF"):
        decode(tiff(full >> 4, 5))
    for samples, dark in ((full[..., :3], False), (full[..., :3] >> 4, True)):
        data = b"P6 7 5 65535\n" + samples.astype(">u2").tobytes()
        if dark:
            with pytest.raises(ImageFault, match="16-bit colour in a PPM"):
                decode(data)
        else:
            assert np.asarray(decode(data)).max() > 200


def test_without_heif_nothing_is_imported() -> None:
    """The plug-in is looked for when there is HEIC, not at every start."""
    assert "pillow_heif" not in sys.modules or formats.has_heif()
