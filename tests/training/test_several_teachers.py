"""Several teachers in one run: layers of a store, and of stores that are joined by key."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting import waits_of_a_step
from helpers import EXTRACTION, SMALL, Notes, in_raster, log_of, weights
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import milan
from milan.config import PretrainConfig
from milan.core.progress import NoProgress
from milan.core.rng import teacher_noise
from milan.data.dataset import CachedDataset
from milan.data.loader import Batch, CachedBatches, FileChannel, SharedBatch
from milan.data.order import order_of
from milan.data.sampler import Address, Kind
from milan.errors import CacheError, ConfigError, MilanError
from milan.objectives.resample import resampled_features
from milan.objectives.teachers import SeveralTeachers, kept_teachers
from milan.reporting.run_files import read_run
from milan.reports.page import write_page
from milan.reports.pictures import PictureSettings, shown_of
from milan.reports.sources import Run, find_store
from milan.store.cache import TargetCache
from milan.store.joined import open_targets, short_names
from milan.training import compilation
from milan.training.build import Settings, resolve_defaults, student_of
from milan.training.estimate import estimate_run
from milan.training.memory import peak_bytes
from milan.training.trained import load_student
from pipeline.extract import extract_targets
from pipeline.prune import Drop, prune
from pipeline.zero_shot import zero_shot

CPU = torch.device("cpu")
OTHER: dict[str, Any] = {
    **EXTRACTION, "teacher": "timm:test_vit", "pretrained": "none", "codec": "float16",
}  # fmt: skip
"""A teacher of another width (64), patch (16 pixels) and codec."""
VIT = "timm:test_vit/float16"
WHOLE: dict[str, Any] = {"views": 1, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
"""The same crop of an image in whatever row it is."""
ROWS, VIEWS = np.array([3, 17, 0, 9]), np.array([1, 0, 0, 1])


@pytest.fixture(scope="module")
def layers(
    finished_store: Callable[..., Path], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A store of two teachers; the second saw the crops at 48 pixels, in 3 x 3 patches."""
    store = tmp_path_factory.mktemp("layers") / "t.zarr"
    shutil.copytree(finished_store(), store)
    extract_targets(str(photos), out=str(store), extend=True, img_size=48, **OTHER)
    return store


def both(store: Path, **more: Any) -> dict[str, Any]:
    """Settings of a short run with both teachers of `layers`."""
    clip = TargetCache(store).layer
    return {**SMALL, "layer": [clip, VIT], "held_out": 0.34, "report_to": "none", **more}


def settings_of(store: Path, **more: Any) -> Settings:
    given = both(store, **more)
    given["layer"] = ",".join(given["layer"])
    return resolve_defaults(PretrainConfig(str(store), **given), CPU)


def decoded(cache: TargetCache, rows: np.ndarray, views: np.ndarray) -> torch.Tensor:
    """A layer's own features, [B, T, C]."""
    targets = cache.read(rows, views)
    assert targets.codes is not None
    scale = None if targets.scale is None else torch.from_numpy(targets.scale)
    return cache.codec.decode(torch.from_numpy(targets.codes), scale)


# --- reading --------------------------------------------------------------------------------------


def test_layers_are_read_side_by_side(layers: Path) -> None:
    """As each is read alone; the first's pixels, and the attention of the layer that masks."""
    clip, vit = TargetCache(layers), TargetCache(layers, layer=VIT)
    joined = open_targets(layers, f"{clip.layer},{VIT}")
    again = open_targets(layers, f"{VIT},{clip.layer}", mask_layer=clip.layer)
    assert (joined.grid, vit.grid, joined.view_spec.size) == ((4, 4), (3, 3), 32)
    assert joined.digest not in (clip.digest, vit.digest, again.digest)
    assert joined.view_bytes == clip.spec.view_bytes() + vit.spec.view_bytes()
    assert short_names(joined) == [clip.layer.partition("/")[0], "timm-test_vit"]
    for cache, first, second in ((joined, clip, vit), (again, vit, clip)):
        found = pickle.loads(pickle.dumps(cache)).read(ROWS, VIEWS)  # as a loader worker has it
        assert np.array_equal(found.codes, first.read(ROWS, VIEWS).codes)
        assert np.array_equal(found.others[0].codes, second.read(ROWS, VIEWS).codes)
        assert np.array_equal(found.attention, clip.read(ROWS, VIEWS).attention)
        masks = cache.read(ROWS, VIEWS, features=False)
        assert masks.codes is None
        assert np.array_equal(masks.attention, found.attention)
    assert open_targets(layers, VIT).digest == vit.digest


