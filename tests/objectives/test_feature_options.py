"""The options of the feature objective: which tokens, which distance, which normalised target."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL, STUDENT, Notes, log_of, run_here, tree, weights
from safetensors import safe_open

import milan
from milan.config import PretrainConfig
from milan.data.loader import Batch
from milan.errors import MilanError
from milan.models.masking import Mask
from milan.objectives.base import Prediction
from milan.objectives.features import FeatureRegression, image_loss
from milan.objectives.normalisation import Affine, hadamard, layer_norm
from milan.objectives.targets import smooth_l1_distance
from milan.reporting.run_files import read_run, write_run
from milan.store.cache import TargetCache
from milan.store.statistics import FOLDER, find, measured, statistics_of
from milan.training.build import resolve_defaults, student_of
from milan.training.memory import peak_bytes
from milan.training.trained import load_student

RUN: dict[str, Any] = {
    **SMALL, "epochs": 2, "log_every": 1, "report_to": "none", "held_out": 0.34, "device": "cpu",
}  # fmt: skip
EVERYTHING: dict[str, Any] = {
    "loss": "smooth-l1", "target_norm": "phi-s", "predict": "both", "class_weight": 0.5,
    "deep_supervision": "1", "decode_fraction": 0.5,
}  # fmt: skip


def test_the_tokens_that_count_are_those_that_are_named() -> None:
    """Against the sums by hand; over all choices of 2 of 4 masked patches exactly the same."""
    distance = torch.rand(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen, hidden = [0, 2, 3, 5, 8], [1, 4, 6, 7]
    visible, masked = torch.tensor([seen] * 3), torch.tensor([hidden] * 3)
    pixels = torch.zeros(3, 3, 6, 6)
    first, patches = distance[:, 0], distance[:, 1:]
    means = {"visible": patches[:, seen].mean(1), "masked": patches[:, hidden].mean(1)}
    means |= {"both": (means["visible"] + means["masked"]) / 2, "all": patches.mean(1)}
    cases = [("all", None, distance.mean(1))]
    cases += [(kind, None, mean) for kind, mean in means.items() if kind != "all"]
    cases += [(kind, 0.3, mean + 0.3 * first) for kind, mean in means.items()]
    for predict, class_weight, expected in cases:
        found = []
        for pair in [None, *itertools.combinations(range(4), 2)]:
            mask = Mask(visible, masked, None if pair is None else masked[:, list(pair)])
            tokens = distance.gather(1, mask.rows)
            ours = Prediction(tokens[..., None], pixels, mask, Batch(*[pixels] * 5, None, None))
            found.append(image_loss(ours, tokens, predict=predict, class_weight=class_weight))
        torch.testing.assert_close(found[0], expected)
        torch.testing.assert_close(torch.stack(found[1:]).mean(0), expected)


def test_smooth_l1_has_beta_two() -> None:
    """Half of a quarter of the square up to 2, then the distance less 1."""
    apart = torch.tensor([0.0, 1.0, -2.0, 5.0])
    expected = (0 + 0.25 + 1 + 4) / 4
    apart = apart[None, None]
    assert float(smooth_l1_distance(apart, 0 * apart)) == pytest.approx(expected)
    assert smooth_l1_distance(torch.zeros(2, 3, 4).half(), torch.ones(2, 3, 4)).shape == (2, 3)


def test_hadamard_matrices() -> None:
    """Orthonormal, with entries of one size, for the widths of teachers; refused where unknown."""
    for size in (1, 2, 12, 24, 36, 52, 64, 192, 384):
        if size == 52:  # 51 and 25 are no primes
            with pytest.raises(MilanError, match="phi-s with a teacher of 52 channels"):
                hadamard(size)
            continue
        matrix = hadamard(size)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-9)
        np.testing.assert_allclose(np.abs(matrix), size**-0.5)


def test_norms_by_the_statistics_of_a_store(cache: TargetCache) -> None:
    """standardise: each channel 0 and 1. phi-s: the same, by a rotation and one factor."""
    statistics = measured(cache)
    assert measured(cache).digest == statistics.digest  # not by chance
    rows, views = (grid.ravel() for grid in np.meshgrid(np.arange(24), np.arange(2), indexing="ij"))
    targets = cache.read(rows, views)
    features = cache.codec.decode(torch.tensor(targets.codes), torch.tensor(targets.scale))
    flat = features.flatten(0, 1)
    spread = (flat - torch.from_numpy(statistics.mean)).square().mean().sqrt()
    for kind in ("standardise", "phi-s"):
        affine = Affine(kind, statistics)
        found = affine(features)
        # The sample has one view of each image, at random: its mean is not that of both.
        assert found.flatten(0, 1).mean(0).abs().max() < 0.3
        assert found.flatten(0, 1).std(0).sub(1).abs().max() < 0.3
        torch.testing.assert_close(affine.restored(found), features, atol=1e-4, rtol=1e-4)
    turned = found.flatten(0, 1)[:40]
    torch.testing.assert_close(
        torch.pdist(turned) * spread, torch.pdist(flat[:40]), rtol=0.1, atol=1e-3
    )
    # Of the sample itself both are exact.
    variance = np.diag(affine.weight @ _covariance(statistics) @ affine.weight.T)
    np.testing.assert_allclose(variance, 1, rtol=1e-3)
    by_token = layer_norm(features)
    assert by_token.mean(-1).abs().max() < 1e-5
    assert by_token.var(-1, correction=0).sub(1).abs().max() < 1e-3


def _covariance(statistics: Any) -> np.ndarray:
    """One with the axes and the deviations of the statistics: their variances are solved for."""
    axes = statistics.axes.astype(np.float64)
    variances = np.linalg.lstsq((axes**2).T, statistics.deviation.astype(np.float64) ** 2)[0]
    return axes.T @ np.diag(variances) @ axes


def test_a_run_with_everything(store: Path, tmp_path: Path) -> None:
    """It resumes to the same bits, keeps heads and statistics to itself, and is no other run."""
    own = tmp_path / "own.zarr"
    shutil.copytree(store, own)
    run = {**RUN, **EVERYTHING}
    notes = Notes()
    figures = milan.pretrain(str(own), out=str(tmp_path / "whole"), progress=notes, **run)
    assert notes.line("targets: phi-s, by statistics of 24 views")
    assert notes.line("student: ").endswith("; deep supervision adds 0.00782 M")
    for name in ("val_loss", "val_cosine", "val_class_cosine", "val_cosine_block_1"):
        assert np.isfinite(figures[name])
    milan.pretrain(str(own), out=str(tmp_path / "two"), stop_after=1, **run)
    (path,) = (own / FOLDER).iterdir()
    path.write_bytes(b"damaged")  # the run has its own copy; another measures anew
    milan.pretrain(str(own), out=str(tmp_path / "two"), **run)
    assert weights(tmp_path / "two") == weights(tmp_path / "whole")
    with safe_open(tmp_path / "two/encoder.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "deep" in name]  # noqa: SIM118
        assert file.metadata()["pooling"] == '"both"'
    for changed in EVERYTHING:
        other = {**run, changed: getattr(PretrainConfig(), changed)}
        if changed != "class_weight":
            other["class_weight"] = 0.5
        with pytest.raises(MilanError, match=changed):
            milan.pretrain(str(own), out=str(tmp_path / "two"), **other)
    # The student alone predicts the teacher's own features, without heads.
    trained = load_student(tmp_path / "two")
    assert trained.class_token
    assert not trained.student.deep_decoders
    shutil.rmtree(tmp_path / "two" / FOLDER)
    with pytest.raises(MilanError, match="are not in its folder statistics/"):
        milan.pretrain(str(own), out=str(tmp_path / "two"), **{**run, "epochs": 3})


def test_visible_patches_alone(store: Path, tmp_path: Path) -> None:
    """Nothing is decoded: the decoder's blocks stay as drawn. A store that cannot be written."""
    own = tmp_path / "own.zarr"
    shutil.copytree(store, own)
    (own / FOLDER).write_text("in the way: nothing can be written there, by root neither")
    before = tree(own)
    run = {**RUN, "predict": "visible", "target_norm": "standardise"}
    notes, out = Notes(), tmp_path / "run"
    milan.pretrain(str(own), out=str(out), progress=notes, **run)
    assert notes.line("target statistics: kept with the run")
    assert tree(own) == before
    digest = read_run(out)["identity"]["target_statistics"]
    found = find(out / FOLDER, TargetCache(own))
    assert found
    assert digest == [found.digest]
    drawn = load_student(out, drawn=RUN.get("seed", 0)).student.decoder.blocks.state_dict()
    trained = load_student(out)
    assert not trained.class_token
    for name, value in trained.student.decoder.blocks.state_dict().items():
        assert torch.equal(value, drawn[name]), name
    with safe_open(out / "encoder.safetensors", "pt") as file:
        assert file.metadata()["pooling"] == '"mean"'


