"""The pipeline under DVC: the repository's own dvc.yaml on a small project."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from doc_blocks import shell_blocks
from helpers import (
    ROOT,
    STUDENT,
    VOID,
    Ran,
    draw_masks,
    draw_scenes,
    make_photos,
    run_here,
    tree,
)

from milan.store.cache import TargetCache

pytest.importorskip("dvc", reason="DVC is not installed: pip install milan-pretrain[dvc]")


STAGES = (
    "extract", "pretrain@milan", "pretrain@pixels", "evaluate@linear_probe", "report",
)  # fmt: skip
"""In an order in which they can run."""


def dvc_environment(project: Path) -> dict[str, str]:
    """With the installed `dvc` and `milan` on its path."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(project / ".site"),
    }


def run_dvc(project: Path, *arguments: str, seconds: int = 900) -> subprocess.CompletedProcess:
    """dvc in `project`."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "dvc"), *arguments],
        cwd=project, env=dvc_environment(project), capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


def write_parquet(path: Path, folder: Path) -> None:
    """Class folders as a Parquet file in the Hugging Face image schema."""
    files = sorted(folder.rglob("*.jpg"))
    classes = sorted({file.parent.name for file in files})
    images = [{"bytes": f.read_bytes(), "path": f.name} for f in files]
    labels = [classes.index(file.parent.name) for file in files]
    info = {"info": {"features": {"label": {"names": classes, "_type": "ClassLabel"}}}}
    table = pa.table({"image": images, "label": labels})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


def set_params(project: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Change values of the project's params.yaml; a key that is not there is a mistake."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for section, values in changes.items():
        params[section] |= values
    path.write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, teacher_files: dict[str, str]
) -> Path:
    """A folder with the repository's dvc.yaml and params.yaml, the values made small."""
    folder = tmp_path_factory.mktemp("project")
    assert run_dvc(folder, "init", "--no-scm").returncode == 0
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, folder / name)
    write_parquet(folder / "data" / "train.parquet", photos)
    write_parquet(folder / "data" / "test.parquet", make_photos(folder / "test", seed=1))
    (folder / "teacher").mkdir()
    for file in teacher_files.values():
        shutil.copy(file, folder / "teacher")
    store = "targets.zarr"
    set_params(folder, {
        "extract": {
            "data": "data/train.parquet", "out": store, "teacher": "teacher/config.json",
            "pretrained": "teacher/model.safetensors", "views": 2, "executor": "local",
            "scale": [0.6, 1.0],
            "shard_size": 8,
        },
        "pretrain": {
            **STUDENT, "epochs": 1, "warmup_epochs": 0, "batch_size": 8,
            "num_workers": 0,
        },
        "evaluation": {"protocols": ["linear_probe"]},
        "linear_probe": {"data": "data/train.parquet", "val_data": "data/test.parquet"},
        "watched": {"data": "data", "teacher": "teacher"},
    })  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def reproduced(project: Path) -> subprocess.CompletedProcess:
    """Extraction and one pretraining, run by DVC."""
    done = run_dvc(project, "repro", "pretrain@milan")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def ran(done: subprocess.CompletedProcess) -> list[str]:
    """Names of the stages that DVC ran."""
    return re.findall(r"^Running stage '(.*?)'", done.stdout, re.MULTILINE)


