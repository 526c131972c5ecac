"""Images, teacher and student of a study: what is extracted, trained and measured, and how."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import milan
from milan.core.progress import NoProgress
from milan.core.signals import REQUEUE
from milan.store.format import INDEX
from pipeline.teachers.frozen import frozen_teacher
from studies import cifar_teacher
from studies.steps import Probe, in_a_fork

PROBES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "k-NN": ("knn", "k20", {}),
    "linear": ("linear_probe", "top1", {}),
    "linear, 10 %": ("linear_probe", "top1", {"fraction": 0.1, "draws": 3}),
    "linear, 1 %": ("linear_probe", "top1", {"fraction": 0.01, "draws": 3}),
    "attentive": ("attentive_probe", "top1", {"epochs": 4}),
}
"""measure -> (protocol, figure, settings)"""
TUNING: dict[str, Any] = {
    "batch_size": 64, "lr": 1e-3, "warmup_epochs": 0.5, "mixup": 0.0, "cutmix": 0.0,
    "auto_augment": "none", "erasing": 0.0, "scale": (0.6, 1.0), "num_workers": 0,
    "report_to": "none", "baseline": "none",
}  # fmt: skip
"""A short fine-tuning of all weights."""


@dataclass(frozen=True)
class Setting:
    """What the runs of a study have in common."""

    name: str
    data: dict[str, Any]
    """Images to extract and train on, as `extract_targets` names them."""
    measured: dict[str, Any]
    """Images to fit probes on and to measure on, as `evaluate` names them."""
    teacher: dict[str, str]
    student: dict[str, Any]
    """Settings of pretraining."""

    def store(self, work: Path, *, codec: str, views: int, images: int) -> Path:
        """A store of so many images, made if it is not there; its name says what is in it.

        With the views: to decode originals would take longer than a step of such a student.
        """
        folder = work / "stores" / self.name
        store = folder / f"{codec.replace(':', '')}-{images}-{views}.zarr"
        if not (store / INDEX).exists():  # it is written last
            self.extract(store, codec=codec, views=views, limit=images, store_views="jpeg:95")
        return store

    def extract(self, store: Path, **settings: Any) -> float:
        """A finished store in `store`; CPU seconds of this call."""
        began = time.process_time()
        milan.extract_targets(
            **self.data | self.teacher | {"executor": "local"} | settings, out=str(store),
            progress=NoProgress(),
        )  # fmt: skip
        return round(time.process_time() - began, 1)

    def train(self, store: Path, run: Path, seed: int, **settings: Any) -> float:
        """Pretrain, or go on; CPU seconds, with those of stopped calls."""
        before, began = run / "cpu_seconds", time.process_time()
        spent = float(before.read_text()) if before.exists() else 0.0
        found = milan.pretrain(
            str(store), out=str(run), seed=seed, progress=NoProgress(), **self.student | settings
        )
        spent += time.process_time() - began
        before.write_text(str(spent))
        unless_stopped(found)
        return round(spent, 1)

    def probe(self, checkpoint: Path | str, name: str, **settings: Any) -> float:
        """A figure of frozen features, in percent; of a run, `random` or `teacher`."""
        protocol, figure, own = PROBES[name]
        more = self.teacher if checkpoint == "teacher" else {}
        found = milan.evaluate(
            protocol, str(checkpoint), baseline="none", crop_share=1.0, num_workers=1,
            progress=NoProgress(), load_teacher=frozen_teacher,
            **self.measured | own | more | settings,
        )  # fmt: skip
        return unless_stopped(found)[figure]

    def fine_tuned(
        self, run: Path, seed: int, *, epochs: int, images: int, **settings: Any
    ) -> float:
        """Top-1 in percent after so many epochs of a few training images, of all weights."""
        found = milan.finetune(
            str(run), seed=seed, epochs=epochs, progress=NoProgress(),
            **self.measured | TUNING | {"limit": images} | settings,
        )  # fmt: skip
        return unless_stopped(found)["top1"]

    def probes(self, run: Path, names: Sequence[str]) -> dict[str, Probe]:
        """What `Figures.run` measures of a run."""
        return {name: partial(self.probe, run, name) for name in names}


def unless_stopped(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a call that has ended. Exits with 75 after one that was asked to stop."""
    if "stopped_by" in found:
        raise SystemExit(REQUEUE)
    return found


DEMO = Setting(
    name="demo",
    data={"data": "demo/data/train.parquet"},
    measured={
        "data": "demo/data/train.parquet", "val_data": "demo/data/test.parquet", "limit": 4000
    },
    teacher={
        "teacher": "demo/teacher/config.json", "pretrained": "demo/teacher/model.safetensors"
    },
    student={
        "model_args": {"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4},
        "batch_size": 64, "warmup_epochs": 0.5, "num_workers": 0, "report_to": "none",
        "picture_every": 1000, "weight_decay": 0.05,
    },
)  # fmt: skip
"""The images, captions and CLIP in demo/."""

SMALL: dict[str, Any] = {
    "batch_size": 64, "num_workers": 0, "report_to": "none", "picture_every": 1000,
    "weight_decay": 0.05, "lr": 4e-3, "held_out": 0.0, "log_every": 10,
    "decoder": {"embed_dim": 64, "depth": 2, "num_heads": 4},
}  # fmt: skip
"""A student whose runs take seconds, for studies of many of them."""
SHAPE = {"embed_dim": 96, "depth": 3, "num_heads": 3}


def add_images(parser: argparse.ArgumentParser) -> None:
    """The flags of `small`."""
    parser.add_argument("--cifar10", type=Path, help="its Parquet files; without it: demo/")
    parser.add_argument("--teacher", type=Path, default=Path("runs/cifar10/teacher"))
    parser.add_argument(
        "--measured", type=int, default=2000, help="images of each set that probes see, at most"
    )


def small(given: argparse.Namespace) -> Setting:
    """The demo's images, or CIFAR-10 with the teacher in `given.teacher`, which is made once.

    Call it before anything is computed. The student has the teacher's patches.
    """
    if not given.cifar10:
        return replace(
            DEMO, student=SMALL | {"model_args": SHAPE | {"patch_size": 4}},
            measured=DEMO.measured | {"limit": given.measured},
        )  # fmt: skip
    in_a_fork(cifar_teacher.make, given.cifar10, given.teacher)
    return Setting(
        name="cifar10",
        data={"data": str(given.cifar10), "split": "train"},
        measured={
            "data": str(given.cifar10), "split": "train", "val_data": str(given.cifar10),
            "val_split": "test", "limit": given.measured,
        },
        teacher={
            "teacher": str(given.teacher / "config.json"),
            "pretrained": str(given.teacher / "model.safetensors"),
        },
        student=SMALL | {"model_args": SHAPE | {"patch_size": 8}},
    )  # fmt: skip
