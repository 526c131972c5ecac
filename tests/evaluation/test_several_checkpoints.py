"""Any checkpoint by the same line, several in one table; a bad one is found before any work."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Notes, last_wins, make_photos, published, run_here
from safetensors.torch import save_file

from milan.core.device import MEAN, STD
from milan.errors import MilanError
from milan.evaluation.config import EvaluationConfig, FinetuneConfig
from milan.evaluation.evaluate import evaluate
from milan.evaluation.protocols import PROTOCOLS
from milan.models.decoder import Decoder
from milan.models.encoder import build_encoder
from milan.models.export import ENCODER, save_encoder
from milan.models.student import Student

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


def run(folder: Path, seed: int, **changes: Any) -> Path:
    """The folder of a run with an encoder."""
    torch.manual_seed(seed)
    args = SMALL | changes
    vit = build_encoder(VIT, img_size=16, args=args)
    folder.mkdir()
    about = {"model": VIT, "model_args": args, "mean": MEAN, "std": STD, "input_size": 16}
    save_encoder(folder / ENCODER, vit.state_dict(), about)
    return folder


def published_file(path: Path) -> Path:
    """A checkpoint in the published layout, of a ViT as small as timm has them."""
    vit = build_encoder(VIT, img_size=32)
    decoder = Decoder(
        "prompt", encoder_width=vit.embed_dim, grid=2, target_width=8, embed_dim=64, depth=1,
        num_heads=16, mlp_ratio=4.0,
    )  # fmt: skip
    save_file({n: t.contiguous() for n, t in published(Student(vit, decoder)).items()}, path)
    return path


def test_a_teacher_that_is_named_is_measured_beside() -> None:
    """With --teacher the table has it too; it is not asked for twice."""
    for checkpoint in ("a,b", "a,teacher,b"):
        config = EvaluationConfig(checkpoint, teacher="ViT-B-16", pretrained="openai")
        names = [one.checkpoint for one in config.each()]
        assert sorted(names) == ["a", "b", "teacher"]
    assert [one.checkpoint for one in EvaluationConfig("a").each()] == ["a"]


@pytest.mark.parametrize("several", [{"checkpoint": "a,b"}, {"shots": 2, "draws": 2}])
def test_ranks_that_others_started_train_one(
    several: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They meet once: more runs would wait for each other for ever."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(MilanError, match="2 runs of finetune by ranks that others started"):
        evaluate("finetune", **{"checkpoint": "a", "data": "photos", **several})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one shape, one of another, published weights, images."""
    folder = tmp_path_factory.mktemp("place")
    run(folder / "a", 1)
    run(folder / "b", 2)
    run(folder / "wide", 3, embed_dim=32)
    published_file(folder / "milan.safetensors")
    make_photos(folder / "photos", count=24)
    return folder


def test_one_table(place: Path) -> None:
    """Images are listed once, a random baseline is measured once a shape, metrics lie where those
    of a single checkpoint lie and are the same; a file has all."""
    done = run_here(
        "knn", "--checkpoint", "a", "--checkpoint", "b,wide", "--checkpoint",
        "published:milan.safetensors", "--model", VIT, "--data", "photos", "--out", "all.csv",
        cwd=place,
    )  # fmt: skip
    assert (done.code, done.err) == (0, ""), done.err
    assert done.out.count("data: ") == 1
    assert done.out.count("features of random: 24 images") == 3  # of a and b together
    one = json.loads((place / "b/knn.json").read_text())
    assert (place / "runs/published-milan/knn.json").is_file()
    for name in ("classes.csv", "confusion.csv"):
        assert (place / "wide/knn" / name).is_file()
    rows = list(csv.DictReader((place / "all.csv").open()))
    names = ["a", "b", "wide", "published:milan.safetensors"]
    shapes = ["random, like a", "random, like wide", "random, like published:milan.safetensors"]
    assert [row["checkpoint"] for row in rows] == shapes + names
    assert float(rows[4]["k10"]) == one["k10"]
    assert rows[4]["k10_low"] == str(one["k10_interval"][0])
    for words in ("all.json", "a,b"), ("b.json", "b"):
        done = run_here("knn", "--checkpoint", words[1], "--data", "photos", "--out", words[0],
                        cwd=place)  # fmt: skip
        assert (done.code, done.err) == (0, ""), done.err
    alone, both = (json.loads((place / f"{name}.json").read_text()) for name in ("b", "all"))
    del one["baseline"]["like"], alone["baseline"]["like"], both["b"]["baseline"]["like"]
    assert both["b"] | {"seconds": 0} == one | {"seconds": 0} == alone | {"seconds": 0}


