"""Fine-tuning: the published recipe's parts, and the pretraining's promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import At, Notes, log_of, make_photos, run_here
from safetensors.torch import load_file
from torch.nn import functional as F

import milan
from milan.core.device import MEAN, STD, normalise
from milan.core.signals import Stop
from milan.data.sampler import Address, Kind
from milan.errors import ConfigError, DataError, TrainError
from milan.evaluation.config import FinetuneConfig
from milan.evaluation.splits import open_splits
from milan.models.classifier import CLASSIFIER, load_classifier
from milan.models.foreign import Weights
from milan.models.weights import find_weights
from milan.training.finetune import classifier_of, finetune
from milan.training.finetune_data import Augmentation, LabelledImages
from milan.training.supervised import parameter_groups

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "model_args": VIT, "epochs": 3, "batch_size": 8,
    "num_workers": 0, "report_to": "none", "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images to train on and to measure on."""
    val = make_photos(tmp_path_factory.mktemp("val"), count=12, seed=1)
    return {"data": str(photos), "val_data": str(val)}


def run(images: dict[str, str], folder: Path, name: str = "a", **changes: Any) -> dict[str, Any]:
    return finetune("random", out=str(folder / f"{name}.json"), **SMALL | images | changes)


# --- the recipe -----------------------------------------------------------------------------------


def test_learning_rates_by_layer() -> None:
    """0.65^(13 - layer) for the 12 blocks of ViT-B; the head has the whole rate (MAE)."""
    config = FinetuneConfig()
    with torch.device("meta"):
        vit = classifier_of(Weights({}, "vit_base_patch16_224", 224), config, size=224, classes=10)
    names = {id(p): name for name, p in vit.named_parameters()}
    seen = {}
    for group in parameter_groups(vit, config):
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert seen.keys() == dict(vit.named_parameters()).keys()
    for name, (scale, decay) in seen.items():
        layer = 13
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        assert scale == pytest.approx(0.65 ** (13 - layer)), name
        plain = name in ("cls_token", "pos_embed") or name.endswith("bias") or "norm" in name
        assert decay == (0 if plain else 0.05), name


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_the_encoder_is_kept_and_the_head_is_new(
    pooling: str, finished_run: Callable[..., Path]
) -> None:
    """Patches averaged, a norm of its own, the head; or the class token after the old norm."""
    run = finished_run()
    weights = find_weights(str(run), flag="--checkpoint", model="")
    config = FinetuneConfig(str(run), pooling=pooling, drop_path=0.0)
    vit = classifier_of(weights, config, size=weights.size, classes=3).eval()
    encoder = milan.load_encoder(run)
    images = torch.randn(2, 3, weights.size, weights.size)
    with torch.no_grad():
        logits, tokens = vit(images), encoder.forward_features(images)
        if pooling == "token":
            assert torch.equal(logits, vit.head(tokens[:, 0]))
        else:
            encoder.norm = torch.nn.Identity()
            mean = encoder.forward_features(images)[:, 1:].mean(dim=1)
            assert (logits - vit.head(vit.fc_norm(mean))).abs().max() < 1e-5
    assert 0.01 < vit.head.weight.std() < 0.03
    assert vit.pos_embed.requires_grad
    larger = classifier_of(weights, config, size=2 * weights.size, classes=3)
    assert larger.pos_embed.shape[1] == 1 + 4 * (vit.pos_embed.shape[1] - 1)


def test_the_step_is_timms(data: dict[str, str], tmp_path: Path) -> None:
    """Without augmentation a step is AdamW on the cross-entropy, each layer at its own rate."""
    plain: dict[str, Any] = {
        "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "auto_augment": "none", "hflip": 0.0,
        "scale": (1.0, 1.0), "drop_path": 0.0, "smoothing": 0.0, "epochs": 2, "lr": 1e-3,
        "batch_size": 24, "micro_batch": 24, "warmup_epochs": 0, "precision": "fp32",
    }  # fmt: skip
    run(data, tmp_path, **plain)
    config = FinetuneConfig("random", **SMALL | data | plain)
    vit = classifier_of(Weights({}, SMALL["model"], 32, VIT), config, size=32, classes=3).train()
    groups = parameter_groups(vit, config)
    for group in groups:
        group["lr"] = 1e-3 * group["lr_scale"]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    train, val = open_splits(config)
    augmentation = Augmentation(32, (1.0, 1.0), 0.0, "none", MEAN)
    source, rows = LabelledImages(train, val, augmentation, crop_share=0.875, seed=0), np.arange(24)
    losses = []
    for epoch in range(2):
        batch = source.load(Address(Kind.TRAIN, epoch, rows, rows * 0))
        loss = F.cross_entropy(vit(normalise(batch.pixels, MEAN, STD)), batch.labels)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    logged = [line["loss"] for line in log_of(tmp_path / "a")]
    np.testing.assert_allclose(logged, losses, rtol=1e-4)


