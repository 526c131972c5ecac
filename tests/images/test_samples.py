"""Samples of files as they are, the channels that are picked of them, and pairs of files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from milan.errors import ConfigError, DataError, ImageFault
from milan.images.channels import Channels
from milan.images.decode import decode_pixels
from milan.images.pairing import FilesOfImages
from milan.images.samples import Bands, percentiles, read_samples
from milan.images.views import View, ViewSpec, render

WHOLE = np.random.default_rng(0).integers(0, 10_000, (20, 30, 5)).astype(np.uint16)
PLANES = np.ascontiguousarray(np.moveaxis(WHOLE, -1, 0))
NUMBERS = {"photometric": "minisblack"}


def saved(write: Callable[..., Any], *args: Any, **options: Any) -> bytes:
    """What `write` writes to its first argument, a file."""
    sink = io.BytesIO()
    write(sink, *args, **options)
    return sink.getvalue()


def tiff(samples: np.ndarray, **options: Any) -> bytes:
    return saved(tifffile.imwrite, samples, **options)


def picture(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    return saved(lambda sink: Image.fromarray(pixels).save(sink, kind, **options))


FLOATS = WHOLE.astype(np.float32) / 7
READ = {
    "pixels": (tiff(WHOLE, planarconfig="contig", **NUMBERS), WHOLE),
    "planes": (tiff(PLANES, planarconfig="separate", **NUMBERS), WHOLE),
    "pages": (tiff(PLANES, **NUMBERS), WHOLE),
    "ImageJ": (tiff(PLANES, imagej=True, metadata={"axes": "CYX"}), WHOLE),
    "LZW": (tiff(WHOLE, planarconfig="contig", compression="lzw", **NUMBERS), WHOLE),
    "tiles": (tiff(WHOLE, planarconfig="contig", tile=(16, 16), **NUMBERS), WHOLE),
    "floats": (tiff(FLOATS, planarconfig="contig", **NUMBERS), FLOATS),
    "grey": (tiff(WHOLE[..., 0]), WHOLE[..., :1]),
    "turned": (
        tiff(WHOLE[..., 0], extratags=[(274, "H", 1, 6, True)]),
        np.rot90(WHOLE[..., :1], -1),
    ),
    "array": (saved(np.save, WHOLE), WHOLE),
    "array of one": (saved(np.save, WHOLE[..., 0]), WHOLE[..., :1]),
    "PNG of 16 bits": (picture(WHOLE[..., 0], "PNG"), WHOLE[..., :1]),
    "PNG": (picture(WHOLE[..., :3].astype(np.uint8), "PNG"), WHOLE[..., :3].astype(np.uint8)),
}
NAN = FLOATS.copy()
NAN[3, 4, 1] = np.nan
REFUSED = {
    "cut": (READ["pixels"][0][:3000], "truncated"),
    "cut tiles": (READ["tiles"][0][:-40], "truncated"),
    "cut ImageJ": (READ["ImageJ"][0][: len(READ["ImageJ"][0]) // 2], "truncated"),
    "cut array": (READ["array"][0][:-1], "truncated"),
    "cut PNG": (READ["PNG of 16 bits"][0][:-300], "truncated"),
    "a stack in depth": (tiff(PLANES, imagej=True, metadata={"axes": "ZYX"}), "multi-page"),
    "NaN": (tiff(NAN, planarconfig="contig", **NUMBERS), "not-finite: 1 of 3,000"),
    "NaN in an array": (saved(np.save, NAN), "not-finite"),
    "objects": (saved(np.save, np.array([[None]])), "unsupported"),
    "a huge array": (
        READ["array"][0].replace(b"(20, 30, 5)", b"(90000, 9000, 5)")[:200], "too-large"
    ),
    "text": (b"no picture at all", "not-an-image"),
    "nothing": (b"", "empty"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_samples_are_those_of_the_file(kind: str) -> None:
    """Every value, of the file's own type, whatever the layout."""
    data, expected = READ[kind]
    found = read_samples(data)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_whole_file_of_samples_is_a_fault(kind: str) -> None:
    """One reason, never values that are not there."""
    data, reason = REFUSED[kind]
    with pytest.raises(ImageFault, match=reason):
        read_samples(data)


