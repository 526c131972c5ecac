"""A few training images of each class: the same lists everywhere, and figures over draws."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Notes, make_photos

from milan.errors import ConfigError, MilanError
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.draws import drawn_places, over_draws
from milan.evaluation.evaluate import evaluate
from milan.evaluation.frozen import Frozen
from milan.evaluation.protocols import Column
from milan.training.finetune import finetune


class Counting:
    """A network whose features are an image's mean colour; it counts the images that it sees."""

    def __init__(self) -> None:
        self.seen = 0
        self.frozen = Frozen(self.features, 8, "colours", {"network": "colours"})

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return pixels.float().mean(dim=(1, 2)) / 255


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Class folders of 10 photographs each and of 2 (the last), others to measure on."""
    make_photos(tmp_path / "data", count=30)
    for file in sorted((tmp_path / "data/class 2").iterdir())[2:]:
        file.unlink()
    make_photos(tmp_path / "val", count=12, seed=1)
    return {
        "data": str(tmp_path / "data"), "val_data": str(tmp_path / "val"),
        "features": str(tmp_path / "kept"),
    }  # fmt: skip


def measured(data: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Metrics without what differs from call to call."""
    given = {"frozen": Counting().frozen, **data, **settings}
    got = evaluate("linear_probe", **given)
    for one in (got, *got.get("draws", ())):
        one.pop("seconds", None)
    return got


def test_the_law_of_a_draw() -> None:
    """Of each class the first in the order of a digest of seed, draw and name: nothing else counts.

    So more shots contain fewer, and other classes change nothing.
    """
    names = [f"class {i % 3}/{i}.jpg" for i in range(60)]
    classes = np.arange(60) % 3

    def drawn(order: np.ndarray, **settings: Any) -> set[str]:
        number = settings.pop("number", 0)
        config = EvaluationConfig(seed=7, **settings)
        listed = [names[i] for i in order]
        places = drawn_places(listed, classes[order], config=config, number=number)
        assert places.tolist() == sorted(places.tolist())
        return {listed[place] for place in places}

    def rank(name: str) -> str:
        return hashlib.sha256(f"7 0 {name}".encode()).hexdigest()

    expected = {
        name for c in range(3)
        for name in sorted((n for n in names if n.startswith(f"class {c}/")), key=rank)[:4]
    }  # fmt: skip
    order = np.random.default_rng(0).permutation(60)
    assert drawn(np.arange(60), shots=4) == drawn(order, shots=4) == expected
    assert drawn(order[classes[order] < 2], shots=4) == {n for n in expected if "class 2" not in n}
    assert drawn(order, shots=3) < expected < drawn(order, shots=9)
    assert drawn(order, shots=4, number=1) != expected
    for fraction, count in ((0.2, 4), (0.125, 3), (0.01, 1)):  # of 20; 2.5 is rounded up
        assert len(drawn(order, fraction=fraction)) == 3 * count


