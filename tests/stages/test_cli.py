"""The command line: exit codes, what is printed, which files a whole small run leaves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from helpers import Ran, run_here, tree

from milan.config import PretrainConfig
from milan.errors import MilanError
from milan.evaluation.config import LinearProbeConfig
from milan.evaluation.protocols import PROTOCOLS
from pipeline.config import ExtractConfig
from stages import console

COMMANDS = (
    "doctor", "plan", "extract-targets", "pretrain", "linear-probe", "inspect", "verify", "repair",
    "visualise", "report", "config", "predict", "embed", "neighbours", "zero-shot",
    "export",
)  # fmt: skip
STUDENT_FLAGS = (
    "--set", "model.patch_size=8", "--set", "model.embed_dim=32", "--set", "model.depth=2",
    "--set", "model.num_heads=2", "--set", "decoder.embed_dim=16", "--set", "decoder.depth=2",
    "--set", "decoder.num_heads=2",
)  # fmt: skip


# --- help, version, errors ------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    """The cause of a slow --help, not its time: torch alone takes seconds."""
    script = (
        "import contextlib, io, sys\n"
        "from stages.cli import main\n"
        "for command in ([], *([c] for c in sys.argv[1:])):\n"
        "    sys.argv = ['milan', *command, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try: main()\n"
        "        except SystemExit as left: assert left.code == 0, command\n"
        "    assert 'Usage: milan' in out.getvalue(), command\n"
        "print(*{name.split('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *COMMANDS], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "typer" in loaded
    heavy = {"torch", "timm", "open_clip", "ray", "zarr", "tensorstore", "pyarrow", "numpy"}
    assert not loaded & (heavy | {"PIL", "matplotlib", "safetensors", "yaml"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag_with_a_text(command: str) -> None:
    """A flag without help would be a setting without its docstring."""
    shown = run_here(command, "--help").out
    flags = re.findall(r"^│ [* ]{0,4}(--[a-z-]+) +<\S+ +(\S.*) │$", shown, re.MULTILINE)
    assert len(flags) == len(re.findall(r"^│ [* ]{0,4}--", shown, re.MULTILINE)) > 0
    assert all(text.strip() for _, text in flags)
    assert re.search(rf"Example: milan {command} .", shown)


@pytest.mark.parametrize(
    ("command", "panels"),
    [
        ("extract-targets", ("Data", "Views", "Teacher", "Store", "Machine")),
        ("plan", ("Data", "Views", "Teacher", "Store", "Machine")),
        ("pretrain", ("Store and run", "Student", "Schedule", "Machine")),
        ("linear-probe", ("Encoder", "Data", "Machine")),
    ],
)
def test_help_is_in_panels(command: str, panels: tuple[str, ...]) -> None:
    """Thirty flags in one list are read by nobody. Defaults are shown, brackets and all."""
    shown = run_here(command, "--help").out
    found = re.findall(r"^╭─ (.*?) ─+╮$", shown, re.MULTILINE)
    assert [name for name in found if name in panels] == list(panels)
    assert "[auto]" in shown
    assert "\\[" not in shown


def test_the_examples_of_the_help_are_command_lines() -> None:
    """Each is understood: it fails for what is not there, if at all, and not as a usage error."""
    for command in COMMANDS:
        line = run_here(command, "--help").out.split("Example: milan ")[1].split("\n\n")[0]
        assert run_here(*line.split(), "--help").code == 0


# --- milan config ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "kind", "key"),
    [
        ("extract-targets", ExtractConfig, "views"), ("pretrain", PretrainConfig, "window_rows"),
        ("linear-probe", LinearProbeConfig, "crop_share"), ("extract", ExtractConfig, "batch_size"),
    ],
)  # fmt: skip
def test_config_lists_every_key(command: str, kind: type, key: str) -> None:
    """Those that are no flags stand nowhere else."""
    shown = run_here("config", command).out
    listed = re.findall(r"^│ ([\w.]+) ", shown, re.MULTILINE)
    names = [field.name for field in dataclasses.fields(kind)]
    by_key = {f"{n}_args": f"{n}.KEY" for n in ("model", "objective")} | {"decoder": "decoder.KEY"}
    names = [by_key.get(name, name) for name in names]
    assert listed == names
    assert key in listed


def test_config_says_where_a_value_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default, recipe, file or --set; with its unit, and whole."""
    monkeypatch.setattr(console.out, "width", 200)  # whatever COLUMNS was when it was imported
    (tmp_path / "p.yaml").write_text("pretrain: {recipe: vit_large, seed: 3, lr: auto}\n")
    line = ("config", "pretrain", "--params", "p.yaml", "--set", "epochs=100")
    shown = run_here(*line, cwd=tmp_path).out
    rows = {
        cells[1].strip(): tuple(cell.strip() for cell in cells[2:5])
        for cells in (row.split("│") for row in shown.splitlines())
        if len(cells) == 7 and cells[1].strip()
    }
    assert rows["epochs"] == ("100", "epochs", "--set")
    assert rows["seed"] == ("3", "number", "p.yaml")
    assert rows["lr"] == ("auto", "a step", "p.yaml")
    assert rows["micro_batch"] == ("128", "images", "recipe vit_large")
    assert rows["mask_ratio"] == ("0.75", "share", "default")
    assert run_here("config").out.count("parameter file") == 6 + len(PROTOCOLS)
    wrong = run_here("config", "pretrian")
    assert (wrong.code, wrong.err.split("try: ")[1]) == (1, "milan config pretrain\n")