def test_stores_are_joined_by_key(
    photos: Path, teacher_files: dict[str, str], layers: Path, tmp_path: Path
) -> None:
    """Rows are found by the image's name; what one lacks is left out; other views are refused."""
    some = tmp_path / "some"
    shutil.copytree(photos, some, ignore=shutil.ignore_patterns("class 2", "bild 00*"))
    a, b, other = tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "other.zarr"
    extract_targets(str(photos), out=str(a), **{**EXTRACTION, **teacher_files, **WHOLE})
    extract_targets(str(some), out=str(b), img_size=32, **{**OTHER, **WHOLE})
    first, second = TargetCache(a), TargetCache(b)
    joined = open_targets(a, f"{first.layer},{b}::")
    rows = joined.good_rows()
    assert len(rows) == 15
    assert joined.lacking() == [(f"{b} ({VIT})", 9)]  # type: ignore[attr-defined]
    keys = first.manifest.keys()
    there = np.array([second.manifest.keys().index(keys[row]) for row in rows.tolist()])
    assert (there != rows).any()
    zeros = np.zeros_like(rows)
    found = joined.read(rows, zeros)
    assert np.array_equal(found.codes, first.read(rows, zeros).codes)
    assert np.array_equal(found.others[0].codes, second.read(there, zeros).codes)
    with pytest.raises(CacheError, match=r"hflip 0.0 where .* has 0.5; .*--extend"):
        open_targets(layers, f"{TargetCache(layers).layer},{b}::")
    # By the same law other rows have other crops.
    extract_targets(str(some), out=str(other), img_size=32, **OTHER)
    with pytest.raises(CacheError, match=r"other pixels for view . of 'class"):
        open_targets(layers, f"{TargetCache(layers).layer},{other}::")
    # What the first look has not seen is seen when it is read.
    joined.places[1][rows[-2:]] = joined.places[1][rows[-2:]][::-1]  # type: ignore[attr-defined]
    joined.read(rows[:2], zeros[:2])
    with pytest.raises(CacheError, match="other pixels"):
        joined.read(rows, zeros)


def test_a_validation_row_stays_one_when_a_layer_gains_images(layers: Path) -> None:
    """Whatever the other layer lacks, validation images are those of the first layer."""
    clip = TargetCache(layers)
    joined = open_targets(layers, f"{clip.layer},{VIT}")
    whole = order_of(joined, seed=0, batch_size=4, held_out=0.34)
    assert np.array_equal(
        whole.validation_rows, order_of(clip, seed=0, batch_size=4, held_out=0.34).validation_rows
    )
    joined.places[1][:5] = -1  # type: ignore[attr-defined]
    some = order_of(joined, seed=0, batch_size=4, held_out=0.34)
    rows = np.arange(5, 24)
    assert np.array_equal(some.validation_rows, np.intersect1d(whole.validation_rows, rows))
    assert np.array_equal(some.train_rows, np.intersect1d(whole.train_rows, rows))


