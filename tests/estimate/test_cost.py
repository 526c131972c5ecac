"""Tests of `milan plan`: its bytes are those of the run, its choices those that it states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import make_photos
from PIL import Image

from milan.core.progress import NoProgress
from milan.core.units import format_bytes, parse_bytes
from milan.errors import ConfigError
from milan.store.format import GENERATION, Index
from pipeline.config import ExtractConfig
from pipeline.estimate.accelerators import view_flop
from pipeline.estimate.cost import cost_of, estimate_cost, fit_budget, seconds_of
from pipeline.estimate.decoding import Decoding, measure_decoding
from pipeline.estimate.size import size_of_store
from pipeline.estimate.throughput import Throughput
from pipeline.extract import extract_targets
from pipeline.extraction.hardware import Workers
from pipeline.extraction.plan import Plan, plan
from pipeline.teachers.load import Teacher

SPEED = Throughput(image_seconds=0.5, teacher_seconds=0.1, write_rate=50e6, source="made up")


@pytest.fixture
def config(photos: Path, teacher_files: dict[str, str], tmp_path: Path) -> ExtractConfig:
    return ExtractConfig(
        str(photos), out=str(tmp_path / "t.zarr"), views=2, shard_size=8, batch_size=7,
        executor="local", **teacher_files,
    )  # fmt: skip


@pytest.fixture
def planned(config: ExtractConfig) -> Plan:
    return plan(config, NoProgress())


def on_disk(out: Path) -> tuple[int, int, int]:
    """(bytes, files, folders) of everything in a store's folder."""
    found = list(out.rglob("*"))
    files = [path for path in found if path.is_file()]
    return sum(f.stat().st_size for f in files), len(files), len(found) - len(files)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "shard_size", "views"), [("int8", 8, 2), ("float16", 5, 3), ("int8", 1024, 1)]
)
def test_the_plan_is_the_run(
    config: ExtractConfig, codec: str, shard_size: int, views: int
) -> None:
    """Everything in the store's folder within 2 %; files, folders and the shards' bytes exactly."""
    config = replace(config, codec=codec, shard_size=shard_size, views=views)
    sizes = size_of_store(plan(config, NoProgress()))
    extract_targets(config)
    total, files, folders = on_disk(Path(config.out))
    assert sizes.total == pytest.approx(total, rel=0.02)
    assert (sizes.files, sizes.folders) == (files, folders)
    (entry,) = Index.read(Path(config.out)).generations
    assert sizes.shards == entry.bytes
    assert sizes.manifest == (Path(config.out) / GENERATION / "manifest.parquet").stat().st_size