def test_draws(data: dict[str, Any], tmp_path: Path) -> None:
    """Means and intervals over draws; features once for all; small classes are said; the lists
    that were written give the same figures, from wherever the images lie then."""
    network, notes = Counting(), Notes()
    lists = tmp_path / "lists"
    got = measured(
        data, shots=3, draws=3, save_lists=str(lists), frozen=network.frozen, progress=notes
    )
    assert notes.line("1 classes have fewer than 3").endswith(
        "'class 2' with 2: all of them are taken"
    )
    assert notes.line("training images: 8 of 22 (shots 3, seed 0), 3 draws")
    values = [draw["top1"] for draw in got["draws"]]
    assert got["top1"] == pytest.approx(np.mean(values), abs=0.01)
    assert got["top1_interval"][0] <= got["top1"] <= got["top1_interval"][1]
    assert [draw["draw"] for draw in got["draws"]] == [0, 1, 2]
    assert (got["shots"], got["train_images"], got["val_images"]) == (3, 8, 12)
    texts = [(lists / f"draw-{i}.txt").read_text().splitlines() for i in range(3)]
    names = {line for text in texts for line in text[1:]}
    assert network.seen == len(names) + 12
    assert len(texts[0]) == 9
    assert all(name.startswith("class ") for name in names)
    alone = measured(data, shots=3, first_draw=1)
    assert [alone["top1"], alone["l2"]] == [values[1], got["draws"][1].get("l2", got.get("l2"))]

    (tmp_path / "elsewhere").mkdir()
    shutil.move(data["data"], tmp_path / "elsewhere/train")
    moved = data | {"data": str(tmp_path / "elsewhere"), "split": "train"}
    files = ",".join(str(lists / f"draw-{i}.txt") for i in range(3))
    again = measured(moved, train_list=files)
    assert [draw["top1"] for draw in again["draws"]] == values
    assert again["top1_interval"] == got["top1_interval"]
    other = tmp_path / "other"
    measured(moved, shots=3, save_lists=str(other))
    assert (other / "draw-0.txt").read_text() == (lists / "draw-0.txt").read_text()
    names_alone = tmp_path / "names.txt"  # as ImageNet's lists are published
    names_alone.write_text("\n".join(line.split("/")[1] for line in texts[0][1:]))
    assert measured(moved, train_list=str(names_alone))["top1"] == values[0]


def test_lists_of_odd_names(data: dict[str, Any], tmp_path: Path) -> None:
    """A saved list names what was drawn, whatever the files are called."""
    names = ["#tag", "two\nlines", " spaces ", '"quoted"', "back\\slash", "Größe ☃"]
    classes = ("#1", "line\nbreak", '"c"')
    for folder in (Path(data["data"]), Path(data["val_data"])):
        for old, name in zip(sorted(folder.iterdir()), classes, strict=True):
            old.rename(folder / name)
            for file, new in zip(sorted((folder / name).iterdir()), names, strict=False):
                file.rename(file.with_name(f"{new}.jpg"))
    lists = tmp_path / "lists"
    got = measured(data, shots=8, save_lists=str(lists))
    again = measured(data, train_list=str(lists / "draw-0.txt"))
    assert (again["top1"], again["train_images"]) == (got["top1"], 18)
    by_hand = tmp_path / "by-hand.txt"  # no JSON, and so the names of files
    by_hand.write_text('"c"/#tag.jpg\nline_break/x.jpg\n')
    with pytest.raises(MilanError, match=r"1 of 2 names .* the first is 'line_break/x"):
        measured(data, train_list=str(by_hand))


def test_intervals_over_draws() -> None:
    """Student's; what differs is kept for each draw."""
    column, t = Column("top1", "top-1 %"), np.linspace(0, 1, 200_001)
    for count in range(2, 31):
        drawn = (50 + np.arange(count) % 7).tolist()
        got = over_draws([{"top1": v, "classes": 3, "l2": v} for v in drawn], [column])
        low, high = got["top1_interval"]
        quantile = (high - low) / 2 / (np.std(drawn, ddof=1) / count**0.5)
        density = (1 + (quantile * t) ** 2 / (count - 1)) ** (-count / 2)
        area = quantile * density.mean() * math.gamma(count / 2) / math.gamma((count - 1) / 2)
        area /= (math.pi * (count - 1)) ** 0.5
        assert area == pytest.approx(0.475, abs=2e-3)
        assert (got["classes"], len(got["draws"]), "l2" in got) == (3, count, False)
    wide = over_draws([{"top1": 1.0}, {"top1": 99.0}], [column])
    assert wide["top1_interval"] == [0, 100]
    none = over_draws([{"k10": None}, {"k10": None}], [Column("k10", "k 10 %")])
    assert (none["k10"], none["k10_interval"]) == (None, None)


