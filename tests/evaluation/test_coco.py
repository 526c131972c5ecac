"""COCO's annotations: what is read, what is refused in one line, and average precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHAPES, Notes, draw_scenes
from PIL import Image

from milan.core.progress import NoProgress
from milan.errors import DataError
from milan.evaluation.average_precision import AveragePrecision
from milan.evaluation.box_splits import open_boxes
from milan.evaluation.coco import BoxSet, read_coco
from milan.evaluation.config import DetectConfig


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


def read(folder: Path, **how: Any) -> BoxSet:
    return read_coco(folder / "annotations.json", folder, NoProgress(), **how)


def changed(folder: Path, scenes: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of the scenes whose JSON is changed."""
    shutil.copytree(scenes, folder, dirs_exist_ok=True)
    content = json.loads((folder / "annotations.json").read_text())
    content = change(content) or content
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def test_boxes_and_masks_are_those_drawn(scenes: Path) -> None:
    """Every mask, polygon or run lengths, covers the pixels of its shape, and no others."""
    boxes = read(scenes)
    assert boxes.classes == SHAPES
    colours = np.array([(230, 40, 40), (40, 200, 60), (50, 60, 230)])
    seen = set()
    for position, name in enumerate(boxes.names):
        image = np.asarray(Image.open(scenes / name)).astype(int)
        there = boxes.of_image(position)
        for box in range(there.start, there.stop):
            left, top, right, bottom = boxes.boxes[box].astype(int)
            drawn = np.zeros(image.shape[:2], bool)
            label = boxes.labels[box]
            part = (image[top:bottom, left:right] == colours[label]).all(axis=-1)
            drawn[top:bottom, left:right] = part
            mask = boxes.mask(box, boxes.shapes[position]).astype(bool)
            assert (mask & drawn).sum() / (mask | drawn).sum() > (0.85 if label == 2 else 0.95)
            seen.add(int(label))
    assert seen == {0, 1, 2}
    assert read(scenes, with_masks=False).masks is None


def test_what_is_not_in_the_image_is_cut_or_left_out(tmp_path: Path, scenes: Path) -> None:
    """Counted, with the first of them named; a crowd stays a crowd."""

    def change(content: dict[str, Any]) -> None:
        first, second, third, fourth, fifth = content["annotations"][:5]
        first["bbox"][0] = -5
        second["bbox"] = [500, 10, 20, 20]
        third["bbox"][3] = 0
        fourth["bbox"][2] = float("nan")
        fifth["iscrowd"] = 1

    folder, notes = changed(tmp_path / "a", scenes, change), Notes()
    boxes = read_coco(folder / "annotations.json", folder, notes)
    whole = read(scenes)
    assert len(boxes.labels) == len(whole.labels) - 3
    assert boxes.boxes.min() == 0
    assert int(boxes.crowd.sum()) == 1
    assert "annotation 1" in notes.line("cut at the edge: 1 boxes")
    assert "annotation 2: [500, 10, 20, 20]" in notes.line("left out: 3 boxes")


def test_a_mask_outside_its_image_is_said(tmp_path: Path, scenes: Path) -> None:
    """Counted, with the first of them named."""
    outside = {"segmentation": [[500, 500, 600, 500, 600, 600]]}
    folder, notes = changed(tmp_path / "a", scenes, put("annotations", **outside)), Notes()
    read_coco(folder / "annotations.json", folder, notes)
    line = notes.line("masks without a pixel in their images: 1 of")
    assert line.endswith("the first is of annotation 2")


def drop_keys(part: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part][0].pop(key) and None


def put(part: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part][1].update(values)


def corners(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x, y, x + w, y + h]