def test_a_batch_of_several_teachers_arrives_as_it_was(layers: Path) -> None:
    """From a loader worker, through one file; and with a draw for each teacher."""
    joined = open_targets(layers, f"{TargetCache(layers).layer},{VIT}")
    source = CachedBatches(CachedDataset(joined), 5, True, 16)
    batch = source.load(Address(Kind.TRAIN, 2, ROWS, VIEWS))
    expected = teacher_noise(5, np.full(4, 2), ROWS, VIEWS, 2)
    assert torch.equal(batch.drops, torch.from_numpy(expected))  # type: ignore[arg-type]
    channel = SharedBatch.channels[-3] = FileChannel()
    try:
        arrived = pickle.loads(pickle.dumps(SharedBatch(batch, -3, channel))).opened()
    finally:
        SharedBatch.channels.pop(-3).close()
    assert type(arrived) is Batch
    (codes, scale), (ours, _) = arrived.others[0], batch.others[0]
    assert scale is None
    assert codes.dtype == torch.float16
    assert torch.equal(codes, ours)
    assert torch.equal(arrived.drops, batch.drops)  # type: ignore[arg-type]


# --- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_mean_of_the_teachers(layers: Path) -> None:
    """Each by its own head on its own grid; with dropping over those that an image keeps."""
    settings = settings_of(layers, layer_weights="3,1")
    clip, vit = TargetCache(layers), TargetCache(layers, layer=VIT)
    joined = open_targets(layers, f"{clip.layer},{VIT}")
    student = student_of(settings, joined)
    assert student.decoder.heads is not None
    batch = CachedBatches(CachedDataset(joined), 0, True, 16).load(
        Address(Kind.TRAIN, 0, ROWS, VIEWS)
    )
    objective = settings.objective(joined)
    prediction = objective.predict(student, batch)
    features = [decoded(clip, ROWS, VIEWS), decoded(vit, ROWS, VIEWS)]
    features[1] = resampled_features(F.normalize(features[1], dim=-1), 16, 32)
    widths, first = [f.shape[2] for f in features], 0
    each = []  # [teachers][B]
    for width, target in zip(widths, features, strict=True):
        own = in_raster(prediction.tokens, prediction.mask)[..., first : first + width]
        each.append((2 - 2 * F.cosine_similarity(own, target, dim=-1)).mean(dim=1))
        first += width
    expected = (3 * each[0] + each[1]) / 4
    assert objective.loss(prediction).item() == pytest.approx(expected.mean().item(), abs=1e-6)
    metrics = objective.metrics(prediction)
    assert metrics["loss_timm-test_vit"].item() == pytest.approx(each[1].mean().item(), abs=1e-6)
    assert metrics["loss"].item() == pytest.approx(expected.mean().item(), abs=1e-6)
    target, said = objective.picture(prediction)
    assert target is not None
    assert target.shape == said.shape == (4, 16, sum(widths))
    # With all that can be dropped gone, each image has its worst teacher.
    dropping = settings_of(layers, teacher_dropping=1.0).objective(joined)
    worst = torch.stack(each).amax(dim=0).mean()
    assert dropping.loss(prediction).item() == pytest.approx(worst.item(), abs=1e-6)
    assert isinstance(dropping, SeveralTeachers)


