"""README's quick start, typed as it stands, in a home that has photographs and the weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import timm
from browser import Browser
from helpers import ROOT, make_photos
from markdown_it import MarkdownIt
from safetensors.torch import save_file

README = (ROOT / "README.md").read_text()
SCREEN = 1400  # pixels
LINES = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0]
STYLE = """
body { margin: 0 auto; width: 838px; font: 16px/1.5 text; }
h1, h2 { margin: 24px 0 16px; padding-bottom: .3em; border-bottom: 1px solid; line-height: 1.25; }
h1 { font-size: 2em; margin-top: 0; } h2 { font-size: 1.5em; }
p, ul, table, pre, details { margin: 0 0 16px; }
ul { padding-left: 2em; } li + li { margin-top: .25em; }
code { font: 85% mono; padding: .2em .4em; }
pre { padding: 16px; overflow: auto; font: 85%/1.45 mono; } pre code { font: inherit; padding: 0; }
table { display: block; border-collapse: collapse; overflow: auto; }
th, td { padding: 6px 13px; border: 1px solid; }
img { max-width: 100%; }
"""
"""GitHub's, as far as it counts for heights."""


def test_it_comes_first() -> None:
    """Ten lines at most, before everything that one need not know yet."""
    assert len(LINES.splitlines()) <= 10
    assert README.index(LINES) < README.index("## Two commands")


def height(browser: Browser, text: str, page: Path, *, until: str = "") -> float:
    """Pixels of a Markdown page, or of its beginning up to the end of the first `until`, as GitHub
    draws it: a column of 838 pixels, text of 16, pictures, and what is folded stays folded.

    DejaVu Sans at 87 % stands for the fonts of readers: it is as wide as Roboto, to 0.4 %.
    """
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    faces = "".join(
        f"@font-face {{ font-family: {family}; font-weight: {weight}; size-adjust: {adjust}%;"
        f" src: url({(fonts / file).as_uri()}) }}\n"
        for family, weight, adjust, file in (
            ("text", "normal", 87, "DejaVuSans.ttf"), ("text", "bold", 87, "DejaVuSans-Bold.ttf"),
            ("mono", "normal", 100, "DejaVuSansMono.ttf"),
        )
    )  # fmt: skip
    body = MarkdownIt("commonmark").enable("table").render(text)
    page.write_text(
        f"<!doctype html><meta charset=utf-8><base href={ROOT.as_uri()}/>"
        f"<style>{faces}{STYLE}</style><body>{body}",
        encoding="utf-8",
    )
    browser.open(page, width=900)
    browser.run("document.fonts.ready.then(() => true)")
    assert browser.errors == []
    assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.run("[...document.fonts].filter(f => f.status === 'loaded').length") >= 2
    last = f"document.querySelector('{until}')" if until else "document.body"
    return browser.run(f"{last}.getBoundingClientRect().bottom")


def test_two_screens(browser: Browser, tmp_path: Path) -> None:
    """The quick start ends on the first one, of 1,400 pixels, and the page on the second; what else
    is to be said is folded or a page of docs/."""
    page = tmp_path / "readme.html"
    whole = height(browser, README, page)
    assert height(browser, README, page, until="pre") <= SCREEN
    assert whole <= 2 * SCREEN
    section = "\n\n## One more\n\n" + "It says something in words. " * 12
    assert height(browser, README + section, page) > whole + 100
    assert height(browser, README.replace("<details>", "<details open>"), page) > whole + 500


@pytest.mark.soak
def test_it_runs_as_it_stands(tmp_path: Path) -> None:
    """On one's own photographs, without Ray; the weights are random, and lie where the hub puts
    them."""
    make_photos(tmp_path / "Pictures", count=48)
    name = re.search(r"--teacher timm:(\S+)", LINES)
    assert name is not None
    hub = tmp_path / ".cache/huggingface/hub" / f"models--timm--{name[1]}"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).mkdir(parents=True)
    weights = timm.create_model(name[1].partition(".")[0]).state_dict()
    save_file(weights, hub / "snapshots" / ("0" * 40) / "model.safetensors")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", LINES], cwd=tmp_path, text=True, capture_output=True, timeout=1800,
        env={**keep, "HOME": str(tmp_path), "PATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "executor: local, 1 x teacher" in done.stdout
    assert "VisionTransformer(" in done.stdout
    for left in ("photos.zarr/index.json", "runs/photos/encoder.safetensors", "photos.png"):
        assert (tmp_path / left).is_file()
