"""Evaluation protocols, and the settings they share. No heavy imports.

A protocol is declared once, in PROTOCOLS below. Its command, its section of the parameter file, its
metrics file, its DVC stage and its table in the report follow from the declaration:

    name linear_probe ─┬─ milan linear-probe --checkpoint RUN --data DATA
                       ├─ section linear_probe of params.yaml
                       ├─ RUN/linear_probe.json
                       └─ evaluation: {protocols: [linear_probe]} of params.yaml
                            ├─ dvc repro: a stage for each encoder
                            └─ milan report: a table, a chart, metrics.json

Another package declares its protocols in its pyproject.toml:

    [project.entry-points."milan.protocols"]
    nearest_mean = "some_package.nearest_mean:PROTOCOL"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from milan.core.config_fields import check_fields, seed_setting, setting
from milan.core.units import parse_bytes
from milan.errors import ConfigError, nearest

ENTRY_POINTS = "milan.protocols"
"""The group of entry points in which other packages declare theirs."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of every evaluation: which encoder, which labelled images, where the metrics go."""

    checkpoint: str = "runs/pretrain"
    """A run's folder, random (as timm initialises it), timm:NAME, or teacher."""
    data: str = "imagenet"
    """Labelled images to fit on."""
    val_data: str | None = None
    """Labelled images to measure on; default: a fifth of --data, by seed."""
    data_root: str | None = None
    """Where data names are looked up."""
    split: str | None = None
    """Which split of --data: train, validation, test, ..., or all; default: train, if any."""
    val_split: str | None = None
    """Which split of --val-data; default: validation, else test, if any."""
    out: str | None = None
    """Where the metrics go (JSON); default: linear_probe.json and the like in the run's folder."""
    features: str | None = None
    """Where features are kept for the next evaluation, float32, or none; default:
    frozen_features/ in the run's folder."""
    baseline: str = setting("random", choices=("random", "none"))
    """What is measured beside the checkpoint: random, the same network as timm initialises it."""
    like: str | None = None
    """With random: a run, or timm:NAME, whose encoder's shape is taken."""
    model: str = "vit_base_patch16_224"
    """With random and no --like: a ViT of timm."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments: --set model.embed_dim=128."""
    crop_share: float = setting(0.875, unit="share", above=0, most=1)
    """Central square shown, as a share of the shorter edge (224 of 256)."""
    batch_size: int = setting(256, unit="images", least=1)
    """Images at once."""
    num_workers: int | None = setting(None, unit="threads", auto=True, least=1)
    """Decoding threads; auto: the cores, at most 16."""
    limit: int | None = setting(None, unit="images", least=1)
    """Only so many images of each set."""
    device: str = "auto"
    """auto, cuda, cpu, ..."""
    devices: int | None = setting(None, unit="ranks", auto=True, least=1)
    """Ranks on this machine; auto: one a GPU."""
    memory: str | None = setting(None, auto=True)
    """Features that each rank keeps in memory between two passes, such as 8GB; auto: half of a
    GPU's free memory, 1GB on a CPU. Others are read from disk again."""
    seed: int = seed_setting()
    """Of random weights and of the splits."""
    teacher: str | None = None
    """With checkpoint teacher: its name or config, as in extract-targets."""
    pretrained: str | None = setting(None, auto=True)
    """With checkpoint teacher: its weights, as in extract-targets."""
    teacher_norm: str | None = setting(None, auto=True)
    """With checkpoint teacher: imagenet, own or auto, as in extract-targets."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        check_fields(self)
        if self.memory is not None:
            parse_bytes(self.memory)

    @property
    def folder(self) -> Path:
        """Of what evaluations of the checkpoint leave: the run's, else runs/<checkpoint>."""
        name, folder = self.checkpoint, Path(self.checkpoint)
        if name in ("random", "teacher") or name.startswith("timm:"):  # never paths
            return Path("runs") / name.replace(":", "-")
        return folder.parent if folder.is_file() else folder


@dataclass(frozen=True)
class Column:
    """One figure of a protocol's row in the report."""

    key: str
    """Of the metrics, such as top1."""
    heading: str
    """With its unit, such as top-1 %; a chart of percentages ends at 100."""
    format: str = "{:.1f}"


@dataclass(frozen=True)
class Protocol:
    """One way to measure an encoder."""

    name: str
    """In snake case: the section of the parameter file, and the metrics file without .json."""
    title: str
    """Of its tables and charts."""
    help: str
    """Of its command, one sentence."""
    run: str
    """module:function. Called with an Evaluation (milan.evaluation.evaluate), on all ranks; returns
    its figures as JSON values. Imported when it runs."""
    columns: tuple[Column, ...]
    """Of the report; the first is drawn as a chart."""
    settings: type[EvaluationConfig] = EvaluationConfig
    """A dataclass that adds settings of its own to EvaluationConfig: they become flags too."""

    @property
    def command(self) -> str:
        """The word after `milan`."""
        return self.name.replace("_", "-")

    def metrics_file(self, folder: str | Path) -> Path:
        """Where the metrics of the encoder in `folder` are, unless another place was asked for."""
        return Path(folder) / f"{self.name}.json"

    def metrics_path(self, config: EvaluationConfig) -> Path:
        """Where the metrics go: `config.out`, else the folder of the checkpoint."""
        return Path(config.out) if config.out else self.metrics_file(config.folder)

    def load(self) -> Callable[..., dict[str, Any]]:
        """The function that measures."""
        module, _, function = self.run.partition(":")
        return getattr(import_module(module), function)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="linear_probe",
            title="Linear probe",
            help="Fit a linear classifier on frozen features and measure it.",
            run="milan.evaluation.linear_probe:measure",
            columns=(Column("top1", "top-1 %"), Column("top5", "top-5 %")),
        ),
        Protocol(
            name="knn",
            title="k nearest neighbours",
            help="Classify by the nearest images in feature space; nothing is fitted.",
            run="milan.evaluation.knn:measure",
            columns=tuple(Column(f"k{k}", f"k {k}, top-1 %") for k in (20, 10, 100, 200)),
        ),
    )
}
"""By name, in the order of the report."""


def find_protocol(name: str) -> Protocol | None:
    """The protocol of that name, of milan or of an installed package; None if there is none."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    entries = _installed()
    return entries[name].load() if name in entries else None


def get_protocol(name: str) -> Protocol:
    """As find_protocol. Raises ConfigError, which names the nearest, if there is none."""
    protocol = find_protocol(name)
    if protocol is None:
        known = [*PROTOCOLS, *_installed()]
        raise ConfigError(
            f"unknown evaluation protocol {name!r}",
            expected="one of " + ", ".join(known),
            fix=nearest(name, known),
        )
    return protocol


def _installed() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
