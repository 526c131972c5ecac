"""Features of frozen networks: computed once, by all ranks, resumed, and never another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Notes, alone_and_as_ranks, make_photos
from safetensors.torch import load, load_file

from milan.core.atomic import lock_folder
from milan.core.signals import Stop
from milan.core.waiting import Stopped
from milan.errors import DataError
from milan.evaluation import features
from milan.evaluation.evaluate import evaluate
from milan.evaluation.frozen import Frozen
from milan.evaluation.protocols import PROTOCOLS
from milan.images.source import ImageSource
from milan.training.finetune import finetune

CPU = torch.device("cpu")
Measure = Callable[..., dict[str, Any]]


class Colours:
    """A network whose features are an image's mean colour; it counts the images that it sees."""

    def __init__(self, before: Callable[[int], None] = lambda seen: None, **identity: Any) -> None:
        self.seen, self.before = 0, before
        self.frozen = Frozen(self.features, 8, "colours", {"network": "colours", **identity})

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        self.before(self.seen)
        self.seen += len(pixels)
        return pixels.float().mean(dim=(1, 2)) / 255


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 5 rows."""
    monkeypatch.setattr(features, "FILE_ROWS", 5)


@pytest.fixture
def measure(tmp_path: Path, small_files: None) -> Measure:
    """measure(network, protocol="knn", data=...) -> metrics without the seconds."""

    def run(network: Colours, protocol: str = "linear_probe", **settings: Any) -> dict[str, Any]:
        given = {"features": str(tmp_path / "kept"), "batch_size": 3, **settings}
        got = evaluate(PROTOCOLS[protocol], frozen=network.frozen, **given)
        return {key: value for key, value in got.items() if key != "seconds"}

    return run


def test_features_are_computed_once(tmp_path: Path, measure: Measure) -> None:
    """By the first protocol for all; again for whatever would give other features, and for nothing
    else. A file that is damaged is made again, and no other."""
    data, network = make_photos(tmp_path / "data", count=24), Colours()

    def newly(network: Colours = network, **settings: Any) -> tuple[int, dict[str, Any]]:
        before = network.seen
        got = measure(network, data=str(data), **settings)
        return network.seen - before, got

    count, first = newly()
    assert count == 24
    (place,) = (tmp_path / "kept").iterdir()
    assert len(list(place.glob("*.safetensors"))) == 5
    for settings in ({"protocol": "knn"}, {"seed": 3}, {"batch_size": 7}, {"memory": "1 B"}):
        assert newly(**settings)[0] == 0, settings
    assert newly() == (0, first)
    for settings, expected in (({"crop_share": 0.5}, 24), ({"limit": 20}, 20)):
        assert newly(**settings)[0] == expected
    assert newly(Colours(weights="others"))[0] == 24

    file = place / "00002.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-30] ^= 1  # in the features
    for damaged in (bytes(flipped), whole[:-7], b""):
        file.write_bytes(damaged)
        assert newly() == (5, first)
        assert load_file(file)["features"].equal(load(whole)["features"])

    name = next(data.glob("*/*.jpg"))
    name.write_bytes(next(make_photos(tmp_path / "else", seed=5).glob("*/*.jpg")).read_bytes())
    assert newly()[0] == 24


@pytest.mark.parametrize("which", ["evaluation.ranks", "training.supervised_run"])
def test_ranks_that_stood_still_are_a_stop(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog ended them after a signal: that is told as every stop is."""

    def stood(*_: Any, **__: Any) -> None:
        raise Stopped("SIGTERM")

    monkeypatch.setattr(f"milan.{which}.launch", stood)
    run = evaluate if which == "evaluation.ranks" else finetune
    first = ("linear_probe", "x") if run is evaluate else ("x",)
    assert run(*first, devices=2, device="cpu") == {"stopped_by": "SIGTERM"}


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_evaluation_goes_on(how: str, tmp_path: Path, measure: Measure) -> None:
    """What was computed before it ended is not computed again, and figures are the same."""
    data, stop = make_photos(tmp_path / "data", count=24), Stop()
    alone = measure(Colours(), data=str(data), features=str(tmp_path / "alone"))

    def end(seen: int) -> None:
        if seen >= 12:  # in the third file
            if how == "killed":
                raise SystemExit("killed")
            stop.request(15)

    if how == "killed":
        with pytest.raises(SystemExit):
            measure(Colours(end), data=str(data))
    else:
        assert measure(Colours(end), data=str(data), stop=stop) == {"stopped_by": "SIGTERM"}
    rest, notes = Colours(), Notes()
    assert measure(rest, data=str(data), progress=notes) == alone
    assert (rest.seen, notes.begun[0]) == (14, (24, 10))


