"""Masks: a class for every pixel of an image. Where they lie beside images, and how they are read.

    DATA/images/training/a.jpg        DATA/annotations/training/a.png      (ADE20K's folders)
    DATA/images/b.jpg                 DATA/masks/b.tif                     (matched by stem)
    DATA/train.parquet                columns image{bytes, path} and mask{bytes, path}

A mask is a picture without loss whose pixels are class numbers: grey of 8 or 16 bits, or indices of
a palette. Masks of colours need a palette file, which says what each colour means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from milan.core.paths import AnyPath, answered, folders_in, read_lines
from milan.errors import DataError, ImageFault
from milan.images.classes import class_name
from milan.images.decode import fault_of, orientation_of
from milan.images.formats import open_picture
from milan.images.manifest import Manifest, build_manifest, describe_source
from milan.images.pairing import FilesBeside, stem_of
from milan.images.parquet import parquet_below
from milan.images.source import ImageSource
from milan.images.splits import WantedSplit

IGNORED = -1
"""In masks as they are used here: a pixel that is neither trained on nor measured."""
UNKNOWN = -2
"""A pixel whose colour is not in the palette, or whose number no mask may have."""
MOST_CLASSES = 1000
"""Class numbers of masks that nobody named; more are numbers of things, not of classes."""
FOLDERS = ("annotations", "masks", "labels")
"""Where masks are looked for, beside the folder `images`."""
_ENDINGS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm")
_LOSSLESS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes


@dataclass(frozen=True)
class Palette:
    """What the colours of masks mean; a class's number is its place."""

    colours: tuple[tuple[int, int, int], ...]
    names: tuple[str, ...]

    @classmethod
    def read(cls, path: str) -> Palette:
        """A text file, a line `red green blue name` for each class. Raises DataError."""
        colours, names = [], []
        for number, line in enumerate(_lines(path, "a palette"), 1):
            parts = line.split(maxsplit=3)
            values = [int(part) if part.isdecimal() else -1 for part in parts[:3]]
            if len(values) < 3 or not all(0 <= value < 256 for value in values):
                raise DataError(
                    f"line {number} of {path} is {line!r}",
                    expected="red green blue name, three numbers from 0 to 255 first",
                    fix="128 64 128 road",
                )
            colours.append((values[0], values[1], values[2]))
            names.append(class_name(parts[3].strip()) if len(parts) > 3 else str(number - 1))
        if len(set(colours)) < len(colours):
            twice = next(colour for colour in colours if colours.count(colour) > 1)
            raise DataError(
                f"{path} has the colour {twice} twice",
                expected="one class a colour",
                fix="another colour for one of them, in the file and in the masks",
            )
        return cls(tuple(colours), tuple(names))

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        codes = _packed(np.array(self.colours, np.int32).reshape(-1, 3))
        order = np.argsort(codes)
        return codes[order], order.astype(np.int32)

    def numbers(self, pixels: np.ndarray) -> np.ndarray:
        """Colours uint8 [H, W, 3] to class numbers int32 [H, W]; UNKNOWN for other colours."""
        codes, numbers = self._sorted
        seen = _packed(pixels.astype(np.int32))
        at = np.searchsorted(codes, seen).clip(max=len(codes) - 1)
        return np.where(codes[at] == seen, numbers[at], UNKNOWN).astype(np.int32)


def _packed(colours: np.ndarray) -> np.ndarray:
    return (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]


def read_names(path: str) -> tuple[str, ...]:
    """Class names, a line each; the first is that of class 0. Raises DataError."""
    names = tuple(class_name(line) for line in _lines(path, "class names"))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"{path} has the class {twice!r} twice",
            expected="a name for each class",
            fix="another name for one of them",
        )
    return names


