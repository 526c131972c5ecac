"""A study is a list of `milan` commands: each is printed, runs once, and its line is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")


def run(name: str, line: str, out: Path, **folders: Path) -> None:
    """Run `milan LINE` in the folder `out`, unless steps.json there has it as finished.

    A word of the line that is a name of `folders`, such as DATA, stands for that folder. Finished
    lines are kept with their seconds; one that was changed runs again. Raises SystemExit.
    """
    record = out / "steps.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    if done.get(name, {}).get("line") == line:
        return
    print(f"\n{name}: milan {line}", flush=True)
    began = time.monotonic()
    in_a_fork(_milan, [str(folders.get(word, word)) for word in shlex.split(line)], out)
    done[name] = {"line": line, "seconds": round(time.monotonic() - began)}
    record.write_text(json.dumps(done, indent=2))


def in_a_fork(work: Callable[..., Any], *arguments: Any) -> None:
    """Call it in a process of its own that has all imports already. Raises SystemExit if it fails.

    Only for processes that have computed nothing by torch: its threads do not survive a fork.
    """
    for name in ("milan.evaluation.evaluate", "milan.training.pretrain", "pipeline.extract"):
        import_module(name)
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _milan(words: list[str], folder: Path) -> None:
    from stages import cli

    os.chdir(folder)
    sys.argv = ["milan", *words]
    cli.main()


def markdown(rows: list[list[str]]) -> str:
    """A table, its first row the headings."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"
