"""Images with masks: where masks are found, what their pixels mean, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import SCENE_COLOURS, VOID, Notes, draw_masks
from PIL import Image

from milan.errors import DataError, ImageFault
from milan.evaluation.config import SegmentConfig
from milan.evaluation.masked import open_masked
from milan.images.masks import IGNORED, MaskCoding, Palette, upright_size


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """ADE20K's folders with both splits: 6 scenes to train on, 3 to measure on."""
    folder = tmp_path / "scenes"
    draw_masks(folder, count=6, split="training")
    return draw_masks(folder, count=3, seed=1, split="validation")


def settings(data: Path, **changes: object) -> SegmentConfig:
    return SegmentConfig("random", data=str(data), **{"ignore": VOID, **changes})  # type: ignore[arg-type]


def as_bytes(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def as_parquet(folder: Path, path: Path, column: str = "mask") -> Path:
    """The scenes below a folder as a Parquet file of Hugging Face's image schema."""
    images, masks = (sorted((folder / kind).iterdir()) for kind in ("images", "annotations"))
    rows = {
        name: [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        for name, files in (("image", images), (column, masks))
    }
    pq.write_table(pa.table(rows), path)
    return path


def test_the_same_masks_in_every_layout(scenes: Path, tmp_path: Path) -> None:
    """Folders with splits, folders without, Parquet: the same pixels, counted and reconciled."""
    plain = draw_masks(tmp_path / "plain", count=6)
    (plain / "annotations").rename(plain / "masks")
    other = draw_masks(tmp_path / "val", count=3, seed=1)
    for number, layout in enumerate(("splits", "folders", "parquet")):
        notes = Notes()
        if layout == "splits":
            data, val = scenes, scenes
        elif layout == "folders":
            (plain / "masks" / "left over.png").write_bytes(b"not looked at")
            data, val = plain, other
        else:
            (plain / "masks" / "left over.png").unlink()
            (plain / "masks").rename(plain / "annotations")
            data, val = as_parquet(plain, tmp_path / "a.parquet"), other
        masked = open_masked(settings(data, val_data=str(val)), notes)
        said = [line for line in notes.lines if line.startswith("matched: 6 images")]
        assert len(said) == 1, notes.lines
        assert ("1 masks without an image" in said[0]) == (layout == "folders")
        assert (len(masked.train), len(masked.val), masked.names) == (6, 3, ["0", "1", "2"])
        by_name = {Path(key).name: i for i, key in enumerate(masked.train.keys)}
        position = by_name["scene 00.jpg"]
        pixels, mask = masked.train.pixels(position), masked.train.mask(position)
        assert pixels.shape[:2] == mask.shape
        for kind, colour in enumerate(SCENE_COLOURS):
            assert np.abs(pixels[mask == kind].mean(axis=0) - colour).max() < 12
        if number == 0:
            counts, identity = masked.train_pixels, masked.identity
        assert masked.train_pixels.tolist() == counts.tolist()
    again = open_masked(settings(scenes, val_data=str(scenes)))
    assert again.identity == identity
    mask_file = next((scenes / "annotations/training").iterdir())
    mask_file.write_bytes(mask_file.read_bytes() + b" ")
    assert open_masked(settings(scenes, val_data=str(scenes))).identity != identity


def test_what_pixels_mean(tmp_path: Path) -> None:
    """Numbers of 8 and 16 bits, indices of a palette, colours by a palette file."""
    numbers = np.array([[0, 1], [2, 255]], np.uint8)
    indexed = Image.fromarray(numbers, "P")
    indexed.putpalette([200, 200, 200] * 256)  # all alike: only indices tell them apart
    for image in (Image.fromarray(numbers), Image.fromarray(numbers.astype(np.uint16)), indexed):
        assert MaskCoding().decode(as_bytes(image)).tolist() == [[0, 1], [2, IGNORED]]
        reduced = MaskCoding(reduce_zero=True).decode(as_bytes(image))
        assert reduced.tolist() == [[IGNORED, 0], [1, IGNORED]]
    (tmp_path / "p.txt").write_text("0 0 0 sky\n255 255 255 a road\n9 9 9 void\n")
    palette = Palette.read(str(tmp_path / "p.txt"))
    assert palette.names == ("sky", "a road", "void")
    coloured = Image.fromarray(np.array([[[0] * 3, [255] * 3, [9] * 3]], np.uint8))
    assert MaskCoding(2, palette=palette).decode(as_bytes(coloured)).tolist() == [[0, 1, IGNORED]]
    black_and_white = Image.fromarray(np.array([[0, 255]], np.uint8))
    found = MaskCoding(2, palette=palette).decode(as_bytes(black_and_white))
    assert found.tolist() == [[0, 1]]


def change_mask(change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def act(scenes: Path) -> None:
        path = scenes / "annotations/training/scene 02.png"
        change(Image.open(path)).save(path)

    return act


def as_jpeg(scenes: Path) -> None:
    path = scenes / "annotations/training/scene 02.png"
    Image.open(path).save(path, format="jpeg")


def numbers(number: int) -> Callable[[Path], None]:
    return change_mask(lambda mask: mask.point(lambda value: number if value == 2 else value))


def without(name: str) -> Callable[[Path], None]:
    return lambda scenes: (scenes / name).unlink()


def no_more_than(split: str, one: int) -> Callable[[Path], None]:
    """All pixels of a split become one class."""

    def act(scenes: Path) -> None:
        for path in (scenes / "annotations" / split).iterdir():
            Image.open(path).point(lambda value: one).save(path)

    return act


BAD = {
    "another size": (
        change_mask(lambda mask: mask.resize((30, 20), Image.Resampling.NEAREST)), {},
        r"1 of 6 masks .*scene 02.jpg: 30 x 20 pixels, and its image has",
    ),
    "colours": (
        change_mask(lambda mask: mask.convert("RGB")), {},
        r"mask-of-colours.*try: --palette FILE",
    ),
    "a JPEG": (as_jpeg, {}, r"lossy-mask: a JPEG.*expected: .* PNG.*try: the masks from which"),
    "an unknown number": (
        numbers(77), {"classes": "names"}, r"number 77 is no class \(3 classes are named"
    ),
    "numbers of things": (
        change_mask(lambda mask: Image.fromarray(np.asarray(mask).astype(np.uint16) + 5000)), {},
        r"number 50\d\d is no class \(1000 are allowed\)",
    ),
    "an unknown colour": (
        change_mask(lambda mask: mask.convert("RGB")), {"palette": "palette"},
        r"colour \d \d \d is no class",
    ),
    "no mask": (
        without("annotations/training/scene 02.png"), {},
        r"1 of 6 images have no mask, the first is 'scene 02.jpg'; expected: .*scene 02.png",
    ),
    "two masks": (
        lambda scenes: Image.open(scenes / "annotations/training/scene 02.png").save(
            scenes / "annotations/training/scene 02.tif"
        ), {}, r"two masks for one image",
    ),
    "another folder": (lambda scenes: None, {"masks": "gt"}, r"expected: masks in .*gt.*--masks"),
    "one class": (no_more_than("training", 1), {}, r"are of one class, 1; .*black and white"),
    "nothing counts": (no_more_than("training", VOID), {}, r"are of no class"),
    "a class to measure on alone": (
        no_more_than("validation", 5), {}, r"--data has not, the first is number 5"
    ),
    "no class in common": (
        no_more_than("validation", 5), {"classes": "many"}, r"no class to measure on has a pixel"
    ),
    "a palette without numbers": (
        lambda scenes: None, {"palette": "many"}, r"line 1 of .* is 'a'; expected: red green blue"
    ),
    "an empty split": (
        lambda scenes: [p.unlink() for p in (scenes / "images/validation").iterdir()], {},
        r"has no split validation or test|no images in",
    ),
    "the same images": (
        lambda scenes: None, {"val_split": "train"}, r"all 6 images of --val-data are training"
    ),
    "one image": (
        lambda scenes: [p.unlink() for p in sorted((scenes / "images/training").iterdir())[1:]],
        {"val_data": None}, r"0 images to fit on and 1 to measure on",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str, scenes: Path, tmp_path: Path) -> None:
    """One line: what was found, what was expected, what to type."""
    spoil, changes, said = BAD[name]
    (tmp_path / "names").write_text("grass\ndisc\nbox\n")
    (tmp_path / "many").write_text("a\nb\nc\nd\ne\nf\n")
    (tmp_path / "palette").write_text("100 100 100 x\n101 101 101 y\n")
    places = ("classes", "palette")
    changed = {k: str(tmp_path / str(v)) if k in places else v for k, v in changes.items()}
    spoil(scenes)
    with pytest.raises(DataError, match=said) as error:
        open_masked(settings(scenes, **{"val_data": str(scenes), **changed}))
    assert "\n" not in str(error.value)
    assert error.value.fix or name == "a palette without numbers"  # there it says how a line looks


def test_what_is_said_and_goes_on(scenes: Path, tmp_path: Path) -> None:
    """A mask that cannot be read, classes that lack pixels: counted, and the first is named."""
    path = scenes / "annotations/training/scene 02.png"
    path.write_bytes(path.read_bytes()[:60])
    (tmp_path / "names").write_text("grass\ndisc\nbox\ntree\n")
    notes = Notes()
    masked = open_masked(
        settings(scenes, val_data=str(scenes), classes=str(tmp_path / "names")), notes
    )
    assert (len(masked.train), masked.rejected, len(masked.names)) == (5, 1, 4)
    assert "scene 02.jpg: its mask: truncated" in notes.line("rejected files: 1 ")
    with pytest.raises(ImageFault, match="not-an-image: begins with b'no pictu'"):
        upright_size(b"no picture")
    assert notes.line("1 of 4 classes have no pixel to train on").endswith("tree")
