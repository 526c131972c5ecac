"""Bytes become an upright RGB picture by the stated rules, or a fault with the right reason."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from milan.errors import ImageFault
from milan.images.decode import MAX_PIXELS, content_digest, decode


def picture(height: int = 5, width: int = 7, seed: int = 0) -> np.ndarray:
    """[H, W, 3] of noise, of odd and unequal edges: no turn of it equals another."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int = 24, width: int = 40) -> Image.Image:
    """A picture that JPEG keeps nearly as it is."""
    coarse = Image.fromarray(picture(3, 4))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    samples: np.ndarray, *, depth: int, colour: int, size: tuple[int, int] | None = None
) -> bytes:
    """A PNG by hand: Pillow writes no 48-bit ones. `samples` [H, W] or [H, W, C]."""
    height, width = size or samples.shape[:2]
    rows = samples.astype(">u2" if depth == 16 else np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_48(samples: np.ndarray) -> bytes:
    """An uncompressed TIFF of three 16-bit channels, by hand."""
    height, width, _ = samples.shape
    data = samples.astype("<u2").tobytes()
    at = 8 + 2 + 12 * 9 + 4
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, at + 6), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags)
    head = b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0)
    return head + struct.pack("<HHH", 16, 16, 16) + data


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: bytes) -> str:
    with pytest.raises(ImageFault) as fault:
        decode(data)
    return fault.value.reason


# EXIF 2.3, tag 0x0112: what is done to an upright picture to store it with this orientation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF lzw", "WEBP", "MPO"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_undone(kind: str, orientation: int) -> None:
    """Pixel for pixel, whatever the container; once, where Pillow does it by itself."""
    upright = picture() if kind != "MPO" else np.asarray(smooth())
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options: dict = {"WEBP": {"lossless": True}, "TIFF lzw": {"compression": "tiff_lzw"}}.get(
        kind, {}
    )
    if kind == "MPO":
        options = {"save_all": True, "append_images": [smooth(8, 8)], "quality": 100}
    got = pixels(saved(stored, kind.split()[0], exif=exif, **options))
    if kind == "MPO":
        assert got.shape == upright.shape
        assert np.abs(got.astype(int) - upright).mean() < 2
    else:
        assert np.array_equal(got, upright)


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_jpegs(orientation: int) -> None:
    """What cameras write; within JPEG's own error."""
    upright = np.asarray(smooth())
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    got = pixels(saved(stored, "JPEG", exif=exif, quality=100, subsampling=0))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 2


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_unknown_orientations_change_nothing(orientation: int) -> None:
    """Cameras write zeros; a picture is then taken as it is."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(saved(Image.fromarray(picture()), "PNG", exif=exif)), picture())


def test_palette() -> None:
    """Colours, not palette numbers; a transparent colour shows what it is."""
    image = Image.fromarray(picture(1, 6)).quantize(6)
    expected = np.asarray(image.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warning about bytes transparency
        assert np.array_equal(pixels(saved(image, "PNG")), expected)
        assert np.array_equal(pixels(saved(image, "PNG", transparency=2)), expected)
        transparent = bytes([0, 128, 255, 255, 7, 255])
        assert np.array_equal(pixels(saved(image, "PNG", transparency=transparent)), expected)
        assert np.array_equal(pixels(saved(image, "GIF", transparency=1)), expected)


def test_alpha_is_dropped() -> None:
    """As torchvision's loaders do: no background is invented."""
    colour = picture()
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7)[..., None] * 7
    rgba = Image.fromarray(np.concatenate([colour, alpha], axis=2))
    assert np.array_equal(pixels(saved(rgba, "PNG")), colour)
    assert np.array_equal(pixels(saved(rgba, "TIFF")), colour)
    grey = np.concatenate([colour[..., :1], alpha], axis=2)
    got = pixels(saved(Image.fromarray(grey, "LA"), "PNG"))
    assert np.array_equal(got, np.repeat(colour[..., :1], 3, axis=2))


def test_grey_and_one_bit() -> None:
    """All three channels alike; a bit is black or white."""
    grey = picture()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert np.array_equal(pixels(saved(Image.fromarray(grey), kind)), expected)
    bits = Image.fromarray(grey > 127)
    assert bits.mode == "1"
    assert np.array_equal(pixels(saved(bits, "PNG")), np.where(expected > 127, 255, 0))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    """Ink is converted: white paper is white, not black."""
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[8:, :, 0] = 255  # cyan below, nothing above
    options = {"quality": 100} if kind == "JPEG" else {}
    got = pixels(saved(Image.fromarray(cmyk, "CMYK"), kind, **options)).astype(int)
    assert np.abs(got[:7] - 255).max() <= 3
    assert np.abs(got[9:] - [0, 255, 255]).max() <= 3


def expected_eight(samples: np.ndarray, depth: int) -> np.ndarray:
    """The stated rule: x of `depth` bits becomes the nearest of 256 steps."""
    return np.rint(samples * 255.0 / (2**depth - 1)).astype(np.uint8)