def test_other_spellings() -> None:
    """What people type is understood, or the nearest is named."""
    for name in ("visualize", "visualise", "linear_probe", "extract"):
        assert run_here(name, "--help").code == 0
    assert "Did you mean 'pretrain'" in run_here("pretain").err


@pytest.mark.parametrize(
    "words",
    [("--scale", "0.6,1"), ("--scale", "0.6", "1"), ("--scale=0.6,1",), ("--set", "scale=0.6,1")],
)
def test_pairs_with_a_comma(words: tuple[str, ...], tmp_path: Path) -> None:
    """All spellings of a pair say the same, whatever follows."""
    seen: list[ExtractConfig] = []

    def keep(config: ExtractConfig, **_: Any) -> dict:
        seen.append(config)
        raise MilanError("enough")

    import pipeline.estimate.cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.estimate.cost, "estimate_cost", keep)
        done = run_here("plan", "--data", "a,b", *words, "--views", 2, cwd=tmp_path)
    assert (done.code, done.err) == (1, "milan: enough\n")
    assert [(c.scale, c.views, c.data) for c in seen] == [((0.6, 1.0), 2, "a,b")]


def test_version() -> None:
    """One version: what is printed is what is installed."""
    assert run_here("--version") == Ran(0, f"milan-pretrain {version('milan-pretrain')}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("no-such-command",),
        ("pretrain", "--no-such-flag"),
        ("pretrain", "--epochs", "many"),
        ("pretrain", "stray"),
        ("extract-targets", "--scale", "0.2"),
        ("extract-targets", "--views"),
        ("visualise",),
        ("report",),  # a parameter file is read only when it is named
    ],
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    """A script can tell a mistyped line (2) from a run that failed (1)."""
    done = run_here(*arguments)
    assert done.code == 2
    assert "Usage: " in done.err or "Error: " in done.err
    assert "Traceback" not in done.err


