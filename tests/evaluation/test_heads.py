"""Probes that are trained in steps: published linear probes, the attentive probe, their order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Notes, alone_and_as_ranks, make_photos, run_here
from torch import nn
from torch.nn import functional as F

from milan.core.device import MEAN as MEAN_OF_PIXELS
from milan.core.device import STD, normalise
from milan.core.distributed import Ranks
from milan.core.signals import Stop
from milan.errors import ConfigError, DataError, MilanError
from milan.evaluation import features
from milan.evaluation.attentive_probe import ClassQueries, OneQuery
from milan.evaluation.config import AttentiveProbeConfig, EvaluationConfig, LinearProbeConfig
from milan.evaluation.evaluate import evaluate
from milan.evaluation.evaluation import Evaluation
from milan.evaluation.features import Context, Features, File, Labelled, _Files
from milan.evaluation.frozen import Frozen, frozen_encoder
from milan.evaluation.heads import Head, Steps, best_of, train_heads
from milan.evaluation.linear_probe import linear_probe, measure, measure_classifier
from milan.evaluation.published_probes import WholeBatchNorm, fit_dinov2, fit_published
from milan.evaluation.shuffled import Shuffled
from milan.models.export import load_encoder

CPU = Context(torch.device("cpu"))
TOKEN, MEAN = "class token", "mean of patches"


def kept(folder: Path, x: torch.Tensor, labels: np.ndarray, *, rows: int = 16) -> Labelled:
    """Features [n, ...] with labels [n], in files of so many rows."""
    folder.mkdir(parents=True)
    files = _Files(folder, "key", len(x), rows)
    for number, own in enumerate(files.ranges):
        files.write(number, File(x[own].clone(), own, own.astype(np.uint64), []))
    return Labelled(Features(files, "drawn"), np.arange(len(x)), labels)


def drawn(
    folder: Path, config: EvaluationConfig, *, parts: tuple[str, ...], told: int, images: int = 300
) -> Evaluation:
    """Noise of 4 features a part, and of part `told` the class: 3 classes that are easily told."""
    generator = torch.Generator().manual_seed(2)
    split = []
    for name, count in (("train", images), ("val", 90)):
        labels = np.arange(count) % 3
        x = torch.randn(count, 4 * len(parts), generator=generator)
        x[:, 4 * told : 4 * told + 3] += 4 * F.one_hot(torch.from_numpy(labels), 3)
        split.append(kept(folder / name, x, labels))
    frozen = Frozen(lambda pixels: pixels, 8, "drawn", None, None, parts)
    return Evaluation(config, frozen, *split, 3, CPU, ("a", "b", "c"))


# --- the order of images --------------------------------------------------------------------------


def test_each_epoch_has_each_image_once_on_any_ranks(tmp_path: Path) -> None:
    """Steps are the same whatever the number of ranks, differ between epochs, and have as many
    images each as can be; what is left out never comes."""
    n, step_images = 70, 16
    x = torch.arange(n, dtype=torch.float32)[:, None]
    data = kept(tmp_path / "a", x, np.arange(n) % 7)
    data = replace(data, places=data.places[5:], labels=data.labels[5:])  # a split of the files

    def steps_of(ranks: int, epoch: int) -> list[list[float]]:
        together: list[list[float]] = []
        for rank in range(ranks):
            context = replace(CPU, ranks=Ranks(rank, ranks))
            images = Shuffled(
                data, context, step_images=step_images, seed=1, wanted=lambda at: at % 10 > 0
            )
            for i, batch in enumerate(images.epoch(epoch)):
                assert (batch.x[:, 0] % 7 == batch.y).all()
                together += [[]] * (i == len(together))
                together[i] = together[i] + batch.x[:, 0].tolist()
                sizes.append(batch.images)
        return [sorted(step) for step in together]

    sizes = list[int]()
    alone = steps_of(1, 0)
    assert sizes == [len(step) for step in alone]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= step_images
    expected = [row for row in range(5, n) if (row - 5) % 10 > 0]
    assert sorted(chain(*alone)) == expected
    assert steps_of(3, 0) == alone
    assert steps_of(1, 0) == alone
    other = steps_of(1, 1)
    assert sorted(chain(*other)) == expected
    assert other != alone


def test_heads_learn_as_each_would_alone(tmp_path: Path) -> None:
    """Two heads in the same passes have the weights of two trainings by torch alone."""
    config = LinearProbeConfig(seed=4)
    evaluation = drawn(tmp_path, config, parts=("features",), told=0, images=64)
    rates = (0.5, 0.02)

    def linear() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(4, 3)

    heads = [Head(m := linear(), [{"params": list(m.parameters()), "lr": lr}]) for lr in rates]
    steps = Steps(3, 16, lambda groups: torch.optim.SGD(groups, momentum=0.9), warmup=1)
    train_heads(evaluation, heads, steps, "heads")
    for head, rate in zip(heads, rates, strict=True):
        module = linear()
        optimiser = torch.optim.SGD(module.parameters(), lr=0, momentum=0.9)
        images = Shuffled(evaluation.train, CPU, step_images=16, seed=4)
        for epoch in range(3):
            for i, batch in enumerate(images.epoch(epoch)):
                at = epoch + (i + 0.5) / 4
                share = at if at < 1 else 0.5 * (1 + np.cos(np.pi * (at - 1) / 2))
                optimiser.param_groups[0]["lr"] = rate * share
                optimiser.zero_grad()
                F.cross_entropy(module(batch.x), batch.y).backward()
                optimiser.step()
        torch.testing.assert_close(head.module.weight, module.weight)  # type: ignore[union-attr]
    assert not torch.equal(heads[0].module.weight, heads[1].module.weight)  # type: ignore[arg-type]


def test_ranks_add_up_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The normalisation of a batch of two ranks is that of torch's own over the whole batch."""
    x = torch.randn(24, 5) * 3 + 1
    theirs = nn.BatchNorm1d(5, affine=False, eps=1e-6)
    ours = [WholeBatchNorm(5, Ranks(rank, 2)) for rank in range(2)]
    sums: list[torch.Tensor] = []
    for _ in range(3):
        expected = theirs(x)
        monkeypatch.setattr(Ranks, "add_up", lambda _, own: sums.append(own.clone()))
        for norm, part in zip(ours, (x[:7], x[7:]), strict=True):
            before = norm.mean.clone(), norm.variance.clone()
            norm(part)
            norm.mean, norm.variance = before
        total = sums[-2] + sums[-1]
        monkeypatch.setattr(Ranks, "add_up", lambda _, own, total=total: own.copy_(total))
        got = torch.cat([n(part) for n, part in zip(ours, (x[:7], x[7:]), strict=True)])
        torch.testing.assert_close(got, expected)
    for norm in ours:
        torch.testing.assert_close(norm.eval()(x), theirs.eval()(x))


