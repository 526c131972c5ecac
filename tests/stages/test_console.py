"""Progress of a run, on a terminal and without one."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, WATCHED

import milan
from milan.errors import ConfigError


def seen_on(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the console's watcher writes, to a terminal of 100 columns or to a file."""
    from rich.console import Console

    from stages import console

    shown = io.StringIO()
    out = Console(file=shown, force_terminal=terminal, width=100, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", out)
    return shown


def test_progress_fits_a_terminal(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch, step, loss, rate, images/s, waiting, time left, and the judgement, uncut."""
    from stages.console import ConsoleProgress

    shown = seen_on(True, monkeypatch)
    run = {**WATCHED, "out": str(tmp_path), "log_every": 1, "report_to": "none"}
    with ConsoleProgress() as progress:
        monkeypatch.setattr(progress, "note", lambda _: None)  # they may be longer
        milan.pretrain(str(store), progress=progress, **run)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    lines = text.replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 100
    assert "…" not in text
    assert re.search(r"train ━+ 16/16 [\d.]+ steps/s \d:\d\d:\d\d [\d.]+ s left", text)
    (last,) = {line for line in lines if line.startswith("epoch 8.0, loss ")}
    assert re.search(
        r"lr \d\.\de-\d+, [\d,]+ images/s, data loading \d+%, val_loss \d\.\d{3}", last
    )
    assert shown.getvalue().rstrip().count("\x1b[?25l") == shown.getvalue().count("\x1b[?25h")


def test_an_error_leaves_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar hides it, and goes with the work, however that ends."""
    from stages.console import ConsoleProgress

    shown = seen_on(True, monkeypatch)

    def fails() -> None:
        with ConsoleProgress() as progress:
            progress.begin("train", 10, "steps")
            raise ConfigError("no")

    with pytest.raises(ConfigError):
        fails()
    assert shown.getvalue().count("\x1b[?25l") == shown.getvalue().count("\x1b[?25h") == 1


def test_a_plain_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal; the figures are those told last."""
    from stages import console

    shown, clock = seen_on(False, monkeypatch), 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    progress = console.ConsoleProgress()
    progress.begin("train", 1000, "steps", done=100)
    for done in range(101, 301):
        clock += 1.0
        progress.advance(done, f"loss {done}" if done % 50 == 0 else "")
    progress.end()
    assert shown.getvalue().splitlines() == [
        "train: 160/1,000, 1.0 steps/s, 0:14:00 left, loss 150",
        "train: 220/1,000, 1.0 steps/s, 0:13:00 left, loss 200",
        "train: 280/1,000, 1.0 steps/s, 0:12:00 left, loss 250",
        "train: 200 steps in 0:03:20, 1.0 steps/s",
    ]


WIDE = "console.table('t', ['encoder', *'abcde'], [['MILAN', *['80.5 (78.7-82.2) of 100'] * 5]])"


def test_a_table_is_whole_in_a_file_and_a_pipe() -> None:
    """No terminal, no width: a row is a line, though it has more than 80 columns."""
    keep = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    program = f"from stages import console; {WIDE}"
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=keep, capture_output=True, text=True
    )
    (row,) = (line for line in told.stdout.splitlines() if "MILAN" in line)
    assert row.count("80.5 (78.7-82.2) of 100") == 5


def test_a_table_is_whole_beside_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """report.txt does not depend on the window from which it was written."""
    from stages import console

    monkeypatch.setenv("COLUMNS", "40")
    file = io.StringIO()
    console.table("t", ["encoder", "top-1"], [["x" * 90, "80.5"]], to=console.text_file(file))
    assert f"{'x' * 90} │  80.5 │" in file.getvalue()
