"""Extraction under real Ray: from a hostile folder, against one process, and through real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import make_photos, tree

from pipeline.extract import extract_targets

COMMAND = str(Path(sys.executable).parent / "milan")


def line(photos: Path, out: Path, teacher_files: dict[str, str], *more: str) -> list[str]:
    return [
        COMMAND, "extract-targets", "--data", str(photos), "--out", str(out), "--views", "2",
        "--shard-size", "8", "--batch-size", "7", "--teacher", teacher_files["teacher"],
        "--pretrained", teacher_files["pretrained"], *more,
    ]  # fmt: skip


def test_under_ray_from_a_folder_with_packages_of_our_names(
    tmp_path: Path, photos: Path, store: Path, teacher_files: dict[str, str]
) -> None:
    """A user's own pipeline/, stages/ and milan/ must not be imported by Ray's workers."""
    for name in ("pipeline", "stages", "milan"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the user own package')\n")
    out = tmp_path / "ray.zarr"
    done = subprocess.run(
        line(photos, out, teacher_files), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "executor: ray, 1 x teacher" in done.stdout
    # The same bytes as the local executor's: only what says where data and store are may differ.
    ours, local = tree(out), tree(store)
    ours.pop("generations/000/zarr.json")
    local.pop("generations/000/zarr.json")
    assert ours == local


def test_a_killed_driver_and_the_same_line_again(
    tmp_path: Path, teacher_files: dict[str, str]
) -> None:
    """SIGKILL after the first commit: running the line again must end in a clean run's bytes."""
    photos = make_photos(tmp_path / "photos", count=48, seed=3)
    clean, out = tmp_path / "clean.zarr", tmp_path / "killed.zarr"
    extract_targets(
        str(photos), out=str(clean), views=2, shard_size=8, batch_size=7, executor="local",
        **teacher_files,
    )  # fmt: skip
    driver = subprocess.Popen(
        line(photos, out, teacher_files, "--executor", "local"), stdout=subprocess.DEVNULL
    )
    records = out / "generations" / "000" / "records"
    while driver.poll() is None and not (records.exists() and any(records.iterdir())):
        time.sleep(0.001)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    again = subprocess.run(
        line(photos, out, teacher_files), capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stdout + again.stderr
    killed, whole = tree(out), tree(clean)
    killed.pop("generations/000/zarr.json")
    whole.pop("generations/000/zarr.json")
    assert killed == whole
    assert not (out / ".staging").exists()
