"""Trackers: TensorBoard's files, Weights & Biases, MLflow.

Each is imported only if asked for. One run is one run in each of them, however often it is resumed:
a step that it already has is not sent again, and those that it missed are sent from the log.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from milan.errors import ConfigError
from milan.reporting.log import COLUMNS, Tracker
from milan.reporting.run_files import TENSORBOARD, read_run, update_run

_PROJECT = "milan"
_LATER = 60.0  # seconds after which a server that did not answer is asked again


class TensorBoard:
    """Scalars, pictures and the run's settings (its HPARAMS page) below the run's folder.

    Figures of training are tagged train/…, those of validation images val/….
    """

    def __init__(self, run: Path, start: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = run / TENSORBOARD
        self.last_step = start if folder.exists() else 0
        self.board = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        about = read_run(run)
        shown = {f"decoder.{name}": value for name, value in about.get("decoder", {}).items()}
        for name, value in about["config"].items():
            if isinstance(value, dict):
                shown |= {f"{name}.{inner}": _plain(v) for inner, v in value.items()}
            elif value is not None:
                shown[name] = _plain(value)
        # Not add_hparams: it would make a second run of its own.
        self._writer: Any = self.board._get_file_writer()
        *begin, self._end = hparams(shown, {"train/loss": 0.0, "val/loss": 0.0})
        for summary in begin:
            self._writer.add_summary(summary)

    @classmethod
    def check(cls) -> None:
        """It is installed with milan."""

    def add(self, line: dict[str, Any]) -> None:
        """Every figure of a line as a scalar."""
        for key, value in line.items():
            if key != "step":
                group = "train" if key in COLUMNS else "val"
                self.board.add_scalar(f"{group}/{key.removeprefix('val_')}", value, line["step"])

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]."""
        self.board.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Write what came so far."""
        self.board.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.add_summary(self._end)
        self.board.close()


def _plain(value: Any) -> bool | int | float | str:
    """As a page of settings can show it."""
    return value if isinstance(value, bool | int | float | str) else str(value)


class WeightsAndBiases:
    """A run of Weights & Biases under the run's own id; WANDB_MODE=offline keeps it here."""

    def __init__(self, run: Path, start: int) -> None:
        about = read_run(run)
        with self._answering() as wandb:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                id=about["id"],
                name=run.name,
                dir=str(run),
                config=about["config"],
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        self._image = wandb.Image
        before = _record_id(run, "wandb", about["id"])
        # Online the server says what it has; offline every call leaves a part of its own.
        self.last_step = max(start if before else 0, self.run.starting_step - 1)

    @classmethod
    def check(cls) -> None:
        """Raises ConfigError: no credentials, or a server that does not take them."""
        with cls._answering() as wandb:
            wandb.login()  # offline it asks nobody

    @staticmethod
    @contextmanager
    def _answering() -> Iterator[ModuleType]:
        """The package; what it raises inside as ConfigError."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Not a word of its own on the terminal, above all no question after a key.
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        try:
            yield wandb
        except wandb.errors.Error as error:
            raise ConfigError(
                f"report_to wandb: {str(error).splitlines()[0]}",
                expected="credentials: WANDB_API_KEY, or those of `wandb login`",
                fix="WANDB_MODE=offline keeps everything here, for `wandb sync`",
            ) from None

    def add(self, line: dict[str, Any]) -> None:
        """Every figure of a line, at its step."""
        self.run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]."""
        self.run.log({name: self._image(pixels)}, step=step)

    def flush(self) -> None:
        """Its own process has it already."""

    def close(self) -> None:
        """Send, or write, what is left."""
        self.run.finish()


