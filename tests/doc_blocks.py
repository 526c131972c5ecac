"""The command blocks of README and docs, as the tests read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "demo/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
_FENCE = re.compile(
    r"(?:^<!-- needs (?P<needs>GPU|network|hours): [^\n]{6,} -->\n+)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    needs: str | None
    """GPU, network or hours, if a comment before it says so: then no test runs it."""

    @property
    def place(self) -> str:
        """For messages: page and line."""
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """In the order of the page."""
    text = page.read_text()
    return [
        Block(
            page.relative_to(ROOT).as_posix(), text[: found.start("text")].count("\n"),
            found["language"], found["text"], found["needs"],
        )
        for found in _FENCE.finditer(text)
    ]  # fmt: skip


def shell_blocks(page: Path) -> list[Block]:
    """Those that people type."""
    return [block for block in blocks_of(page) if block.language in ("sh", "bash")]


def python_blocks(page: Path) -> list[Block]:
    """Programs (python) and parts of them (py)."""
    return [block for block in blocks_of(page) if block.language in ("python", "py")]


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell text, variables of its own replaced."""
    values: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in values.items():
            line = line.replace(f"${name}", value)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|(){}"):
                while words and (found := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
                    values[found[1]] = found[2]
                    del words[0]
                if words:
                    yield words
                words = []
            else:
                words.append(word)