def test_errors_are_one_line_and_exit_with_1(
    milan: Callable[..., subprocess.CompletedProcess], tmp_path: Path
) -> None:
    """The real process: one line on stderr that begins with `milan: `, nothing else, and 1."""
    done = milan("pretrain", "--cache", tmp_path / "none.zarr", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("milan: no store at ")
    assert "try: milan extract-targets" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("extract-targets --data x --views 99999999999", "expected: at least 1, at most 10000"),
        ("extract-targets --data x --img-size 100000", "expected: at least 1, at most 4096"),
        (
            "extract-targets --data x --scale nan 1",
            "scale = (nan, 1.0) in the command line; expected: 2 numbers, with a comma",
        ),
        ("pretrain --out ''", "out ''; expected: a folder: runs are kept on a disk; try: --out"),
        ("pretrain --lr nan", "lr = 'nan' in the command line; expected: a number"),
        ("pretrain --cache x", "no store at x; try: milan extract-targets --data … --out x"),
        ("pretrain --cache .", "it has no index.json; try: the --out of an extraction"),
        ("linear-probe --checkpoint x --data y", "no encoder.safetensors at x; expected: the fold"),
    ],
)
def test_values_that_cannot_be(line: str, said: str, tmp_path: Path) -> None:
    """So many views were planned for minutes; an empty --out made the working folder the run's."""
    done = run_here(*shlex.split(line), cwd=tmp_path)
    assert done.code == 1
    assert said in done.err
    assert not list(tmp_path.iterdir())


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pretrain --epochs 5 --seed 1 --epochs=6", "--epochs stands 2 times; expected: once; "
         "try: --epochs 6"),
        ("extract-targets --scale 0.5,1 --scale 0.6 1", "--scale stands 2 times"),
        ("knn --data a --data a --checkpoint b", "--data stands 2 times"),
        ("store prune a --layer b --layer c --views 1 --views 2", "--views stands 2 times"),
        ("predict --out a.csv b --out c.csv", "--out stands 2 times"),
        ("finetune --set a=1 --set model.depth=2 --set model.depth=3", "unknown parameter 'a'"),
        ("finetune --set model.depth=2 --set model.depth=3", "--set model.depth stands twice"),
    ],
)  # fmt: skip
def test_one_value_stands_once(line: str, said: str, tmp_path: Path) -> None:
    """In every command; a flag of several values, and a switch, may be repeated."""
    ran = run_here(*line.split(), cwd=tmp_path)
    assert ran.code == 1
    assert said in ran.err
    several = "knn --checkpoint a --checkpoint b --set seed=1 --set limit=1 --data no"
    assert "stands" not in run_here(*several.split(), cwd=tmp_path).err


def test_a_parameter_file_is_read_only_when_named(tmp_path: Path) -> None:
    """A params.yaml lying about must not change a run (DVC's own habit)."""
    for name, section in (("pretrain", "cache"), ("extract", "data")):
        (tmp_path / "params.yaml").write_text(f"{name}: {{{section}: from-the-file}}\n")
        command = "extract-targets" if name == "extract" else name
        silent = run_here(command, f"--{section}", "given", cwd=tmp_path)
        assert silent.code == 1
        assert "given" in silent.err
        named = run_here(command, "--params", "params.yaml", cwd=tmp_path)
        assert named.code == 1
        assert "from-the-file" in named.err
        flag = run_here(command, "--params", "params.yaml", f"--{section}", "given", cwd=tmp_path)
        assert "from-the-file" not in flag.err


def test_a_flag_beats_set_beats_the_file(tmp_path: Path) -> None:
    """default < parameter file < --set < flag; seen by which store is missed."""
    (tmp_path / "p.yaml").write_text("pretrain: {cache: of-file}\n")
    line = ["pretrain", "--params", "p.yaml"]
    assert "of-file" in run_here(*line, cwd=tmp_path).err
    line += ["--set", "cache=of-set"]
    assert "of-set" in run_here(*line, cwd=tmp_path).err
    assert "of-flag" in run_here(*line, "--cache", "of-flag", cwd=tmp_path).err


