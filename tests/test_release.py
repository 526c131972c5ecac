"""A release: one version everywhere, part of no identity; types that others can check against."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import EXTRACTION, ROOT, SMALL

import milan
from milan.version import __version__
from pipeline.extract import extract_targets


def test_one_version_everywhere() -> None:
    """Code, citation and changelog; the newest release stands right below Unreleased."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", __version__]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    major = int(__version__.split(".")[0])
    stable = "Development Status :: 5 - Production/Stable" in project["classifiers"]
    assert stable == (major >= 1)


def test_another_release_goes_on(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store and a run that another version of milan began are grown and resumed by this one."""
    store, run = tmp_path / "t.zarr", tmp_path / "run"
    settings: dict[str, Any] = {**EXTRACTION, **teacher_files, "out": str(store)}
    with monkeypatch.context() as earlier:
        for module in ("pipeline.extraction.plan", "milan.training.run", "milan.training.pretrain"):
            earlier.setattr(f"{module}.version", lambda name: "0.9.1")
        extract_targets(str(photos), **settings, limit=16)
        milan.pretrain(str(store), out=str(run), **SMALL, stop_after=2)
    assert '"milan":"0.9.1"' in (store / "generations/000/origin.json").read_text()
    assert "0.9.1" in (run / "run.json").read_text()
    figures = milan.pretrain(str(store), out=str(run), **SMALL, stop_after=1)
    assert figures["step"] == 3
    assert extract_targets(str(photos), **settings)["images"] == 24
    assert milan.verify(store).code == 0


def annotated(function: Callable[..., Any]) -> list[str]:
    """What a function's signature leaves open: parameters without a type, or the result."""
    signature = inspect.signature(function)
    open_ = [
        name
        for name, parameter in signature.parameters.items()
        if name != "self" and parameter.annotation is parameter.empty
    ]
    return open_ + (["return"] if signature.return_annotation is signature.empty else [])


@pytest.mark.parametrize("name", [n for n in milan.__all__ if n != "__version__"])
def test_public_names_are_typed(name: str) -> None:
    """Each parameter and result, of the public methods too; the results are no bare containers."""
    value = getattr(milan, name)
    functions = [value] if inspect.isfunction(value) else []
    if inspect.isclass(value):
        functions = [
            getattr(member, "fget", member)
            for word, member in vars(value).items()
            if not word.startswith("_") and (inspect.isfunction(member) or hasattr(member, "fget"))
        ]
        if not dataclasses.is_dataclass(value) and "__init__" in vars(value):
            functions.append(value.__init__)
    for function in functions:
        assert annotated(function) == [], function
        told = str(inspect.signature(function).return_annotation)
        assert told not in ("Any", "dict", "list", "tuple"), function
    # For type checkers the name is what it is when the program runs.
    seen = ast.parse((ROOT / "milan/__init__.py").read_text())
    (typed,) = [node for node in seen.body if ast.unparse(node).startswith("if TYPE_CHECKING")]
    imports = {
        alias.name: node.module
        for node in ast.walk(typed)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imports[name] == milan._HOME[name]


USER = """
import milan

summary: dict[str, object] = milan.extract_targets("photos", out="targets.zarr", views=2)
verdict = milan.verify("targets.zarr", deep=True)
code: int = verdict.code
views = milan.open_cache("targets.zarr")
count: int = len(views)
metrics: dict[str, object] = milan.pretrain("targets.zarr", out="runs/a", epochs=3)
encoder = milan.load_encoder("runs/a").eval()
encoder.requires_grad_(False)
names: list[str] = milan.load_classifier("runs/a/finetune").class_names
config = milan.ExtractConfig("photos", views=2)
quiet = milan.NoProgress()
milan.zero_shot("runs/a", progress=quiet)

# Each of these is wrong; were a name Any, its line would pass, and --strict would say so.
milan.extract_targets(3)  # type: ignore[arg-type]
milan.verify("targets.zarr", depth=1)  # type: ignore[call-arg]
milan.repair("targets.zarr", teacher=3)  # type: ignore[arg-type]
milan.ExtractConfig(views=2)  # type: ignore[call-arg]
milan.embed(3)  # type: ignore[arg-type]
milan.zero_shot(3)  # type: ignore[arg-type]
milan.open_cache("targets.zarr", layers="a")  # type: ignore[call-arg]
milan.load_encoder(3)  # type: ignore[arg-type]
milan.nonsense  # type: ignore[attr-defined]
"""


@pytest.mark.soak
def test_a_users_program_is_checked(tmp_path: Path) -> None:
    """mypy --strict on a program beside the installed wheel, which sees neither checkout nor
    tests: `py.typed` is there, and the names have their types."""
    wheels, site = tmp_path / "wheels", tmp_path / "env"
    (tmp_path / "copy").mkdir()  # so that no build/ is left in the checkout
    for name in ("milan", "pipeline", "stages"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "copy")
    source = str(tmp_path / "copy")
    build = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-q", "-w", str(wheels)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(site)], check=True)
    (packages,) = site.glob("lib/python*/site-packages")
    (wheel,) = wheels.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
    subprocess.run([*install, str(wheel)], check=True)
    # Behind it the libraries of this environment.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(others))
    (tmp_path / "user.py").write_text(USER)
    # Large, and not what is asked: their types are Any.
    large = (
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "pyarrow",
        "matplotlib",
        "sympy",
        "ray",
        "PIL",
    )
    sections = ",".join(f"mypy-{name},mypy-{name}.*" for name in large)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[{sections}]\nfollow_imports = skip\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(site / "bin/python"),
         "--cache-dir", str(tmp_path / "cache"), "user.py"],
        cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
