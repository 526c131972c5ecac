"""What a command needs of its process: names in UTF-8, any terminal, errors of the system."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from helpers import ROOT

from stages import cli, process
from stages.process import explain, prepare_process


@pytest.mark.parametrize(
    ("line", "code", "shown"),
    [
        (["--help"], 0, "extract-targets"),
        (["pretrain", "--help"], 0, "--num-workers"),
        (["config", "pretrain"], 0, "num_workers"),
        (["inspect", "STORE"], 0, "generations/000"),
        (["inspect", "nö/ç"], 1, r"no store at n\xf6/\xe7"),
        (["pretrain", "--cache", "日本"], 1, r"\u65e5\u672c"),
        (["pretrain", "--modèle"], 2, "No such option: --mod"),
    ],
)
def test_a_terminal_that_is_not_utf8(
    line: list[str], code: int, shown: str, store: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Help, tables and errors arrive; letters that it lacks are shown by their number."""
    monkeypatch.setattr(sys, "argv", ["milan", *(str(store) if w == "STORE" else w for w in line)])
    sent, ended = tmp_path / "sent", None
    with sent.open("w", encoding="ascii") as tty, redirect_stdout(tty), redirect_stderr(tty):
        try:
            cli.main()
        except SystemExit as left:
            ended = left.code
    text = sent.read_text(encoding="ascii", errors="replace")  # click's errors are UTF-8
    assert (ended or 0) == code
    assert shown in text


def test_another_locale_starts_the_command_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, in UTF-8: the names of files in a store do not depend on the shell."""
    started: list[list[str]] = []
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "milan", "inspect", "x"])
    monkeypatch.setattr(os, "execv", lambda program, line: started.append([program, *line]))
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONIOENCODING", "latin1")
    process._use_utf8()
    assert started == [[sys.executable, sys.executable, "-m", "milan", "inspect", "x"]]
    assert os.environ["PYTHONUTF8"] == "1"
    assert os.environ["PYTHONIOENCODING"] == "latin1"
    process._use_utf8()
    assert len(started) == 1


def test_text_files_are_utf8() -> None:
    """Whatever the locale: each text file that is opened names its encoding."""
    done = subprocess.run(
        [Path(sys.executable).parent / "ruff", "check", "--preview", "--select", "PLW1514",
         "milan", "pipeline", "stages"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_as_many_open_files_as_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit that the system sets by default is for programs that open few."""
    asked: list[tuple[int, int]] = []
    limits = (64, 4096)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    prepare_process()
    limits = (4096, 4096)
    prepare_process()
    assert asked == [(4096, 4096)]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/a"), r"/a: Too .*\); try: ulimit -n"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system; try: a"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; try: free"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
         r"\['/tmp'\]; try: TMPDIR=a folder"),
        (ConnectionError("refused"), "refused"),
        (OSError(), "OSError"),
    ],
)  # fmt: skip
def test_errors_of_the_system_are_explained(error: OSError, line: str) -> None:
    """What it is about, what is wrong, and what to do; no bare number."""
    assert re.search(line, explain(error))
    assert "Errno" not in explain(error)


@pytest.mark.parametrize("code", [0, 1])
def test_a_thread_that_stands_still_does_not_keep_the_process(code: int) -> None:
    """Python joins its threads before it ends: one in a read that never answers, for ever."""
    script = (
        "import os, sys, threading\n"
        "import milan.__main__ as entry\n"
        "def main():\n"
        "    threading.Thread(target=os.read, args=(os.pipe()[0], 1)).start()\n"
        f"    sys.exit({code})\n"
        "entry.import_module = lambda name: sys.modules['__main__']\n"
        "entry._LEAVE = 0.1\n"
        "entry.main()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == code