# --- promises -------------------------------------------------------------------------------------


def test_it_learns_and_leaves_a_classifier(data: dict[str, str], tmp_path: Path) -> None:
    """The loss goes down; timm's classifier says what the metrics say."""
    figures = run(
        data, tmp_path, epochs=40, lr=1e-2, layer_decay=1.0, scale=(0.6, 1.0), mixup=0.0,
        cutmix=0.0, erasing=0.0, auto_augment="none", drop_path=0.0,
    )  # fmt: skip
    losses = [line["loss"] for line in log_of(tmp_path / "a")]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    low, high = figures["top1_interval"]
    assert low <= figures["top1"] <= high
    vit = load_classifier(tmp_path / "a")
    assert vit.class_names == ["class 0", "class 1", "class 2"]
    cfg = timm.data.resolve_model_data_config(vit)
    _, val = open_splits(FinetuneConfig("random", **data))
    source = LabelledImages(
        val, val, Augmentation(32, (1, 1), 0, "none", cfg["mean"]), crop_share=0.875, seed=0
    )
    rows = np.arange(12)
    batch = source.load(Address(Kind.VALIDATION, 0, rows, rows * 0))
    with torch.no_grad():
        best = vit(normalise(batch.pixels, cfg["mean"], cfg["std"])).argmax(dim=1)
    right = (best == batch.labels).float().mean().item()
    assert round(100 * right, 2) == figures["top1"]
    rows_of = (tmp_path / "a/classes.csv").read_text().splitlines()
    assert rows_of[0] == "class,images,correct,top1"
    assert sum(int(line.split(",")[2]) for line in rows_of[1:]) == round(12 * right)


