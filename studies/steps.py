"""What a study does step by step: each is done once, and its figure is kept as soon as it is known.

A figure comes from a function, or is the seconds of a `milan` command. A stopped call goes on.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

Probe = Callable[[], float]
FORK = multiprocessing.get_context("fork")


def flags(name: str, about: str) -> argparse.ArgumentParser:
    """What every study takes: `--work`, `--out` and `--seeds`.

    Figures that `--out` has are not measured again; another file measures all.
    """
    parser = argparse.ArgumentParser(prog=f"python -m studies.{name}", description=about)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/studies"), help="folder of stores and runs"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("studies/results") / f"{name}.csv",
        help="the figures: those that are there are not measured again (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    return parser


class Figures:
    """The figures of a file: method, seed, measure, value; a line for each."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[tuple[str, str, str], float]()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                self.known = {
                    (row["method"], row["seed"], row["measure"]): float(row["value"])
                    for row in csv.DictReader(file)
                }

    def measure(self, method: str, seed: int, name: str, find: Callable[[], float]) -> None:
        """Find a figure and keep it, if it is not known."""
        if (method, str(seed), name) not in self.known:
            self.keep(method, seed, name, find())
            print(f"{method}, seed {seed}, {name}: {self.value(method, seed, name)}", flush=True)

    def keep(self, method: str, seed: int, name: str, value: float) -> None:
        """Keep a figure; one that is known stays."""
        key = method, str(seed), name
        if key in self.known:
            return
        self.known[key] = value
        new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(("method", "seed", "measure", "value"))
            writer.writerow((*key, value))

    def run(
        self, method: str, seed: int, train: Callable[[], float], probes: Mapping[str, Probe]
    ) -> None:
        """Train by `method` and measure what comes out, unless all of it is known.

        `train` gives the seconds of a run, also of one that is finished; they are kept as CPU s.
        """
        names = ["CPU s", *probes]
        if all((method, str(seed), name) in self.known for name in names):
            return
        spent = train()
        self.measure(method, seed, "CPU s", lambda: spent)
        for name, find in probes.items():
            self.measure(method, seed, name, find)

    def value(self, method: str, seed: int, name: str) -> float:
        """A figure that is known."""
        return self.known[method, str(seed), name]

    def values(self, method: str, name: str) -> list[float]:
        """A figure of all seeds, as far as they are known."""
        return [v for (m, _, n), v in self.known.items() if (m, n) == (method, name)]

    def mean(self, method: str, name: str) -> float:
        """Mean over the seeds; not a number if none is known."""
        found = self.values(method, name)
        return statistics.mean(found) if found else float("nan")

    def epochs_at_equal_time(self, method: str, reference: str, epochs: int) -> int:
        """How many epochs of a method take as long as so many of another, rounded."""
        share = self.mean(reference, "CPU s") / self.mean(method, "CPU s")
        return max(1, round(epochs * share))

    def cell(self, method: str, name: str, form: str = "{:.1f}") -> str:
        """Mean and standard deviation over the seeds, as far as they are known."""
        return spread(self.values(method, name), form)


def spread(values: list[float], form: str = "{:.1f}") -> str:
    """Mean and standard deviation over seeds; one value alone, and - for none."""
    if len(values) < 2:
        return form.format(values[0]) if values else "-"
    deviation = form.replace("+", "").format(statistics.stdev(values))
    return f"{form.format(statistics.mean(values))} ± {deviation}"


def run(figures: Figures, line: str, out: Path, **folders: Path) -> None:
    """Run `milan LINE` in the folder `out`, unless its seconds are known.

    A word of the line that is a name of `folders`, such as DATA, stands for that folder. A line
    that was changed runs again. Raises SystemExit.
    """

    def seconds() -> float:
        print(f"\nmilan {line}", flush=True)
        began = time.monotonic()
        in_a_fork(_milan, [str(folders.get(word, word)) for word in shlex.split(line)], out)
        return round(time.monotonic() - began)

    figures.measure(f"milan {line}", 0, "s", seconds)


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


def with_interval(metrics: dict[str, Any], key: str) -> str:
    """A figure of a protocol with its interval, as far as they are among the metrics."""
    if metrics.get(key) is None:
        return "-"
    interval = metrics.get(f"{key}_interval")
    return f"{metrics[key]:.1f}" + (f" ({interval[0]:.1f}-{interval[1]:.1f})" if interval else "")


def write_table(rows: list[list[str]], out: Path) -> None:
    """Print a table, and leave it as table.md and table.csv in the folder `out`."""
    with (out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (out / "table.md").write_text(markdown(rows))
    print("\n" + markdown(rows))


def markdown(rows: list[list[str]]) -> str:
    """A table, its first row the headings."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"
