"""Evaluation protocols. No heavy imports.

A protocol is declared once, in PROTOCOLS below. Its command, its section of the parameter file, its
metrics file, its DVC stage and its table in the report follow from the declaration. Settings of
milan's own are in milan.evaluation.config:

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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from milan.errors import ConfigError, nearest
from milan.evaluation.config import (
    AttentiveProbeConfig,
    DetectConfig,
    EvaluationConfig,
    FewShotConfig,
    FinetuneConfig,
    LabelledConfig,
    LinearProbeConfig,
    SegmentConfig,
    ZeroShotConfig,
)

ENTRY_POINTS = "milan.protocols"
"""The group of entry points in which other packages declare theirs."""


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
    """module:function; returns figures as JSON values. Imported when it runs. Called with an
    Evaluation (milan.evaluation.evaluation) on all ranks if `settings` is an EvaluationConfig, else
    as function(config, stop=Stop or None, progress=Progress or None)."""
    columns: tuple[Column, ...]
    """Of the report; the first is drawn as a chart."""
    classifies: bool = False
    """Whether --corruptions can be measured: `run` returns what `measure_classifier` returns,
    or trains a classifier and names its folder."""
    settings: type[LabelledConfig] = EvaluationConfig
    """A dataclass that adds settings of its own to EvaluationConfig, or to LabelledConfig if it
    needs no features: they become flags too."""
    data_example: str = "--data imagenet --val-data imagenet/val"
    """Of the command's help."""

    @property
    def command(self) -> str:
        """The word after `milan`."""
        return self.name.replace("_", "-")

    def metrics_file(self, folder: str | Path) -> Path:
        """Where the metrics of the encoder in `folder` are, unless another place was asked for."""
        return Path(folder) / f"{self.name}.json"

    def metrics_path(self, config: LabelledConfig) -> Path:
        """Where the metrics go: `config.out`, else the folder of the checkpoint."""
        return Path(config.out) if config.out else self.metrics_file(config.folder)

    def tables_folder(self, config: LabelledConfig) -> Path:
        """Where the tables of the classes go: beside the metrics, without .json."""
        path = self.metrics_path(config)
        return path.with_suffix("") if path.suffix else path.with_name(f"{path.name}-tables")

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
            classifies=True,
            settings=LinearProbeConfig,
        ),
        Protocol(
            name="few_shot",
            title="Linear probe on a few images a class",
            help="Fit the linear probe on a few images of each class, drawn several times.",
            run="milan.evaluation.linear_probe:measure",
            columns=(Column("top1", "top-1 %"), Column("top5", "top-5 %")),
            classifies=True,
            settings=FewShotConfig,
        ),
        Protocol(
            name="attentive_probe",
            title="Attentive probe",
            help="Fit learnt queries and a classifier on frozen patches and measure them.",
            run="milan.evaluation.attentive_probe:measure",
            columns=(Column("top1", "top-1 %"), Column("top5", "top-5 %")),
            classifies=True,
            settings=AttentiveProbeConfig,
        ),
        Protocol(
            name="knn",
            title="k nearest neighbours, top-1",
            help="Classify by the nearest images in feature space; nothing is fitted.",
            run="milan.evaluation.knn:measure",
            columns=tuple(Column(f"k{k}", f"k {k} %") for k in (20, 10, 100, 200)),
        ),
        Protocol(
            name="finetune",
            title="Fine-tuning",
            help="Train an encoder and a new head on labelled images, and measure them.",
            run="milan.training.finetune:finetune",
            columns=(Column("top1", "top-1 %"), Column("top5", "top-5 %")),
            classifies=True,
            settings=FinetuneConfig,
        ),
        Protocol(
            name="detect",
            title="Detection",
            help="Train Mask R-CNN on an encoder, from COCO's JSON, and measure it.",
            run="milan.training.detect:detect",
            columns=(
                Column("box_ap", "box AP %"),
                Column("box_ap50", "box AP50 %"),
                Column("mask_ap", "mask AP %"),
            ),
            settings=DetectConfig,
            data_example="--data coco",
        ),
        Protocol(
            name="segment",
            title="Segmentation",
            help="Train a head, or encoder and decoder, on images with masks, and measure mIoU.",
            run="milan.training.segment:segment",
            columns=(Column("miou", "mIoU %"), Column("pixel_accuracy", "pixel accuracy %")),
            settings=SegmentConfig,
            data_example="--data ade20k --val-data ade20k --reduce-zero-label",
        ),
        Protocol(
            name="zero_shot",
            title="Zero-shot",
            help="Classify by words: predicted features against class texts.",
            run="pipeline.zero_shot:zero_shot",
            columns=(
                Column("token_top1", "class token, top-1 %"),
                Column("mean_top1", "mean of patches, top-1 %"),
                Column("token_top5", "class token, top-5 %"),
                Column("mean_top5", "mean of patches, top-5 %"),
            ),
            settings=ZeroShotConfig,
            data_example="--val-data imagenet/val",
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
