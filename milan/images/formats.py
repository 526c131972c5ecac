"""Which file formats are pictures, and what other files that lie among them are called.

Pillow opens many formats, and one of them, PostScript, by starting an interpreter. Only those
listed here are opened, whatever a file is called.
"""

from __future__ import annotations

import io
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from PIL import Image

from milan.core.paths import LFS_POINTER, AnyPath, open_below
from milan.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
"""Of files that are taken for images on every machine; see also `extensions`."""
HEIC = (".heic", ".heif")
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
_PLUGINS = ("Jpeg", "Mpo", "Png", "WebP", "Tiff", "Gif", "Bmp", "Ppm", "Jpeg2K", "Avif")
_INSTALL_HEIF = "pip install 'milan-pretrain[heic]'"

_BY_BEGINNING = {
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"II\xbc\x01": "JPEG XR",
    b"FUJIFILMCCD-RAW": "camera raw (Fujifilm)",
    b"IIRO": "camera raw (Olympus)",
    b"IIRS": "camera raw (Olympus)",
    b"MMOR": "camera raw (Olympus)",
    b"IIU\x00": "camera raw (Panasonic)",
    b"FOVb": "camera raw (Sigma)",
    b"\x00MRM": "camera raw (Minolta)",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"SIMPLE  =": "FITS",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a NumPy array",
    b"<svg": "SVG",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
}
_BY_BRAND = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"crx ": "camera raw (Canon)",
    b"qt  ": "a video",
    b"isom": "a video",
    b"mp42": "a video",
} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"),
    "HEIC",
)
_BY_EXTENSION = {".avif": "AVIF", ".jxl": "JPEG XL", ".svg": "SVG", ".psd": "Photoshop"} | (
    dict.fromkeys(
        (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"),
        "camera raw",
    )
)


@cache
def has_heif() -> bool:
    """Whether HEIC can be decoded on this machine: pillow-heif is installed."""
    try:
        return find_spec("pillow_heif") is not None
    except ValueError:
        return False


def extensions() -> tuple[str, ...]:
    """Endings, in lower case, of the file names that are taken for images on this machine."""
    return EXTENSIONS + HEIC if has_heif() else EXTENSIONS


def kind_of_extension(extension: str) -> str:
    """An extension, in lower case, with what a person needs to know of it: `.nef (camera raw)`."""
    if extension in HEIC:
        return f"{extension} (HEIC: {_INSTALL_HEIF})"
    kind = _BY_EXTENSION.get(extension)
    return f"{extension} ({kind})" if kind else extension


def open_picture(data: bytes) -> Image.Image:
    """Pillow's image of a picture, pixels not read. Raises what Pillow raises."""
    return Image.open(io.BytesIO(data), formats=_formats(_is_heic(data) and has_heif()))


def kind_of(data: bytes) -> str | None:
    """What a file is, by its first bytes, if it is of a known kind that is not read; else None."""
    if data.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the picture: git lfs pull"
    if _is_heic(data):
        return None if has_heif() else f"HEIC: {_INSTALL_HEIF}"
    if data[4:8] == b"ftyp":
        kind = _BY_BRAND.get(data[8:12])
        kind = "AVIF" if kind == "HEIC" else kind  # else it would have been HEIC above
        return None if kind == "AVIF" and "AVIF" in _formats(False) else kind
    return next((name for start, name in _BY_BEGINNING.items() if data.startswith(start)), None)


def is_lfs_pointer(root: AnyPath, name: str) -> bool:
    """Whether the file `name` below root is a Git LFS pointer. Raises as read_below does."""
    try:
        with open_below(root, name) as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def lfs_pointer(path: object) -> DataError:
    """The error for a Git LFS pointer where `path` should be."""
    return DataError(
        f"{path} is a Git LFS pointer", expected="the file it stands for", fix="git lfs pull"
    )


def _is_heic(data: bytes) -> bool:
    if data[4:8] != b"ftyp" or _BY_BRAND.get(data[8:12]) not in ("HEIC", "AVIF"):
        return False
    # An AVIF may call itself mif1 first, and name avif among the brands that follow.
    length = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[at : at + 4] for at in (8, *range(16, length, 4))}
    return not brands & {b"avif", b"avis"}


@cache
def _formats(heif: bool) -> tuple[str, ...]:
    """Pillow's names of what may be opened, their plug-ins imported."""
    if heif:
        import_module("pillow_heif").register_heif_opener()
        return ("HEIF",)
    for plugin in _PLUGINS:
        if find_spec(f"PIL.{plugin}ImagePlugin"):  # AVIF is younger than the oldest Pillow
            import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in _FORMATS if name in Image.OPEN)


_formats(False)