@pytest.mark.parametrize("dropping", [0.0, 0.5])
def test_nothing_waits_for_a_gpu(
    layers: Path, dropping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of teachers are no tensor of the host that would be copied in each step."""
    given = settings_of(layers, teacher_dropping=dropping, layer_weights="1,0.5")
    cache = open_targets(layers, given.config.layer)
    assert waits_of_a_step(given, cache, monkeypatch) == {}


def test_the_worst_teacher_is_kept_and_others_at_the_rate() -> None:
    """At least one an image, drawn by address."""
    rows = np.arange(4000)
    drops = torch.from_numpy(teacher_noise(0, rows * 0, rows, rows * 0, 3))
    losses = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    kept = kept_teachers(losses, drops, 0.4).bool()
    worst = losses.argmax(dim=1)
    assert kept[torch.arange(4000), worst].all()
    others = kept[~F.one_hot(worst, 3).bool()].float().mean()
    assert abs(float(others) - 0.6) < 4 * (0.24 / 8000) ** 0.5
    assert kept_teachers(losses, drops, 0.0).all()


# --- whole runs -----------------------------------------------------------------------------------


def test_a_run_resumes_to_the_bit_and_says_what_each_teacher_taught(
    layers: Path, photos: Path, tmp_path: Path
) -> None:
    """Stopped, and with a local cache, it ends as if it had not been; its store is found again."""
    notes = Notes()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = both(layers, teacher_dropping=0.5, layer_weights=[1, 0.5])
    found = milan.pretrain(str(layers), out=str(whole), progress=notes, **given)
    local = {"local": str(tmp_path / "local"), "cache_limit": "5MB"}
    milan.pretrain(str(layers), out=str(parts), stop_after=5, **given, **local)
    milan.pretrain(str(layers), out=str(parts), **given)
    assert weights(whole) == weights(parts)
    assert len(list((tmp_path / "local").glob("*/shards/*"))) == 12  # 3 shards of 2 views, 2 layers
    said = "\n".join(notes.lines)
    assert "a head each" in said
    assert "losses: teacher0 1, timm-test_vit 0.5; each but the worst is dropped in 50%" in said
    line = log_of(whole)[-1]
    assert line["val_loss"] == pytest.approx(
        (line["val_loss_teacher0"] + 0.5 * line["val_loss_timm-test_vit"]) / 1.5, abs=1e-6
    )
    assert found["val_cosine_teacher0"] > 0
    assert (whole / "sheet.png").is_file()
    about = read_run(whole)
    assert [part["generations"] for part in about["stretches"][0]["layers"]] == [2, 2]
    store = find_store(Run("whole", whole, about), [])
    assert isinstance(store, TargetCache)
    assert store.digest == about["stretches"][0]["cache"]
    assert load_student(whole).student.decoder(  # one head: what is compared with texts
        torch.zeros(1, 5, 32), settings_of(layers).objective(store).mask(
            CachedBatches(CachedDataset(store), 0, True, 16).load(
                Address(Kind.TRAIN, 0, ROWS[:1], VIEWS[:1])
            )
        ),
    ).shape == (1, 17, 24)  # fmt: skip
    run = Run("whole", whole, about)
    shown = shown_of(store, [(run, store)], PictureSettings(images=3, compared=0), NoProgress())
    assert not shown.missing
    first, second = shown.students["whole"]
    assert (first.teacher, second.teacher) == ("teacher0", "timm-test_vit")
    assert first.target is None
    assert second.target is not None
    assert second.target.shape == first.predicted.shape == (3, 4, 4, 3)
    assert second.cosine is not None
    assert not np.allclose(first.cosine, second.cosine)
    page = write_page(tmp_path / "r.html", [run], [], PictureSettings(images=1, compared=12))
    told = page.read_text()
    assert "cosine to the target, whole, timm-test_vit" in told
    for name in ("teacher teacher0", "teacher timm-test_vit"):
        assert f"shared with the {name}" in told
        assert f"neighbour 1 by {name}, cosine" in told
    key = "teacher timm-test_vit"
    settings = PictureSettings(images=3, compared=20, near=4)
    first_layer = TargetCache(layers, layer=given["layer"][0])
    shown = shown_of(first_layer, [(run, store)], settings, NoProgress())
    assert list(shown.alike) == ["", key, "whole"]
    assert shown.alike["whole"].shared.keys() == {"", key}
    rows = np.array([int(caption.split(",")[0].split()[1]) for caption in shown.bank_captions])
    tokens = decoded(TargetCache(layers, layer=VIT), rows, np.zeros_like(rows))[:, 0].float()
    cosine = F.cosine_similarity(tokens[:3, None], tokens[None], dim=2).numpy()
    np.put_along_axis(cosine, np.arange(3)[:, None], -2, axis=1)
    assert np.array_equal(shown.alike[key].places, np.argsort(-cosine, axis=1)[:, :4])
    # An image that the second teacher has never seen is nobody's neighbour.
    gone = shown.alike[key].places[0, 0]
    store.places[1][rows[gone]] = -1  # type: ignore[attr-defined]
    less = shown_of(first_layer, [(run, store)], settings, NoProgress()).alike[key].places
    assert np.array_equal(less[0, :3], shown.alike[key].places[0, 1:4])
    drawn = load_student(whole, layer=VIT)
    assert (drawn.layer, drawn.store, drawn.teacher) == (VIT, str(layers), "timm:test_vit")
    assert drawn.student.decoder.heads[0].mlp.fc2.out_features == 64
    with pytest.raises(ConfigError, match=f"no layer 'timm'; expected: one of .*, {VIT}"):
        load_student(whole, layer="timm")
    with pytest.raises(ConfigError, match=r"no text of 3 classes, .* and its teacher gives none"):
        zero_shot(str(whole), layer=VIT, data=str(photos))
    for other in ({"mask_layer": VIT}, {"layer": given["layer"][::-1]}, {"layer": VIT}):
        with pytest.raises(MilanError, match="other settings"):
            milan.pretrain(str(layers), out=str(parts), **{**given, **other})
    with pytest.raises(CacheError, match="whole"):
        prune(layers, Drop(layers=[VIT]), runs=[whole], agree=lambda _: True)


@pytest.mark.soak
@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_with_loader_workers_learn_as_one(layers: Path, tmp_path: Path) -> None:
    """Teachers are dropped by address, and a micro-batch's loss does not depend on the others."""
    given = both(layers, teacher_dropping=0.5, log_every=1, epochs=2)
    milan.pretrain(str(layers), out=str(tmp_path / "one"), **given)
    two = {"devices": 2, "num_workers": 1, "micro_batch": 2}
    milan.pretrain(str(layers), out=str(tmp_path / "two"), **{**given, **two})
    one, other = (log_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(other) == 4
    for ours, theirs in zip(one, other, strict=True):
        for key in ours.keys() & {"loss", "val_loss", "val_cosine_teacher0"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


@pytest.mark.soak
def test_a_step_of_several_teachers_is_two_graphs(
    layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and loss, compiled whole, also with dropping; the run is the one without."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compilation, "BACKEND", counter)
    torch._dynamo.reset()
    given = both(layers, teacher_dropping=0.5, log_every=1, epochs=2)
    for how in ("on", "off"):
        milan.pretrain(str(layers), out=str(tmp_path / how), compile=how, **given)
    assert counter.frame_count == 2
    ours, theirs = ([line["loss"] for line in log_of(tmp_path / how)] for how in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.soak
def test_a_run_moves_on_when_both_layers_have_grown(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Images that only one layer has got yet are left out until the other has them too."""
    store, out = tmp_path / "t.zarr", str(tmp_path / "run")
    clip: dict[str, Any] = {**EXTRACTION, **teacher_files, "out": str(store), "views": 1}
    vit: dict[str, Any] = {**OTHER, "out": str(store), "img_size": 32, "extend": True, "views": 1}
    extract_targets(str(photos), limit=16, **clip)
    extract_targets(str(photos), limit=16, **vit)
    given = both(store, held_out=0.5, on_growth="move")
    milan.pretrain(str(store), out=out, stop_after=2, **given)
    extract_targets(str(photos), **clip)
    notes = Notes()
    milan.pretrain(str(store), out=out, stop_after=1, progress=notes, **given)
    assert any("left out: 8 images that" in note for note in notes.lines)
    extract_targets(str(photos), **vit)
    milan.pretrain(str(store), out=out, **given)
    parts = read_run(Path(out))["stretches"]
    assert [len(part["layers"]) for part in parts] == [2] * len(parts)
    assert parts[-1]["layers"][1]["generations"] == 4
    assert log_of(Path(out))[-1]["epoch"] == 7


def test_options_of_the_objective_hold_for_each_teacher(layers: Path, tmp_path: Path) -> None:
    """Each has statistics of its own, and blocks predict all of them; it resumes to the bit."""
    own = tmp_path / "own.zarr"
    shutil.copytree(layers, own)
    run = both(
        own, epochs=1, loss="smooth-l1", target_norm="phi-s", predict="both", class_weight=0.5,
        deep_supervision="1", decode_fraction=0.5, teacher_dropping=0.5,
    )  # fmt: skip
    figures = milan.pretrain(str(own), out=str(tmp_path / "whole"), **run)
    for name in ("val_loss", "val_class_cosine", "val_cosine_block_1", "val_cosine_timm-test_vit"):
        assert np.isfinite(figures[name])
    milan.pretrain(str(own), out=str(tmp_path / "two"), stop_after=1, **run)
    milan.pretrain(str(own), out=str(tmp_path / "two"), **run)
    assert weights(tmp_path / "two") == weights(tmp_path / "whole")
    digests = read_run(tmp_path / "two")["identity"]["target_statistics"]
    assert len({*digests}) == 2
    assert len([*(own / "statistics").iterdir()]) == 2
    assert load_student(tmp_path / "two").student.decoder.heads is not None


@pytest.mark.soak
def test_memory_counts_all_teachers(layers: Path) -> None:
    """Heads and batches of every teacher."""
    settings, peaks = settings_of(layers), []
    for names in (f"{TargetCache(layers).layer},{VIT}", None):
        cache = open_targets(layers, names)
        peaks.append(peak_bytes(student_of(settings, cache), settings, cache, CPU, 8))
    assert peaks[0] > peaks[1] + 8 * 16 * 64 * 4  # at least the second prediction


@pytest.mark.soak
def test_an_estimate_reads_all_teachers(layers: Path, tmp_path: Path) -> None:
    """And writes nothing."""
    given = both(layers) | {"layer": ",".join(both(layers)["layer"])}
    rows = dict(estimate_run(PretrainConfig(str(layers), out=str(tmp_path / "r"), **given)))
    assert rows["images"] == "16 an epoch, 8 for validation"
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layer": [VIT, VIT]}, "stands twice"),
        ({"layer": ["elsewhere.zarr::A", VIT]}, "first layer is of elsewhere.zarr.*--cache"),
        ({"layer": [VIT, "timm:test_vit/int8"]}, "no targets called.*try: timm:test_vit/float16"),
        ({"layer": [VIT, "none.zarr::"]}, "no store at none.zarr"),
        ({"mask_layer": "timm"}, "mask_layer 'timm'; expected: one of the layers"),
        ({"mask_layer": VIT, "masking": "random"}, "mask_layer .* with random masks"),
        ({"layer_weights": "1"}, "layer_weights 1; expected: a number above 0 for each of the 2"),
        ({"layer_weights": [1, "x"]}, "layer_weights 1,x; expected: a number"),
        ({"layer_weights": "1,2", "layer": VIT}, "layer_weights 1,2 with one layer"),
        ({"teacher_dropping": 0.5, "layer": VIT}, "teacher_dropping 0.5 with one layer"),
        ({"teacher_dropping": 1.5}, "teacher_dropping 1.5; expected: at least 0, at most 1"),
        ({"objective": "pixels"}, "2 layers with objective pixels; expected: one layer"),
        ({"objective": "rils-cached"}, "2 layers with objective rils-cached"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(
    more: dict[str, Any], message: str, layers: Path, tmp_path: Path
) -> None:
    """Before the run's folder is there."""
    with pytest.raises(MilanError, match=message):
        milan.pretrain(str(layers), out=str(tmp_path / "r"), **both(layers, **more))
    assert not (tmp_path / "r").exists()
