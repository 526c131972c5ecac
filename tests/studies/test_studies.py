"""The studies, small: that their commands run and go on, and the laws of what they measure by."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from studies import options
from studies.ablation import block_mask
from studies.online import ONLINE, curve
from studies.steps import Figures
from studies.views import front

Study = Callable[..., Figures]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """study("views", "--keep", "1") runs the command, small, and returns its figures."""

    def run(name: str, *flags: str) -> Figures:
        out = tmp_path / f"{name}.csv"
        words = [*flags, "--work", str(tmp_path), "--out", str(out)]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *words])
        import_module(f"studies.{name}").main()
        return Figures(out)

    return run


TUNED = ("--tuning", "1", "--measured", "80")
SMALL = ("--images", "192", "--epochs", "2", "--seeds", "1", "--measured", "60")


def test_figures_are_kept(tmp_path: Path) -> None:
    """A figure is written at once, and never found twice; a cell has mean and spread."""
    figures, found = Figures(tmp_path / "f.csv"), iter([1.0, 2.0])
    figures.measure("a", 0, "x", lambda: next(found))
    again = Figures(tmp_path / "f.csv")
    for seed in (0, 1):
        again.measure("a", seed, "x", lambda: next(found))
    assert again.cell("a", "x") == "1.5 ± 0.7"
    assert again.cell("b", "x") == "-"
    trained: list[int] = []
    for _ in range(2):
        again.run("c", 0, lambda: trained.append(0) or 3.0, {"y": lambda: 4.0})
    assert (len(trained), again.value("c", 0, "y")) == (1, 4.0)


def test_the_front() -> None:
    """Better than all that take no more bytes; of equal bytes the best."""
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (2.0, 6.0), "d": (3.0, 6.0), "e": (9.0, 7.0)}
    assert front(points) == ["a", "c", "e"]


def test_a_block_is_a_block() -> None:
    """All patches are in it or not, as many as asked; each masked row of patches is one stretch."""
    noise = torch.rand(200, 49, generator=torch.Generator().manual_seed(0))
    mask = block_mask(noise, visible=12)
    assert mask.visible.shape == (200, 12)
    both = torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(49).expand(200, -1))
    hidden = mask.boolean().view(-1, 7, 7).int()
    for lines in (hidden, hidden.transpose(1, 2)):
        starts = (lines.diff(dim=2) > 0).sum(dim=2) + lines[:, :, 0]
        assert starts.max() == 1
    assert len({tuple(row) for row in mask.visible.tolist()}) > 10


@pytest.mark.soak
def test_cached_against_online(study: Study, tmp_path: Path) -> None:
    """The command gives both methods, equal curves, and a picture; a second call trains nothing."""
    flags = (*SMALL, "--codecs", "float16", "--picture", str(tmp_path / "p.png"))
    first = study("online", *flags)
    assert {method for method, _, _ in first.known} == {ONLINE, "float16"}
    losses = curve(first, ONLINE, 0)
    assert len(losses) == 2
    assert curve(first, "float16", 0) == pytest.approx(losses, abs=1e-3)
    assert (tmp_path / "p.png").stat().st_size > 10_000
    (tmp_path / "online").rename(tmp_path / "gone")
    assert study("online", *flags).known == first.known
    assert not (tmp_path / "online").exists()


def test_options_at_equal_steps_and_at_equal_time(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both rows of an option, and the epochs that take as long as the published objective's."""
    monkeypatch.setattr(options, "PROBED", ("k-NN",))
    monkeypatch.setattr(options, "MEASURES", ("k-NN", "fine-tuned"))
    figures = study(
        "options", "--images", "96", "--epochs", "1", "--seeds", "1", "--measured", "40",
        "--options", "visible", "inner", "--tuning", "1", "--tuned-images", "64",
    )  # fmt: skip
    for method in ("published", "visible", "visible, equal time", "inner", "inner, equal time"):
        assert all(figures.value(method, 0, name) > 0 for name in ("CPU s", "k-NN", "epochs"))
        # How many epochs take as long differs from call to call, and a head that has seen 64 images
        # may know none of the 40.
        assert 0 <= figures.value(method, 0, "fine-tuned") <= 100
    share = figures.value("published", 0, "CPU s") / figures.value("visible", 0, "CPU s")
    expected = max(1, round(figures.value("published", 0, "epochs") * share))
    assert figures.value("visible, equal time", 0, "epochs") == expected


def test_what_a_store_saves(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both tables, from seconds and operations that are known, and an extraction that is not."""
    runs, known = Figures(tmp_path / "online.csv"), Figures(tmp_path / "cost.csv")
    for method, spent in ((ONLINE, 400.0), ("int8", 200.0)):
        runs.keep(method, 0, "CPU s", spent)
    for name, operations, size in (("ViT-B-16-quickgelu", 34, 1e5), ("ViT-L-14", 150, 2e5)):
        known.keep(name, 0, "GFLOP a view", operations)
        known.keep(name, 0, "bytes a view", size)
    known.keep("student", 0, "GFLOP a step", 50)
    picture = tmp_path / "p.png"
    figures = study(
        "cost", *SMALL, "--images", "32", "--views", "1", "--runs", str(runs.path),
        "--picture", str(picture),
    )  # fmt: skip
    once = figures.value("extraction", 0, "CPU s")
    assert once > 0
    said = capsys.readouterr().out
    assert f"| 3 | 1,200 / {once + 600:,.0f} = {1200 / (once + 600):.2f} |" in said
    assert f"| break-even | {once / 100:.1f} epochs, of all students together |" in said
    epoch = 312 / 400 / 84  # A100 hours of a GFLOP an image
    ours = (4 * 34 + 400 * 50) * epoch
    row = f"| ViT-B-16-quickgelu | 4 | 0.51 TB | {4 * 34 * epoch:.1f} | 4 | 312 / {ours:.0f} = "
    assert row in said
    assert picture.stat().st_size > 10_000


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (
            "views",
            ("--keep", "1", "2", "--codecs", "int8", "pq:16", *TUNED),
        ),
        ("ablation", ("--views", "1")),
        (
            "teachers",
            ("--views", "1", "--teacher-epochs", "2", *TUNED),
        ),
        ("channels", ("--views", "1", *TUNED)),
        ("shapes", ("--views", "1", *TUNED)),
    ],
)
def test_every_study_runs(study: Study, tmp_path: Path, name: str, flags: tuple[str, ...]) -> None:
    """Each has figures for all that its table shows."""
    if name in ("views", "ablation"):
        flags = (*flags, "--picture", str(tmp_path / "p.png"))
    assert study(name, *SMALL, *flags).known