def test_pictures_show_what_is_learnt(cache: TargetCache) -> None:
    """The teacher's features and the student's on the whole grid; not learnt is not a number."""
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).clamp(1e-6)
    rows = np.array([0, 1])
    targets = cache.read(rows, 0 * rows)
    batch = Batch(
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor(targets.attention), noise,
        torch.tensor(rows), torch.tensor(0 * rows), torch.tensor(targets.codes),
        torch.tensor(targets.scale),
    )  # fmt: skip
    raw = cache.codec.decode(batch.codes, batch.scale)[:, 1:]
    for predict in ("all", "visible", "masked"):
        settings = resolve_defaults(
            PretrainConfig("", **STUDENT, predict=predict, target_norm="phi-s"), torch.device("cpu")
        )
        objective, student = settings.objective(cache), student_of(settings, cache)
        prediction = objective.predict(student, batch)
        features, predicted = objective.picture(prediction)
        torch.testing.assert_close(features, raw)
        hidden, gone = prediction.mask.boolean(), predicted.isnan().all(-1)
        known = {"all": ~hidden | hidden, "visible": ~hidden, "masked": hidden}[predict]
        assert torch.equal(gone, ~known)
        assert float(objective.loss(prediction).detach()) > 0
        assert peak_bytes(student, settings, cache, torch.device("cpu"), 2) > 0


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"objective": "pixels", "loss": "smooth-l1"}, "loss with objective pixels"),
        ({"objective": "rils", "predict": "masked"}, "predict with objective rils"),
        ({"objective": "rils-cached", "target_norm": "none"}, "target_norm with objective rils-c"),
        ({"objective": "rils-cached", "gather": "full"}, "gather with objective rils-cached"),
        ({"objective": "pixels", "deep_supervision": "1"}, "deep_supervision with objective pix"),
        ({"deep_supervision": "1,1"}, "deep_supervision '1,1'"),
        ({"deep_supervision": "first"}, "deep_supervision 'first'"),
        ({"deep_supervision": "2"}, "deep_supervision 2 with a student of 2 blocks"),
        ({"predict": "visible", "decode_fraction": 0.5}, "decode_fraction 0.5 with predict visi"),
        ({"predict": "masked", "class_weight": -1.0}, "class_weight -1"),
        ({"loss": "huber"}, "loss 'huber'"),
        ({"class_weight": 1.0, "bare": True}, "class_weight 1 with .* without class token"),
    ],
)
def test_what_cannot_be_is_refused(
    given: dict[str, Any], why: str, cache: TargetCache, tmp_path: Path
) -> None:
    """In one line, before a run begins."""
    args = {**STUDENT["model_args"]}
    if given.pop("bare", False):
        args |= {"class_token": False, "global_pool": "avg"}
    config = PretrainConfig("", **{**STUDENT, "model_args": args}, **given)

    def begin() -> None:
        config.check()
        student_of(resolve_defaults(config, torch.device("cpu")), cache)

    with pytest.raises(MilanError, match=why):
        begin()


