"""`milan report`: every figure is one of the runs', and the page is whole in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from browser import Browser
from helpers import SMALL, log_of, run_here
from PIL import Image
from torch.nn import functional as F

import milan
from milan.core.atomic import write_with_digest
from milan.core.device import MEAN, STD, normalise
from milan.core.machine import cpu_count
from milan.reports.pictures import _Bank
from milan.reports.pipeline import build_report
from milan.training.trained import load_student

ODD = 'a <b>"name" & ü'


class Page(NamedTuple):
    text: str
    tables: dict[str, list[list[str]]]
    """By caption: rows of cells, the headings first."""
    pictures: list[str]
    """Their alternative texts."""
    links: list[str]
    """All that it might load or go to."""


class _Reader(HTMLParser):
    """Tables, pictures and links of a page; and that its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.caption = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)
        if tag == "img" and given.get("src"):
            self.pictures.append(given["alt"] or "")
        if tag == "table":
            self.rows, self.caption = [], ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            self.caption += data
        elif self.open[-1:] == ["small"] and self.rows and "td" in self.open:
            self.rows[-1][-1] += f" ({data})"
        elif {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()


def read_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(text)
    assert reader.open == []
    return Page(text, reader.tables, reader.pictures, reader.links)


def embedded(page: Page) -> dict[str, Any]:
    """The figures that its script draws."""
    found = re.search(r'id="data">(.*?)</script>', page.text, re.S)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, store: Path, photos: Path) -> dict[str, Path]:
    """Two runs on `store` with 8 validation images, measured by a linear probe."""
    torch.set_num_threads(1)
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name, objective in ((ODD, "milan"), ("pixels", "pixels")):
        made[name] = folder / name
        milan.pretrain(
            str(store), out=str(made[name]), objective=objective,
            **{**SMALL, "epochs": 2, "log_every": 1, "held_out": 0.34, "lr": 3e-3},
        )  # fmt: skip
        told = run_here("linear-probe", "--checkpoint", made[name], "--data", photos)
        assert told.code == 0, told.err
    return made