# --- protocols of papers --------------------------------------------------------------------------


def test_the_published_probe_is_the_published_program(tmp_path: Path) -> None:
    """The class token, batch normalisation of torch's, LARS by its formula, warm-up and cosine: the
    same weights."""
    config = LinearProbeConfig(protocol="published", epochs=4, seed=3)
    evaluation = drawn(tmp_path, config, parts=(TOKEN, MEAN), told=0, images=256)
    module, settings = fit_published(evaluation)
    assert settings == {"epochs": 4, "step_images": 64, "lr": 3.2}
    assert measure(evaluation)["protocol"] == "published"
    torch.manual_seed(3)
    linear, norm = nn.Linear(4, 3), nn.BatchNorm1d(4, affine=False, eps=1e-6)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    moments = [torch.zeros(3, 4), torch.zeros(3)]
    images = Shuffled(evaluation.train, CPU, step_images=64, seed=3)
    for epoch in range(4):
        for i, batch in enumerate(images.epoch(epoch)):
            at = epoch + (i + 0.5) / images.steps
            lr = 3.2 * (at / 2 if at < 2 else 0.5 * (1 + np.cos(np.pi * (at - 2) / 2)))
            linear.zero_grad()
            F.cross_entropy(linear(norm(batch.x[:, :4])), batch.y).backward()
            with torch.no_grad():
                for p, moment in zip(linear.parameters(), moments, strict=True):
                    trust = 0.001 * p.norm() / p.grad.norm() if p.ndim > 1 else 1
                    p -= lr * moment.mul_(0.9).add_(trust * p.grad)
    assert images.steps == 4
    x = evaluation.table(evaluation.val)[0]
    torch.testing.assert_close(module(x), linear(norm.eval()(x[:, :4])), rtol=1e-4, atol=1e-5)