def test_finetuning_on_draws(data: dict[str, Any], tmp_path: Path) -> None:
    """A training a draw, each in its own folder; called again, none is trained."""
    vit = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
    settings = {
        "data": data["data"], "val_data": data["val_data"], "model_args": vit, "epochs": 1,
        "model": "vit_tiny_patch16_224", "batch_size": 4, "num_workers": 0, "report_to": "none",
        "warmup_epochs": 0, "shots": 3, "draws": 2, "out": str(tmp_path / "a.json"),
    }  # fmt: skip
    got = evaluate("finetune", "random", **settings)
    assert got["train_images"] == 8
    assert [Path(draw["run"]).name for draw in got["draws"]] == ["0", "1"]
    assert (tmp_path / "a-draws/1/classifier.safetensors").is_file()
    again = evaluate("finetune", "random", **settings)
    assert again["top1"] == got["top1"]
    with pytest.raises(ConfigError, match="2 draws of training images in one training"):
        finetune("random", **settings | {"out": str(tmp_path / "b.json")})


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"fraction": 0.1}, "--fraction 0.1 --draws 3"),
        ({"train_list": "a.txt"}, "--train-list a.txt"),
    ],
)
def test_few_shot_draws_shots(given: dict[str, Any], instead: str) -> None:
    """What else chooses images is refused: nobody has typed the --shots that is in its way."""
    with pytest.raises(ConfigError, match=f"try: milan linear-probe {instead}$"):
        evaluate("few_shot", "random", **given)


Change = Callable[[Path], dict[str, Any]]


def listing(*lines: str) -> Change:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "list.txt").write_text("\n".join(lines))
        return {"train_list": str(folder / "list.txt")}

    return write


def binary(folder: Path) -> dict[str, Any]:
    (folder / "list.txt").write_bytes(b"\xff\xfe\x00")
    return {"train_list": str(folder / "list.txt")}


def twins(folder: Path) -> dict[str, Any]:
    for name in ("class 0", "class 1"):
        first = next((folder / "data" / name).iterdir())
        shutil.copy(first, first.with_name("same.jpg"))
    return listing("same.jpg")(folder)


REFUSED: dict[str, tuple[Change, str]] = {
    "two choices": (lambda f: {"shots": 1, "fraction": 0.1}, "fraction 0.1 and shots 1"),
    "draws of all": (lambda f: {"draws": 3}, "draws 3 without fraction or shots"),
    "a share above all": (lambda f: {"fraction": 1.5}, "fraction 1.5; expected: .*less than 1"),
    "no shot": (lambda f: {"shots": 0}, "shots 0"),
    "lists of all": (lambda f: {"save_lists": str(f / "x")}, "of all images"),
    "no list": (lambda f: {"train_list": "nowhere.txt"}, "nowhere.txt cannot be read: No such"),
    "a list of nothing": (listing("# a comment", ""), "names no image"),
    "a list that is no text": (binary, "is not UTF-8 text"),
    "a list of other images": (
        listing("class 0/cat.jpg"), r"1 of 1 names in .* are no training images, the first is 'cl"
    ),
    "a name of several images": (twins, "1 names in .* stand for several images"),
    "an empty name": (lambda f: {"train_list": "a.txt,,b.txt"}, "an empty name in 'a.txt,,b.txt'"),
    "a folder that is a file": (
        lambda f: {"shots": 2, "save_lists": str(next((f / "data").rglob("*.jpg")) / "x")},
        "cannot be written",
    ),
    "one class": (
        lambda f: listing(*(f"class 0/{p.name}" for p in (f / "data/class 0").iterdir()))(f),
        r"2 classes of --val-data are not in --data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, data: dict[str, Any], tmp_path: Path) -> None:
    """In one line, before any feature is computed."""
    make, found = REFUSED[case]
    network = Counting()
    with pytest.raises(MilanError, match=found) as refused:
        measured(data, frozen=network.frozen, **make(tmp_path))
    assert "\n" not in str(refused.value)
    assert network.seen == 0
