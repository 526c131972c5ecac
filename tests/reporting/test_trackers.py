"""Trackers: one run in each, every step once, whatever ends the run or the server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from helpers import SMALL, WATCHED, board_of, log_of, pretrain_line, tree

import milan
from milan.errors import ConfigError
from milan.reporting import trackers
from milan.training import checkpoint


def reported(store: Path, run: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """WATCHED cut twice, and once killed behind its checkpoint: its log speaks of more steps."""
    settings = {**WATCHED, "out": str(run), "report_to": to, "log_every": 1}
    milan.pretrain(str(store), stop_after=5, **settings)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            milan.pretrain(str(store), stop_after=4, **settings)
    assert log_of(run)[-1]["step"] == 9
    milan.pretrain(str(store), **settings)
    assert [line["step"] for line in log_of(run)] == list(range(1, 17))


def test_tensorboard_catches_up(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step once after a kill; a deleted folder is made of the log."""
    reported(store, tmp_path, "tensorboard", monkeypatch)
    lines = log_of(tmp_path)
    events = board_of(tmp_path).Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 17))
    run = tmp_path / "again"
    settings = {**WATCHED, "out": str(run)}
    milan.pretrain(str(store), stop_after=9, **settings)
    shutil.rmtree(run / "tensorboard")
    milan.pretrain(str(store), stop_after=1, **settings)
    lines = log_of(run)
    events = board_of(run).Scalars("val/loss")
    assert [event.step for event in events] == [x["step"] for x in lines if "val_loss" in x]
    tags = board_of(run).Tags()["scalars"]
    assert {t for t in tags if "val" in t} == {"val/loss", "val/cosine", "val/knn_top1"} & {*tags}
    assert not [tag for tag in tags if tag.startswith(("train/val", "train/knn"))]


@pytest.mark.soak
def test_mlflow(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in a real database beside the folder; each step once, settings and pictures."""
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    reported(store, tmp_path / "run", "mlflow", monkeypatch)
    about = json.loads((tmp_path / "run/run.json").read_text())
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "milan"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == about["reported"]["mlflow"]
    assert found.data.tags["milan.id"] == about["id"]
    assert (found.info.status, found.data.params["lr"]) == ("FINISHED", "0.003")
    lines = log_of(tmp_path / "run")
    for name in ("loss", "val_loss", "knn_top1"):
        history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, name)}
        assert history == {line["step"]: line[name] for line in lines if name in line}
        assert len(client.get_metric_history(found.info.run_id, name)) == len(history)
    pictures = [f.path for f in client.list_artifacts(found.info.run_id)]
    assert pictures == [f"sheet-{step:08d}.png" for step in (2, 10, 16)]


@pytest.mark.soak
@pytest.mark.parametrize(("failing", "later"), [(range(5, 9), 0.0), (range(5, 6), 60.0)])
def test_a_server_that_is_away(
    failing: range, later: float, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run does not end with its reporter: what was not taken is said later, or in the end."""
    tracking = pytest.importorskip("mlflow.tracking")
    from mlflow.exceptions import MlflowException

    log_batch, count = tracking.MlflowClient.log_batch, 0

    def flaky(self: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count in failing:
            raise MlflowException("away")
        return log_batch(self, *arguments, **more)

    monkeypatch.setattr(tracking.MlflowClient, "log_batch", flaky)
    monkeypatch.setattr(trackers, "_LATER", later)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/own.db")
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts of a database that says nothing else
    milan.pretrain(str(store), out=str(tmp_path / "run"), report_to="mlflow", **WATCHED)
    told = json.loads((tmp_path / "run/run.json").read_text())["reported"]["mlflow"]
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/own.db")
    steps = sorted(m.step for m in client.get_metric_history(told, "loss"))
    assert steps == [line["step"] for line in log_of(tmp_path / "run")]


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the end of a block is filled up
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


@pytest.mark.soak
def test_wandb_offline(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call leaves a part, all of one id; each step is in one of them, or said alike."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    reported(store, tmp_path, "wandb", monkeypatch)
    about = json.loads((tmp_path / "run.json").read_text())
    parts = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {part.stem for part in parts} == {f"run-{about['id']}"}
    said: dict[int, dict[str, Any]] = {}
    settings = {}
    for part in parts:
        for data in records_of(part):
            record = Record()
            record.ParseFromString(data)
            for item in record.run.config.update:
                settings[item.key] = json.loads(item.value_json)
            values = {
                (i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item
            }
            if "loss" in values:
                assert said.setdefault(record.history.step.num, values)["loss"] == values["loss"]
    lines = {line["step"]: line for line in log_of(tmp_path)}
    assert said.keys() == lines.keys()
    for step, line in lines.items():
        assert said[step]["loss"] == pytest.approx(line["loss"])
    assert settings["lr"] == 0.003


@pytest.mark.soak
def test_wandb_asks_nothing(store: Path, tmp_path: Path) -> None:
    """Without credentials, and on a terminal: one error that names the way out, no question.

    Nothing is lost either: the run that was to be replaced is what it was.
    """
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    milan.pretrain(str(store), out=str(run), stop_after=1, **SMALL)
    before = tree(run)
    left = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "COLUMNS": "500"}
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        pretrain_line(store, run, "--report-to", "wandb", "--overwrite", "--seed", 1),
        stdin=theirs, stdout=theirs, stderr=theirs, env=left | home,
    )  # fmt: skip
    os.close(theirs)
    patience = Timer(60, process.kill)  # a question would be waited for
    patience.start()
    said = b""
    with suppress(OSError):  # how a terminal ends
        while part := os.read(ours, 65536):
            said += part
    patience.cancel()
    os.close(ours)
    assert process.wait() == 1
    (line,) = [x for x in said.decode().splitlines() if x.startswith("milan: report_to wandb")]
    assert "WANDB_API_KEY" in line
    assert "try: WANDB_MODE=offline" in line
    assert tree(run) == before


def test_a_server_that_never_answers(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the run that was to be replaced is."""
    pytest.importorskip("mlflow")
    run = tmp_path / "run"
    milan.pretrain(str(store), out=str(run), stop_after=1, **SMALL)
    before = tree(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    another = {**SMALL, "seed": 1, "out": str(run), "report_to": "mlflow"}
    with pytest.raises(ConfigError, match="report_to mlflow"):
        milan.pretrain(str(store), overwrite=True, **another)
    assert tree(run) == before


def test_reporters_that_are_not_here(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown, or not installed: said before anything is made."""
    run = {**WATCHED, "out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="report_to 'visdom'"):
        milan.pretrain(str(store), report_to="tensorboard,visdom", **run)
    monkeypatch.setattr("milan.reporting.trackers.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="its package is not here") as error:
        milan.pretrain(str(store), report_to="mlflow", **run)
    assert error.value.fix == "pip install 'milan-pretrain[mlflow]'"
    assert not (tmp_path / "run").exists()