def test_images_are_decoded_while_the_network_works(
    tmp_path: Path, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next batch is read before the network has answered to the first."""
    data, reads, read = make_photos(tmp_path / "data", count=12), [], ImageSource.read

    def counted(images: ImageSource, row: int) -> bytes:
        reads.append(row)
        return read(images, row)

    monkeypatch.setattr(ImageSource, "read", counted)

    def wait(seen: int) -> None:
        end = time.monotonic() + 20
        while len(reads) < min(12, seen + 6):
            assert time.monotonic() < end, f"{len(reads)} images were read ahead"
            time.sleep(0.001)

    measure(Colours(wait), data=str(data))


def test_a_second_evaluation_waits_for_the_first(tmp_path: Path, measure: Measure) -> None:
    """It takes the features that the other computes: both are not computed twice."""
    data = make_photos(tmp_path / "data", count=12)
    measure(Colours(), data=str(data))
    (place,) = (tmp_path / "kept").iterdir()
    lock = lock_folder(place)
    threading.Timer(0.3, lock.close).start()
    began = time.monotonic()
    measure(Colours(), data=str(data))
    assert time.monotonic() - began > 0.25


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("protocol", "images", "baseline"),
    [
        ("linear_probe", 10, "none"),
        ("knn", 40, "random"),
        pytest.param("linear_probe", 60, "random", marks=pytest.mark.soak),
    ],
)
def test_ranks_agree_with_one(
    protocol: str, images: int, baseline: str, tmp_path: Path, finished_run: Callable[..., Path]
) -> None:
    """Two ranks, each with its share: the same files, the same figures."""
    data = make_photos(tmp_path / "data", count=images)
    val = make_photos(tmp_path / "val", count=31, seed=1)
    (next(val.glob("*/*.jpg"))).write_bytes(b"no image")
    got = alone_and_as_ranks(
        protocol, 4, tmp_path, finished_run(epochs=2), data, val_data=str(val), baseline=baseline
    )
    files = {
        name: {
            path.relative_to(tmp_path / name): load_file(path)["features"]
            for path in sorted((tmp_path / name).rglob("*.safetensors"))
        }
        for name in got
    }
    assert got["ranks"] == got["alone"]
    assert got["alone"]["val_images"] == 30
    beside = baseline == "random"
    assert ("baseline" in got["alone"]) == beside
    assert len(files["alone"]) == (1 + beside) * (-(-images // 4) + 8)
    assert files["ranks"].keys() == files["alone"].keys()
    for name, x in files["alone"].items():
        assert (x - files["ranks"][name]).abs().max() < 1e-5


def test_what_cannot_be_kept(tmp_path: Path, measure: Measure) -> None:
    """A folder that was asked for and cannot be written is refused; the run's own is told, and
    nothing is left; `none` leaves nothing either."""
    data = make_photos(tmp_path / "data", count=12)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: Not a directory") as refused:
        measure(Colours(), data=str(data), features=str(tmp_path / "file" / "x"))
    assert "--features none" in refused.value.fix
    notes = Notes()
    run = str(tmp_path / "file" / "run")
    measure(Colours(), data=str(data), features=None, checkpoint=run, progress=notes)
    assert "cannot be written" in notes.line("features are not kept")
    measure(Colours(), data=str(data), features="none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "file"]


def test_features_that_are_no_numbers(tmp_path: Path, measure: Measure) -> None:
    """A network whose training failed is named, not scored."""
    data = make_photos(tmp_path / "data", count=12)
    network = Frozen(lambda p: p.float().mean(dim=(1, 2)) * torch.nan, 8, "broken", {})
    with pytest.raises(DataError, match="broken gives features that are no numbers"):
        evaluate(PROTOCOLS["knn"], frozen=network, data=str(data), features=str(tmp_path / "f"))


def test_a_disk_that_is_too_small(
    tmp_path: Path, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said after the first file, not after hours."""
    data, network = make_photos(tmp_path / "data", count=24), Colours()
    usage = features.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=200))
    with pytest.raises(DataError, match=r"features take 300 B, and .* has room for 200 B"):
        measure(network, data=str(data))
    assert network.seen == 5