@pytest.mark.parametrize(
    ("command", "given", "near"),
    [
        ("pretrain", ("--set", "batchsize=16"), "batch_size"),
        ("pretrain", ("--set", "weight_decai=0"), "weight_decay"),
        ("extract-targets", ("--data", "x", "--set", "view=2"), "views"),
        ("linear-probe", ("--set", "crop=1"), "crop_share"),
        ("pretrain", ("--params", "p.yaml"), "epochs"),
        ("pretrain", ("--set", "pretrain.batchsize=16"), "batch_size"),
        ("extract-targets", ("--data", "x", "--set", "extract.views=2"), "views"),
        ("linear-probe", ("--set", "linear_probe.limit=1"), "limit"),
    ],
)
def test_an_unknown_parameter_names_the_nearest(
    command: str, given: tuple[str, ...], near: str, tmp_path: Path
) -> None:
    """A mistyped setting that was ignored would cost a run of days."""
    (tmp_path / "p.yaml").write_text("pretrain: {epoch: 3}\n")
    done = run_here(command, *given, cwd=tmp_path)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "unknown parameter" in line
    assert near in line.split("try: ")[1]


# --- a whole small run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, teacher_files: dict[str, str]
) -> Iterator[tuple[Path, dict[str, Ran]]]:
    """An empty folder after the commands a user types, and what each of them said."""
    folder = tmp_path_factory.mktemp("project")
    said: dict[str, Ran] = {}
    said["dry run"] = run_here(
        "extract-targets", "--data", photos, "--executor", "local", "--dry-run",
        "--teacher", teacher_files["teacher"], "--pretrained", "none", cwd=folder,
    )  # fmt: skip
    said["plan"] = run_here(
        "plan", "--data", photos, "--executor", "local",
        "--teacher", teacher_files["teacher"], "--pretrained", "none", cwd=folder,
    )  # fmt: skip
    assert not list(folder.iterdir())
    said["extract"] = run_here(
        "extract-targets", "--data", photos, "--views", 2, "--executor", "local",
        "--teacher", teacher_files["teacher"], "--pretrained", "none", "--shard-size", 16,
        cwd=folder,
    )  # fmt: skip
    train = (
        "pretrain", "--epochs", 2, "--batch-size", 8, "--num-workers", 0, "--set", "log_every=2",
        *STUDENT_FLAGS,
    )  # fmt: skip
    said["pretrain"] = run_here(*train, cwd=folder)
    said["metrics"] = Ran(0, (folder / "runs/pretrain/metrics.json").read_text(), "")
    said["again"] = run_here(*train, cwd=folder)
    said["probe"] = run_here("linear-probe", "--data", photos, cwd=folder)
    said["random"] = run_here(
        "linear-probe", "--checkpoint", "random", "--like", "runs/pretrain", "--data", photos,
        cwd=folder,
    )  # fmt: skip
    said["visualise"] = run_here("visualise", "targets.zarr", "--images", 2, cwd=folder)
    return folder, said


def test_every_command_succeeds(project: tuple[Path, dict[str, Ran]]) -> None:
    """And says nothing on stderr."""
    for name, ran in project[1].items():
        assert (ran.code, ran.err) == (0, ""), name


def test_what_a_dry_run_says(project: tuple[Path, dict[str, Ran]]) -> None:
    """The plan: what it takes, and nothing written (the fixture looked)."""
    said = project[1]["dry run"].out
    assert "Planned" in said
    assert "24 x 4" in said
    assert "rejected files" not in said


def test_plan_and_dry_run_say_the_same(project: tuple[Path, dict[str, Ran]]) -> None:
    """One plan, whichever way it is asked for."""
    told = [
        re.findall(r"^│ (\w[^│]*?) +│", project[1][name].out, re.MULTILINE)
        for name in ("plan", "dry run")
    ]
    assert told[0] == told[1]
    for what in ("images x views", "bytes", "files", "time", "reads", "page cache"):
        assert what in told[0]


