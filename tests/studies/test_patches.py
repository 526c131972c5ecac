"""The study of patches, small: their labels, the classifier, and its command."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import STUDENT, draw_scenes

from milan.core.progress import NoProgress
from milan.evaluation.box_splits import open_boxes
from milan.evaluation.config import DetectConfig
from studies import patches
from studies.patches import OUTSIDE, SIZE, fitted, labels_of


def test_labels_of_patches(tmp_path: Path) -> None:
    """The class of the smallest box around a patch's centre; 0 beside all; none outside the image.

    Images of 96 x 192 fill the upper half of the canvas.
    """
    data = draw_scenes(tmp_path, size=(96, 192), masks=False)
    boxes, _ = open_boxes(DetectConfig(data=str(data)), NoProgress())
    labels = labels_of(boxes, 8).view(len(boxes), 16, 16)
    assert (labels[:, 8:] == OUTSIDE).all()
    assert (labels[:, :8] != OUTSIDE).all()
    for image, grid in enumerate(labels):
        for row in range(8):
            for column in range(16):
                x, y = (8 * place + 4 for place in (column, row))
                around = []
                for n in range(len(boxes.boxes))[boxes.of_image(image)]:
                    left, top, right, bottom = boxes.boxes[n] * SIZE / 192
                    if left <= x <= right and top <= y <= bottom:
                        around.append(((right - left) * (bottom - top), boxes.labels[n] + 1))
                assert grid[row, column] == (min(around)[1] if around else 0)
    assert set(labels[:, :8].unique().tolist()) == {0, 1, 2, 3}


def test_the_classifier() -> None:
    """Features that tell the class are worth 100, others the share of the class; what is outside an
    image is neither fitted nor measured."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 0, 0, 1, 2] * 400)
    telling = torch.eye(3)[y] + 0.01 * torch.randn(2000, 3, generator=generator)
    y[:100], telling[:100] = OUTSIDE, 1e3
    assert fitted(telling, y, telling, y) == ["100.0"] * 3
    noise, val = torch.randn(2, 2000, 3, generator=generator)
    accuracy, *precisions = map(float, fitted(noise, y, val, y))
    assert accuracy == 60
    assert precisions == pytest.approx([20, 20], abs=4)


def test_the_command(
    finished_run: Callable[..., Path],
    teacher_files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A row for each encoder, with its positions and without, behind each block."""
    shutil.copytree(finished_run(), tmp_path / "runs/milan")
    shutil.copytree(Path(teacher_files["teacher"]).parent, tmp_path / "teacher")
    data = draw_scenes(tmp_path / "scenes", size=(96, 128), masks=False)
    monkeypatch.setattr(sys, "argv", ["x", "--bccd", str(data), "--cifar10", str(tmp_path)])
    patches.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("| accuracy | square | disc | triangle |")
    cells = [row.strip("| ").split(" | ") for row in rows]
    depth = STUDENT["model_args"]["depth"]
    assert [row[:3] for row in cells[: depth + 1]] == [
        ["random", "own", str(block)] for block in range(depth + 1)
    ]
    assert {row[0] for row in cells} == {"random", "MILAN", "teacher"}
    assert len({tuple(row[:3]) for row in cells}) == len(cells) == 3 * 2 * (depth + 1)
    assert all(0 < float(figure) <= 100 for row in cells for figure in row[3:])
    # Shapes have colours of their own: behind the first embedding most patches are told apart.
    assert all(float(row[3]) > 80 for row in cells)
