"""`make gpu-check` with the CPU in the GPU's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import PARTS, Check, run_parts, write


def test_parts_fail_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises is a row of the table, and the others go on."""

    def broken(check: Check) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(PARTS, "groups", broken)
    monkeypatch.setitem(PARTS, "late", lambda check: check.at_most("late", "a value", 2.0, 1.0))
    check = Check(torch.device("cpu"), tmp_path, small=True)
    assert run_parts(check, ["groups", "late"]).keys() == {"groups", "late"}
    assert not write(check, {}, tmp_path / "gpu.json")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["good"] for row in rows] == [False, False]
    assert rows[0]["value"] == "RuntimeError: no such kernel"


def test_a_loss_is_read_late_and_one_that_is_none_is_named(tmp_path: Path) -> None:
    """The part that looks into a step, which training changes."""
    check = Check(torch.device("cpu"), tmp_path, small=True)
    run_parts(check, ["late"])
    assert [row.good for row in check.rows] == [True, True]


@pytest.mark.soak
def test_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends with good verdicts, without packages that a GPU's machine need not have; but times
    of a dry run depend on what else runs here."""
    for absent in ("ray", "typer", "faiss", "tensorboard"):
        monkeypatch.setitem(sys.modules, absent, None)
    check = Check(torch.device("cpu"), tmp_path, small=True)
    run_parts(check, list(PARTS))
    write(check, {}, tmp_path / "gpu.json")
    bad = [row for row in check.rows if row.good is False and row.what != "images/s, difference"]
    assert not bad
    assert {row.part for row in check.rows} == PARTS.keys()