def test_the_plan_of_a_growing_store(
    config: ExtractConfig, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """What is there is not made again; what is added is counted like the rest."""
    photos = make_photos(tmp_path / "p", count=12)
    config = replace(config, data=str(photos))
    extract_targets(config)
    make_photos(tmp_path / "p", count=20)
    config = replace(config, views=4)
    tables = estimate_cost(config, images_per_second=1.0)
    assert dict(tables["Planned"])["still to write"].startswith("8 shards, ")
    sizes = size_of_store(plan(config, NoProgress()))
    extract_targets(config)
    total, files, folders = on_disk(Path(config.out))
    assert sizes.total == pytest.approx(total, rel=0.03)
    assert (sizes.files, sizes.folders) == (files, folders)
    assert "time" in dict(tables["Extraction"])
    done = estimate_cost(config, images_per_second=1.0)
    assert dict(done["Planned"])["still to write"].startswith("0 shards, 0 B")


def test_sizes_of_the_published_teacher(planned: Plan) -> None:
    """The figures that the documents state: 102,516 bytes a view, 131 GB of ImageNet-1k."""
    spec = replace(
        planned.parts[0].spec, rows=1_281_167, views=1, tokens=197, channels=512, shard_size=1024
    )
    assert spec.view_bytes() == 102_516
    assert spec.total_bytes() == pytest.approx(131.3e9, rel=0.001)
    assert spec.shards == 1252


def test_a_plan_of_400_million_images_takes_a_moment(planned: Plan) -> None:
    """Nothing in it grows with the images: records and tables are sampled."""
    part = planned.parts[0]
    spec = replace(part.spec, rows=400_000_000, tokens=197, channels=512, shard_size=1024, views=1)
    work = replace(planned, parts=[replace(part, spec=spec)])
    sizes = size_of_store(work)
    assert sizes.shards == pytest.approx(400e6 * 102_516, rel=0.001)
    assert sizes.files == pytest.approx(390_625 * 5, rel=0.001)
    assert sizes.records > 30e9


# --- time and reading -----------------------------------------------------------------------------


def test_time_is_that_of_the_teacher_or_of_the_disk(planned: Plan) -> None:
    """The slower of both; replicas share the teacher's part, not the disk."""
    left = [planned.parts[0].spec.shards]
    assert seconds_of(planned, Workers(1, 1, None), SPEED, left) == pytest.approx(24 * 0.5)
    assert seconds_of(planned, Workers(4, 1, None), SPEED, left) == pytest.approx(3)
    slow = replace(SPEED, write_rate=100.0)
    disk = planned.parts[0].spec.total_bytes() / 100
    assert seconds_of(planned, Workers(4, 1, None), slow, left) == pytest.approx(disk)
    assert seconds_of(planned, Workers(1, 1, None), SPEED, [3]) == pytest.approx(6)  # half is there


def test_what_training_needs_and_saves(planned: Plan) -> None:
    """0.5 s once against 0.1 s an epoch: break-even after 5; reads are rate x bytes."""
    rows = dict(cost_of(planned, Workers(1, 1, None), SPEED, train=1000)["Training from it"])
    assert rows["break-even"].startswith("5.0 epochs: ")
    a_view = planned.parts[0].spec.view_bytes()
    assert rows["reads"].startswith(f"{format_bytes(1000 * a_view)}/s of targets and ")
    assert rows["a step online"].startswith("101.00 times as long")
    assumed = dict(cost_of(planned, Workers(1, 1, None), SPEED)["Training from it"])
    assert "assumed" in assumed["training, images/s"]
    assert "a step online" not in assumed


SLOW, FAST = Decoding(0.1, 0.001, 30e3), Decoding(0.004, 0.001, 30e3)


def test_storing_views_is_recommended_where_decoding_starves(
    planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 ms at 6,000 images/s are 600 cores; with a speed that is given, this machine's count."""
    rows = dict(cost_of(planned, Workers(1, 1, None), SPEED, SLOW)["Training from it"])
    assert rows["decoding"] == (
        "600 cores at 100 ms a view of the originals, 96 assumed: NOT ENOUGH"
    )
    stored = rows["with --store-views jpeg:95"]
    assert stored == (
        "6 cores at 1 ms a view; about 30 KB more each, 1.44 MB in all, RECOMMENDED for a new store"
    )
    rows = dict(cost_of(planned, Workers(1, 1, None), SPEED, FAST)["Training from it"])
    assert rows["decoding"].endswith("96 assumed: enough")
    assert "RECOMMENDED" not in rows["with --store-views jpeg:95"]
    monkeypatch.setattr("pipeline.estimate.decoding.cpu_count", lambda: 8)
    assert [SLOW.is_bottleneck(train) for train in (79, 81)] == [False, True]
    assert "decoding" not in dict(cost_of(planned, Workers(1, 1, None), SPEED)["Training from it"])


def test_a_plan_with_stored_views_decodes_these(planned: Plan) -> None:
    """There is nothing left to recommend."""
    part = planned.parts[0]
    kept = replace(planned, parts=[replace(part, spec=replace(part.spec, stored_views="webp"))])
    rows = dict(cost_of(kept, Workers(1, 1, None), SPEED, SLOW)["Training from it"])
    assert rows["decoding"] == "6 cores at 1 ms a view as stored, 96 assumed: enough"
    assert not [what for what in rows if what.startswith("with")]


def test_decoding_is_measured(config: ExtractConfig, tmp_path: Path) -> None:
    """Large photographs cost much, their stored views do not; files that are no images nothing."""
    folder = tmp_path / "large"
    folder.mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((2000, 1500), Image.Resampling.BICUBIC)
    for i in range(3):
        image.save(folder / f"{i}.jpg")
    (folder / "none.jpg").touch()
    found = measure_decoding(plan(replace(config, data=str(folder)), NoProgress()))
    assert found is not None
    assert found.original > 5 * found.stored > 0
    assert 200 < found.bytes < 5000  # of 32 x 32 pixels
    small = measure_decoding(plan(config, NoProgress()))
    assert small is not None
    assert small.original < found.original / 3
    for path in folder.glob("?.jpg"):
        path.unlink()
    assert measure_decoding(plan(replace(config, data=str(folder)), NoProgress())) is None


def test_the_plan_and_the_budget_act_on_it(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured decides what `milan plan --budget` proposes."""
    monkeypatch.setattr("pipeline.estimate.cost.measure_throughput", lambda *_, **__: SPEED)
    for found, kept in ((SLOW, " --store-views jpeg:95"), (FAST, "")):
        monkeypatch.setattr("pipeline.estimate.cost.measure_decoding", lambda _, found=found: found)
        tables = estimate_cost(config, budget="2MB")
        (proposed,) = [row for what, row in tables["Within 2 MB"] if what == "proposed"]
        assert proposed == "--views 16 --codec int8" + kept
        assert "decoding" in dict(tables["Training from it"])


def test_the_measurement_leaves_nothing(config: ExtractConfig, tmp_path: Path) -> None:
    """Real images, teacher and disk; then the folder is as it was."""
    tables = estimate_cost(config)
    assert list(tmp_path.iterdir()) == []
    assert dict(tables["Extraction"])["throughput"].startswith("measured with ")


def test_given_rates_measure_nothing(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--images-per-second replaces the measurement."""
    monkeypatch.setattr(
        "pipeline.estimate.cost.measure_throughput", lambda *_, **__: pytest.fail("measured")
    )
    tables = estimate_cost(config, images_per_second=2.0, write_mb_per_second=10)
    rows = dict(tables["Extraction"])
    assert (rows["throughput"], rows["time"]) == ("given", "12.0 s")
    for name in ("images_per_second", "write_mb_per_second", "train_images_per_second"):
        for rate in (0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {rate:g};"):
                estimate_cost(config, **{name: rate})


SOURCES = "Where the figures come from"


def test_what_was_measured_and_what_was_assumed(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each assumption is named with its source; what is here is measured all the same."""
    given = estimate_cost(config, images_per_second=2.0)[SOURCES]
    assert [what for what, _ in given] == [
        "teacher, images, disk", "assumed", "assumed", "decoding", "training", "page cache",
    ]  # fmt: skip
    assert "all of an image's time is the teacher's" in given[1][1]
    assert "the store takes what is written" in given[2][1]
    assert dict(given)["training"].startswith("assumed, 6,000 images/s: the published 400 epochs")
    rates = {"write_mb_per_second": 10.0, "train_images_per_second": 9.0}
    told = estimate_cost(config, images_per_second=2.0, **rates)[SOURCES]
    assert [what for what, _ in told].count("assumed") == 1
    assert dict(told)["training"] == "given, with the cores of this machine"
    monkeypatch.setattr(Teacher, "targets", lambda *_: pytest.fail("the teacher ran"))
    tables = estimate_cost(config, accelerator="A100")
    rows = dict(tables[SOURCES])
    assert rows["teacher, images, disk"].endswith(", but the teacher")
    assert rows["assumed"].endswith("35% of the 312 TFLOP/s of NVIDIA's data sheet")
    assert "time" in dict(tables["Extraction"])
    both = estimate_cost(config, images_per_second=2.0, accelerator="rtx4090")
    assert "measured by timm" in both[SOURCES][1][1]
    with pytest.raises(ConfigError, match=r"--accelerator rtx409: .* -> rtx4090|rtx409.*rtx4090"):
        estimate_cost(config, accelerator="rtx409")


def test_gpus_that_are_not_here_are_not_guessed(
    planned: Plan, config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver without a GPU does not time its own CPU for the cluster's: bytes, and no hours."""
    away = replace(planned, hardware=replace(planned.hardware, on_gpu=True))
    monkeypatch.setattr("pipeline.estimate.cost.plan", lambda *_: away)
    measure = "pipeline.estimate.cost.measure_throughput"
    with monkeypatch.context() as patch:
        patch.setattr(measure, lambda *_, **__: pytest.fail("measured"))
        tables = estimate_cost(config)
    assert "bytes" in dict(tables["Planned"])
    assert dict(tables["Extraction"])["throughput"].startswith("unknown: its GPUs are not here")
    assert "time" not in dict(tables["Extraction"])
    assert not {"break-even", "400 epochs online"} & set(dict(tables["Training from it"]))
    monkeypatch.setattr(measure, lambda *_, accelerator: replace(SPEED, source=accelerator))
    assert (
        dict(estimate_cost(config, accelerator="h100")[SOURCES])["teacher, images, disk"] == "h100"
    )


def test_operations_of_a_teacher(planned: Plan) -> None:
    """The products of 2 blocks of width 32 for 17 tokens, of 16 patches and of 24 channels."""
    products = 2 * 17 * 12 * 32 * 32 + 16 * 192 * 32 + 17 * 32 * 24
    assert 2 * products <= view_flop(planned.teacher) < 2.2 * products


# --- a budget -------------------------------------------------------------------------------------


@pytest.fixture
def large(planned: Plan) -> Plan:
    """A million images of the published teacher's shape, on paper."""
    part = planned.parts[0]
    spec = replace(part.spec, rows=1_000_000, tokens=197, channels=512, shard_size=1024)
    return replace(planned, parts=[replace(part, spec=spec)])


@pytest.mark.parametrize(
    ("budget", "codec", "views"),
    [("2TB", "int8", 16), ("600GB", "int8", 5), ("300GB", "pq:64", 16), ("60GB", "pq:64", 4),
     ("40GB", "pq:32", 5), ("10GB", "pq:16", 2)],
)  # fmt: skip
def test_a_budget_prefers_views(large: Plan, budget: str, codec: str, views: int) -> None:
    """int8 with at most 16 views; pq where fewer than 4 would fit; and the proposal fits."""
    chosen, tables = fit_budget(large, budget)
    assert (chosen.config.codec, chosen.config.views) == (codec, views)
    assert size_of_store(chosen).total <= parse_bytes(budget)
    (rows,) = tables.values()
    assert rows[-1] == ("proposed", f"--views {views} --codec {codec}")


def test_a_budget_keeps_views_where_decoding_starves(large: Plan) -> None:
    """31 KB a view more: fewer views, still within; not at all where then none would fit."""
    part = large.parts[0]
    spec = replace(part.spec, view_law={**part.spec.view_law, "size": 224})
    large = replace(large, parts=[replace(part, spec=spec)])
    chosen, tables = fit_budget(large, "600GB", store_views=True)
    assert (chosen.config.codec, chosen.config.views) == ("int8", 4)
    assert chosen.config.store_views == chosen.parts[0].spec.stored_views == "jpeg:95"
    assert size_of_store(chosen).total <= 600e9
    (rows,) = tables.values()
    assert rows[-1] == ("proposed", "--views 4 --codec int8 --store-views jpeg:95")
    chosen, _ = fit_budget(large, "10GB", store_views=True)
    assert (chosen.config.codec, chosen.config.store_views) == ("pq:16", "none")


def test_a_budget_too_small(large: Plan) -> None:
    """The least that would do is named."""
    with pytest.raises(ConfigError, match=r"not one view of 1,000,000 images fits.*GB \(pq:16\)"):
        fit_budget(large, "1GB")


def test_a_budget_is_for_a_new_store(config: ExtractConfig) -> None:
    """Views of a store only grow: a smaller proposal could not be followed."""
    extract_targets(config)
    with pytest.raises(ConfigError, match="which has begun"):
        estimate_cost(config, budget="1GB")