def list_stages(project: Path) -> dict[str, tuple[str, list[str]]]:
    """name -> command and outputs, as DVC resolves dvc.yaml."""
    script = (
        "import json; from dvc.repo import Repo; stages = Repo('.').index.stages\n"
        "print(json.dumps({s.addressing: [s.cmd, [str(o) for o in s.outs]] for s in stages}))"
    )
    listed = subprocess.run(
        [sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=True
    )
    return json.loads(listed.stdout)


def times(store: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}


def test_extraction_and_pretraining(project: Path, reproduced: subprocess.CompletedProcess) -> None:
    """What a stage needs is run first, and only that."""
    assert ran(reproduced) == ["extract", "pretrain@milan"]
    assert (project / "runs/milan/encoder.safetensors").exists()


def test_the_commands_of_the_other_stages(
    project: Path, reproduced: subprocess.CompletedProcess
) -> None:
    """Each command of dvc.yaml, as DVC would type it, leaves the files that are declared."""
    stages = list_stages(project)
    assert len(stages) == len(STAGES)
    for name in sorted(stages.keys() - {"extract", "pretrain@milan"}, key=STAGES.index):
        command, outs = stages[name]
        done = run_here(*shlex.split(command)[1:], cwd=project)
        assert (done.code, done.err) == (0, ""), command
        assert [out for out in outs if not (project / out).exists()] == []
    check_results(project)


def check_results(project: Path) -> None:
    """The figures of a whole pipeline."""
    for name in ("milan", "pixels", "random", "teacher"):
        probe = json.loads((project / "runs" / name / "linear_probe.json").read_text())
        assert 0 <= probe["top1"] <= 100
        assert (probe["train_images"], probe["val_images"]) == (24, 24)
    report = (project / "report/report.txt").read_text()
    for text in ("random encoder", "pixels (MAE)", "MILAN", "teacher", "bytes a view"):
        assert text in report
    for picture in ("sheet.png", "curves.png", "evaluation/linear_probe.png"):
        assert (project / "report" / picture).stat().st_size > 5000


def test_a_second_repro_does_nothing(
    project: Path, reproduced: subprocess.CompletedProcess
) -> None:
    """No stage runs, no file of the store or of a run is touched."""
    before = times(project / "targets.zarr") | times(project / "runs")
    again = run_dvc(project, "repro", "pretrain@milan")
    assert again.returncode == 0
    assert ran(again) == []
    assert "up to date" in again.stdout
    assert times(project / "targets.zarr") | times(project / "runs") == before


@pytest.mark.soak
def test_a_training_parameter_does_not_extract_again(
    project: Path, reproduced: subprocess.CompletedProcess
) -> None:
    """Two epochs in place of one: the student is trained anew, the store is left alone."""
    before = times(project / "targets.zarr")
    set_params(project, {"pretrain": {"epochs": 2}})
    again = run_dvc(project, "repro", "pretrain@milan")
    assert again.returncode == 0, again.stdout + again.stderr
    assert ran(again) == ["pretrain@milan"]
    assert "'extract' didn't change" in again.stdout
    assert times(project / "targets.zarr") == before
    metrics = json.loads((project / "runs/milan/metrics.json").read_text())
    assert (metrics["step"], metrics["finished"]) == (6, True)


def run_stage(project: Path, name: str) -> Ran:
    """The command of a stage, in this process."""
    command, _ = list_stages(project)[name]
    return run_here(*shlex.split(command)[1:], cwd=project)


def dvc_stage(project: Path, name: str) -> Ran:
    """The stage, as DVC runs it."""
    done = run_dvc(project, "repro", name)
    assert ran(done) == [name]
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("run", [run_stage, pytest.param(dvc_stage, marks=pytest.mark.soak)])
def test_another_teacher_and_another_scale_are_not_mixed(
    run: Callable[[Path, str], Ran], project: Path, reproduced: subprocess.CompletedProcess
) -> None:
    """The stage refuses and says what to do, the store stays; with the old teacher and settings
    in place again nothing is to be done."""
    before = tree(project / "targets.zarr")
    weights = project / "teacher/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-2] + bytes(2))
    set_params(project, {"extract": {"scale": [0.2, 1.0]}})
    refused = run(project, "extract")
    assert refused.code != 0
    (line,) = (x for x in refused.err.splitlines() if x.startswith("milan: "))
    assert "teacher.weights: " in line
    assert "view_law.scale: [0.6, 1.0] != [0.2, 1.0]" in line
    assert "--out another.zarr, or delete targets.zarr first (in params.yaml: extract.out)" in line
    assert "--extend" not in line, "layers share their crops"
    assert tree(project / "targets.zarr") == before

    # What the line says: one key, and the new store is made beside the old one.
    weights.write_bytes(kept)
    lock = (project / "dvc.lock").read_bytes()
    set_params(project, {"extract": {"out": "another.zarr"}})
    beside = run(project, "extract")
    assert beside.code == 0, beside.err
    assert tree(project / "targets.zarr") == before
    assert TargetCache(project / "another.zarr").view_spec.scale == (0.2, 1.0)
    command, _ = list_stages(project)["pretrain@milan"]
    assert "--cache another.zarr" in command

    shutil.rmtree(project / "another.zarr")
    (project / "dvc.lock").write_bytes(lock)
    set_params(project, {"extract": {"scale": [0.6, 1.0], "out": "targets.zarr"}})
    again = run_dvc(project, "status", "extract")
    assert "up to date" in again.stdout
    assert tree(project / "targets.zarr") == before


@pytest.mark.soak
def test_a_killed_extraction_resumes(
    project: Path, reproduced: subprocess.CompletedProcess
) -> None:
    """A store as a killed run leaves it: no index, some shards without their records. The next
    repro makes their blocks, and the store is the same to the byte."""
    store = project / "targets.zarr"
    before, untouched = tree(store), store / "generations/000/records/00000.00.json"
    time = untouched.stat().st_mtime_ns
    (store / "index.json").unlink()
    for name in ("00001.01.json", "00002.00.json"):
        (store / "generations/000/records" / name).unlink()
    again = run_dvc(project, "repro", "extract")
    assert again.returncode == 0, again.stdout + again.stderr
    assert ran(again) == ["extract"]
    assert "resuming: 2 of 6 shards are there" in again.stdout
    assert tree(store) == before
    assert untouched.stat().st_mtime_ns == time


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


def test_committed_parameters_are_the_demo(project: Path) -> None:
    """A fresh clone runs on the embedded data; the files named are committed ones."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for path in (params["extract"]["data"], params["linear_probe"]["val_data"]):
        assert (ROOT / path).is_file()
    assert params["extract"]["teacher"].startswith("demo/")
    assert params["extract"]["pretrained"].startswith("demo/")
    for section in ("extract", "pretrain", "report", *params["evaluation"]["protocols"]):
        assert section in params


def test_a_protocol_is_one_word_of_the_parameters(project: Path, tmp_path: Path) -> None:
    """Its stage follows: of all encoders, with a metrics file of each."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(project / name, tmp_path)
    assert run_dvc(tmp_path, "init", "--no-scm").returncode == 0
    set_params(tmp_path, {
        "evaluation": {"protocols": ["linear_probe", "knn"], "finetuned": ["finetune"]}
    })  # fmt: skip
    stages = list_stages(tmp_path)
    for name, folder in {
        "finetune@finetune-milan": "milan", "finetune@finetune-pixels": "pixels",
        "finetune-random@finetune": "random",
    }.items():  # fmt: skip
        command, outs = stages.pop(name)
        assert command.startswith("milan finetune --params params.yaml --checkpoint ")
        assert outs == [f"runs/{folder}/finetune.json"]
    assert stages.keys() - set(STAGES) == {"evaluate@knn"}
    command, outs = stages["evaluate@knn"]
    assert command.startswith("milan knn --params params.yaml --checkpoint random,runs/pixels,")
    assert outs == [
        f"runs/{folder}/knn.json" for folder in ("random", "pixels", "milan", "teacher")
    ]

    set_params(tmp_path, {"evaluation": {"by_words": ["zero_shot"]}})
    command, outs = list_stages(tmp_path)["by-words@zero_shot"]
    assert command.startswith("milan zero_shot --params params.yaml --checkpoint random,runs/milan")
    assert outs == [f"runs/{folder}/zero_shot.json" for folder in ("random", "milan", "teacher")]


@pytest.mark.soak
def test_all_kinds_of_protocols_in_one_pipeline(project: Path, tmp_path: Path) -> None:
    """Frozen features, fine-tuning, segmentation, detection and words, by DVC, to the report.

    Each of the stages is a process, whose imports take most of its time.
    """
    shutil.copytree(project / "data", tmp_path / "data")
    shutil.copytree(ROOT / "demo/teacher", tmp_path / "teacher")  # which knows all words
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(project / name, tmp_path)
    draw_masks(tmp_path / "masked")
    draw_scenes(tmp_path / "scenes", size=(48, 96))
    short = {"epochs": 1, "warmup_epochs": 0, "batch_size": 4, "num_workers": 0}
    own = {
        "segment": {"data": "masked", "ignore": VOID, "size": 28},
        "detect": {"data": "scenes", "size": 64, "width": 16, "proposals": 20, "samples": 16},
        "finetune": {"data": "data/train.parquet", "val_data": "data/test.parquet"},
    }
    path = tmp_path / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["pretrain"]["model_args"] |= {"patch_size": 7}
    params["evaluation"] = {
        "protocols": ["linear_probe"], "finetuned": [*own], "by_words": ["zero_shot"]
    }  # fmt: skip
    params |= {name: section | short for name, section in own.items()}
    params["zero_shot"]["val_data"] = "data/test.parquet"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    assert run_dvc(tmp_path, "init", "--no-scm").returncode == 0
    done = run_dvc(tmp_path, "repro", seconds=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = ran(done)
    for name in own:
        assert {f"finetune@{name}-milan", f"finetune@{name}-pixels"} <= set(stages)
        assert f"finetune-random@{name}" in stages
    assert (len(stages), stages[-1]) == (15, "report")
    report = (tmp_path / "report/report.txt").read_text()
    for title in ("Linear probe", "Fine-tuning", "Segmentation", "Detection", "Zero-shot"):
        assert title in report
    figures = json.loads((tmp_path / "report/metrics.json").read_text())
    assert set(figures["segment"]["miou"]) == {"random encoder", "pixels (MAE)", "MILAN"}
    assert set(figures["detect"]["box_ap"]) == {"random encoder", "pixels (MAE)", "MILAN"}
    assert set(figures["zero_shot"]["token_top1"]) == {"random encoder", "MILAN", "teacher"}
    for name in ("segment", "detect", "zero_shot"):
        assert (tmp_path / f"report/evaluation/{name}.png").stat().st_size > 3000
    assert ran(run_dvc(tmp_path, "repro")) == []


@pytest.mark.soak
def test_the_pipeline_from_captions(tmp_path: Path) -> None:
    """demo/rils/dvc.yaml on a few of the demo's images: every stage once, then none."""
    demo = tmp_path / "demo"
    shutil.copytree(ROOT / "demo/rils", demo / "rils")
    shutil.copytree(ROOT / "demo/teacher", demo / "teacher")
    (demo / "data").mkdir()
    for name in ("train", "test"):
        few = pq.read_table(ROOT / f"demo/data/{name}.parquet")[:48]
        pq.write_table(few, demo / f"data/{name}.parquet")
    small = {"model_args": STUDENT["model_args"] | {"patch_size": 7}, "epochs": 1}
    set_params(demo / "rils", {"pretrain": small | {"warmup_epochs": 0, "batch_size": 16}})
    assert run_dvc(tmp_path, "init", "--no-scm").returncode == 0
    done = run_dvc(tmp_path, "repro", "demo/rils/dvc.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    measured = ["knn", "linear_probe", "zero_shot"]
    assert [name.split(":")[1] for name in ran(done)] == [
        "tokens", "pretrain", *(f"evaluate@{name}" for name in measured)
    ]  # fmt: skip
    figures = {n: json.loads((tmp_path / f"runs/rils/{n}.json").read_text()) for n in measured}
    for name, key in zip(measured, ("k20", "top1", "mean_top1"), strict=True):
        assert 0 <= figures[name][key] <= 100
    assert ran(run_dvc(tmp_path, "repro", "demo/rils/dvc.yaml")) == []


def run_shell(project: Path, line: str) -> str:
    """What a line prints that is typed in `project`, a git repository of nobody's."""
    env = dvc_environment(project) | {"GIT_CONFIG_GLOBAL": os.devnull}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_NAME": "milan", f"GIT_{who}_EMAIL": "milan@localhost"}
    done = subprocess.run(
        ["bash", "-ec", line], cwd=project, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, (line, done.stdout + done.stderr)
    return done.stdout


@pytest.mark.soak
def test_the_whole_pipeline(project: Path, tmp_path: Path) -> None:
    """Every stage by DVC, each once; the second time none; metrics and plots are found, and an
    experiment is compared as docs/dvc.md says."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(project / name, tmp_path)
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("data", "teacher"):
        shutil.copytree(project / name, tmp_path / name)
    set_params(tmp_path, {"pretrain": {"epochs": 2, "held_out": 0.34}})
    run_shell(tmp_path, "git init -q && dvc init -q && git add dvc.yaml .gitignore .dvcignore")
    done = run_dvc(tmp_path, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = ran(done)
    assert stages[-1] == "report"
    assert sorted(stages) == sorted(STAGES)
    check_results(tmp_path)
    before = times(tmp_path)
    again = run_dvc(tmp_path, "repro")
    assert (again.returncode, ran(again)) == (0, [])
    now = times(tmp_path)
    assert [
        path
        for path in before
        if now.get(path) != before[path] and not {".dvc", ".site"} & set(Path(path).parts)
    ] == []

    shown = json.loads(run_dvc(tmp_path, "metrics", "show", "--json").stdout)[""]["data"]
    names = {"runs/milan/metrics.json", "runs/pixels/metrics.json", "report/metrics.json"}
    names |= {f"runs/{n}/linear_probe.json" for n in ("milan", "pixels", "random", "teacher")}
    assert set(shown) == names
    assert all("data" in value for value in shown.values())
    check_comparison(tmp_path)


def check_comparison(project: Path) -> None:
    """The lines of docs/dvc.md, of 2 epochs and 4: what changed is what they show."""
    (block,) = (b.text for b in shell_blocks(ROOT / "docs/dvc.md") if "exp run" in b.text)
    assert "pretrain.epochs=20" in block
    lines = block.replace("pretrain.epochs=20", "pretrain.epochs=4").splitlines()
    before = json.loads((project / "report/metrics.json").read_text())
    printed = {line.partition(" -")[0]: run_shell(project, line) for line in lines}
    after = json.loads((project / "report/metrics.json").read_text())
    assert "Running stage 'pretrain@milan'" in printed["dvc exp run"]
    assert "Running stage 'extract'" not in printed["dvc exp run"]

    (changed,) = re.findall(r"^params.yaml +(.*)$", printed["dvc params diff"], re.MULTILINE)
    assert changed.split() == ["pretrain.epochs", "2", "4"]
    key, every = "pretrain_images_per_second", run_shell(project, "dvc metrics diff")
    for text in (printed["dvc metrics diff"], every):
        for name in ("MILAN", "pixels"):
            assert re.search(rf"{key}.{name} .*{before[key][name]} .*{after[key][name]} ", text)
    assert re.search(r"runs/milan/metrics.json +step +4 +8 +4$", every, re.MULTILINE)
    assert re.search(r"runs/pixels/metrics.json +val_loss ", every)

    html = (project / "dvc_plots/index.html").read_text()
    charts = [
        json.loads(chart) for chart in re.findall(r"var spec = (\{.+\});$", html, re.MULTILINE)
    ]
    titles = {chart["title"]["text"]: chart["data"]["values"] for chart in charts}
    for objective in ("milan", "pixels"):
        for kind in ("training", "validation"):
            rows = titles.pop(f"{objective}: loss in {kind}")
            curve = "curves" if kind == "training" else "validation"
            kept = (project / f"runs/{objective}/{curve}.csv").read_text()
            now = [row for row in rows if row["rev"] == "workspace"]
            assert [{**row, "rev": ""} for row in now] == [
                {**row, "rev": ""} for row in csv.DictReader(io.StringIO(kept))
            ]
            assert [float(row["epoch"]) for row in rows if row["rev"] == "HEAD"] == [1, 2]
    bars = titles.pop("report/evaluation/linear_probe.csv")
    assert not titles
    for rev, figures in (("HEAD", before), ("workspace", after)):
        found = {row["encoder"]: float(row["value"]) for row in bars if row["rev"] == rev}
        assert found == figures["linear_probe"]["top1"]
    for rev in ("HEAD", "workspace"):
        picture = project / f"dvc_plots/static/{rev}_report_evaluation_linear_probe.png"
        assert picture.stat().st_size > 3000

    (head,) = re.findall(r"^ +Experiment .*", printed["dvc exp show"], re.MULTILINE)
    assert head.split()[-1] == "pretrain.epochs"
    assert "pretrain_images_per_second.MILAN" in head.split()
    assert not re.search(r"runs/", head)
    assert re.search(
        rf"longer\].* {after[key]['MILAN']} .* 4 *$", printed["dvc exp show"], re.MULTILINE
    )

    run_shell(project, "git checkout -q . && dvc checkout -q")
    assert json.loads((project / "report/metrics.json").read_text()) == before
    run_shell(project, "dvc exp apply longer")
    assert json.loads((project / "report/metrics.json").read_text()) == after