@pytest.fixture(scope="module")
def path(runs: dict[str, Path], store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of both runs, as the command writes it."""
    folder = tmp_path_factory.mktemp("page")
    done = run_here("report", *runs.values(), store, "--compared", 20, "--images", 2, cwd=folder)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("page: report.html\n")
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return read_page(path)


# --- figures --------------------------------------------------------------------------------------


def test_it_needs_nothing_else(page: Page, path: Path) -> None:
    """One file below 5 MB; what it names lies inside it, and its policy lets it load nothing."""
    assert path.stat().st_size < 5_000_000
    assert all(re.match(r"data:|#\w", link) or link == "" for link in page.links), page.links
    assert "default-src 'none'" in page.text
    assert "Leon Sorokin" in page.text  # uPlot's licence asks for that


def test_curves_and_settings_are_those_of_the_runs(page: Page, runs: dict[str, Path]) -> None:
    """Every point of the log; only settings that differ; names as they are, without their tags."""
    data = embedded(page)
    assert data["names"] == list(runs)
    charts = {chart["title"]: chart for chart in data["charts"]}
    for at, (folder, objective) in enumerate(zip(runs.values(), ("milan", "pixels"), strict=True)):
        lines = log_of(folder)
        for series in charts[f"loss ({objective})"]["series"]:
            key = "loss" if series["kind"] == "training" else "val_loss"
            expected = [(line["epoch"], line[key]) for line in lines if key in line]
            assert series["run"] == at
            np.testing.assert_allclose(
                list(zip(series["x"], series["y"], strict=True)), expected, 1e-4
            )
    assert [s["run"] for s in charts["validation cosine"]["series"]] == [0]
    rows = {row[0]: row[1:] for row in page.tables["Settings that differ"]}
    assert rows.pop("setting") == list(runs)
    assert rows == {
        "objective": ["milan", "pixels"], "decoder_kind": ["prompt", "mae"],
        "masking": ["semantic", "random"],
    }  # fmt: skip
    assert "<b>" not in page.text.replace("<b>\\u", "")
    assert ["batch_size", "8", "8"] in page.tables["All settings"]


def test_models_and_devices_are_what_was_trained(page: Page) -> None:
    """Not the default that the model was changed from, and not the word `auto`."""
    args = [f"{name} {value}" for name, value in SMALL["model_args"].items()]
    (_, *rows) = page.tables["Runs, with the newest figures of their logs"]
    assert {row[3] for row in rows} == {", ".join(["vit_base_patch16_224", *args])}
    heading, *rows = page.tables["Cost of training"]
    assert {row[heading.index("device")] for row in rows} == {f"CPU with {cpu_count()} cores"}


def test_evaluations_have_their_intervals(page: Page, runs: dict[str, Path]) -> None:
    """Every protocol of every run, and the baseline once."""
    heading, *rows = page.tables["Linear probe"]
    assert heading[:3] == ["encoder", "top-1 %", "top-5 %"]
    assert [row[0] for row in rows] == ["random", *runs]
    for row, folder in zip(rows[1:], runs.values(), strict=True):
        probe = json.loads((folder / "linear_probe.json").read_text())
        low, high = probe["top1_interval"]
        assert row[1] == f"{probe['top1']:.1f} ({low:.1f}–{high:.1f})"
    assert "Small figures: 95 % interval over images." in page.text
    assert "Not measured alike" not in page.text


def test_pictures_and_neighbours(page: Page, runs: dict[str, Path], store: Path) -> None:
    """Validation images; the cosine of prediction and target; neighbours as `milan neighbours`."""
    known = milan.TargetCache(store)
    captions = re.findall(r"<figcaption>(row (\d+), view 0: [^<]*)", page.text)
    assert len(captions) == 2
    assert "No run was trained on these images" in page.text
    told = [alt for alt in page.pictures if alt.startswith("cosine: ")]
    assert len(told) == 2
    student = load_student(runs[ODD]).student
    for alt, (_, row) in zip(told, captions, strict=True):
        shown = re.search(r": (-?\d\.\d+) over masked patches; row (\d+),", alt)
        assert shown
        assert shown[2] == row
        at = np.array([int(row)])
        batch = _batch_of(student, known, at)
        with torch.inference_mode():
            tokens = student(normalise(batch[0], MEAN, STD), batch[1])
        predicted = batch[1].in_raster(tokens[:, 1:])[0]
        cosine = F.cosine_similarity(predicted, batch[2][0], dim=-1)
        assert abs(float(cosine[batch[1].boolean()[0]].mean()) - float(shown[1])) < 2e-3
    # The first image's nearest by the teacher, among all 24: none was left out.
    found = [
        re.match(r"neighbour (\d) by teacher, cosine [\d.]+: row (\d+),", alt)
        for alt in page.pictures
    ]
    ours = [int(match[2]) for match in found if match][:3]
    tokens = np.stack(
        [milan.open_cache(store)[2 * row]["features"][0].numpy() for row in range(24)]
    )
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    first = int(captions[0][1])
    bank = [int(row) for row in _bank_rows(captions, known)]
    order = sorted(
        (row for row in bank if row != first), key=lambda row: -float(unit[row] @ unit[first])
    )
    assert ours == order[:3]


def _bank_rows(captions: list[tuple[str, str]], known: Any) -> list[int]:
    """The 20 images that are compared: the shown ones, then the first of the store."""
    shown = [int(row) for _, row in captions]
    return [*shown, *(row for row in known.good_rows().tolist() if row not in shown)][:20]


def _batch_of(student: Any, known: Any, rows: np.ndarray) -> tuple[Any, Any, torch.Tensor]:
    """(pixels, mask, the teacher's patches) of view 0, masked as in a run's sheets (seed 0)."""
    from milan.core.rng import mask_noise
    from milan.models.masking import importance_mask
    from milan.reporting.panels import patch_features

    first = np.zeros_like(rows)
    pixels = torch.from_numpy(milan.open_cache(known.path).pixels(rows, first))
    noise = mask_noise(0, np.full(len(rows), (1 << 32) + 1), rows, first, student.patches)
    attention = torch.from_numpy(known.read(rows, first).attention)
    mask = importance_mask(attention, torch.from_numpy(noise), visible=4)
    return pixels, mask, torch.from_numpy(patch_features(known, rows, first))


def test_store_and_cost(page: Page, runs: dict[str, Path]) -> None:
    """Teacher, fidelity, bytes; time, speed and data loading of each run."""
    for title in ("teacher/int8", "teacher/int8: fidelity to the teacher", "generations"):
        assert title in " ".join(page.tables) or title.split("/")[0] in " ".join(page.tables)
    heading, *rows = page.tables["Cost of training"]
    for row, folder in zip(rows, runs.values(), strict=True):
        told = dict(zip(heading, row, strict=True))
        figures = json.loads((folder / "metrics.json").read_text())
        assert told["images/s"] == f"{figures['images_per_second']:,.0f}"
        assert told["data-loading time"] == f"{100 * figures['wait_share']:.1f} %"
    ((_, *stored),) = page.tables["Cost of stores"][1:]
    assert stored[1:3] == ["24", "2"]


def test_the_pipelines_report(runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    """Tables, one JSON of figures, a CSV that DVC plots, pictures, the page; by the command."""
    named = {"milan": str(runs[ODD]), "pixels": str(runs["pixels"])}
    section = {"out": "rep", "cache": str(store), "runs": named, "encoders": named}
    protocols = "evaluation: {protocols: [linear_probe]}\n"
    (tmp_path / "p.yaml").write_text(f"{protocols}report: {json.dumps(section)}")
    done = run_here("report", "--params", "p.yaml", "--compared", 0, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    text = (tmp_path / "rep/report.txt").read_text()
    assert text in done.out
    for word in ("milan", "pixels", "top-1 %", "bytes a view", "extraction, images/s", "sheet.png"):
        assert word in text
    for name in ("sheet.png", "curves.png", "evaluation/linear_probe.png"):
        with Image.open(tmp_path / "rep" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    lines = (tmp_path / "rep/evaluation/linear_probe.csv").read_text().splitlines()
    assert lines[0] == "encoder,metric,value"
    assert [line.split(",")[0] for line in lines[1:]] == ["milan", "pixels"]
    metrics = json.loads((tmp_path / "rep/metrics.json").read_text())
    for name, run in named.items():
        probe = json.loads(Path(run, "linear_probe.json").read_text())
        for key in ("top1", "top5", "top1_interval"):
            assert metrics["linear_probe"][key][name] == probe[key]
    assert embedded(read_page(tmp_path / "rep/report.html"))["names"] == ["milan", "pixels"]
    section = f"report: {{out: {tmp_path}/rep, cache: x, runs: {{a: none}}, encoders: {{}}}}"
    (tmp_path / "p.yaml").write_text(section)
    with pytest.raises(milan.MilanError, match=r"has no evaluation.protocols"):
        build_report(str(tmp_path / "p.yaml"))
    (tmp_path / "p.yaml").write_text(protocols + section)
    with pytest.raises(milan.MilanError, match="no metrics at none"):
        build_report(str(tmp_path / "p.yaml"))


# --- what is missing ------------------------------------------------------------------------------


def without(run: Path, *names: str) -> None:
    """Remove files and folders of a run."""
    for name in names:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def unfinished(run: Path) -> None:
    """As a run that trains now: its log is ahead of what is written at the end of a call."""
    without(run, "metrics.json", "encoder.safetensors")
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(log[:3]) + log[3][:20])


def elsewhere(run: Path) -> None:
    """Its store is not where it was."""
    about = json.loads((run / "run.json").read_text())
    about["config"]["cache"] = "gone.zarr"
    write_with_digest(run / "run.json", about)


@pytest.mark.parametrize(
    ("change", "told", "lacks"),
    [
        (lambda run: without(run, "linear_probe.json"), "finished", 'id="evaluations"'),
        (unfinished, "epoch 1.5 of 2, not finished", ""),
        (lambda run: without(run, "checkpoints"), "no predictions and no neighbours", "cosine: "),
        (elsewhere, "the store that it was trained on (gone.zarr", 'id="stores"'),
        (lambda run: without(run, "log.jsonl"), "finished", 'id="charts"'),
        (
            lambda run: without(run, "run.json", "log.jsonl", "checkpoints", "sheet.png"),
            "evaluations only", 'id="pictures"',
        ),
    ],
    ids=["no evaluation", "running", "no checkpoint", "no store", "no log", "evaluations only"],
)  # fmt: skip
def test_a_run_that_lacks_something(
    change: Callable[[Path], None], told: str, lacks: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """The page has the rest, and says what it lacks."""
    run = shutil.copytree(runs[ODD], tmp_path / "run")
    change(run)
    page = read_page(milan.report(str(run), out=tmp_path / "r.html", compared=0, images=1))
    assert told in page.text
    assert not lacks or lacks not in page.text


def test_a_baseline_without_a_figure_has_no_row(runs: dict[str, Path], tmp_path: Path) -> None:
    """As of files that name one without having measured it."""
    run = shutil.copytree(runs[ODD], tmp_path / "run")
    metrics = json.loads((run / "linear_probe.json").read_text())
    metrics["baseline"] = {"checkpoint": "random", "not_measured": "in as many hours", "like": "x"}
    (run / "linear_probe.json").write_text(json.dumps(metrics))
    page = read_page(milan.report(str(run), out=tmp_path / "r.html", compared=0, images=1))
    assert [row[0] for row in page.tables["Linear probe"][1:]] == ["run"]


def test_a_store_alone(store: Path, tmp_path: Path) -> None:
    """What the teacher sees, and which images it finds alike."""
    page = read_page(milan.report(str(store), out=tmp_path / "deep/r.html", compared=9, images=1))
    assert {"view", "attention", "target"} <= {alt.split(":")[0] for alt in page.pictures}
    assert "neighbour 1 by teacher" in page.text
    assert not {"Runs", "Settings that differ"} & page.tables.keys()


@pytest.mark.parametrize(
    ("labels", "share"),
    [([0, 1, 2, 2, -1], 25.0), ([0, 1, 2, 3, -1], None)],
    ids=["one class of two", "each alone"],
)
def test_an_image_that_is_alone_in_its_class(labels: list[int], share: float | None) -> None:
    """It has no neighbour to find, and is not counted as one that found none."""
    bank = _Bank.__new__(_Bank)
    bank.labels, bank.asked, bank.near, bank.teachers = np.array(labels), 5, 2, None
    bank.shown = SimpleNamespace(alike={})  # type: ignore[assignment]
    bank._note("teacher", torch.eye(5) + 0.1, [])
    assert bank.shown.alike["teacher"].same_class == share


def test_many_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    """Thirteen: all in the tables, twelve with pictures, which the page says; by given names."""
    folders = [f"run {n}={shutil.copytree(runs[ODD], tmp_path / str(n))}" for n in range(13)]
    page = read_page(milan.report(*folders, out=tmp_path / "r.html", compared=0, images=1))
    assert embedded(page)["names"] == [f"run {n}" for n in range(13)]
    assert "Pictures are shown of the first 12 of 13 runs" in page.text
    assert len([alt for alt in page.pictures if alt.startswith("prediction: ")]) == 12
    assert "Settings that differ" not in page.tables
    assert "All runs have the same settings" in page.text


def test_what_cannot_be_reported(runs: dict[str, Path], store: Path, tmp_path: Path) -> None:
    """One line, a page is not written."""
    with pytest.raises(milan.MilanError, match=r"a report of nothing.*milan report runs/pretrain"):
        milan.report()
    damaged = shutil.copytree(runs[ODD], tmp_path / "damaged")
    (damaged / "linear_probe.json").write_text('{"top1": 3}')
    for arguments, told in (
        ([tmp_path], "holds no run, no metrics of an evaluation and no finished store"),
        (["nowhere"], "nothing is at nowhere"),
        ([damaged], "linear_probe.json is damaged: it has no usable 'top5'"),
        ([store, "--out", "r.png"], "expected: a name that ends with .html; try: --out r.html"),
        ([store, "--out", tmp_path / "damaged/run.json/r.html"], "cannot be written"),
        ([store, "--params", "p.yaml"], "--params beside runs"),
    ):  # fmt: skip
        done = run_here("report", *arguments, "--images", 0, cwd=tmp_path)
        assert done.code == 1
        assert told in done.err
        assert done.err.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


# --- in a browser ---------------------------------------------------------------------------------


FOCUS = "document.activeElement"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desk", "phone"])
def test_the_page_is_whole(browser: Browser, path: Path, width: int, dark: bool) -> None:
    """Nothing is loaded, nothing fails, nothing is cut off; curves are drawn; dark and light."""
    browser.open(path, width=width, dark=dark)
    loaded = [url for url in browser.requests if not url.startswith("data:")]
    assert loaded == [path.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    fit = (  # tables of facts wrap; only those with a column a figure may be pushed aside
        "[...document.querySelectorAll('.facts')]"
        ".map((t) => t.offsetWidth <= t.parentElement.clientWidth)"
    )
    assert set(browser.run(fit)) == {True}
    drawn = (
        "[...document.querySelectorAll('canvas')].map((c) => c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data.some((x) => x > 0))"
    )
    browser.run("new Promise((done) => setTimeout(done, 50))")  # the others are drawn when opened
    assert browser.run(drawn) == [True] * len(browser.run("JSON.parse(data.textContent).charts"))
    ink, paper = (
        browser.run(f"getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (ink, paper)]
    assert (light[0] > 0.8 > 0.2 > light[1]) if dark else (light[1] > 0.8 > 0.2 > light[0])
    assert browser.errors == []


def test_a_screen_reader_hears_names(browser: Browser, path: Path) -> None:
    """Headings in order; every button, link, picture, table and field is called something."""
    browser.open(path, width=1280)
    named = browser.names()
    spoken = ("button", "link", "image", "table", "checkbox", "searchbox", "region", "dialog")
    assert [pair for pair in named if pair[0] in spoken and not pair[1]] == []
    roles = {role for role, _ in named}
    assert {"banner", "navigation", "main", "contentinfo", "columnheader", "rowheader"} <= roles
    assert any(
        name.startswith("Curves of loss (milan) over epochs. At the end: ") for _, name in named
    )
    levels = browser.run(
        "[...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert max(np.diff(levels)) <= 1


def test_it_is_used_by_the_keyboard(browser: Browser, path: Path, runs: dict[str, Path]) -> None:
    """Sort, read a curve, hide a run, enlarge a picture and go back to where one was."""
    browser.open(path, width=1280)
    first = "[...document.querySelectorAll('#overview tbody th')].map((x) => x.textContent)"
    before = browser.run(first)
    browser.run("document.querySelector('#overview button.sort').focus()")
    browser.press("Enter")
    browser.press("Enter")
    assert browser.run(first) == sorted(before, reverse=True)
    assert browser.run("document.querySelector('#overview th').ariaSort") == "descending"
    browser.press("Tab")
    assert browser.run(f"{FOCUS}.textContent") == "state"
    assert browser.run(f"getComputedStyle({FOCUS}).outlineStyle") == "solid"

    browser.run("document.querySelector('.chart [role=img]').focus()")
    browser.press("ArrowRight")
    line = log_of(runs[ODD])[0]
    told = browser.run("document.querySelector('.chart output').textContent")
    assert f"epoch {line['epoch']:.4g}: {ODD} training {line['loss']:.4g}" in told

    browser.run("filter.querySelector('input').click()")
    hidden = browser.run(
        "[...document.querySelectorAll('[data-run=\"0\"]')].map((x) => x.offsetHeight)"
    )
    assert hidden
    assert set(hidden) == {0}
    assert browser.run("document.querySelector('#overview tbody').innerText").count("finished") == 1
    browser.run("filter.querySelector('input').click()")

    browser.run("document.querySelectorAll('button.zoom')[1].focus()")
    browser.press("Enter")
    dialog = "document.querySelector('dialog')"
    assert browser.run(f"{dialog}.open")
    assert browser.run(f"{dialog}.querySelector('img').alt").startswith("attention: ")
    assert browser.run(f"{dialog}.querySelector('img').offsetWidth") > 400
    browser.press("Escape")
    assert not browser.run(f"{dialog}.open")
    assert browser.run(f"{FOCUS} === document.querySelectorAll('button.zoom')[1]")
    browser.run("document.querySelector('#settings details').open = true")
    browser.run("search.value = 'WARMUP'; search.dispatchEvent(new Event('input'))")
    rows = "[...document.querySelectorAll('#settings-table tbody tr:not([hidden]) th')]"
    assert browser.run(f"{rows}.map((x) => x.textContent)") == ["warmup_epochs"]
    assert browser.errors == []