def test_flags_and_a_student_without_class_token(store: Path, tmp_path: Path) -> None:
    """As words of the command, on another grid; and a run of before the options goes on."""
    line = [
        "pretrain", "--cache", store, "--out", tmp_path / "run", "--loss", "smooth-l1", "--predict",
        "both", "--deep-supervision", "1", "--epochs", "2", "--batch-size", "8", "--num-workers",
        "0", "--report-to", "none", "--lr", "1e-3",
    ]  # fmt: skip
    args = {**STUDENT["model_args"], "patch_size": 4, "class_token": "false", "global_pool": "avg"}
    sets = [f"model.{name}={value}" for name, value in args.items()]
    sets += [f"decoder.{name}={value}" for name, value in STUDENT["decoder"].items()]
    for item in sets:
        line += ["--set", item]
    ran = run_here(*line, "--dry-run")
    assert ran.code == 0, ran.err
    ran = run_here(*line)
    assert ran.code == 0, ran.err
    assert not (store / FOLDER).exists()
    assert all(np.isfinite(entry["loss"]) for entry in log_of(tmp_path / "run") if "loss" in entry)
    content = json.loads((tmp_path / "run/run.json").read_text())
    assert content["config"]["deep_supervision"] == "1"


def test_runs_of_before_go_on(store: Path, tmp_path: Path) -> None:
    """A run that does not name the options has their defaults."""
    run = {**RUN, "out": str(tmp_path / "run")}
    milan.pretrain(str(store), stop_after=1, **run)
    content = read_run(tmp_path / "run")
    for name in FeatureRegression.settings:
        del content["identity"][name]
    write_run(tmp_path / "run", content)
    assert milan.pretrain(str(store), **run)["finished"]
    assert statistics_of(TargetCache(store)).views[0] == 24  # asked for, and not written
    assert not (store / FOLDER).exists()


@pytest.mark.soak
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("more", [EVERYTHING, {"predict": "visible"}], ids=["all", "visible"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_does(
    parallel: str, more: dict[str, Any], copy: Path, tmp_path: Path
) -> None:
    """Deep decoders, frozen blocks and statistics, which all ranks have from the first."""
    run = {**RUN, **more}
    milan.pretrain(str(copy), out=str(tmp_path / "one"), **run)
    milan.pretrain(str(copy), out=str(tmp_path / "two"), devices=2, parallel=parallel, **run)
    ours, theirs = ([line["loss"] for line in log_of(tmp_path / name)] for name in ("two", "one"))
    assert ours == pytest.approx(theirs, rel=1e-4)
