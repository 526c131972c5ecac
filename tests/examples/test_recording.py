"""The recording at the top of the README: what it shows, and the command that makes it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from helpers import ROOT

PICTURE = ROOT / "docs" / "pictures" / "kill-resume-verify.svg"
TEXT = "{http://www.w3.org/2000/svg}text"


def shown(picture: str) -> list[str]:
    """The lines of a recording."""
    return ["".join(text.itertext()) for text in ElementTree.fromstring(picture).iter(TEXT)]


def check(picture: str) -> None:
    """A kill in the middle, the rest of the shards by the same line, a good store."""
    lines = shown(picture)
    assert len(picture) < 200_000
    assert lines.count("Killed") == 1
    prompts = [i for i, line in enumerate(lines) if line.startswith("$ milan extract-targets")]
    assert lines[prompts[0] : prompts[0] + 3] == lines[prompts[1] : prompts[1] + 3]
    assert prompts[0] < lines.index("Killed") < prompts[1]
    (line,) = (line for line in lines if line.startswith("resuming"))
    resumed = re.match(r"resuming: (\d+) of 20 shards", line)
    assert resumed is not None
    assert 8 <= int(resumed[1]) < 20
    assert re.search(r"targets\.zarr +│ +good", "\n".join(lines))
    assert "$ milan verify targets.zarr --deep" in lines
    assert not re.search(r"(?<![\w~.])/[a-z]+/\w", "\n".join(lines)), "a path of some machine"


def test_the_recording_in_the_readme() -> None:
    check(PICTURE.read_text(encoding="utf-8"))
    assert f"](docs/pictures/{PICTURE.name})" in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", ROOT / "demo" / "record.py")
    assert spec
    assert spec.loader
    module = sys.modules["record"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_appear_and_scroll(record: ModuleType, tmp_path: Path) -> None:
    """At their times; the window follows the last line; markup in a line is text."""
    recording = record.Recording(tmp_path)
    for number in range(record.HEIGHT + 2):
        recording.show(f"<line> {number} & " + "x" * number * 10, "output", after=0.5)
    picture = record.svg(recording, "a & b")
    assert shown(picture)[1] == "<line> 1 & " + 10 * "x"
    assert shown(picture)[-1].endswith("x…")
    assert max(map(len, shown(picture))) == record.WIDTH
    total, last = recording.now + 5, recording.now
    assert f"{100 * last / total:.2f}%, 100% {{opacity: 1}}" in picture
    assert f"translateY(-{2 * record._LINE}px)" in picture


@pytest.mark.soak
def test_it_is_recorded(tmp_path: Path) -> None:
    """By real commands, as the one that is kept."""
    out = tmp_path / "recording.svg"
    subprocess.run([sys.executable, ROOT / "demo/record.py", "--out", out], check=True)
    check(out.read_text(encoding="utf-8"))
