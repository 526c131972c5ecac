"""Commands in README and docs: each flag, key, extra, target and module that they name exists.

`test_pages_run.py` runs them, in minutes; this takes a second.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from doc_blocks import PAGES, ROOT, blocks_of, python_blocks, shell_blocks, simple_commands

from milan.core import config_resolver
from stages import cli

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SHELL = {".", "[", "apt-get", "cd", "dpkg", "exit", "export", "mkdir", "pid=$!", "scontrol", "trap"}
SHELL |= {"code=$?", "dvc", "docker", "git", "kill", "python3", "ray", "sbatch", "wait"}
"""Other commands that a block may begin with."""
OTHERS = {
    "--md",
    "--version",
    "--no-scm",
    "--queue",
    "--temp",
    "--shm-size",
    "--no-python",
    "--nproc-per-node",
}
"""Flags of other programs, in running text."""
EXAMPLES = {"feature-rank"}
"""Commands that a page shows how to add."""


class Resolved(Exception):
    """A command had its settings, and would now begin."""


@pytest.fixture
def only_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where their settings are resolved."""
    resolve = config_resolver.resolve

    def resolved(*arguments: Any, **options: Any) -> None:
        resolve(*arguments, **options)
        raise Resolved

    monkeypatch.setattr(config_resolver, "resolve", resolved)
    monkeypatch.chdir(ROOT)


@cache
def commands() -> dict[str, Any]:
    """All commands of milan by name, such as `pretrain` and `store prune`."""
    group: Any = typer.main.get_command(cli.app)
    found = {name: group.get_command(typer.Context(group), name) for name in group.commands}
    for name, one in list(found.items()):
        found |= {f"{name} {below}": inner for below, inner in getattr(one, "commands", {}).items()}
    return found


@cache
def flags_of(name: str) -> set[str]:
    """Those of a command; of all if it has no name."""
    found = [commands()[name]] if name else commands().values()
    return {opt for one in found for param in one.params for opt in param.opts} | {"--help"}


@cache
def flags_of_scripts() -> set[str]:
    """Those of benchmarks, studies and the demo."""
    files = [
        path
        for folder in ("benchmarks", "studies", "demo")
        for path in (ROOT / folder).glob("*.py")
    ]
    return {flag for file in files for flag in re.findall(r'"(--[a-z][\w-]+)"', file.read_text())}


def check(words: list[str]) -> None:
    """Parse a simple command as far as it can be done without doing anything."""
    if "milan" in words and words[0] != "python":  # torchrun and srun may stand before it
        name, *arguments = words[words.index("milan") + 1 :]
        if f"{name} {arguments[0] if arguments else ''}" in commands():
            name, arguments = f"{name} {arguments[0]}", arguments[1:]
        found = commands()[name]
        with found.make_context(name, list(arguments)) as context:
            without = name == "config" or (name == "visualise" and context.params["cache"])
            if {"params", "sets"} <= {p.name for p in found.params} and not without:
                with pytest.raises(Resolved):
                    found.invoke(context)
    elif words[0] == "make":
        assert set(words[1:]) <= TARGETS
    elif words[0] == "pip":
        for word in words[2:]:
            extras = re.search(r"\[(.*)\]", word)
            assert extras is None or set(extras[1].split(",")) <= set(EXTRAS), word
    elif words[0] == "python" and words[1] == "-c":
        compile(words[2], "-c", "exec")
    elif words[0] == "python" and words[1] == "-m":
        file = ROOT / words[2].replace(".", "/")
        assert file.is_dir() or file.with_suffix(".py").is_file() or "." not in words[2]
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in SHELL, "not known here: say in this test how to check it"


@pytest.mark.usefixtures("only_settings")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_typed(page: Path) -> None:
    """Up to the resolved settings: a renamed flag or key, or a value out of range, is found."""
    for block in shell_blocks(page):
        for words in simple_commands(block.text):
            try:
                check(words)
            except Exception as error:
                raise AssertionError(f"{block.place}: {' '.join(words)}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_sentences_exist(page: Path) -> None:
    """`milan pretrain --local DIR` names a flag of pretrain, `--local DIR` one of any command."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        words = span.split()
        name = words[1] if len(words) > 1 and words[0] == "milan" else ""
        if name in EXAMPLES:
            continue
        name = name if re.fullmatch(r"[a-z][a-z-]+", name) else ""
        known = flags_of(name) | (set() if name else flags_of_scripts() | OTHERS)
        flags = {word.split("=")[0].rstrip("….,") for word in words if re.match(r"--[a-z]", word)}
        unknown = {flag for flag in flags if not any(k.startswith(flag) for k in known)}
        assert not unknown, f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles(page: Path) -> None:
    """Each block, alone."""
    for block in python_blocks(page):
        compile(block.text, block.place, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_fences(page: Path) -> None:
    """With a language, so that they are found, highlighted and can be copied."""
    text = page.read_text()
    typed = re.compile(r"^ {4}(milan|python|pip|make|dvc|docker|torchrun|srun|sbatch) ", re.M)
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not typed.search(outside)
    assert text.count("\n<!-- needs") == sum(b.needs is not None for b in blocks_of(page))
    for block in blocks_of(page):
        assert block.language or not re.match(r"(milan|python|pip|make|dvc) ", block.text)