# largest sample -> bits by which the picture is scaled
DEPTHS = {65535: 16, 16384: 16, 16383: 14, 4095: 12, 4096: 14, 1023: 10, 700: 10, 255: 8, 1: 8}


@pytest.mark.parametrize("peak", DEPTHS)
def test_sixteen_bits_are_scaled_by_the_rule(peak: int) -> None:
    """By the least of 8, 10, 12, 14, 16 bits that holds the largest sample: no white squares."""
    grey = np.linspace(0, peak, 35).round().reshape(5, 7)
    expected = expected_eight(grey, DEPTHS[peak])
    if peak > 255:
        assert expected.max() > 60
        assert 20 < expected.mean() < 200
    as_rgb = np.repeat(expected[..., None], 3, axis=2)
    two = np.stack([grey, np.full_like(grey, 65535)], axis=2)
    assert np.array_equal(pixels(png(grey, depth=16, colour=0)), as_rgb)
    assert np.array_equal(pixels(png(two, depth=16, colour=4)), as_rgb), "grey with alpha"
    for dtype in (np.uint16, np.int32):
        image = Image.fromarray(grey.astype(dtype))
        assert image.mode in ("I;16", "I")
        assert np.array_equal(pixels(saved(image, "TIFF")), as_rgb), image.mode
    pgm = b"P5 7 5 65535\n" + grey.astype(">u2").tobytes()
    assert np.array_equal(pixels(pgm), as_rgb)

    colour = np.stack([grey, grey[::-1], grey[:, ::-1]], axis=2)
    expected = expected_eight(colour, DEPTHS[peak])
    assert np.array_equal(pixels(png(colour, depth=16, colour=2)), expected)
    alpha = np.concatenate([colour, np.full((5, 7, 1), 65535)], axis=2)
    assert np.array_equal(pixels(png(alpha, depth=16, colour=6)), expected)


def test_deep_pictures_are_turned_upright_too() -> None:
    """Orientation and depth are dealt with apart; both must happen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.linspace(0, 4095, 35).round().reshape(5, 7)
    stored = np.ascontiguousarray(upright.T[::-1]).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        got = pixels(saved(Image.fromarray(stored), kind, exif=exif))
        assert np.array_equal(got[..., 0], expected_eight(upright, 12)), kind


def test_black_and_negative_samples() -> None:
    """Nothing is divided by zero; less than black is black."""
    black = np.zeros((5, 7))
    assert pixels(png(black, depth=16, colour=0)).max() == 0
    below = np.linspace(-4095, 4095, 35).astype(np.int32).reshape(5, 7)
    got = pixels(saved(Image.fromarray(below), "TIFF"))[..., 0]
    assert np.array_equal(got, expected_eight(below.clip(0), 12))


def test_float_samples() -> None:
    """Fractions are scaled by 1, larger numbers by the rule; what is no number is refused."""
    share = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    got = pixels(saved(Image.fromarray(share), "TIFF"))[..., 0]
    assert np.array_equal(got, np.rint(share.astype(float) * 255))
    got = pixels(saved(Image.fromarray(share * 4095), "TIFF"))[..., 0]
    assert np.array_equal(got, expected_eight((share * 4095).astype(float), 12))
    got = pixels(saved(Image.fromarray(share * 1e9), "TIFF"))[..., 0]
    assert got.max() == 255
    for hole in (np.nan, np.inf):
        share[2, 3] = hole
        assert reason(saved(Image.fromarray(share), "TIFF")) == "unreadable"


def test_colour_tiff_of_sixteen_bits() -> None:
    """Pillow keeps the high bytes: right for a full range, refused where it would be dark."""
    full = np.linspace(0, 65535, 105).round().reshape(5, 7, 3)
    got = pixels(tiff_48(full)).astype(int)
    assert np.abs(got - expected_eight(full, 16)).max() <= 1
    assert reason(tiff_48(full / 16)) == "unreadable"


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
def test_several_pages_are_refused(kind: str) -> None:
    """Which page would it be? The file is named, not guessed at."""
    pages = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    data = saved(pages[0], kind, save_all=True, append_images=pages[1:])
    assert reason(data) == "multi-page"
    with pytest.raises(ImageFault, match="3 pages"):
        decode(data)


def test_one_page_in_such_a_file_is_taken() -> None:
    """A GIF is no animation by its name."""
    image = Image.fromarray(picture(1, 6))
    assert np.array_equal(pixels(saved(image, "GIF")), np.asarray(image.quantize(6).convert("RGB")))
    one = saved(image, "TIFF", save_all=True)
    assert np.array_equal(pixels(one), np.asarray(image))


def test_mpo_gives_its_first_picture() -> None:
    """Many phones' JPEGs are MPO: a photograph and a preview of it."""
    data = saved(smooth(), "MPO", save_all=True, append_images=[smooth(10, 10)])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixels(data).shape == (24, 40, 3)


def test_empty_text_and_zeros() -> None:
    """What is no image at all."""
    assert reason(b"") == "empty"
    for data in (b"not an image\n" * 10, bytes(1), bytes(1000), b"<html></html>", b"\x89PNG\r\n"):
        assert reason(data) == "not-an-image"
    with pytest.raises(ImageFault, match="begins with b'not an i"):
        decode(b"not an image")