def test_above_100_gb_extraction_asks(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal: the plan, one line, exit 1, nothing written; --yes goes ahead."""
    import pipeline.extract

    monkeypatch.setattr(pipeline.extract, "ASK_ABOVE", 20_000)
    line = (
        "extract-targets", "--data", photos, "--views", 2, "--executor", "local",
        "--teacher", teacher_files["teacher"], "--pretrained", "none", "--shard-size", 16,
    )  # fmt: skip
    asked = run_here(*line, cwd=tmp_path)
    assert asked.code == 1
    assert "Planned" in asked.out
    assert asked.err.startswith("milan: targets.zarr would take ")
    assert "--yes" in asked.err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert run_here(*line, cwd=tmp_path).code == 1
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert run_here(*line, cwd=tmp_path).code == 0
    # What was begun was agreed to: growing asks only for what is new.
    assert run_here(*line, cwd=tmp_path).code == 0
    more = (*line[:3], "--views", 6, *line[5:])
    assert run_here(*more, cwd=tmp_path).code == 1
    assert run_here(*more, "--yes", cwd=tmp_path).code == 0


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


def test_what_extraction_says(
    project: tuple[Path, dict[str, Ran]], photos: Path, teacher_files: dict[str, str]
) -> None:
    """The choices made for the user stand in the output."""
    lines = project[1]["extract"].out.splitlines()
    assert f"data: {photos.resolve()}" in lines
    assert "manifest: 24 images, 3 classes" in lines
    teacher = next(line for line in lines if line.startswith("teacher: "))
    assert "RANDOM WEIGHTS" in teacher
    assert "licence of the weights: none (random weights)" in teacher
    assert "normalisation own" in teacher
    executor = next(line for line in lines if line.startswith("executor: "))
    assert re.match(r"executor: local, 1 x teacher, \d+ decoding threads each", executor)
    table = "\n".join(lines)
    assert re.search(r"images x views\W+24 x 2\b", table)
    assert re.search(r"rejected files\W+none", table)


def test_what_pretraining_says(project: tuple[Path, dict[str, Ran]]) -> None:
    """First what differs from the published recipe, the flag of random weights, and the steps."""
    lines = project[1]["pretrain"].out.splitlines()
    assert lines[0].startswith("cache: targets.zarr, 24 images x 2 views, int8, teacher ")
    assert "RANDOM WEIGHTS" in lines[0]
    differs = next(line for line in lines if line.startswith("differs from the published recipe"))
    for told in ("epochs 2", "batch_size 8", "embed_dim: 32", "depth: 2"):
        assert told in differs
    for own in ("cache", "beta2", "weight_decay"):
        assert own not in differs
    steps = next(line for line in lines if line.startswith("steps: "))
    assert steps.startswith("steps: 6 of 8 images (1 x 8), 3 an epoch, fp32 on cpu")


def test_pretraining_again_keeps_what_is_there(project: tuple[Path, dict[str, Ran]]) -> None:
    """A finished run is told as finished; its figures stay those of the run that trained."""
    folder, said = project
    again = said["again"].out
    assert "resuming: runs/pretrain at step 6" in again
    assert "nothing is left to do" in again
    assert (folder / "runs/pretrain/metrics.json").read_text() == said["metrics"].out


def test_the_files_left(project: tuple[Path, dict[str, Ran]]) -> None:
    """Each command leaves what it names, and nothing beside."""
    folder, _ = project
    assert sorted(p.name for p in folder.iterdir()) == ["runs", "sheet.png", "targets.zarr"]
    top = {p.name for p in (folder / "targets.zarr").iterdir()}
    assert top - {".lock", ".staging"} == {
        "index.json", "zarr.json", "generations", "extract.log.jsonl"
    }  # fmt: skip
    assert sorted(p.name for p in (folder / "runs/pretrain").iterdir()) == [
        ".lock", "checkpoints", "curves.csv", "encoder.safetensors", "frozen_features",
        "linear_probe", "linear_probe.json", "log.jsonl", "metrics.json", "run.json", "sheet.png",
        "tensorboard", "validation.csv",
    ]  # fmt: skip
    steps = sorted(p.name for p in (folder / "runs/pretrain/checkpoints").iterdir())
    assert steps == ["step-00000003", "step-00000006"]
    left = sorted(p.name for p in (folder / "runs/random").iterdir())
    assert left == ["frozen_features", "linear_probe", "linear_probe.json"]


def test_what_a_probe_leaves(project: tuple[Path, dict[str, Ran]]) -> None:
    """Figures as JSON that DVC can plot, and the same figures printed."""
    folder, said = project
    for name, place in (("probe", "runs/pretrain"), ("random", "runs/random")):
        metrics = json.loads((folder / place / "linear_probe.json").read_text())
        assert 0 <= metrics["top1"] <= 100
        assert metrics["top5"] is None  # of three classes
        assert (metrics["train_images"], metrics["val_images"]) == (20, 4)
        assert (metrics["classes"], metrics["features"]) == (3, 64)
        assert re.search(rf"top1\W+{re.escape(str(metrics['top1']))}", said[name].out)


def test_telemetry_is_off_in_what_a_command_starts() -> None:
    """Ray, hubs and DVC see these variables; a user's own value does not switch them on."""
    script = (
        "import os, stages.cli\n"
        "print(*(os.environ[k] for k in ('RAY_USAGE_STATS_ENABLED', 'HF_HUB_DISABLE_TELEMETRY',"
        " 'DVC_NO_ANALYTICS', 'DO_NOT_TRACK')))"
    )
    loud = {"RAY_USAGE_STATS_ENABLED": "1", "HF_HUB_DISABLE_TELEMETRY": "0"}
    clean = {k: v for k, v in os.environ.items() if k not in ("DVC_NO_ANALYTICS", "DO_NOT_TRACK")}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**clean, **loud}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "1", "1", "1"]


