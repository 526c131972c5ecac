"""The linear probe: its classifier converges, its features and classes are the right ones."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from helpers import STUDENT, Notes, make_photos, run_here
from PIL import Image
from torch.nn import functional as F

from milan.core.device import MEAN, STD, normalise
from milan.errors import ConfigError, DataError, MilanError
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.evaluate import evaluate
from milan.evaluation.features import Context, Piece
from milan.evaluation.frozen import Frozen, frozen_encoder
from milan.evaluation.linear_probe import LogisticRegression, linear_probe
from milan.evaluation.meaning import chance, doubts
from milan.evaluation.protocols import PROTOCOLS

# --- the classifier -------------------------------------------------------------------------------


def toy(n: int, features: int, classes: int, *, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clouds around class centres; the wider, the less separable."""
    generator = torch.Generator().manual_seed(11)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, features, generator=generator)
    return centres[y] + spread * torch.randn(n, features, generator=generator), y


def fit(
    x: torch.Tensor, y: torch.Tensor, classes: int, *, l2: float, piece: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """A logistic regression of one rank, `piece` images at a time."""
    parts = zip(x.split(piece), y.split(piece), range(0, len(x), piece), strict=True)
    pieces = [Piece(*part) for part in parts]
    context = Context(torch.device("cpu"))
    return LogisticRegression(pieces, (x.shape[1], classes), context).fit(l2)


def objective(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, l2: float
) -> torch.Tensor:
    """What LogisticRegression says it minimises."""
    return F.cross_entropy(x @ weight + bias, y) + 0.5 * l2 * weight.square().sum()


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_the_classifier_converges(l2: float) -> None:
    """An unconverged probe would measure its optimiser: compare with a long run in float64."""
    x, y = toy(600, 40, 5, spread=3.0)
    weight, bias = fit(x, y, 5, l2=l2)
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = objective(x, y, w, b, l2)
    loss.backward()
    assert w.grad is not None
    assert b.grad is not None
    assert max(w.grad.abs().max(), b.grad.abs().max()) < 1e-4

    best = [torch.zeros(40, 5).double().requires_grad_(), torch.zeros(5).double().requires_grad_()]
    optimiser = torch.optim.LBFGS(
        best, max_iter=5000, max_eval=50_000, tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = objective(x.double(), y, best[0], best[1], l2)
        value.backward()
        return value

    optimiser.step(closure)  # type: ignore[arg-type]
    optimum = objective(x.double(), y, best[0], best[1], l2)
    assert optimum < 1.2  # of log 5 = 1.61: there was something to learn
    assert loss.item() == pytest.approx(optimum.item(), abs=1e-5)


def entangled(n: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a network that was never trained: nearly multiples of each other. [n, F], [n]."""
    x, y = toy(n, features, 5, spread=3.0)
    generator = torch.Generator().manual_seed(2)
    mixed = (
        x * torch.logspace(0, -4, features) @ torch.randn(features, features, generator=generator)
    )
    return (mixed - mixed.mean(dim=0)) / mixed.std(dim=0), y


@pytest.mark.parametrize("l2", [1e-5, 1e-2])
def test_as_a_library_fits(l2: float) -> None:
    """scikit-learn's logistic regression on the same features names the same classes: 0.3 points of
    accuracy at most between them; pieces change nothing."""
    from sklearn.linear_model import LogisticRegression as Library

    x, y = entangled(1600, 20)
    library = Library(C=1 / (l2 * 600), solver="newton-cholesky", tol=1e-8)
    library.fit(x[:600].double().numpy(), y[:600].numpy())
    expected = torch.from_numpy(library.predict(x[600:].double().numpy()))
    named = []
    for piece in (600, 37):
        weight, bias = fit(x[:600], y[:600], 5, l2=l2, piece=piece)
        named.append((x[600:] @ weight + bias).argmax(dim=1))
    right = [(classes == y[600:]).float().mean().item() for classes in (expected, *named)]
    assert right[0] > 0.4
    assert max(right) - min(right) <= 0.003
    assert (named[0] == named[1]).float().mean() >= 0.995


def test_few_images_are_fitted_to_convergence() -> None:
    """Where all are told apart, losses are near zero: float32 still says which way is down."""
    from sklearn.linear_model import LogisticRegression as Library

    x, y = toy(10, 64, 3, spread=1.0)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    library = Library(C=1 / (1e-4 * 10), tol=1e-10, max_iter=10_000)
    exact = torch.from_numpy(library.fit(x.double().numpy(), y.numpy()).coef_).T
    weight, _ = fit(x, y, 3, l2=1e-4)
    assert (weight - exact).norm() < 0.04 * exact.norm()  # 0.057 by log_softmax


def test_separable_classes_are_separated() -> None:
    """Nothing in the way of 100 %."""
    x, y = toy(200, 16, 4, spread=0.05)
    weight, bias = fit(x, y, 4, l2=1e-5)
    assert ((x @ weight + bias).argmax(dim=1) == y).all()


# --- a network whose features are the image's colour ----------------------------------------------


def mean_colour(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().mean(dim=(1, 2)) / 255


COLOURS = Frozen(mean_colour, 8, "colours")
PAINTS = {"blue": (20, 30, 200), "green": (20, 200, 30), "red": (200, 20, 30)}


def paintings(folder: Path, names: dict[str, str], *, count: int = 12, seed: int = 0) -> Path:
    """Class folders (name -> paint) of small pictures in nearly one colour."""
    generator = np.random.default_rng(seed)
    for name, paint in names.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(PAINTS[paint] + generator.normal(0, 15, (12, 12, 3)), 0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / name / f"{i}.png")
    return folder


def test_a_probe_finds_colours(tmp_path: Path) -> None:
    """The whole probe on features that tell the classes apart; a fifth is kept for measuring."""
    data = paintings(tmp_path / "a", {paint: paint for paint in PAINTS}, count=20)
    got = linear_probe(data=str(data), frozen=COLOURS)
    assert (got["top1"], got["top5"]) == (100, None)  # five guesses at three classes mean nothing
    assert (got["train_images"], got["val_images"]) == (48, 12)
    assert (got["checkpoint"], got["classes"], got["features"]) == ("colours", 3, 3)
    again = linear_probe(data=str(data), frozen=COLOURS)
    assert {**got, "seconds": 0} == {**again, "seconds": 0}
    other = linear_probe(data=str(data), frozen=COLOURS, seed=1)
    assert other["val_images"] == 12


def test_labels_that_mean_nothing_are_not_learnt(tmp_path: Path) -> None:
    """The measured images are not the fitted ones: noise scores near chance, not 100 %."""
    generator = np.random.default_rng(4)
    for i in range(120):
        folder = tmp_path / "noise" / f"class {i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    everything = Frozen(lambda p: p.float().flatten(1) / 255, 8, "pixels")
    got = linear_probe(data=str(tmp_path / "noise"), frozen=everything, crop_share=1.0)
    assert got["top1"] < 60


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """Folder numbers differ between the sets: `0 green` of one is no class of the other."""
    train = paintings(tmp_path / "train", {"blue": "blue", "green": "green", "red": "red"})
    # Without "blue" the alphabet gives green and red other numbers.
    val = paintings(tmp_path / "val", {"green": "green", "red": "red"}, count=5, seed=1)
    got = linear_probe(data=str(train), val_data=str(val), frozen=COLOURS)
    assert got["top1"] == 100
    assert (got["train_images"], got["val_images"], got["classes"]) == (36, 10, 3)
    crossed = paintings(tmp_path / "crossed", {"green": "red", "red": "green"}, count=5)
    assert linear_probe(data=str(train), val_data=str(crossed), frozen=COLOURS)["top1"] == 0


def numbered(path: Path, paints: dict[int, str], *, seed: int = 0) -> Path:
    """A Parquet file of eight small pictures of each paint, with class numbers alone."""
    generator = np.random.default_rng(seed)
    rows = []
    for label, paint in paints.items():
        for _ in range(8):
            pixels = np.clip(PAINTS[paint] + generator.normal(0, 15, (12, 12, 3)), 0, 255)
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": label})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


SIDES: dict[str, tuple[dict, dict, float | str]] = {
    "a class that training lacks": (
        {"blue": "blue", "green": "green"}, {"blue": "blue", "reddish": "red"},
        r"1 classes of --val-data are not in --data, the first is 'reddish': 8 of 16",
    ),
    "no class in common": ({"a": "blue", "b": "green"}, {"c": "blue"}, r"8 of 8 images could"),
    "names and numbers": (
        {"blue": "blue", "green": "green"}, {0: "blue", 1: "green"},
        r"--data has class names, such as 'blue', and --val-data has class numbers",
    ),
    "numbers and names": (
        {0: "blue", 1: "green"}, {"blue": "blue", "green": "green"},
        r"--val-data has class names, .* and --data has class numbers",
    ),
    "folders named by numbers": ({"10": "blue", "9": "green"}, {9: "green", 10: "blue"}, 100),
    "numbers, and folders named so": ({10: "blue", 9: "red"}, {"10": "blue", "09": "red"}, 100),
    "numbers and numbers": ({10: "blue", 2: "red"}, {2: "red"}, 100),
    "a number that training lacks": (
        {0: "blue", 2: "red"}, {0: "blue", 1: "red"}, r"1 classes .* the first is 1: 8 of 16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIDES)
def test_a_probe_compares_like_with_like(case: str, tmp_path: Path) -> None:
    """Classes are matched by what they mean, or refused: never a low score."""
    *sides, expected = SIDES[case]
    given = [
        numbered(tmp_path / f"{i}.parquet", paints, seed=i)
        if isinstance(next(iter(paints)), int)
        else paintings(tmp_path / str(i), paints, count=8, seed=i)
        for i, paints in enumerate(sides)
    ]
    settings = {"data": str(given[0]), "val_data": str(given[1]), "frozen": COLOURS}
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            linear_probe(**settings)
    else:
        assert linear_probe(**settings)["top1"] == expected


def test_a_sample_may_lack_classes(tmp_path: Path) -> None:
    """With --limit, and of the fifth that is kept, images that cannot be right are counted."""
    data = paintings(tmp_path / "a", {paint: paint for paint in PAINTS}, count=3)
    val = paintings(tmp_path / "b", {**{p: p for p in PAINTS}, "else": "red"}, count=3, seed=1)
    (data / "alone").mkdir()
    Image.new("RGB", (12, 12)).save(data / "alone/1.png")
    for more, said in (
        ({"seed": 0}, "1 classes have images to measure on and none to fit on"),
        ({"limit": 12, "val_data": str(val)}, "1 classes of --val-data are not in --data"),
    ):
        notes = Notes()
        linear_probe(data=str(data), frozen=COLOURS, progress=notes, **more)
        assert any(said in line for line in notes.lines), notes.lines
        assert any("images could never be right" in line for line in notes.lines)
    two = paintings(tmp_path / "two", {p: p for p in PAINTS}, count=1)
    with pytest.raises(DataError, match="try: more images of each class, or --val-data"):
        linear_probe(data=str(two), frozen=COLOURS)


@pytest.mark.parametrize("same", ["folder", "part", "copies", "some copies", "twins"])
def test_the_same_images_on_both_sides(same: str, tmp_path: Path) -> None:
    """Training images to measure on: refused if all are, else counted; wherever they are."""
    data = paintings(tmp_path / "a", {"blue": "blue", "red": "red"}, count=6)
    val, notes = tmp_path / "b", Notes()
    settings: dict[str, Any] = {"data": str(data), "frozen": COLOURS, "progress": notes}
    if same == "folder":
        settings["val_data"] = str(data)
    elif same == "part":
        (data / "deep" / "blue").mkdir(parents=True)
        (data / "deep" / "red").mkdir()
        for name in ("blue", "red"):
            shutil.copy(data / name / "0.png", data / "deep" / name / "0.png")
        settings["val_data"] = str(data / "deep")
    elif same == "twins":
        for path in list((data / "red").glob("*.png")):
            shutil.copy(path, path.with_name(f"twin {path.name}"))
    else:
        shutil.copytree(data, val)
        settings["val_data"] = str(val)
        if same == "some copies":
            paintings(tmp_path / "c", {"blue": "blue", "red": "red"}, count=1, seed=9)
            for name in ("blue", "red"):
                shutil.copy(tmp_path / "c" / name / "0.png", val / name / "0.png")
    if same in ("some copies", "twins"):
        repeated = linear_probe(**settings)["repeated_images"]
        assert repeated == 10 if same == "some copies" else repeated > 0
        assert f"{repeated} of " in notes.line(f"{repeated} of ")
        return
    found = r"all \d+ images of --val-data are" if same in ("folder", "part") else "the same bytes"
    with pytest.raises(DataError, match=found):
        linear_probe(**settings)


def test_figures_that_mean_nothing(tmp_path: Path) -> None:
    """Few images and classes: top-5 is left out, chance and a figure's uncertainty are said."""
    data = paintings(tmp_path / "a", {"blue": "blue", "red": "red"}, count=20)
    val, notes = paintings(tmp_path / "b", {"blue": "blue", "red": "red"}, seed=1), Notes()
    linear_probe(data=str(data), val_data=str(val), frozen=COLOURS, progress=notes)
    said = notes.line("24 validation images of 2 classes")
    assert "chance is 50 %" in said
    assert "less than 20 points mean the same" in said
    assert notes.line("top-5 is left out: with 2 classes it means nothing")
    assert chance(np.arange(70) % 7, np.array([1, 3, 6])) == pytest.approx(100 / 7)  # not 0
    many, few = np.arange(500) % 7, np.arange(40) % 2
    assert doubts(many, many, neighbours=20) == []
    assert len(doubts(few, many[:399], neighbours=20)) == 2
    assert "20 neighbours vote of 40 images" in doubts(few, many, neighbours=20)[0]
    with pytest.raises(DataError, match="of one class"):
        linear_probe(data=str(paintings(tmp_path / "c", {"red": "red"})), frozen=COLOURS)


def lists_of_labels(folder: Path) -> dict[str, Any]:
    """A Parquet file whose images have several labels each."""
    file = numbered(folder / "m.parquet", {0: "blue", 1: "red"})
    table = pq.read_table(file)
    lists = pa.array([[label.as_py(), 3] for label in table["label"]])
    index = table.schema.get_field_index("label")
    pq.write_table(table.set_column(index, "label", lists), file)
    return {"data": str(file)}


def no_encoder(folder: Path) -> dict[str, Any]:
    """The folder of a run that wrote nothing yet."""
    (folder / "run").mkdir()
    data = paintings(folder / "a", {"blue": "blue", "red": "red"}, count=3)
    return {"data": str(data), "checkpoint": str(folder / "run"), "frozen": None}


def random_encoder(folder: Path, **settings: Any) -> dict[str, Any]:
    data = paintings(folder / "a", {"blue": "blue", "red": "red"}, count=3)
    return {"data": str(data), "checkpoint": "random", "frozen": None, **settings}


def unreadable(folder: Path) -> dict[str, Any]:
    """Images to measure on of which none is one."""
    data = paintings(folder / "a", {"blue": "blue", "red": "red"}, count=3)
    val = paintings(folder / "b", {"blue": "blue", "red": "red"}, count=1)
    for file in val.glob("*/*.png"):
        file.write_text("no image")
    return {"data": str(data), "val_data": str(val)}


def one_image_each(folder: Path) -> dict[str, Any]:
    """Classes of a single image."""
    data = paintings(folder / "a", {"blue": "blue", "red": "red", "green": "green"}, count=1)
    val = paintings(folder / "b", {"blue": "blue"}, count=2, seed=1)
    return {"data": str(data), "val_data": str(val)}


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str | None]] = {
    "several labels of an image": (lists_of_labels, "label"),
    "a checkpoint without encoder": (no_encoder, r"no encoder\.safetensors at"),
    "an input that is no size": (
        lambda f: random_encoder(f, model_args={"img_size": "large"}), "img_size='large'"
    ),
    "an input of three sizes": (
        lambda f: random_encoder(f, model_args={"img_size": [8, 8, 8]}), "height and width"
    ),
    "no model of timm": (lambda f: random_encoder(f, like="timm:vit_x"), "unknown timm model"),
    "an empty split": (
        lambda f: {**one_image_each(f), "val_split": "test"}, "test"
    ),
    "no image to measure on": (unreadable, "no image of .* can be read"),
    "classes of one image": (one_image_each, None),
    "a memory that is none": (lambda f: one_image_each(f) | {"memory": "much"}, "is not a size"),
    "ranks of a given network": (lambda f: one_image_each(f) | {"devices": 2}, "devices 2"),
}  # fmt: skip


@pytest.mark.parametrize("protocol", ["linear_probe", "knn"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(protocol: str, case: str, tmp_path: Path) -> None:
    """In one line, by every protocol alike; what can be measured is, whatever its size."""
    make, found = REFUSED[case]
    settings = {"frozen": COLOURS, "features": "none", **make(tmp_path)}
    if found is None:
        got = evaluate(PROTOCOLS[protocol], **settings)
        assert (got["classes"], got["val_images"]) == (3, 2)
        return
    with pytest.raises(MilanError, match=found) as refused:
        evaluate(PROTOCOLS[protocol], **settings)
    assert "\n" not in str(refused.value)


def test_images_smaller_than_a_patch(tmp_path: Path) -> None:
    """They are enlarged, as training images are."""
    for i in range(8):
        (tmp_path / f"a/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1 + i, 1), (i * 30, 0, 0)).save(tmp_path / f"a/{i % 2}/{i}.png")
    settings = random_encoder(tmp_path / "b", model="vit_tiny_patch16_224", features="none")
    model_args = {"img_size": 32, "depth": 1}
    got = linear_probe(**{**settings, "data": str(tmp_path / "a"), "model_args": model_args})
    assert got["train_images"] + got["val_images"] == 8


def test_images_without_labels(tmp_path: Path) -> None:
    """A flat folder has no classes to probe."""
    data = paintings(tmp_path / "a", {"blue": "blue"}, count=3)
    with pytest.raises(DataError, match="3 images without a label"):
        linear_probe(data=str(data / "blue"), frozen=COLOURS)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images(count: int, tmp_path: Path) -> None:
    """Nothing can be fitted on one image; told, not a warning of some library."""
    data = paintings(tmp_path / "a", {"blue": "blue", "red": "red"}, count=2)
    with pytest.raises(DataError, match="images to fit on"):
        linear_probe(data=str(data), limit=count, frozen=COLOURS)


def test_bad_images_are_left_out_and_told(tmp_path: Path) -> None:
    """Measured on what can be read, and the rest is counted."""
    data = paintings(tmp_path / "a", {"blue": "blue", "red": "red"}, count=10)
    (data / "red" / "broken.png").write_text("no image")
    ran = run_here(
        "linear-probe", "--checkpoint", "random", "--model", "vit_tiny_patch16_224",
        "--set", "model.img_size=32", "--set", "model.depth=1", "--data", data,
        "--out", tmp_path / "out" / "probe.json",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert "rejected files: 1, the first is red/broken.png: not-an-image" in ran.out
    metrics = json.loads((tmp_path / "out/probe.json").read_text())
    assert metrics["train_images"] + metrics["val_images"] == 20
    assert metrics["rejected_images"] == 1


def test_top5_counts_the_five_best(tmp_path: Path) -> None:
    """Seven classes in pairs of one paint: the second best is often right, top-5 always."""
    names = {f"{i} {paint}": paint for i, paint in enumerate([*PAINTS, *PAINTS])}
    data = paintings(tmp_path / "a", names, count=15)
    got = linear_probe(data=str(data), frozen=COLOURS)
    assert got["classes"] == 6
    assert 20 < got["top1"] < 90
    assert got["top5"] == 100


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(finished_run: Callable[..., Path]) -> Path:
    """A short run; not to be changed."""
    return finished_run(epochs=2)


def test_features_are_class_token_and_mean_of_patches(run: Path) -> None:
    """Of timm's own forward on the exported encoder, in eval mode, both after the final norm."""
    frozen = frozen_encoder(EvaluationConfig(checkpoint=str(run)), torch.device("cpu"))
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    encoder = timm.create_model(
        "vit_base_patch16_224", checkpoint_path=str(run / "encoder.safetensors"), num_classes=0,
        img_size=32, **STUDENT["model_args"],
    ).eval()  # fmt: skip
    tokens = encoder.forward_features(normalise(pixels, MEAN, STD))
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    assert frozen.size == 32
    got = frozen.features(pixels)
    assert got.shape == (3, 64)
    assert not got.requires_grad
    assert (got - expected).abs().max() <= 1e-5


def test_random_like_a_run_has_its_shape_and_other_weights(run: Path) -> None:
    """The baseline differs in nothing but the training."""
    like = EvaluationConfig(checkpoint="random", like=str(run))
    frozen = frozen_encoder(like, torch.device("cpu"))
    trained = frozen_encoder(EvaluationConfig(checkpoint=str(run)), torch.device("cpu"))
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    assert frozen.size == trained.size
    assert frozen.features(pixels).shape == trained.features(pixels).shape
    assert not torch.equal(frozen.features(pixels), trained.features(pixels))
    again = frozen_encoder(like, torch.device("cpu"))
    assert torch.equal(frozen.features(pixels), again.features(pixels))


def test_the_teacher_itself(teacher_files: dict[str, str], tmp_path: Path, photos: Path) -> None:
    """The figure that a student is measured against, by the same command; a folder that bears
    the word's name is not meant by it."""
    (tmp_path / "teacher").mkdir()
    ran = run_here(
        "linear-probe", "--checkpoint", "teacher", "--teacher", teacher_files["teacher"],
        "--pretrained", teacher_files["pretrained"], "--teacher-norm", "imagenet",
        "--data", photos, cwd=tmp_path,
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    metrics = json.loads((tmp_path / "runs/teacher/linear_probe.json").read_text())
    assert metrics["checkpoint"].startswith("teacher ")
    assert metrics["features"] == 48
    assert not list((tmp_path / "teacher").iterdir())


def test_an_encoder_file_is_a_checkpoint_too(run: Path, photos: Path, tmp_path: Path) -> None:
    """encoder.safetensors carried away from its run; figures land beside it."""
    (tmp_path / "carried").mkdir()
    file = tmp_path / "carried" / "encoder.safetensors"
    file.write_bytes((run / "encoder.safetensors").read_bytes())
    ran = run_here("linear-probe", "--checkpoint", file, "--data", photos, cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "carried/linear_probe.json").exists()


def test_an_unknown_timm_name() -> None:
    """Before any network is asked."""
    with pytest.raises(ConfigError, match="unknown timm model") as refused:
        linear_probe("timm:vit_bse_patch16_224", data="x")
    assert "vit_base_patch16_224" in refused.value.fix


def test_the_limit_is_of_each_set(tmp_path: Path) -> None:
    """`--limit` for a quick look: seeded, not one class."""
    data = make_photos(tmp_path / "data", count=30)
    val = make_photos(tmp_path / "val", count=30, seed=1)
    got = linear_probe(data=str(data), val_data=str(val), limit=12, frozen=COLOURS)
    assert (got["train_images"], got["val_images"]) == (12, 12)


@pytest.mark.parametrize(
    ("model", "width"),
    [
        ("vit_tiny_patch16_224", 2),
        ("vit_base_patch16_siglip_224", 1),  # no class token
        ("deit_tiny_distilled_patch16_224", 2),  # two tokens before the patches
        ("vit_relpos_small_patch16_224", 1),  # positions between patches
        ("vit_small_patch16_rope_224", 2),  # positions by rotation alone
    ],
)
def test_any_vit_of_timm_is_probed(model: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kind of positions and tokens it has: class token and mean of the patches."""
    frozen = timm_encoder(monkeypatch, model, depth=1, embed_dim=24, num_heads=2)
    features = frozen.features(torch.zeros(2, frozen.size, frozen.size, 3, dtype=torch.uint8))
    assert features.shape == (2, 24 * width)
    assert features.isfinite().all()


def test_what_is_no_vit_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by its kind, with what would be taken."""
    with pytest.raises(ConfigError, match="timm:resnet10t is a ResNet, whose output is not"):
        timm_encoder(monkeypatch, "resnet10t")


def timm_encoder(monkeypatch: pytest.MonkeyPatch, model: str, **options: Any) -> Any:
    """`timm:model` with random weights."""
    make = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **given: make(name, num_classes=0, **options)
    )
    return frozen_encoder(EvaluationConfig(f"timm:{model}", "x"), torch.device("cpu"))