PARTS: dict[str, tuple[tuple[str, ...], int, dict[str, Any]]] = {
    "an early block": ((TOKEN,) * 4 + (MEAN,), 1, {"blocks": 4}),
    "the mean of patches": ((TOKEN,) * 4 + (MEAN,), 4, {"mean_of_patches": True}),
    "one block": ((TOKEN, MEAN), 0, {"blocks": 1}),
    "no class token": ((MEAN,) * 4, 3, {"mean_of_patches": False}),
    "a network of somebody's": (("features",), 0, {"blocks": 1, "mean_of_patches": False}),
}


@pytest.mark.parametrize("case", PARTS)
def test_the_grid_finds_what_tells_classes(case: str, tmp_path: Path) -> None:
    """Wherever the class is, a setting that sees it is chosen, by training images alone."""
    parts, told, expected = PARTS[case]
    config = LinearProbeConfig(protocol="dinov2", step_images=100, epochs=12)
    evaluation = drawn(tmp_path, config, parts=parts, told=told)
    blind = replace(evaluation.val, labels=np.zeros(90, int))  # cannot help to choose
    module, chosen = fit_dinov2(replace(evaluation, val=blind))
    assert chosen.items() >= expected.items()
    figures = measure_classifier(
        evaluation, features.Share(evaluation.val, CPU), lambda x: module(x).detach()
    )
    assert figures["top1"] > 80


def test_a_rate_that_diverges(tmp_path: Path) -> None:
    """Weights that are no numbers are said, not scored."""
    evaluation = drawn(tmp_path, EvaluationConfig(), parts=("features",), told=0, images=40)

    def make() -> Head:
        module = nn.Linear(4, 3)
        return Head(module, [{"params": list(module.parameters()), "lr": 1e38}])

    steps = Steps(5, 8, lambda groups: torch.optim.SGD(groups, weight_decay=1e3))
    with pytest.raises(DataError, match="classifier of drawn diverged"):
        best_of(evaluation, [{}], make, steps, "classifier", otherwise={})


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"epochs": 3}, "epochs 3 with protocol logistic, which has none"),
        ({"protocol": "dinov2", "lr": 0.1}, "lr 0.1 with protocol dinov2"),
        ({"protocol": "lars"}, "protocol 'lars'"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], found: str) -> None:
    """Rather than ignored."""
    with pytest.raises(ConfigError, match=found):
        linear_probe("random", data="x", **settings)


# --- feature sets of encoders ---------------------------------------------------------------------


def test_features_of_blocks_and_patches(finished_run: Callable[..., Path]) -> None:
    """Class tokens of the last blocks after the final norm, as timm gives them; each set has an
    identity of its own; the last block's are those of the pooled set."""
    run, pixels = str(finished_run(epochs=2)), torch.randint(0, 256, (3, 32, 32, 3)).byte()
    found = {
        "pooled": frozen_encoder(EvaluationConfig(run), CPU.device),
        "blocks": frozen_encoder(LinearProbeConfig(run, protocol="dinov2"), CPU.device),
        "patches": frozen_encoder(AttentiveProbeConfig(run), CPU.device),
        "tokens": frozen_encoder(AttentiveProbeConfig(run, tokens="all"), CPU.device),
    }
    assert len({str(frozen.identity) for frozen in found.values()}) == 4
    assert found["pooled"].identity["features"] == "class token and mean of patches"  # type: ignore[index]
    x = {name: frozen.features(pixels) for name, frozen in found.items()}
    assert x["blocks"].shape == (3, 3 * 32)  # two blocks, for there are no more, and the mean
    assert found["blocks"].parts == (TOKEN, TOKEN, MEAN)
    torch.testing.assert_close(x["blocks"][:, 32:], x["pooled"])
    layers = load_encoder(run).get_intermediate_layers(
        normalise(pixels, MEAN_OF_PIXELS, STD), 2, norm=True, return_prefix_tokens=True
    )
    torch.testing.assert_close(x["blocks"][:, :32], layers[0][1][:, 0])
    assert not torch.allclose(x["blocks"][:, :32], x["blocks"][:, 32:64], atol=0.01)
    assert (x["patches"].shape, x["patches"].dtype) == ((3, 16, 32), torch.float16)
    torch.testing.assert_close(
        x["patches"].float().mean(dim=1), x["pooled"][:, 32:], atol=2e-3, rtol=0
    )
    assert torch.equal(x["tokens"][:, 1:], x["patches"])
    torch.testing.assert_close(x["tokens"][:, 0].float(), x["pooled"][:, :32], atol=2e-3, rtol=0)