def _lines(path: str, what: str) -> list[str]:
    lines = [line.strip() for line in read_lines(path, what) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty", expected=what, fix="a line for each class")
    return lines


@dataclass(frozen=True)
class MaskCoding:
    """How the pixels of a mask become classes."""

    ignore: int = 255
    """The number of pixels that do not count, as it stands in the file."""
    reduce_zero: bool = False
    """Class 0 does not count and the others move down by one (ADE20K)."""
    palette: Palette | None = None
    """For masks of colours."""

    def decode(self, data: bytes) -> np.ndarray:
        """The classes of a mask's pixels, int32 [H, W]; IGNORED, and UNKNOWN for no class.

        Raises ImageFault with a reason: colours without a palette, a format that loses, unreadable.
        """
        numbers = answered(f"a mask of {len(data):,} bytes", lambda: self._numbers(data))
        ignored = numbers == self.ignore
        if self.reduce_zero:
            ignored |= numbers == 0
            numbers = np.where(numbers > 0, numbers - 1, numbers)
        return np.where(ignored, IGNORED, np.where(numbers < 0, UNKNOWN, numbers)).astype(np.int32)

    def first_unknown(self, data: bytes, classes: int) -> str:
        """The first number, or colour, of a mask that is none of `classes`, in words."""
        wrong = self.decode(data)
        at = np.flatnonzero(((wrong == UNKNOWN) | (wrong >= classes)).ravel())[0]
        if self.palette:
            pixels = np.asarray(open_picture(data).convert("RGB")).reshape(-1, 3)
            return f"colour {' '.join(map(str, pixels[at].tolist()))}"
        return f"number {int(self._numbers(data).ravel()[at])}"

    def _numbers(self, data: bytes) -> np.ndarray:
        """int32 [H, W] as the file has them; UNKNOWN for colours that are not in the palette."""
        try:
            image = open_picture(data)
            if image.format not in _LOSSLESS:
                raise ImageFault("lossy-mask", f"a {image.format}, which changes class numbers")
            if self.palette:
                return self.palette.numbers(np.asarray(image.convert("RGB")))
            if image.mode not in _NUMBERS:
                raise ImageFault("mask-of-colours", f"pixels of mode {image.mode}")
            return np.asarray(image).astype(np.int32)
        except Exception as error:  # decoders meet damaged bytes with any exception
            raise fault_of(data, error) from None


def upright_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the pixels that decode_pixels gives, from a picture's header alone.

    Raises ImageFault.
    """
    try:
        image = open_picture(data)
    except Exception as error:  # decoders meet damaged bytes with any exception
        raise fault_of(data, error) from None
    width, height = image.size
    return (width, height) if orientation_of(image) >= 5 else (height, width)


# --- where they lie -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedImages:
    """Images of one place, each with its mask; row i of both is image i."""

    images: Manifest
    masks: Manifest
    """Only where the masks lie."""
    column: str
    """Of Parquet files: the column of the masks."""

    def __len__(self) -> int:
        return len(self.images)

    def head(self, limit: int) -> MaskedImages:
        """The first `limit` rows."""
        return replace(self, images=self.images.head(limit), masks=self.masks.head(limit))

    def sources(self) -> tuple[ImageSource, ImageSource]:
        """What reads the images, and what reads the masks."""
        masks = ImageSource(self.masks, self.masks.root, column=self.column)
        return ImageSource(self.images, self.images.root), masks


def list_masked(
    source: AnyPath, *, folder: str | None, column: str, wanted: WantedSplit, seed: int
) -> tuple[MaskedImages, list[str]]:
    """The images of `source` with their masks, shuffled by `seed`, and lines that count them.

    `folder` has the masks, beside `images` (default: the first of FOLDERS); of Parquet files it is
    `column`. Raises DataError for images without a mask, and what build_manifest raises.
    """
    folders = set() if source.is_file() else folders_in(source)
    if "images" in folders:
        return _of_folders(source, folder, folders, wanted, seed)
    manifest = build_manifest(source, seed=seed, split=wanted)
    if manifest.table["group"].null_count:
        raise DataError(
            f"{source} has no folder images, and no Parquet files of images and masks",
            expected=f"{source}/images, and masks of the same names in {source}/{FOLDERS[0]} or "
            f"{source}/{FOLDERS[1]}; or Parquet files with columns image and mask",
            fix=f"move the images to {source}/images, and the masks to {source}/{FOLDERS[0]}",
        )
    for path in pc.unique(manifest.table["path"]).to_pylist():
        _check_column(manifest.root, path, column)
    return MaskedImages(manifest, manifest, column), [
        *describe_source(manifest, wanted.flag),
        f"matched: {len(manifest):,} images, each with a mask in its row ({column})",
    ]


def _check_column(root: AnyPath, path: str, column: str) -> None:
    with parquet_below(root, path) as reader:
        schema = reader.schema_arrow
    kind = schema.field(column).type if column in schema.names else pa.null()
    if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise DataError(
            f"{root / path} has columns {', '.join(f'{f.name} {f.type}' for f in schema)}",
            expected=f"a column {column}{{bytes, path}} of masks beside image{{bytes, path}}",
            fix="--mask-column NAME, if it has another name",
        )


def _of_folders(
    source: AnyPath, folder: str | None, folders: set[str], wanted: WantedSplit, seed: int
) -> tuple[MaskedImages, list[str]]:
    names = [folder] if folder else [name for name in FOLDERS if name in folders]
    if not names or names[0] not in folders:
        raise DataError(
            f"{source} has folders {', '.join(sorted(folders))}",
            expected=f"masks in {source / (folder or FOLDERS[0])}, beside {source / 'images'}",
            fix="--masks NAME, if the folder has another name",
        )
    manifest = build_manifest(source / "images", seed=seed, split=wanted)
    below = str(manifest.root).removeprefix(str(source / "images")).strip("/")
    root = source / names[0] / below if below else source / names[0]
    if not root.is_dir():
        raise DataError(
            f"no masks at {root} for the images in {manifest.root}",
            expected="a folder of the same name for the masks",
            fix="--masks NAME, a folder beside images",
        )
    files = FilesBeside.below(root, _ENDINGS)
    masks = _matched(manifest, files)
    table = manifest.table
    for name, values in (
        ("path", pa.array([path for path, _ in masks], pa.string())),
        ("bytes", pa.array([size for _, size in masks], pa.int64())),
    ):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    listing = manifest.listing
    assert listing is not None
    lines = [
        *describe_source(manifest, wanted.flag),
        f"masks: {root}",
        _reconciled(len(manifest), files, {stem_of(path) for path, _ in masks}),
    ]
    return MaskedImages(manifest, Manifest(table, None, replace(listing, root=root)), ""), lines


def _matched(manifest: Manifest, files: FilesBeside) -> list[tuple[str, int | None]]:
    """(path, bytes) of the mask of each image. Raises DataError."""
    keys = manifest.keys()
    masks = files.of_images(keys, "mask")
    if absent := [key for key, mask in zip(keys, masks, strict=True) if mask is None]:
        first = min(absent)
        raise DataError(
            f"{len(absent):,} of {len(keys):,} images have no mask, the first is {first!r}",
            expected=f"{files.root / (stem_of(first) + '.png')}, or another format without loss",
            fix="move images without a mask elsewhere; --masks NAME, if the folder is another",
        )
    return [mask for mask in masks if mask]


def _reconciled(images: int, files: FilesBeside, used: set[str]) -> str:
    """'matched: 120 images, each with a mask; 122 masks found, 2 without an image, such as …'."""
    spare = sorted(set(files.by_stem) - used)
    line = f"matched: {images:,} images, each with a mask, of {len(files.by_stem):,} masks found"
    if spare:
        line += f"; left out: {len(spare):,} masks without an image, such as {spare[0]!r}"
    named = [f"{count:,} {ending}" for ending, count in sorted(files.others.items())]
    return line + (f"; no masks: {', '.join(named)}" if named else "")