# --- Ctrl-C ---------------------------------------------------------------------------------------


def test_ctrl_c_says_what_is_kept(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line: how many shards stay, and how to go on; the same line then makes the same store."""
    from pipeline.extraction import run

    line = [
        "extract-targets", "--data", photos, "--views", 2, "--shard-size", 8, "--executor", "local",
        *(word for name, value in teacher_files.items() for word in (f"--{name}", value)),
    ]  # fmt: skip
    assert run_here(*line, "--out", "whole.zarr", cwd=tmp_path).code == 0
    commit = run._Commits.commit

    def press(self: Any, *arguments: Any) -> None:
        commit(self, *arguments)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run._Commits, "commit", press)
        pressed = run_here(*line, "--out", "t.zarr", cwd=tmp_path)
    kept = "2 of 6 shards are in t.zarr and stay; the same line goes on with the others"
    assert (pressed.code, pressed.err) == (130, f"milan: interrupted: {kept}\n")
    assert "resuming: 2 of 6 shards" in run_here(*line, "--out", "t.zarr", cwd=tmp_path).out
    assert tree(tmp_path / "t.zarr") == tree(tmp_path / "whole.zarr")


@pytest.mark.parametrize(
    ("line", "left"),
    [
        (("verify", "x.zarr"), "nothing was written; the same line starts again"),
        (("linear-probe", "--data", "x"), "features that were computed stay; the same line"),
        (("repair", "x.zarr"), "shards that were written again stay; the same line repairs"),
        (("pretrain", "--cache", "x.zarr"), "the checkpoints in runs/pretrain stay; the same line"),
    ],
)
def test_ctrl_c_in_other_commands(
    line: tuple[str, ...], left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said is true of the command."""

    def press(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in (
        "pipeline.verify.verify", "pipeline.repair.repair", "milan.training.pretrain.pretrain",
        "milan.evaluation.evaluate.evaluate",
    ):  # fmt: skip
        monkeypatch.setattr(place, press)
    done = run_here(*line, cwd=tmp_path)
    assert done.code == 130
    assert done.err.startswith(f"milan: interrupted: {left}")