# --- the attentive probe --------------------------------------------------------------------------


def test_queries_are_attention() -> None:
    """Scores of both kinds are those of torch's attention, with equal weights."""
    x, classes, heads = torch.randn(5, 9, 8), 3, 2
    own = ClassQueries(8, classes)
    nn.init.normal_(own.queries)
    for c in range(classes):
        found = F.scaled_dot_product_attention(own.queries[c].expand(5, 1, 8), x, x)[:, 0]
        expected = found @ own.weight[c] + own.bias[c]
        torch.testing.assert_close(own(x)[:, c], expected)
    one = OneQuery(8, classes, heads)
    nn.init.normal_(one.queries)
    parts = [
        F.scaled_dot_product_attention(one.queries[h].expand(5, 1, 8), x, x)[:, 0] @ one.values[h]
        for h in range(heads)
    ]
    torch.testing.assert_close(one(x), one.classifier(torch.cat(parts, dim=1)))


def spots(folder: Path, *, count: int, seed: int) -> Path:
    """Class folders of noise with one bright spot somewhere: its colour is the class."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = generator.integers(0, 120, (16, 16, 3))
        top, left = 4 * generator.integers(0, 4, 2)
        pixels[top : top + 4, left : left + 4, i % 3] += 130
        place = folder / "rgb"[i % 3] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place)
    return folder


class Tiles:
    """A network whose patches are mean colours of tiles, normalised; it counts its images."""

    def __init__(self) -> None:
        self.seen = 0
        self.frozen = Frozen(self.patches, 16, "tiles", {"network": "tiles"}, None, ("patches",))

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        tiles = pixels.float().view(len(pixels), 4, 4, 4, 4, 3).mean(dim=(2, 4))
        return (tiles.flatten(1, 2) / 255).half()


def test_attention_finds_what_is_somewhere(tmp_path: Path) -> None:
    """The same figures with patches on disk and computed in every pass; kept ones are read again,
    by the other kind of queries too, and those that are not kept take no room."""
    data, val = (spots(tmp_path / n, count=c, seed=c) for n, c in (("a", 90), ("b", 30)))
    shared = {"data": str(data), "val_data": str(val), "crop_share": 1.0, "epochs": 6}
    shared |= {"step_images": 16}

    def measured(keep: str, **more: Any) -> tuple[dict[str, Any], int]:
        network, folder = Tiles(), str(tmp_path / keep)
        got = evaluate(
            "attentive_probe", frozen=network.frozen, features=folder, keep=keep, progress=notes,
            **shared, **more,
        )  # fmt: skip
        return {key: value for key, value in got.items() if key != "seconds"}, network.seen

    notes = Notes()
    on_disk, seen = measured("1MB")
    assert seen == 90 + 30 + 2  # and a blank image for each set, for its shape
    assert on_disk["top1"] > 85
    assert on_disk["features"] == 3
    assert not any("computed in every pass" in line for line in notes.lines)
    live, seen = measured("1B")
    assert any("computed in every pass" in line for line in notes.lines)
    assert live == on_disk
    assert seen > 6 * 90
    sizes = [sum(f.stat().st_size for f in (tmp_path / k).rglob("*.sa*")) for k in ("1B", "1MB")]
    assert sizes[0] < sizes[1] / 2
    one, seen = measured("1MB", queries="one", heads=3)
    assert one["top1"] > 85
    assert seen == 2


def test_the_attentive_probe_as_a_command(
    photos: Path, finished_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Its metrics, tables and baseline, from a run's encoder."""
    ran = run_here(
        "attentive-probe", "--checkpoint", finished_run(epochs=2), "--data", photos, "--epochs", 2,
        "--out", tmp_path / "a.json",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    metrics = json.loads((tmp_path / "a.json").read_text())
    assert {"top1", "top1_interval", "lr", "weight_decay", "queries"} <= metrics["baseline"].keys()
    assert (tmp_path / "a/classes.csv").is_file()


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("protocol", "settings"),
    [
        ("attentive_probe", {"epochs": 2, "step_images": 8}),
        pytest.param(
            "attentive_probe", {"epochs": 1, "step_images": 8, "keep": "1B"}, marks=pytest.mark.soak
        ),
        ("linear_probe", {"protocol": "published", "epochs": 4, "lr": 1.0}),
        pytest.param("linear_probe", {"protocol": "dinov2", "epochs": 4}, marks=pytest.mark.soak),
    ],
)
def test_ranks_train_what_one_trains(
    protocol: str, settings: dict[str, Any], tmp_path: Path, finished_run: Callable[..., Path]
) -> None:
    """Two ranks, each with its part of every step: the same figures."""
    data = make_photos(tmp_path / "data", count=33)
    got = alone_and_as_ranks(
        protocol, 8, tmp_path, finished_run(epochs=2), data, baseline="none", **settings
    )
    assert got["ranks"] == got["alone"]


