"""Packaging: what the wheel holds, what it asks for, one name everywhere, the promised commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers import ROOT

PACKAGES = ("milan", "pipeline", "stages")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel, built from a copy, so that no build/ is left in the checkout."""
    pytest.importorskip("setuptools", reason="pip install milan-pretrain[test]")
    copy = tmp_path_factory.mktemp("wheel") / "checkout"
    unwanted = shutil.ignore_patterns(
        ".*", "*.egg-info", "__pycache__", "build", "runs", "site", "*.zarr", "*.so"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation",
            "--disable-pip-version-check", "-w", "dist",
        ],
        cwd=copy, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = (copy / "dist").glob("*.whl")
    return ZipFile(file)


def metadata(wheel: ZipFile, name: str) -> str:
    (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_the_wheel_holds_every_module_and_nothing_else(wheel: ZipFile) -> None:
    """A module that is missing here is missing for everyone but us."""
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ours = {
        path.relative_to(ROOT).as_posix() for p in PACKAGES for path in (ROOT / p).rglob("*.py")
    }
    data = [
        path for room in ("recipes", "reports/page") for path in (ROOT / "milan" / room).iterdir()
    ]
    read = {path.relative_to(ROOT).as_posix() for path in data}
    typed = {"milan/py.typed", "pipeline/py.typed"}  # milan's public names are also the pipeline's
    # C and what it was compiled to: nothing where there is no compiler.
    compiled = {name for name in held if name.startswith("milan/images/_resize.")}
    assert len(compiled) == (1 if shutil.which("cc") else 0)
    assert held == ours | read | compiled | typed | {"milan/images/resize.c"}
    # Installed, they would hide a program's own folder called so.
    assert not held & {"pipeline/__init__.py", "stages/__init__.py"}
    for module in held:
        if module.endswith(".py"):
            assert wheel.read(module) == (ROOT / module).read_bytes()


def test_the_wheel_installs_the_command(wheel: ZipFile) -> None:
    """`milan` is what the README types."""
    assert "milan = milan.__main__:main" in metadata(wheel, "entry_points.txt").splitlines()


def test_the_wheels_metadata(wheel: ZipFile) -> None:
    """Name, version, licence and its text."""
    told = message_from_string(metadata(wheel, "METADATA"))
    assert told["Name"] == PROJECT["name"]
    version: dict[str, str] = {}
    exec((ROOT / "milan/version.py").read_text(), version)
    assert told["Version"] == version["__version__"]
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == ">=3.11"
    assert "two commands" in told.get_payload().lower()  # the README
    (licence,) = (n for n in wheel.namelist() if n.endswith("/LICENSE"))
    assert b"Apache License" in wheel.read(licence)[:400]
    assert set(told.get_all("Provides-Extra")) >= {"dvc", "test"}


def test_torch_is_never_replaced() -> None:
    """Lower bounds only, and on torch above all: a cap or a pin would swap a user's build."""
    names = {}
    for requirement in PROJECT["dependencies"]:
        name, bound = re.fullmatch(r"([A-Za-z0-9_.-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        names[name] = bound
        assert re.fullmatch(r">=[0-9.]+", bound), requirement
    assert "torch" in names
    assert "dvc" not in names


def test_ci_tries_the_oldest_and_the_newest() -> None:
    """The Pythons that are named begin with the oldest that is allowed, and CI tries both ends."""
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert "\n.ci/package oldest newest\n" in (ROOT / ".ci/run").read_text()
    script = (ROOT / ".ci/package").read_text()
    listed = subprocess.run(
        ["bash", "-ec", re.search(r"^supported\(\).*?^}$", script, re.M | re.S)[0] + "\nsupported"],  # type: ignore[index]
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout.split() == named
    for told in (f"Python {', '.join(named[:-1])} and {named[-1]}", "torch ≥ 2.6"):
        assert told in (ROOT / "docs/stability.md").read_text()
    assert "torch>=2.6" in PROJECT["dependencies"]


def test_every_extra_is_told() -> None:
    """In the table of the first hour, and in the image, which has all that milan can use."""
    extras = set(PROJECT["optional-dependencies"]) - {"test", "dev"}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/start.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == extras
    image = re.search(r"\.\[(.*?)\]", (ROOT / "deploy/Dockerfile").read_text())
    assert image
    assert set(image[1].split(",")) == extras - {"docs"}


@pytest.mark.parametrize("name", ["run", "package"])
def test_scripts_of_ci(name: str) -> None:
    """By a linter of shell scripts."""
    linter = shutil.which("shellcheck")
    if linter is None:
        pytest.skip("shellcheck is absent: .ci/ is not linted")
    done = subprocess.run([linter, str(ROOT / ".ci" / name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_one_name_everywhere() -> None:
    """`milan` on the package index is someone else's: no text may send people there."""
    name = PROJECT["name"]
    assert name != "milan"
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts += [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    asked = []
    for text in texts:
        asked += re.findall(r"pip install (?:--?[\w-]+ )*([\w.-]+)", text.read_text())
    assert name in asked
    assert [a for a in asked if a.startswith("milan") and a != name] == []
    used = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            used |= set(re.findall(r"\bversion\(\"(milan[\w-]*)\"\)", path.read_text()))
    assert used == {name}


def test_the_promised_commands() -> None:
    """README's two commands are targets, and CI runs the one that tests."""
    makefile = (ROOT / "Makefile").read_text()
    for target in ("install", "demo", "test"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert re.search(r"^demo: install$", makefile, re.MULTILINE)
    assert re.search(r"^test: install\b", makefile, re.MULTILINE)
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()
    readme = (ROOT / "README.md").read_text()
    first = readme.index("make demo")
    assert first < readme.index("make test") < readme.index("milan extract-targets --data imagenet")
    for command in ("extract-targets --data imagenet", "pretrain --cache targets.zarr"):
        assert f"milan {command}" in readme
    assert "dvc repro" in readme


def test_the_targets_can_be_made() -> None:
    """make -n: no rule is missing, and `install` comes before what needs it."""
    for target in ("demo", "test"):
        done = subprocess.run(
            ["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        install = next(i for i, line in enumerate(lines) if "pip install" in line)
        work = "dvc repro" if target == "demo" else "pytest"
        assert install < next(i for i, line in enumerate(lines) if work in line)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "CHANGELOG.md", "docs/decisions.md",
                                  ".pre-commit-config.yaml", "pyproject.toml", "SECURITY.md",
                                  "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml"])  # fmt: skip
def test_files_people_look_for(name: str) -> None:
    """They are there and say something."""
    assert len((ROOT / name).read_text()) > 200


def test_nothing_is_built_in_the_checkout(wheel: ZipFile) -> None:
    """The fixture above left nothing behind."""
    assert not (ROOT / "build").exists()
    assert not (ROOT / "dist").exists()
    assert Path(str(wheel.filename)).is_file()
