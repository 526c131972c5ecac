"""DVC's own comparisons of the repository's pipeline: metrics, plots and experiments of before."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

pytest.importorskip("dvc", reason="DVC is not installed: pip install milan-pretrain[dvc]")

STAND_IN = '''#!{python}
"""In place of milan: leaves what a stage declares, with figures that follow from the parameters."""
import json, pathlib, sys, yaml
command, *words = sys.argv[1:]
flags = dict(zip(words[::2], words[1::2]))
params = yaml.safe_load(open("params.yaml"))
epochs = params["pretrain"]["epochs"]

def leave(path, text):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)

if command == "extract-targets":
    leave(params["extract"]["out"] + "/index.json", "")
elif command == "pretrain":
    out = flags["--out"]
    leave(out + "/encoder.safetensors", str(epochs))
    leave(out + "/metrics.json", json.dumps(dict(val_loss=1 / epochs)))
    for name, key in (("curves", "loss"), ("validation", "val_loss")):
        rows = [f"{{i}},{{i}},{{1 / (i + 1)}}" for i in range(epochs)]
        leave(f"{{out}}/{{name}}.csv", chr(10).join(["step,epoch," + key, *rows]))
elif command == "report":
    out = params["report"]["out"]
    for name in ("report.html", "report.txt", "sheet.png", "curves.png"):
        leave(f"{{out}}/{{name}}", "x")
    leave(out + "/evaluation/knn.csv", "encoder,metric,value" + chr(10) + f"MILAN,k 20,{{epochs}}")
    leave(out + "/metrics.json", json.dumps(dict(knn=dict(k20=dict(MILAN=epochs)))))
else:
    folder = flags["--checkpoint"]
    folder = folder if "/" in folder else "runs/" + folder
    leave(f"{{folder}}/{{command}}.json", json.dumps(dict(k20=epochs)))
'''


def test_small_results_are_kept() -> None:
    """Of all outputs only the store and encoders are not: else nothing of before could be shown."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    outs = [
        out if isinstance(out, dict) else {out: {}}
        for stage in stages.values()
        for kind in ("outs", "metrics", "plots")
        for out in stage.get(kind, [])
    ]
    without = {
        Path(path).name for out in outs for path, how in out.items() if how.get("cache") is False
    }
    assert without == {"index.json", "encoder.safetensors"}


@pytest.mark.soak
def test_experiments_are_compared(tmp_path: Path) -> None:
    """After one commit: `dvc exp run -S`, `dvc metrics diff`, `dvc plots` and `dvc exp show`."""
    programs, folder = tmp_path / "bin", tmp_path / "project"
    for path in (programs, folder / "demo/data", folder / "demo/teacher"):
        path.mkdir(parents=True)
    (programs / "milan").write_text(STAND_IN.format(python=sys.executable))
    (programs / "milan").chmod(0o755)
    for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["evaluation"]["protocols"] = ["knn"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    paths = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    env = {**os.environ, "PATH": os.pathsep.join(paths), "DVC_NO_ANALYTICS": "1"}
    env |= {"DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "GIT_CONFIG_GLOBAL": os.devnull}
    env |= {f"GIT_{who}_{what}": "milan@localhost" for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")}  # fmt: skip

    def run(*words: str) -> str:
        done = subprocess.run(
            words, cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("dvc", "repro", "-q")
    run("git", "add", "--all")
    run("git", "commit", "-qm", "seven epochs")
    run("dvc", "exp", "run", "-q", "-n", "four", "-S", "pretrain.epochs=4")
    changed = json.loads(run("dvc", "metrics", "diff", "--json"))
    assert changed["report/metrics.json"]["knn.k20.MILAN"] == {"old": 7, "new": 4, "diff": -3}
    assert changed["runs/milan/metrics.json"]["val_loss"]["new"] == 1 / 4
    shown = csv.DictReader(io.StringIO(run("dvc", "exp", "show", "--csv")))
    figures = {row["Experiment"] or row["rev"]: row["runs/milan/knn.json:k20"] for row in shown}
    assert {name: figures[name] for name in ("four", "workspace")} == {
        "four": "4",
        "workspace": "4",
    }
    assert sorted(figures.values()) == ["4", "4", "7"]
    plots = json.loads(run("dvc", "plots", "diff", "HEAD", "--json"))
    assert not plots.get("errors")
    for name in ("milan/curves.csv", "milan/validation.csv", "evaluation/knn.csv"):
        (found,) = (parts for path, parts in plots["data"].items() if path.endswith(name))
        revisions = {revision for part in found for revision in part["revisions"]}
        assert revisions >= {"HEAD", "workspace"}
