"""Images with boxes, and perhaps masks, from COCO's JSON (cocodataset.org/#format-data)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from milan.core.paths import (
    AnyPath,
    as_data_error,
    check_unicode,
    read_file,
    size_of,
    sizes_below,
)
from milan.core.progress import Progress
from milan.errors import ConfigError, DataError
from milan.images.channels import Channels
from milan.images.pairing import FilesOfImages

COCO = "COCO's JSON: images, annotations and categories (cocodataset.org/#format-data)"
_EDGE = 1.0  # pixels that boxes may reach beyond the image by rounding
_LONGEST = 1 << 20  # pixels of an edge: no decoder gives more
_MEND = "mend it, or take another JSON by --annotations or --val-annotations"


@dataclass(frozen=True)
class BoxSet:
    """Images with the boxes on each; classes are numbered from 0."""

    root: AnyPath
    """Folder that names are relative to."""
    annotations: AnyPath
    """The JSON file."""
    names: tuple[str, ...]
    """Of m images: paths below root."""
    shapes: np.ndarray
    """int64 [m, 2]: height and width in pixels."""
    first: np.ndarray
    """int64 [m + 1]: image i has the boxes first[i] to first[i + 1]."""
    boxes: np.ndarray
    """float32 [n, 4]: left, top, right, bottom in pixels, inside the image."""
    labels: np.ndarray
    """int64 [n]"""
    areas: np.ndarray
    """float64 [n]: of the object in square pixels, as annotated; 0: not said."""
    crowd: np.ndarray
    """bool [n]: a group of objects; not learnt from, and no miss or error where it is found."""
    masks: tuple[bytes, ...] | None
    """[n]: COCO's compressed run lengths of each mask, as large as its image; None: boxes alone."""
    classes: tuple[str, ...]
    channels: Channels | None = None
    """What is seen of the images in place of RGB."""
    beside: FilesOfImages | None = None
    """Files of channels that belong to them, once it is known who looks at them."""

    def __len__(self) -> int:
        return len(self.names)

    def of_image(self, position: int) -> slice:
        """Which boxes are on an image."""
        return slice(int(self.first[position]), int(self.first[position + 1]))

    def mask(self, box: int, shape: Sequence[int]) -> np.ndarray:
        """The mask of a box on an image of (height, width) `shape`, uint8 [H, W] of 0 and 1."""
        assert self.masks is not None
        run_lengths = {"size": [int(edge) for edge in shape], "counts": self.masks[box]}
        return mask_functions().decode(run_lengths)

    def take(self, rows: np.ndarray) -> BoxSet:
        """The images in `rows` [k]."""
        parts = [np.arange(self.first[row], self.first[row + 1]) for row in rows]
        kept = np.concatenate([np.empty(0, np.int64), *parts])
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            shapes=self.shapes[rows],
            first=np.cumsum([0, *map(len, parts)]),
            boxes=self.boxes[kept], labels=self.labels[kept], areas=self.areas[kept],
            crowd=self.crowd[kept],
            masks=None if self.masks is None else tuple(self.masks[i] for i in kept),
            beside=None,
        )  # fmt: skip

    @property
    def identity(self) -> str:
        """SHA-256 of images by name, size in bytes, and all that is known of their boxes."""
        sha, bytes_of = hashlib.sha256(), sizes_below(self.root)
        sha.update(repr([(name, bytes_of(name)) for name in self.names]).encode())
        sha.update(repr((self.classes, self.masks)).encode())
        for array in (self.shapes, self.first, self.boxes, self.labels, self.areas, self.crowd):
            sha.update(array.tobytes())
        identity = sha.hexdigest()
        return self.beside.identity_for(identity, self.channels) if self.beside else identity


def mask_functions() -> Any:
    """faster-coco-eval's functions on masks. Raises ConfigError if it is not installed."""
    check_dense()
    from faster_coco_eval.core import mask

    return mask


def check_dense() -> None:
    """Raises ConfigError if what measures detectors is not installed; imports nothing heavy."""
    for name in ("torchmetrics", "faster_coco_eval"):
        if find_spec(name) is None:
            raise ConfigError(
                f"{name.replace('_', '-')} is not installed",
                expected="torchmetrics and faster-coco-eval, which measure detectors",
                fix="pip install 'milan-pretrain[dense]'",
            )