def shares(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry["bbox"] = [number / 128 for number in entry["bbox"]]


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda content: [content], "has no list of images; expected: COCO's JSON"),
    (lambda content: content | {"annotations": {}}, "has no list of annotations"),
    (lambda content: content | {"images": []}, "has no images"),
    (lambda content: content | {"categories": []}, "has no categories; expected: at least one"),
    (lambda content: content | {"annotations": []}, "has no box to train on in 10 images"),
    (drop_keys("images", "width"), "entry 0 of images in .* has no usable width"),
    (put("categories", id="x"), "entry 1 of categories in .* has no usable id"),
    (put("annotations", category_id=99), "annotation 2 of .* is of category 99, which categories"),
    (put("annotations", image_id=99), "annotation 2 of .* is on image 99, which images does not"),
    (put("annotations", bbox=[1, 2, 3]), r"annotation 2 of .* has the box \[1, 2, 3\]"),
    (put("annotations", bbox=[1, 2, 3, None]), "expected: four numbers"),
    (put("images", file_name="gone.png"), "1 of 12 images of .* are not in .*, the first is 'gone"),
    (put("images", file_name="a\0b"), "names the image 'a"),
    (put("images", file_name="\ud800"), "is not UTF-8"),
    (put("categories", name="\ud800"), "is not UTF-8"),
    (put("images", file_name="../x.png"), r"names the image '\.\./x\.png'"),
    (put("images", id=1), "has 1 ids twice in images, the first is 1"),
    (put("categories", name="square"), "category names twice, the first is 'square'"),
    (corners, "many boxes of .* reach out of their images"),
    (shares, "many boxes of .* are smaller than a pixel"),
    (put("annotations", segmentation=[]), "annotations of .* have no mask, the first is 2"),
    (put("annotations", segmentation=[[1, 2, 3, 4]]), "polygon of less than three corners"),
    (put("annotations", segmentation=[[float("nan")] * 6]), "a corner that is no number of pixels"),
    (put("annotations", segmentation=[[1, 2, 3, 4, 5, 1e12]]), "a corner that is no number of"),
    (put("annotations", segmentation=[["a"] * 6]), "a corner that is no number of pixels"),
    (put("annotations", segmentation=[[[1, 2]] * 6]), "a corner that is no number of pixels"),
    (put("annotations", segmentation={"size": [9, 9], "counts": [81]}), r"is \[9, 9\] pixels"),
    (put("annotations", segmentation={"size": [96, 128], "counts": [81]}), "has runs of 81 pixels"),
    (put("annotations", segmentation={"size": None, "counts": [81]}), "is None pixels"),
    (put("annotations", segmentation={"size": [96, 128], "counts": ["a"]}), "no numbers of pixels"),
    (put("annotations", segmentation={"size": [96, 128], "counts": [-1, 12289]}), "no numbers of"),
    (put("annotations", segmentation={"size": [96, 128], "counts": "zz"}), "2 .* cannot be read"),
    (put("annotations", bbox=[0, 0, 10**400, 3]), "expected: four numbers"),
    (put("images", height=10**30), "entry 1 of images in .* has no usable height"),
    (put("images", width=0), "entry 1 of images in .* has no usable width"),
    (put("images", file_name="a" * 300), "1 of 12 images of .* are not in .*, the first is 'aaa"),
    (put("images", file_name="scene 00.png"), "has 1 files twice among its images, the first is"),
    (put("categories", id=3), "has 1 ids twice in categories, the first is 3"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_is_refused(number: int, tmp_path: Path, scenes: Path) -> None:
    """One line each, that names the annotation."""
    change, said = BAD[number]
    folder = changed(tmp_path / "a", scenes, change)
    with pytest.raises(DataError, match=said) as refused:
        open_boxes(DetectConfig(data=str(folder)), NoProgress())
    assert refused.value.expected
    assert refused.value.fix


def test_what_is_no_json(tmp_path: Path, scenes: Path) -> None:
    folder = changed(tmp_path / "a", scenes, lambda content: None)
    for data, said in (
        (b"\xff\xfe", "is no JSON"), (b"{", "is no JSON"), (b"[" * 100_000, "is no JSON")
    ):  # fmt: skip
        (folder / "annotations.json").write_bytes(data)
        with pytest.raises(DataError, match=said):
            open_boxes(DetectConfig(data=str(folder)), NoProgress())
    (folder / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"no annotations in .*try: --annotations FILE"):
        open_boxes(DetectConfig(data=str(folder)), NoProgress())
    for name in ("one", "two"):
        shutil.copy(scenes / "annotations.json", folder / f"{name}.json")
    with pytest.raises(DataError, match=r"has 2 files of annotations: one\.json, two\.json"):
        open_boxes(DetectConfig(data=str(folder)), NoProgress())


@pytest.mark.parametrize("layout", ["bccd", "coco", "roboflow"])
def test_layouts(layout: str, tmp_path: Path, scenes: Path) -> None:
    """Training and validation images are found where people have them."""
    other = draw_scenes(tmp_path / "other", count=5, seed=1)
    files = {
        "bccd": ("{}.json", "{}", "train", "val"),
        "coco": ("annotations/instances_{}.json", "{}", "train2017", "val2017"),
        "roboflow": ("{0}/_annotations.coco.json", "{}", "train", "valid"),
    }
    annotations, images, *names = files[layout]
    data = tmp_path / "data"
    for source, name in zip((scenes, other), names, strict=True):
        folder, file = data / images.format(name), data / annotations.format(name)
        shutil.copytree(source, folder)
        file.parent.mkdir(exist_ok=True)
        (folder / "annotations.json").rename(file)
    (data / annotations.format("").replace("instances_", "captions_x")).parent.mkdir(exist_ok=True)
    train, val = open_boxes(DetectConfig(data=str(data)), NoProgress())
    assert (len(train), len(val)) == (12, 5)
    assert (train.root, val.root) == tuple(data / images.format(name) for name in names)
    if layout == "bccd":  # a split's own folder: its JSON lies beside it
        train, val = open_boxes(DetectConfig(data=str(data / "train")), NoProgress())
        assert (len(train), len(val)) == (12, 5)
    alone = DetectConfig(annotations=str(data / annotations.format(names[0])))
    assert len(open_boxes(alone, NoProgress())[0]) in (12, 10)
    named = DetectConfig(
        data=str(data), annotations=annotations.format(names[0]),
        val_annotations=str(data / annotations.format(names[1])), limit=3,
    )  # fmt: skip
    assert [len(part) for part in open_boxes(named, NoProgress())] == [3, 3]


def test_a_fifth_by_seed(scenes: Path) -> None:
    """Without images to measure on: no image in both, another fifth by another seed."""
    parts = [open_boxes(DetectConfig(data=str(scenes), seed=seed), NoProgress()) for seed in (0, 1)]
    for train, val in parts:
        assert sorted(train.names + val.names) == sorted(read(scenes).names)
        assert len(val) == 2
    assert parts[0][1].names != parts[1][1].names
    assert parts[0][0].identity != parts[1][0].identity


def test_classes_are_matched_by_name(tmp_path: Path, scenes: Path) -> None:
    """Other ids are the same classes; one that training lacks is refused; an unused one is none."""

    def other_ids(content: dict[str, Any]) -> None:
        for entry in content["categories"]:
            entry["id"] = 10 - entry["id"]
        for entry in content["annotations"]:
            entry["category_id"] = 10 - entry["category_id"]
        content["categories"].append({"id": 77, "name": "never used"})

    val = changed(tmp_path / "val", scenes, other_ids)
    config = DetectConfig(data=str(scenes), val_data=str(val))
    train, measured = open_boxes(config, NoProgress())
    assert train.classes == measured.classes == SHAPES
    assert (train.labels == measured.labels).all()
    less = changed(tmp_path / "less", scenes, put("categories", name="ball"))
    with pytest.raises(DataError, match=r"1 classes of .* have no box in .*, the first is 'disc'"):
        open_boxes(DetectConfig(data=str(less), val_data=str(scenes)), NoProgress())

    def other_names(content: dict[str, Any]) -> None:
        for entry in content["categories"]:
            entry["name"] += " of another set"

    other = changed(tmp_path / "other", scenes, other_names)
    with pytest.raises(DataError, match=r"3 classes of .* have no box in"):  # of a sample too
        open_boxes(DetectConfig(data=str(scenes), val_data=str(other), limit=6), NoProgress())
    with pytest.raises(DataError, match="12 of 12 images to measure on are training images too"):
        open_boxes(DetectConfig(data=str(scenes), val_data=str(scenes)), NoProgress())


# --- average precision ----------------------------------------------------------------------------


def found_like(boxes: BoxSet, position: int, scores: list[float] | None = None) -> dict[str, Any]:
    """Detections that are the annotations."""
    there = boxes.of_image(position)
    count = there.stop - there.start
    masks = [boxes.mask(box, boxes.shapes[position]) for box in range(there.start, there.stop)]
    return {
        "boxes": torch.from_numpy(boxes.boxes[there]),
        "labels": torch.from_numpy(boxes.labels[there]) + 1,
        "scores": torch.tensor(scores or [0.9] * count),
        "masks": torch.from_numpy(np.stack(masks))[:, None].float(),
    }


def test_all_found(scenes: Path) -> None:
    """100 %, of boxes and masks and each class; nothing is confused."""
    boxes = read(scenes)
    metric = AveragePrecision(boxes)
    for position in range(len(boxes)):
        metric.add(position, found_like(boxes, position))
    figures = metric.figures()
    assert {figures[f"{kind}_{name}"] for kind in ("box", "mask") for name in ("ap", "ap50")} == {
        100
    }
    assert figures["mask_classes"] == [100, 100, 100]
    assert metric.intervals(resamples=5) == {
        "box_ap_interval": (100, 100), "mask_ap_interval": (100, 100)
    }  # fmt: skip
    counts = metric.confusion()
    assert counts.diagonal().sum() == counts.sum() == len(boxes.labels)


def test_as_by_hand(tmp_path: Path) -> None:
    """Two objects; found are one, nothing, the other: precision 1 up to half of the recall, then
    2/3. A detection on a crowd is no error."""
    entry = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}],
        "annotations": [
            entry | {"id": 1, "bbox": [0, 0, 20, 20]},
            entry | {"id": 2, "bbox": [40, 0, 20, 20]},
            entry | {"id": 3, "bbox": [0, 40, 100, 40], "iscrowd": 1},
        ],
    }
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    metric = AveragePrecision(read(tmp_path))
    boxes = [[0, 0, 20, 20], [70, 0, 90, 20], [40, 0, 60, 20], [10, 45, 30, 75]]
    metric.add(0, {
        "boxes": torch.tensor(boxes).float(), "labels": torch.ones(4, dtype=torch.int64),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.95]),
    })  # fmt: skip
    figures = metric.figures()
    expected = 100 * (51 + 50 * 2 / 3) / 101
    assert figures["box_ap50"] == pytest.approx(expected, abs=0.01)
    assert figures["box_classes"] == [pytest.approx(expected, abs=0.01), None]
    low, high = metric.intervals(resamples=3)["box_ap_interval"]  # of one image: always itself
    assert low == high == pytest.approx(expected, abs=0.01)
    assert metric.confusion().tolist() == [[2, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_in_parts_it_is_the_whole(scenes: Path) -> None:
    """Two ranks' images in any order give what one gives; the interval holds the figure."""
    boxes, generator = read(scenes), np.random.default_rng(0)
    whole, parts = AveragePrecision(boxes), [AveragePrecision(boxes), AveragePrecision(boxes)]
    for position in range(len(boxes)):
        found = found_like(boxes, position)
        found["boxes"] = (
            found["boxes"] + torch.from_numpy(generator.normal(0, 2, found["boxes"].shape)).float()
        )
        found["scores"] = torch.from_numpy(generator.uniform(0.1, 1, len(found["scores"]))).float()
        whole.add(position, found)
        parts[position % 2].add(position, found)
    joined = AveragePrecision.joined(boxes, [parts[1].state(), parts[0].state()])
    assert not joined.metric.sync_on_compute  # rank 0 would wait for the others for ever
    assert joined.positions == list(range(len(boxes)))
    assert joined.figures() == whole.figures()
    assert joined.intervals() == whole.intervals()
    assert (joined.confusion() == whole.confusion()).all()
    low, high = whole.intervals()["box_ap_interval"]
    assert low < whole.figures()["box_ap"] < high
    assert high - low < 40