class MLflow:
    """A run of MLflow: where MLFLOW_TRACKING_URI says, else `mlflow.db` beside the run's folder."""

    def __init__(self, run: Path, start: int) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        beside = run.parent.resolve()
        about, self.waiting, self.later = read_run(run), list[dict[str, Any]](), 0.0
        with self._answering() as mlflow:
            self._metric, self._fault = mlflow.entities.Metric, mlflow.exceptions.MlflowException
            self.client = mlflow.MlflowClient(uri or f"sqlite:///{beside}/mlflow.db")
            known = self.client.get_experiment_by_name(name)
            artifacts = None if uri else (beside / "mlartifacts").as_uri()
            experiment = (
                known.experiment_id if known else self.client.create_experiment(name, artifacts)
            )
            self.id = about.get("reported", {}).get("mlflow")
            if self.id is None:
                made = self.client.create_run(
                    experiment, run_name=run.name, tags={"milan.id": about["id"]}
                )
                self.id = _record_id(run, "mlflow", made.info.run_id) or made.info.run_id
                params = [mlflow.entities.Param(k, str(v)) for k, v in about["config"].items()]
                self.client.log_batch(self.id, params=params)
            self.client.update_run(self.id, status="RUNNING")
            steps = [metric.step for metric in self.client.get_metric_history(self.id, "epoch")]
        self.last_step = max(steps, default=0)

    @classmethod
    def check(cls) -> None:
        """Raises ConfigError: a server that does not answer."""
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            with cls._answering() as mlflow:
                mlflow.MlflowClient(uri).get_experiment_by_name(_PROJECT)

    @staticmethod
    @contextmanager
    def _answering() -> Iterator[ModuleType]:
        """The package; what it raises inside as ConfigError."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # By default it tries for minutes, in which the run would wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        try:
            yield mlflow
        except (mlflow.exceptions.MlflowException, ImportError) as error:
            raise ConfigError(
                f"report_to mlflow: {str(error).splitlines()[0]}",
                expected="a tracking server or a database",
                fix="MLFLOW_TRACKING_URI=http://… or sqlite:///…",
            ) from None

    def add(self, line: dict[str, Any]) -> None:
        """Every figure of a line, at its step; what a server does not take waits for a minute."""
        self.waiting.append(line)
        self._offer()

    def _offer(self) -> None:
        if time.monotonic() < self.later:
            return
        try:
            while self.waiting:
                at = self.waiting[0]["step"]
                figures = {k: v for k, v in self.waiting[0].items() if k != "step"}
                now = round(1000 * time.time())
                metrics = [self._metric(k, float(v), now, at) for k, v in figures.items()]
                self.client.log_batch(self.id, metrics=metrics)
                self.waiting.pop(0)
        except self._fault:
            self.later = time.monotonic() + _LATER

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]; one that a server does not take is in TensorBoard alone."""
        if time.monotonic() < self.later:
            return
        try:
            self.client.log_image(self.id, pixels, artifact_file=f"{name}-{step:08d}.png")
        except Exception:  # of whatever keeps a server's pictures: no reason to end a run
            self.later = time.monotonic() + _LATER

    def flush(self) -> None:
        """It has it already."""

    def close(self) -> None:
        """Say what is left, and that this process is done."""
        self.later = 0.0
        self._offer()
        try:
            self.client.set_terminated(self.id)
        except self._fault:
            return


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_trackers(names: str) -> None:
    """Check that the trackers of a list such as `tensorboard,wandb` answer; creates nothing.

    Raises ConfigError for a name that is unknown, one whose package is not here, or one that
    refuses or does not answer.
    """
    for name in _chosen(names):
        if name not in TRACKERS:
            raise ConfigError(f"report_to {name!r}", expected="some of " + ", ".join(TRACKERS))
        if find_spec(name) is None:
            raise ConfigError(
                f"report_to {name}: its package is not here",
                fix=f"pip install 'milan-pretrain[{name}]'",
            )
        TRACKERS[name].check()


def open_trackers(names: str, run: Path, start: int) -> list[Tracker]:
    """The trackers of a run that begins, or is resumed, at step `start`. Raises ConfigError."""
    return [TRACKERS[name](run, start) for name in _chosen(names)]


def _chosen(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]


def _record_id(run: Path, tracker: str, name: str) -> str | None:
    """Keep in run.json what a tracker calls the run; returns what it called it before."""
    ids = read_run(run).get("reported", {})
    update_run(run, reported=ids | {tracker: name})
    return ids.get(tracker)