def read_coco(
    file: AnyPath, source: AnyPath, progress: Progress, *, with_masks: bool = True
) -> BoxSet:
    """The images and boxes of a JSON of COCO; images are looked for beside it and below `source`.

    `with_masks`: masks too, if the annotations have them. Raises DataError for what is not COCO's,
    images that are not there, and boxes and masks that cannot be on their images.
    """
    return _Reader(file, source).read(progress, with_masks=with_masks)


class _Reader:
    def __init__(self, file: AnyPath, source: AnyPath) -> None:
        self.file, self.source = file, source

    def read(self, progress: Progress, *, with_masks: bool) -> BoxSet:
        content = self._content()
        images = {entry["id"]: entry for entry in content["images"]}
        self._check_ids(content["images"], "images", "which image a box is on is not known else")
        if not images:
            raise DataError(f"{self.file} has no images", expected="at least one", fix=_MEND)
        names = tuple(entry["file_name"] for entry in images.values())
        shapes = np.array([(e["height"], e["width"]) for e in images.values()], np.int64)
        root = self._root(names)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(
                f"{self.file} has {len(twice):,} files twice among its images, the first is "
                f"{twice[0]!r}",
                expected="one entry an image: of two, each would lack the other's boxes",
                fix="move the boxes of both to one of them",
            )
        if not content["categories"]:
            raise DataError(f"{self.file} has no categories", expected="at least one", fix=_MEND)
        numbers = {entry["id"]: n for n, entry in enumerate(content["categories"])}
        self._check_ids(
            content["categories"], "categories", "which class a box is of is not known else"
        )
        classes = tuple(str(entry["name"]) for entry in content["categories"])
        for name in classes:
            check_unicode(name, "the category", fix="another name in the JSON")
        if twice := [name for name, count in Counter(classes).items() if count > 1]:
            raise DataError(
                f"{self.file} has {len(twice)} category names twice, the first is {twice[0]!r}",
                expected="a name of its own for each category",
                fix="another name for one of them in the JSON",
            )
        place = {image: position for position, image in enumerate(images)}
        of_image: list[list[int]] = [[] for _ in images]
        annotations = content["annotations"]
        for number, entry in enumerate(annotations):
            if entry["category_id"] not in numbers:
                raise DataError(
                    f"annotation {entry.get('id', number)} of {self.file} is of category "
                    f"{entry['category_id']!r}, which categories does not have",
                    expected="the id of one of " + ", ".join(map(str, list(numbers)[:10])),
                    fix="add it to categories, or take the annotation out",
                )
            if entry["image_id"] not in place:
                raise DataError(
                    f"annotation {entry.get('id', number)} of {self.file} is on image "
                    f"{entry['image_id']!r}, which images does not have",
                    expected="the id of an image",
                    fix="add it to images, or take the annotation out",
                )
            of_image[place[entry["image_id"]]].append(number)
        order = [number for numbers_of in of_image for number in numbers_of]
        positions = np.repeat(np.arange(len(images)), [len(part) for part in of_image])
        boxes, kept = self._boxes([annotations[i] for i in order], shapes[positions], progress)
        chosen = [annotations[i] for i, keeps in zip(order, kept, strict=True) if keeps]
        counts = np.bincount(positions[kept], minlength=len(images))
        crowd = np.array([bool(entry.get("iscrowd")) for entry in chosen], bool)
        return BoxSet(
            root, self.file, names, shapes, np.cumsum([0, *counts.tolist()]), boxes[kept],
            np.array([numbers[entry["category_id"]] for entry in chosen], np.int64),
            np.array([_number(entry.get("area")) for entry in chosen]), crowd,
            self._masks(chosen, crowd, shapes[positions[kept]], progress) if with_masks else None,
            classes,
        )  # fmt: skip

    def _check_ids(self, entries: list[dict[str, Any]], part: str, why: str) -> None:
        """Raises DataError for two entries of one id."""
        twice = [
            key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1
        ]
        if twice:
            raise DataError(
                f"{self.file} has {len(twice):,} ids twice in {part}, the first is {twice[0]!r}",
                expected=f"an id for each: {why}",
                fix=_MEND,
            )

    def _content(self) -> dict[str, Any]:
        """The JSON, each of whose entries has what is needed. Raises DataError."""
        with as_data_error(self.file):
            data = read_file(self.file)
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
            raise DataError(f"{self.file} is no JSON: {error}", expected=COCO, fix=_MEND) from None
        needed: dict[str, dict[str, Any]] = {
            "images": {"id": (int, str), "file_name": str, "height": int, "width": int},
            "annotations": {"image_id": (int, str), "category_id": int, "bbox": list},
            "categories": {"id": int, "name": (str, int)},
        }
        for part, keys in needed.items():
            entries = content.get(part) if isinstance(content, dict) else None
            if not isinstance(entries, list):
                raise DataError(f"{self.file} has no list of {part}", expected=COCO, fix=_MEND)
            for number, entry in enumerate(entries):
                odd = [
                    key for key, kind in keys.items()
                    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind)
                    or (key in ("height", "width") and not 0 < entry[key] <= _LONGEST)
                ]  # fmt: skip
                if odd:
                    raise DataError(
                        f"entry {number} of {part} in {self.file} has no usable {odd[0]}",
                        expected=COCO,
                        fix=_MEND,
                    )
        content["categories"].sort(key=lambda entry: entry["id"])
        return content

    def _root(self, names: tuple[str, ...]) -> AnyPath:
        """The folder of the images. Raises DataError if one is nowhere."""
        for name in names:
            check_unicode(name, "the file name", fix="another name in the JSON")
        odd = [
            name for name in names
            if name[:1] in ("", "/") or ".." in name.split("/") or "://" in name or "\0" in name
        ]  # fmt: skip
        if odd:
            raise DataError(
                f"{self.file} names the image {odd[0]!r}",
                expected="paths below the folder of the images",
                fix=_MEND,
            )
        folder = self.source.parent if self.source.is_file() else self.source
        stem = self.file.name.removesuffix(".json").removeprefix("instances_")
        above = self.file.parent.parent  # annotations/ lies beside the images
        # A folder of the split's name first: splits may have images of the same names.
        folders = [part / stem for part in (self.file.parent, above, folder, folder / "images")]
        folders += [self.file.parent, folder, folder / "images"]
        root = next((p for p in folders if size_of(p / names[0]) is not None), None)
        if root is None:
            looked = ", ".join(dict.fromkeys(map(str, folders)))
            raise DataError(
                f"{self.file} names the image {names[0]!r}, which is nowhere; looked in: {looked}",
                expected="the images beside the annotations",
                fix="--data the folder of the images, and --annotations FILE",
            )
        bytes_of = sizes_below(root)
        missing = [name for name in names if bytes_of(name) is None]
        if missing:
            raise DataError(
                f"{len(missing):,} of {len(names):,} images of {self.file} are not in {root}, the "
                f"first is {missing[0]!r}",
                expected="every image that it names: without some the figures are of another set",
                fix="copy them there, or take them out of its images and annotations",
            )
        return root

    def _boxes(
        self, entries: list[dict[str, Any]], shapes: np.ndarray, progress: Progress
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [n, 4] inside their images, and which of them [n] have an area there.

        Raises DataError for what is not left, top, width and height in pixels.
        """
        for entry in entries:
            box = entry["bbox"]
            if len(box) != 4 or not all(_is_number(x) for x in box):
                raise DataError(
                    f"annotation {entry.get('id')} of {self.file} has the box {box}",
                    expected="four numbers: left, top, width, height in pixels",
                    fix=_MEND,
                )
        boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        limits = np.concatenate([shapes[:, ::-1], shapes[:, ::-1]], axis=1)
        inside = np.clip(edges, 0, limits)
        beyond = (np.abs(edges - inside) > _EDGE).any(axis=1)
        if beyond.sum() > max(4, len(boxes) / 4) or (len(boxes) and (edges <= 1).all()):
            first = entries[int(beyond.argmax())]
            what = "reach out of their images" if beyond.any() else "are smaller than a pixel"
            raise DataError(
                f"many boxes of {self.file} {what}, the first is {first['bbox']}",
                expected="left, top, width, height in pixels",
                fix="write them so: corners and shares of an image are other numbers",
            )
        kept = np.isfinite(edges).all(axis=1) & (inside[:, 2:] > inside[:, :2]).all(axis=1)
        beyond &= kept
        if beyond.any():
            progress.note(
                f"cut at the edge: {int(beyond.sum()):,} boxes of {self.file} reach out of their "
                f"images, the first is annotation {entries[int(beyond.argmax())].get('id')}"
            )
        if not kept.all():
            first = entries[int((~kept).argmax())]
            progress.note(
                f"left out: {int((~kept).sum()):,} boxes of {self.file} without an area in their "
                f"images, the first is annotation {first.get('id')}: {first['bbox']}"
            )
        return inside.astype(np.float32), kept

    def _masks(
        self, entries: list[dict[str, Any]], crowd: np.ndarray, shapes: np.ndarray,
        progress: Progress,
    ) -> tuple[bytes, ...] | None:  # fmt: skip
        """Run lengths of each mask; None if no object has one. Raises DataError if only some do."""
        there = np.array([bool(entry.get("segmentation")) for entry in entries], bool)
        if not there[~crowd].any():
            return None
        if not there.all():
            first = entries[int((~there).argmax())]
            raise DataError(
                f"{int((~there).sum()):,} of {len(there):,} annotations of {self.file} have no "
                f"mask, the first is {first.get('id')}",
                expected="a segmentation in each, or in none",
                fix="--masks none, to detect boxes alone",
            )
        convert, sizes = mask_functions().segmToRle, [(int(h), int(w)) for h, w in shapes]
        masks = tuple(
            self._run_lengths(entry, size, convert)
            for entry, size in zip(entries, sizes, strict=True)
        )
        pixels = mask_functions().area(
            [{"size": size, "counts": mask} for size, mask in zip(sizes, masks, strict=True)]
        )
        if (empty := np.flatnonzero(np.asarray(pixels) == 0)).size:
            progress.note(
                f"masks without a pixel in their images: {len(empty):,} of {self.file}, which are "
                f"not learnt from and never found, the first is of annotation "
                f"{entries[int(empty[0])].get('id')}"
            )
        return masks

    def _run_lengths(
        self, entry: dict[str, Any], shape: tuple[int, int], convert: Callable[..., Any]
    ) -> bytes:
        """Of one mask: polygons, or run lengths, of an image of (height, width) `shape`."""
        given, (height, width) = entry["segmentation"], shape
        why, runs = "", given.get("counts") if isinstance(given, dict) else given
        if isinstance(given, dict):
            if given.get("size") != [height, width]:
                why = f"is {given.get('size')} pixels, and its image {[height, width]}"
            elif isinstance(runs, list) and not all(_is_number(run) and run >= 0 for run in runs):
                why = "has runs that are no numbers of pixels"
            elif isinstance(runs, list) and sum(runs) != height * width:
                why = f"has runs of {sum(runs):,} pixels, and its image {height * width:,}"
        elif not isinstance(given, list) or any(
            not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2
            for polygon in given
        ):
            why = "has a polygon of less than three corners"
        elif not all(map(_has_corners, given)):
            why = "has a polygon with a corner that is no number of pixels"
        if not why:
            try:
                counts = convert(given, width, height)["counts"]
                encoded = counts.encode() if isinstance(counts, str) else bytes(counts)
                if not isinstance(runs, list):  # the library takes any letters for run lengths
                    mask_functions().decode({"size": [height, width], "counts": encoded})
                return encoded
            except Exception as error:  # of a library in C++: any
                why = f"cannot be read: {str(error).splitlines()[0][:100]}"
        raise DataError(
            f"the mask of annotation {entry.get('id')} of {self.file} {why}",
            expected="polygons of corners, or run lengths as large as the image",
            fix="--masks none, to detect boxes alone",
        )


def _is_number(value: Any) -> bool:
    """Whether a value of the JSON is a number that a float can be; a whole one may be larger."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _has_corners(polygon: list[Any]) -> bool:
    """Whether its corners are numbers of pixels; the library would take NaN for some."""
    try:
        corners = np.asarray(polygon, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return corners.ndim == 1 and bool((np.abs(corners) <= _LONGEST).all())


def _number(value: Any) -> float:
    """A number of the JSON; 0 for anything else."""
    return float(value) if _is_number(value) else 0.0