def test_random_beside_its_baseline(place: Path) -> None:
    """A random encoder that was asked for is not measured twice."""
    notes = Notes()
    got = evaluate(
        "knn", ["random", str(place / "a")], like=str(place / "a"), data=str(place / "photos"),
        features=str(place / "kept"), progress=notes,
    )  # fmt: skip
    assert got["random"]["k10"] == got[str(place / "a")]["baseline"]["k10"]
    assert [n for n in notes.begun if n[0] == 24] == [(24, 0)] * 2
    assert notes.line("checkpoint 2 of 2: ")


@pytest.mark.parametrize("protocol", ["knn", "linear-probe", "attentive-probe"])
def test_a_random_encoder_that_is_named_is_the_baseline(
    protocol: str, place: Path, tmp_path: Path
) -> None:
    """Of the shape of what it is measured beside; its features are computed once, wherever they
    are kept, and each has its row."""
    shutil.copytree(place / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*features"))
    line = ("--checkpoint", "a,random", "--data", place / "photos")
    done = run_here(protocol, *line, cwd=tmp_path)
    assert (done.code, done.err) == (0, ""), done.err
    assert done.out.count("features of random: 24 images") == 1
    assert done.out.count("│ random ") == 1
    file = f"{protocol.replace('-', '_')}.json"
    a, random = (json.loads((tmp_path / x / file).read_text()) for x in ("a", "runs/random"))
    key = "k20" if protocol == "knn" else "top1"
    assert a["baseline"][key] == random[key]


@pytest.mark.soak
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("protocol", ["knn", "linear_probe", "few_shot"])
def test_ranks_measure_several(protocol: str, place: Path, tmp_path: Path) -> None:
    """Two ranks, three checkpoints, their baselines and draws: the table of one rank."""
    more = {"shots": 4, "draws": 2} if protocol == "few_shot" else {}
    tables = {}
    for devices in (1, 2):
        tables[devices] = evaluate(
            protocol, [str(place / name) for name in ("a", "b", "wide")], device="cpu",
            data=str(place / "photos"), features=str(tmp_path / str(devices)), devices=devices,
            **more,
        )  # fmt: skip
        for metrics in tables[devices].values():
            del metrics["seconds"]
    assert len(tables[1]) == 3
    assert tables[1] == tables[2]


def test_several_are_fine_tuned(place: Path) -> None:
    """One after the other, each in the folder in which it would be alone; those of one shape share
    the baseline that was trained beside the first."""
    done = run_here(
        "finetune", "--checkpoint", "a,b", "--data", "photos", "--epochs", "1", "--batch-size", "8",
        "--num-workers", "0", "--report-to", "none", "--set", "warmup_epochs=0", "--size", "16",
        cwd=place,
    )  # fmt: skip
    assert (done.code, done.err) == (0, ""), done.err
    for name in ("a", "b"):
        assert (place / name / "finetune/classifier.safetensors").is_file()
        assert json.loads((place / name / "finetune.json").read_text())["checkpoint"] == name
    assert "│ b " in done.out
    one, other = (json.loads((place / x / "finetune.json").read_text())["baseline"] for x in "ab")
    assert one == other
    assert (one["checkpoint"], one["like"]) == ("random", "a")
    assert one["run"].endswith("a/finetune/random")
    assert not (place / "b/finetune/random").exists()
    assert done.out.count("│ random ") == 1


def tuned(place: Path, *more: str) -> Any:
    line = last_wins(
        "finetune", "--data", "photos", "--epochs", "1", "--batch-size", "8", "--num-workers", "0",
        "--report-to", "none", "--set", "warmup_epochs=0", "--size", "16", "--out", "tuned.json",
        "--overwrite", *more,
    )  # fmt: skip
    return run_here(*line, cwd=place)


@pytest.mark.parametrize(
    ("flags", "beside"),
    [
        (("--checkpoint", "b"), "random"),
        (("--checkpoint", "b", "--baseline", "none"), None),
        (("--checkpoint", "random", "--like", "b"), None),
    ],
)
def test_a_baseline_is_trained_beside(
    flags: tuple[str, ...], beside: str | None, place: Path
) -> None:
    """By default, and after the result, which is in the run's folder by then."""
    shutil.rmtree(place / "tuned", ignore_errors=True)
    done = tuned(place, *flags)
    assert (done.code, done.err) == (0, ""), done.err
    metrics = json.loads((place / "tuned.json").read_text())
    assert metrics.get("baseline", {}).get("checkpoint") == beside
    assert (place / "tuned/random/classifier.safetensors").exists() == bool(beside)
    assert ("measured: tuned/metrics.json; now the baseline" in done.out) == bool(beside)


def test_the_baseline_of_draws(place: Path) -> None:
    """Its figures are means over the same draws, of the same corrupted images."""
    done = tuned(
        place, "--checkpoint", "b", "--shots", "2", "--draws", "2",
        "--batch-size", "4", "--corruptions",
    )  # fmt: skip
    assert (done.code, done.err) == (0, ""), done.err
    found = json.loads((place / "tuned.json").read_text())
    beside = found["baseline"]
    assert beside["checkpoint"] == "random"
    for key in ("top1", "corrupted_top1"):
        each = [draw["baseline"][key] for draw in found["draws"]]
        assert beside[key] == pytest.approx(sum(each) / 2, abs=0.01)
    assert beside["top1_interval"]


def no_encoder(place: Path) -> str:
    (place / "none").mkdir(exist_ok=True)
    return f"{place / 'a'},{place / 'none'}"


def classifier(place: Path) -> str:
    """The folder of a fine-tuning, which has a classifier."""
    folder = place / "tuned"
    folder.mkdir(exist_ok=True)
    (folder / "classifier.safetensors").write_bytes(b"")
    return f"{place / 'a'},{folder}"


def damaged(place: Path) -> str:
    (place / "bad.safetensors").write_bytes(b"no weights")
    return f"{place / 'a'},published:{place / 'bad.safetensors'}"


def linked(place: Path) -> str:
    if not (place / "link").exists():
        (place / "link").symlink_to(place / "a")
    return f"{place / 'a'},{place / 'link'}"


REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "no encoder": (no_encoder, r"no encoder\.safetensors at .*none"),
    "a classifier in its place": (
        classifier,
        r"no encoder\.safetensors in .*tuned, which holds classifier",
    ),
    "a damaged file": (damaged, "is damaged"),
    "no file": (lambda p: f"{p / 'a'},published:nowhere.pth", "not at nowhere.pth"),
    "no folder": (lambda p: f"{p / 'a'},runs/nowhere", "at runs/nowhere"),
    "no model": (lambda p: f"{p / 'a'},timm:vit_x", "unknown timm model"),
    "twice": (lambda p: f"{p / 'a'},{p / 'a'}/", "are the same"),
    "by its file": (lambda p: f"{p / 'a'},{p / 'a' / ENCODER}", "are the same"),
    "by a link": (linked, "are the same"),
    "nothing": (lambda p: f"{p / 'a'},", "an empty name"),
}


@pytest.mark.parametrize("protocol", ["knn", "finetune"])
@pytest.mark.parametrize("case", REFUSED)
def test_one_that_cannot_be(case: str, protocol: str, place: Path) -> None:
    """It is found before images are listed or a network works."""
    names, found = REFUSED[case]
    with pytest.raises(MilanError, match=found) as refused:
        evaluate(protocol, names(place), data="nowhere", model=VIT)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (FinetuneConfig("random,teacher"), "checkpoint teacher"),
        (EvaluationConfig("teacher,random"), "checkpoint teacher without a network"),
    ],
)
def test_the_teacher_among_several(config: Any, found: str) -> None:
    """Refused at once where it cannot be measured."""
    protocol = "finetune" if isinstance(config, FinetuneConfig) else "knn"
    with pytest.raises(MilanError, match=found):
        evaluate(PROTOCOLS[protocol], config)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_takes_several(name: str) -> None:
    """The flag may be repeated: else the last one alone would count, and nobody would be told."""
    (checkpoint,) = (f for f in fields(PROTOCOLS[name].settings) if f.name == "checkpoint")
    assert checkpoint.metadata["several"]
