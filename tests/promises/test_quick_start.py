"""README's quick start, typed as it stands, in a home that has photographs and the weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from helpers import ROOT, make_photos
from safetensors.torch import save_file

README = (ROOT / "README.md").read_text()
LINES = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0]


def test_it_is_on_the_first_screen() -> None:
    """Ten lines at most, before everything that one need not know yet."""
    assert len(LINES.splitlines()) <= 10
    assert README.index(LINES) < README.index("## Two commands")
    assert README[: README.index(LINES)].count("\n") < 25


def test_the_whole_is_two_screens() -> None:
    """Of 1,400 pixels, in a column of 840; what else is to be said is folded or a page of docs/."""
    seen = re.sub(r"<details>.*?</details>", "", README, flags=re.DOTALL)
    assert len(seen.splitlines()) <= 100
    assert len(seen.split()) <= 950


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