def test_tiff_without_tifffile_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line."""
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ImageFault, match=r"pip install 'milan-pretrain\[tiff\]'"):
        read_samples(READ["pixels"][0])


def test_bands_are_scaled_by_a_range_that_is_given() -> None:
    """The stated formula; the same law twice from JSON; none in the laws of pictures."""
    data = READ["pixels"][0]
    pixels = Bands((3, 2, 1), 1000, 6000).pixels(data)
    exact = 255 * (WHOLE[..., [2, 1, 0]].astype(float) - 1000) / 5000
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - exact.clip(0, 255)).max() <= 0.5 + 1e-3
    spec = ViewSpec(bands=(3, 2, 1), band_range=(1000, 6000))
    assert ViewSpec.from_law(spec.law()) == spec
    assert np.array_equal(spec.decode(data), pixels)
    assert {"bands", "band_range"} & ViewSpec().law().keys() == set()
    low, high, count = percentiles([data, b"none"], (1, 2, 3))
    assert (0 < low < 400, 9600 < high < 10_000, count) == (True, True, 1)
    with pytest.raises(ImageFault, match="5 channels, no number 6"):
        Bands((6, 2, 1), 0, 1).pixels(data)
    with pytest.raises(ConfigError, match="without one milan extract-targets measures"):
        ViewSpec(bands=(3, 2, 1))


def test_channels_as_people_write_them() -> None:
    """Numbers, ranges, colours first; what means nothing is refused with what to type."""
    for text, count, numbers in (
        ("1-13", 13, tuple(range(1, 14))), ("rgb,1", 4, (1,)), ("8, 4-6,2", 5, (8, 4, 5, 6, 2)),
    ):  # fmt: skip
        channels = Channels.parse(text, paired=True)
        assert (channels.count, channels.numbers) == (count, numbers)
    for text in ("", "rgb", "0", "1,1", "3-1", "red", "1,rgb", "1-99999"):
        with pytest.raises(ConfigError, match="student_channels"):
            Channels.parse(text, paired=False)
    with pytest.raises(ConfigError, match="channel 2 is 7 everywhere"):
        Channels("1,2").measured(np.array([1.0, 7.0]), np.array([1.0, 0.0]))


def test_a_view_is_the_teachers_box_and_filter() -> None:
    """Of 8-bit colours the view's float is within half a level of the teacher's pixels; mirrored
    alike; 16 bits keep what 8 would lose; colours are the teacher's pixels themselves."""
    photo = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)
    image = np.asarray(Image.fromarray(photo).resize((60, 50), Image.Resampling.BICUBIC))
    view = View(7, 11, 30, 40, True)
    pixels = render(image, view, size=16)
    plain = {"mean": (0.0,) * 6, "std": (1.0,) * 6}
    seen = Channels("rgb,1-3", **plain).view(image, view, 16, pixels)  # type: ignore[arg-type]
    assert np.array_equal(seen[:3], pixels.transpose(2, 0, 1))
    assert np.abs(seen[3:].clip(0, 255) - seen[:3]).max() <= 1.0  # rounded twice, by Pillow
    moved = Channels("1", mean=(5.0,), std=(2.0,)).view(image[..., :1], view, 16, None)
    assert np.allclose(moved[0], (seen[3] - 5) / 2, atol=1e-5)
    deep = image[..., :1].astype(np.uint16) * 257 + 3
    seen16 = Channels("1", mean=(0.0,), std=(1.0,)).view(deep, view, 16, None)
    assert np.allclose(seen16[0], seen[3] * 257 + 3, rtol=1e-4)


def test_files_of_images_pair_by_key(tmp_path: Path) -> None:
    """Whatever their endings; a missing one is that image's fault, a double one an error."""
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "1.npy", WHOLE)
    (tmp_path / "2.TIF").write_bytes(READ["pixels"][0])
    files = FilesOfImages(str(tmp_path), ["a/1.jpg", "2.jpg", "3.jpg"], of=tmp_path)
    beside = Channels("1", paired=True)
    assert files.read(1, beside) == READ["pixels"][0]
    assert files.read(1, Channels("1")) == b""  # of the image's own file
    assert np.array_equal(read_samples(files.read(0, beside)), WHOLE)
    with pytest.raises(ImageFault, match="missing"):
        files.read(2, beside)
    with pytest.raises(ConfigError, match="--student-data FOLDER"):
        FilesOfImages(None, ["2.jpg"], of=tmp_path).check(beside)
    (tmp_path / "2.npy").write_bytes(READ["array"][0])
    with pytest.raises(DataError, match="two channel files for one image"):
        FilesOfImages(str(tmp_path), ["2.jpg"], of=tmp_path)


def test_a_square_is_of_the_image_whose_file_it_is(photos: Path) -> None:
    """Evaluations: a real photograph beside an array of its size, and one of another size."""
    data = next(iter(sorted(photos.rglob("*.jpg")))).read_bytes()
    image = decode_pixels(data)
    law = Channels("rgb,1", paired=True, mean=(0.0,) * 4, std=(1.0,) * 4)
    depth = image[..., 1].astype(np.float32) / 3
    square = law.centre_crop(data, saved(np.save, depth), share=0.875, size=24)
    assert square.shape == (4, 24, 24)
    assert np.abs(square[3] * 3 - square[1]).max() < 2
    with pytest.raises(ImageFault, match="other-size"):
        law.centre_crop(data, saved(np.save, depth[1:]), share=0.875, size=24)