def valid() -> dict[str, bytes]:
    """A small file of every kind that Pillow writes and a manifest lists."""
    noise = Image.fromarray(picture(16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.random.default_rng(1).integers(0, 65536, (16, 16, 3))
    return {
        "jpeg": saved(noise, "JPEG", exif=exif),
        "progressive": saved(noise, "JPEG", progressive=True),
        "cmyk": saved(noise.convert("CMYK"), "JPEG"),
        "png": saved(noise, "PNG", exif=exif),
        "palette": saved(noise.quantize(16), "PNG", transparency=3),
        "deep": png(deep, depth=16, colour=2),
        "deep grey": png(deep[..., 0], depth=16, colour=0),
        "tiff": saved(noise, "TIFF"),
        "tiff lzw": saved(noise, "TIFF", compression="tiff_lzw"),
        "tiff deep": saved(Image.fromarray(deep[..., 0].astype(np.uint16)), "TIFF"),
        "gif": saved(noise, "GIF"),
        "webp": saved(noise, "WEBP", exif=exif),
        "bmp": saved(noise, "BMP"),
        "ppm": saved(noise, "PPM"),
        "mpo": saved(noise, "MPO", save_all=True, append_images=[noise]),
    }


@pytest.mark.parametrize("kind", valid())
def test_half_a_file(kind: str) -> None:
    """A download cut short is a fault, never half a picture."""
    data = valid()[kind]
    assert pixels(data).shape == (16, 16, 3)
    # The first picture of an MPO ends at its middle: it is whole in two thirds of the file.
    cut = len(data) * 2 // 3 if kind != "mpo" else len(data) // 3
    assert reason(data[:cut]) in ("truncated", "unreadable", "not-an-image")


@pytest.mark.parametrize("kind", ["jpeg", "png", "deep"])
def test_half_a_photograph_is_truncated(kind: str) -> None:
    """The common kinds are called by the right name."""
    data = valid()[kind]
    assert reason(data[: len(data) * 2 // 3]) == "truncated"


BOMBS = {
    "30000 x 30000": png(np.zeros((1, 1)), depth=8, colour=0, size=(30_000, 30_000)),
    "2^31 wide": png(np.zeros((1, 1)), depth=8, colour=0, size=(1, 2**31 - 1)),
    "one pixel more than the limit": png(
        np.zeros((1, 1)), depth=8, colour=0, size=(1, MAX_PIXELS + 1)
    ),
    "deep": png(np.zeros((1, 1)), depth=16, colour=2, size=(20_000, 20_000)),
    "bmp": b"BM" + struct.pack("<IIIIIIHHIIIIII", 54, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_too_large(bomb: str) -> None:
    """A few bytes that ask for gigabytes; told by the header, before memory is taken."""
    assert len(BOMBS[bomb]) < 200
    assert reason(BOMBS[bomb]) == "too-large"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reason(BOMBS[bomb]) == "too-large"


def test_bombs_when_warnings_are_errors() -> None:
    """Pillow only warns up to twice its limit; where that is an error it is still a fault."""
    code = (
        "import sys; from milan.images.decode import decode; from milan.errors import ImageFault\n"
        "try:\n    decode(sys.stdin.buffer.read())\n"
        "except ImageFault as fault:\n    print(fault.reason)\n"
    )
    for options in (["-W", "error"], []):
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            input=BOMBS["30000 x 30000"], capture_output=True,
        )  # fmt: skip
        assert done.stdout.decode().strip() == "too-large", done.stderr.decode()
        assert done.stderr == b""


@pytest.mark.parametrize("kind", valid())
def test_hostile_bytes_raise_nothing_but_faults(kind: str) -> None:
    """Decoders meet garbage with any exception at all; a worker must survive every one."""
    data = valid()[kind]
    generator = np.random.default_rng(len(data))
    known = {"empty", "not-an-image", "truncated", "too-large", "multi-page", "unreadable"}
    known.add("unsupported")
    faults = []
    for turn in range(40):
        broken = bytearray(data)
        if turn % 4 == 0:
            del broken[int(generator.integers(len(broken))) :]
        for _ in range(1 + turn % 8):
            if broken:
                broken[int(generator.integers(len(broken)))] = int(generator.integers(256))
        try:
            assert decode(bytes(broken)).mode == "RGB"
        except ImageFault as fault:
            faults.append(fault.reason)
    assert len(faults) >= 5
    assert set(faults) <= known


def test_faults_cross_processes() -> None:
    """They are raised in workers and counted in the driver."""
    import pickle

    fault = pickle.loads(pickle.dumps(ImageFault("truncated", "why")))
    assert (fault.reason, fault.detail, str(fault)) == ("truncated", "why", "truncated: why")


def test_content_digest() -> None:
    """BLAKE2b's own: anyone can recompute a record."""
    assert content_digest(b"") == "cae66941d9efbd404e4d88758ea67670"
    assert content_digest(b"a") != content_digest(b"b")