def test_resumed_it_is_the_same_run(data: dict[str, str], tmp_path: Path) -> None:
    """Stopped at a step and called again: the same weights to the bit, average included."""
    run(data, tmp_path, "whole", ema=0.9)
    stop = Stop()
    half = run(data, tmp_path, "half", ema=0.9, stop=stop, progress=At(4, lambda: stop.request(15)))
    assert half == {"stopped_by": "SIGTERM"}
    assert not (tmp_path / "half/classifier.safetensors").exists()
    notes = Notes()
    figures = run(data, tmp_path, "half", ema=0.9, progress=notes)
    assert "resuming: " in str(notes.lines)
    whole, parts = (load_file(tmp_path / name / CLASSIFIER) for name in ("whole", "half"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert log_of(tmp_path / "whole")[-1]["loss"] == log_of(tmp_path / "half")[-1]["loss"]
    # Once more: nothing is trained, the figures are the same.
    assert run(data, tmp_path, "half", ema=0.9) == figures


def test_a_run_killed_before_its_metrics(data: dict[str, str], tmp_path: Path) -> None:
    """The classifier is measured again, and not trained; also where its file was lost or cut."""
    figures = run(data, tmp_path)
    weights = (tmp_path / "a" / CLASSIFIER).read_bytes()
    for name in ("metrics.json", CLASSIFIER):
        (tmp_path / "a" / name).unlink()
    again = run(data, tmp_path)
    for damage in (Path.unlink, lambda path: path.write_bytes(weights[:-9])):
        damage(tmp_path / "a" / CLASSIFIER)
        assert run(data, tmp_path) == again
        assert (tmp_path / "a" / CLASSIFIER).read_bytes() == weights
    assert {k: again[k] for k in ("top1", "val_images")} == {
        k: figures[k] for k in ("top1", "val_images")
    }
    assert (tmp_path / "a" / CLASSIFIER).read_bytes() == weights


@pytest.mark.soak
def test_two_ranks_are_one(
    data: dict[str, str], tmp_path: Path, finished_run: Callable[..., Path], forked_ranks: None
) -> None:
    """Without what is drawn for a micro-batch, losses and metrics are those of one rank, of the
    baseline too, for which the ranks stay together."""
    same: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0}
    figures = {}
    for name, ranks in (("one", {}), ("two", {"devices": 2, "device": "cpu"})):
        settings = SMALL | data | {"epochs": 1, "micro_batch": 4} | same | ranks
        figures[name] = finetune(
            str(finished_run()), out=str(tmp_path / f"{name}.json"), **settings
        )
    for part in ("", "random"):
        losses = ([line["loss"] for line in log_of(tmp_path / name / part)] for name in figures)
        np.testing.assert_allclose(*losses, rtol=1e-5)
    one, two = figures.values()
    assert one["top1"] == two["top1"]
    assert one["baseline"]["top1"] == two["baseline"]["top1"]


def test_ranks_that_crashed_go_on(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was to be replaced is replaced once, not again at each restart."""
    run(data, tmp_path, epochs=1)
    asked = []

    def crash(work: Any, arguments: dict[str, Any], **how: Any) -> dict[str, Any]:
        asked.append(how["restart_arguments"]())  # it crashed before it had begun
        work(**arguments | {"config": replace(arguments["config"], devices=1)})
        asked.append(how["restart_arguments"]())
        return {}

    monkeypatch.setattr("milan.training.supervised_run.launch", crash)
    run(data, tmp_path, epochs=1, lr=1e-3, overwrite=True, devices=2, device="cpu")
    assert asked[0] == {}
    assert asked[1]["config"].overwrite is False


def test_a_random_encoder_beside(
    data: dict[str, str], tmp_path: Path, finished_run: Callable[..., Path]
) -> None:
    """The same network as timm initialises it is trained after it; both go on together."""
    settings = SMALL | data | {"epochs": 1, "out": str(tmp_path / "a.json")}
    figures = finetune(str(finished_run()), **settings)
    beside = figures["baseline"]
    assert (beside["checkpoint"], beside["run"]) == ("random", str(tmp_path / "a/random"))
    assert beside["finished"]
    notes = Notes()
    again = finetune(str(finished_run()), **settings, progress=notes)
    assert again["baseline"]["top1"] == beside["top1"]
    assert "now the baseline" in notes.line("measured: ")


def test_more_epochs(data: dict[str, str], tmp_path: Path) -> None:
    """A finished fine-tuning goes on by the longer schedule, and says so."""
    run(data, tmp_path, epochs=1, warmup_epochs=0)
    before, notes = (tmp_path / "a/metrics.json").read_bytes(), Notes()
    figures = run(data, tmp_path, epochs=2, warmup_epochs=0, progress=notes)
    assert figures["epochs"] == 2
    assert notes.line("resuming: ").endswith("a new schedule from there: epochs 1 -> 2")
    (tmp_path / "a/metrics.json").write_bytes(before)  # killed before it wrote its own
    assert run(data, tmp_path, epochs=2, warmup_epochs=0)["epochs"] == 2


def test_augmentation_is_addressed(data: dict[str, str]) -> None:
    """The same in any process and order; another in the next epoch; global draws undisturbed."""
    train, val = open_splits(FinetuneConfig("random", **data))
    augmentation = Augmentation(32, (0.08, 1.0), 0.5, "rand-m9-mstd0.5-inc1", (0.5, 0.5, 0.5))

    def pixels(rows: list[int], epoch: int) -> torch.Tensor:
        source = LabelledImages(train, val, augmentation, crop_share=1.0, seed=0)
        chosen = np.array(rows)
        return source.load(Address(Kind.TRAIN, epoch, chosen, chosen * 0)).pixels

    state = torch.get_rng_state()
    both, alone = pixels([3, 4], 0), pixels([4], 0)
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(alone, pixels([4], 1))
    assert torch.equal(state, torch.get_rng_state())
    for epoch in range(60):  # magnitudes above 10 leave posterize no bit
        pixels([0], epoch)


# --- bad input ------------------------------------------------------------------------------------


def test_what_is_refused(data: dict[str, str], tmp_path: Path) -> None:
    """One line each, before a folder is made."""
    one_class = make_photos(tmp_path / "one", count=8)
    for folder in sorted(one_class.iterdir())[1:]:
        for file in folder.iterdir():
            file.rename(sorted(one_class.iterdir())[0] / f"{folder.name}{file.name}")
        folder.rmdir()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"batch_size": 25}, ConfigError, "batch size 25 with 24 images"),
        ({"batch_size": 7}, ConfigError, "7 images a rank"),
        ({"data": str(one_class), "val_data": None}, DataError, "are of one class"),
        ({"auto_augment": "rand-nonsense"}, ConfigError, "auto_augment rand-nonsense"),
        ({"scale": (0.5, 0.1)}, ConfigError, "scale 0.5 0.1"),
        ({"warmup_epochs": 3}, ConfigError, "warmup_epochs 3"),
        ({"size": 30}, ConfigError, "size 30 with patches of 8 pixels.*try: --size 32"),
    ]
    for changes, kind, said in cases:
        with pytest.raises(kind, match=said):
            run(data, tmp_path, **changes)
        assert not (tmp_path / "a").exists(), said
    with pytest.raises(ConfigError, match="checkpoint teacher") as error:
        finetune("teacher", **data, batch_size=8, out=str(tmp_path / "a.json"))
    assert error.value.fix.startswith("--checkpoint FOLDER, where config.json and weights")


def test_other_settings_are_another_run(data: dict[str, str], tmp_path: Path) -> None:
    """Refused with what differs, and replaced where that is asked for."""
    run(data, tmp_path, epochs=1)
    with pytest.raises(TrainError, match=r"other settings \(layer_decay: 0.65 != 0.75\)"):
        run(data, tmp_path, epochs=1, layer_decay=0.75)
    with pytest.raises(TrainError, match=r"\(warmup_epochs: 0.05 != 0.3, scale: 0.08,1 != 0.5,1\)"):
        run(data, tmp_path, epochs=1, warmup_epochs=0.1 * 3, scale=(0.5, 1.0))
    figures = run(data, tmp_path, epochs=1, layer_decay=0.75, overwrite=True)
    assert figures["finished"]
    config = json.loads((tmp_path / "a/run.json").read_text())["config"]
    assert config["layer_decay"] == 0.75


def test_an_image_that_cannot_be_read(data: dict[str, str], tmp_path: Path) -> None:
    """Counted and said; another stands in for it, also in a batch of one."""
    broken = make_photos(tmp_path / "broken")
    victim = sorted(broken.rglob("*.jpg"))[5]
    victim.write_bytes(victim.read_bytes()[:200])
    notes = Notes()
    figures = run(data, tmp_path, epochs=1, data=str(broken), progress=notes)
    assert figures["rejected_images"] == 1
    assert f"the first is {victim.relative_to(broken)}" in str(notes.lines)
    figures = run(
        data, tmp_path, "one", epochs=1, data=str(broken), micro_batch=1, mixup=0, cutmix=0
    )
    assert figures["rejected_images"] == 1


def test_images_that_no_rank_can_read_are_counted_once(
    data: dict[str, str], tmp_path: Path, forked_ranks: None
) -> None:
    """Of two ranks each sees some of them."""
    broken = make_photos(tmp_path / "broken")
    for victim in sorted(broken.rglob("*.jpg"))[:6]:
        victim.write_bytes(victim.read_bytes()[:200])
    two: dict[str, Any] = {"devices": 2, "device": "cpu", "baseline": "none"}
    figures = run(data, tmp_path, epochs=1, data=str(broken), **two)
    assert figures["rejected_images"] == 6


def test_the_command(data: dict[str, str], tmp_path: Path) -> None:
    """Metrics beside the encoder, a table, and the same line once more."""
    line = ["finetune", "--checkpoint", "random", "--model", SMALL["model"]]
    line += [word for key, value in VIT.items() for word in ("--set", f"model.{key}={value}")]
    line += ["--data", data["data"], "--val-data", data["val_data"], "--epochs", "1"]
    line += ["--batch-size", "8", "--num-workers", "0"]
    done = run_here(*line, cwd=tmp_path)
    assert (done.code, done.err) == (0, ""), done.err
    assert "Fine-tuning" in done.out
    assert "differs from the published recipe vit_base" in done.out
    metrics = json.loads((tmp_path / "runs/random/finetune.json").read_text())
    assert metrics["run"] == "runs/random/finetune"
    assert (tmp_path / "runs/random/finetune" / CLASSIFIER).is_file()
    assert list((tmp_path / "runs/random/finetune/tensorboard").iterdir())
    again = run_here(*line, cwd=tmp_path)
    assert "nothing is left to do" in again.out