class StopsAt(Notes):
    """Asks to stop at a step of the training."""

    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self.stop = stop

    def begin(self, what: str, total: int, unit: str, *, done: int = 0) -> None:
        self.training = unit == "steps"

    def advance(self, done: int, figures: str = "") -> None:
        if self.training and done == 2:
            self.stop.request(15)


def test_a_stop_while_heads_are_trained(tmp_path: Path) -> None:
    """It ends within a step, and features stay."""
    data, stop, network = spots(tmp_path / "a", count=30, seed=1), Stop(), Tiles()
    settings = {"data": str(data), "features": str(tmp_path / "f"), "step_images": 8}
    ended = evaluate(
        "attentive_probe", frozen=network.frozen, stop=stop, progress=StopsAt(stop), **settings
    )
    assert ended == {"stopped_by": "SIGTERM"}
    again = Tiles()
    assert "top1" in evaluate("attentive_probe", frozen=again.frozen, **settings, epochs=1)
    assert again.seen == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a network of one vector": (
        {"frozen": Frozen(lambda p: p.float().mean(dim=(1, 2)), 8, "colours")},
        "colours gives one vector an image",
    ),
    "heads that divide nothing": ({"queries": "one", "heads": 2}, "heads 2 for patches of 3 chann"),
    "heads of no query": ({"heads": 8}, "heads 8 with queries class, which have none; try: --qu"),
    "a size that is none": ({"keep": "much"}, "'much' is not a size"),
    "an unknown kind": ({"queries": "two"}, "queries 'two'"),
    "label sets that differ": ({"val_data": "other"}, "classes of --val-data are not in --data"),
    "an empty split": ({"val_data": "other", "val_split": "test"}, "test"),
    "one class": ({"data": "a/r"}, "without a label"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_attentive_probe_refuses(case: str, tmp_path: Path) -> None:
    """In one line that says what would do."""
    settings, found = REFUSED[case]
    spots(tmp_path / "a", count=9, seed=1)
    spots(tmp_path / "other", count=3, seed=2)
    (tmp_path / "other/r").rename(tmp_path / "other/red")
    given = {"frozen": Tiles().frozen, "features": "none", "data": "a", **settings}
    given |= {k: str(tmp_path / given[k]) for k in ("data", "val_data") if k in given}
    with pytest.raises(MilanError, match=found) as refused:
        evaluate("attentive_probe", **given)
    assert "\n" not in str(refused.value)


def test_heads_that_divide_nothing_are_refused_before_features(tmp_path: Path) -> None:
    """By what the checkpoint says of itself."""
    spots(tmp_path / "a", count=9, seed=1)
    vit = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
    notes = Notes()
    with pytest.raises(MilanError, match=r"heads 3 for patches of 16 channels; .* --heads 2"):
        evaluate(
            "attentive_probe", "random", model_args=vit, data=str(tmp_path / "a"), queries="one",
            heads=3, features=str(tmp_path / "kept"), progress=notes,
        )  # fmt: skip
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("count", [3, 4, 7])
def test_few_images(count: int, tmp_path: Path) -> None:
    """Too few to choose settings by: the usual ones are taken, by every protocol."""
    data = spots(tmp_path / "a", count=count, seed=1)
    val = spots(tmp_path / "b", count=2, seed=9)
    shared = {"data": str(data), "val_data": str(val), "features": "none"}
    got = evaluate("attentive_probe", frozen=Tiles().frozen, epochs=1, **shared)
    assert (got["lr"], got["weight_decay"]) == (1e-2, 0.1)
    vectors = Frozen(lambda p: p.float().mean(dim=(1, 2)) / 255, 8, "colours")
    for protocol in ("published", "dinov2"):
        got = linear_probe(frozen=vectors, protocol=protocol, epochs=2, **shared)
        assert got["val_images"] == 2
