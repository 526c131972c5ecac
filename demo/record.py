"""Record an extraction that is killed, resumed and verified, as an animated SVG.

    python demo/record.py --out docs/pictures/kill-resume-verify.svg

Runs the commands on the demo's data in a temporary folder and keeps what they print, with the time
of each line. Nothing is written by hand but the comments. Pauses are shortened, the folder is shown
as ~, and lines that do not fit are cut, and end in an ellipsis.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "--teacher demo/teacher/config.json --pretrained demo/teacher/model.safetensors"
EXTRACT = f"milan extract-targets --data demo/data/train.parquet {TEACHER}"
EXTRACT += " --views 2 --limit 4000 --shard-size 400"
VERIFY = "milan verify targets.zarr --deep"
WIDTH, HEIGHT = 96, 14  # characters
_CELL, _LINE, _MARGIN = 8.43, 17, 16  # pixels
_LONGEST = 1.0  # seconds between two lines
_READ, _END = 1.6, 5.0  # seconds before a command, and at the end
_KINDS = {"prompt": "#7ee787", "note": "#8b949e", "output": "#e6edf3", "killed": "#ff7b72"}


@dataclass(frozen=True)
class Line:
    """A line of the terminal, and when it appears."""

    at: float
    kind: str
    text: str


class Recording:
    """What a terminal shows while commands run in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.now = folder, list[Line](), 0.0

    def show(self, text: str, kind: str, *, after: float = 0.0) -> None:
        """Add a line so many seconds after the last one."""
        self.now += after
        self.lines.append(Line(self.now, kind, text))

    def run(self, command: str, *, kill_when: Callable[[], bool] | None = None) -> int:
        """Run a command line; with `kill_when` it is killed (SIGKILL) as soon as that is true."""
        first, *more = textwrap.wrap(command, WIDTH - 6, subsequent_indent="    ")
        self.show("$ " + first + " \\" * bool(more), "prompt", after=_READ)
        for number, line in enumerate(more, 1):
            self.show(line + " \\" * (number < len(more)), "prompt")
        words = [sys.executable, "-m", *shlex.split(command)]
        environment = {**os.environ, "COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            words, cwd=self.folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        killer = Thread(target=_kill, args=(process, kill_when), daemon=True)
        if kill_when:
            killer.start()
        assert process.stdout
        last = time.monotonic()
        for line in process.stdout:
            now = time.monotonic()
            self.show(
                line.rstrip("\n").replace(str(self.folder), "~"),
                "output",
                after=min(_LONGEST, now - last),
            )
            last = now
        process.wait()
        if process.returncode == -signal.SIGKILL:
            self.show("Killed", "killed", after=0.4)
        return process.returncode


def _kill(process: subprocess.Popen[str], when: Callable[[], bool]) -> None:
    while process.poll() is None:
        if when():
            os.killpg(process.pid, signal.SIGKILL)
            return
        time.sleep(0.01)


def svg(recording: Recording, title: str) -> str:
    """The recording as a picture that moves: each line appears at its time, the rest scrolls."""
    total = recording.now + _END
    height, width = HEIGHT * _LINE + 2 * _MARGIN, WIDTH * _CELL + 2 * _MARGIN
    rows, scroll, style = list[str](), ["0% {transform: translateY(0)}"], list[str]()
    for number, line in enumerate(recording.lines):
        share = 100 * line.at / total
        text = line.text if len(line.text) <= WIDTH else line.text[: WIDTH - 1] + "…"
        style.append(
            f"@keyframes l{number} {{0%, {max(0, share - 0.01):.2f}% {{opacity: 0}} "
            f"{share:.2f}%, 100% {{opacity: 1}}}}"
            if share
            else f"@keyframes l{number} {{0%, 100% {{opacity: 1}}}}"
        )
        if text.strip():
            rows.append(
                f'<text class="{line.kind}" y="{(number + 0.75) * _LINE:g}" '
                f'style="animation-name: l{number}" xml:space="preserve">{escape(text)}</text>'
            )
        if number >= HEIGHT:
            scroll.append(
                f"{share:.2f}% {{transform: translateY(-{(number - HEIGHT + 1) * _LINE}px)}}"
            )
    scroll.append(
        f"100% {{transform: translateY(-{max(0, len(recording.lines) - HEIGHT) * _LINE}px)}}"
    )
    last = max(0, len(recording.lines) - HEIGHT) * _LINE
    colours = "\n".join(f".{kind} {{fill: {colour}}}" for kind, colour in _KINDS.items())
    inside = f'x="{_MARGIN}" y="{_MARGIN}" width="{WIDTH * _CELL:g}" height="{HEIGHT * _LINE}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}">
<title>{escape(title)}</title>
<style>
text {{font: 14px/1 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
animation: {total:.1f}s step-end infinite}}
{colours}
.scroll {{transform: translateY(-{last}px); animation: scroll {total:.1f}s step-end infinite}}
@keyframes scroll {{{" ".join(scroll)}}}
{chr(10).join(style)}
@media (prefers-reduced-motion: reduce) {{text, .scroll {{animation: none}}}}
</style>
<rect width="100%" height="100%" rx="8" fill="#0d1117"/>
<svg {inside}><g class="scroll">
{chr(10).join(rows)}
</g></svg>
</svg>
"""


def main() -> None:
    """Record, and write the picture."""
    parser = argparse.ArgumentParser(description="Record kill, resume, verify as SVG.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures/kill-resume-verify.svg")
    out = parser.parse_args().out.absolute()
    with tempfile.TemporaryDirectory(prefix="milan-record-") as name:
        folder = Path(name).resolve()
        shutil.copytree(ROOT / "demo", folder / "demo")
        records = folder / "targets.zarr/generations/000/records"
        recording = Recording(folder)
        recording.show("# kill -9 in the middle", "note")
        killed = recording.run(EXTRACT, kill_when=lambda: len(list(records.glob("*"))) >= 8)
        recording.show("# the same line again", "note", after=_READ)
        resumed = recording.run(EXTRACT)
        recording.show("# every byte of it", "note", after=_READ)
        verified = recording.run(VERIFY)
    if (killed, resumed, verified) != (-signal.SIGKILL, 0, 0):
        print("\n".join(line.text for line in recording.lines))
        raise SystemExit(f"the commands ended with {killed}, {resumed}, {verified}")
    picture = svg(
        recording, "An extraction is killed, the same line goes on, and every byte is verified"
    )
    out.write_text(picture, encoding="utf-8")
    print(f"{out}: {len(picture):,} bytes, {len(recording.lines)} lines, {recording.now:.0f} s")


if __name__ == "__main__":
    main()
