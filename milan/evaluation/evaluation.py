"""One network evaluated: its features and labels as a protocol gets them, over all draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.core.atomic import digest_of
from milan.core.config_fields import names_in
from milan.core.progress import NoProgress
from milan.core.units import parse_bytes
from milan.errors import DataError
from milan.evaluation.config import ClassificationConfig, EvaluationConfig
from milan.evaluation.corruptions import Corruption
from milan.evaluation.draws import over_draws
from milan.evaluation.features import Context, Features, Labelled
from milan.evaluation.frozen import Frozen
from milan.evaluation.meaning import chance, doubts
from milan.evaluation.outcome import Outcome
from milan.evaluation.patches import features_for
from milan.evaluation.protocols import Protocol
from milan.evaluation.splits import Split

_MEMORY = 1_000_000_000  # bytes of features kept by a rank on a CPU


@dataclass(frozen=True)
class Evaluation:
    """What a protocol gets: a network's features of labelled images, and where it runs."""

    config: EvaluationConfig
    frozen: Frozen
    train: Labelled
    """To fit on; labels are 0 to classes - 1."""
    val: Labelled
    """To measure on; label -1: a class that `train` lacks."""
    classes: int
    context: Context
    """Of this rank: device, ranks, progress, stop."""
    names: tuple[str, ...] = ()
    """Of the classes; their numbers where they have no names."""
    tables: Path | None = None
    """The folder for classes.csv and confusion.csv, if they are wanted."""
    corrupted: Callable[[Corruption], Labelled] | None = None
    """As `val`, of corrupted images; all ranks call it together."""

    def write_tables(self, outcome: Outcome) -> None:
        """Write the tables of the outcome that the first figure is of; all ranks call it."""
        if self.tables:
            folder = self.tables
            self.context.ranks.on_rank0(lambda: outcome.write_tables(folder))

    @property
    def memory(self) -> int:
        """Bytes of features that this rank may keep on its device."""
        if self.config.memory is not None:
            return parse_bytes(self.config.memory)
        device = self.context.device
        return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _MEMORY

    def table(self, labelled: Labelled) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [m, F] float32 and labels [m] int64 of a split as a whole, on the CPU.

        For protocols on few images: memory grows with their number.
        """
        features = labelled.features
        parts = [part for part, _ in features.pieces(range(len(features)))]
        whole = torch.cat([part for part in parts if len(part)])
        return whole[torch.from_numpy(labelled.places)], torch.from_numpy(labelled.labels)


@dataclass(frozen=True)
class Measurement:
    """A checkpoint to be measured: by which protocol, on which images, features where."""

    protocol: Protocol
    config: EvaluationConfig
    splits: tuple[list[Split], Split]
    folder: Path
    context: Context

    def measure(
        self,
        network: Frozen,
        known: dict[str, dict[str, Any]],
        tables: Path | None,
        *,
        quiet: bool = False,
    ) -> dict[str, Any]:
        """Figures and facts of a network, over all draws; those that are `known` are taken.

        Tables are those of the first draw. Raises DataError if nothing can be learnt or measured.
        """
        identity = digest_of(network.identity) if network.identity else ""
        if identity in known and tables is None:
            return known[identity]
        run, by_draw = self.protocol.load(), list[dict[str, Any]]()
        kept: dict[tuple[str, Corruption | None], Features] = {}

        def features(split: Split, corruption: Corruption | None = None) -> Features:
            key = split.of.identity, corruption  # of one set, if no other is given to measure on
            if key not in kept:
                kept[key] = features_for(
                    network, split.of, self.folder, self.config, self.context, corruption
                )
            return kept[key]

        trains, val = self.splits
        for number, train in enumerate(trains):
            evaluation = _evaluation(network, train, val, features, self.config, self.context)
            if not (quiet or number):
                _tell(evaluation)
            context = replace(self.context, progress=NoProgress()) if quiet else self.context
            figures = run(replace(evaluation, context=context, tables=None if number else tables))
            by_draw.append(figures | _facts(evaluation) | drawn(self.config, number))
        merged = over_draws(by_draw, self.protocol.columns)
        if identity:
            known[identity] = merged
        return merged


FACTS = (
    "chance", "classes", "features", "features_are", "train_images", "val_images",
    "repeated_images", "rejected_images",
)  # fmt: skip


def _facts(evaluation: Evaluation) -> dict[str, Any]:
    """What figures rest on."""
    train, val = evaluation.train, evaluation.val
    facts = (
        round(chance(train.labels, val.labels), 2),
        evaluation.classes,
        train.features.width,
        evaluation.frozen.words,
        len(train),
        len(val),
        _repeated(evaluation),
        sum(len(features.rejected) for features in _features(evaluation)),
    )
    return dict(zip(FACTS, facts, strict=True))


def _evaluation(
    network: Frozen,
    train_split: Split,
    val_split: Split,
    features: Callable[..., Features],
    config: EvaluationConfig,
    context: Context,
) -> Evaluation:
    """The features of both splits. Raises DataError if nothing can be learnt or measured."""
    train, val = (Labelled.of(features(split), split) for split in (train_split, val_split))
    if len(train) < 2 or not len(val):
        raise DataError(
            f"{len(train)} images to fit on and {len(val)} to measure on",
            expected="2 and more, and some to measure on",
            fix="without --limit"
            if config.limit
            else "more images, or --val-data with images of its own",
        )
    numbers, y = np.unique(train.labels, return_inverse=True)  # of classes that can be told apart
    if len(numbers) < 2:
        raise DataError(
            f"all {len(y)} images to fit on are of one class",
            expected="at least two classes",
            fix="--data with images of several: class folders, or a column `label`",
        )

    def numbered(labelled: Labelled) -> Labelled:
        positions = np.searchsorted(numbers, labelled.labels).clip(max=len(numbers) - 1)
        return replace(
            labelled, labels=np.where(numbers[positions] == labelled.labels, positions, -1)
        )

    def corrupted(corruption: Corruption) -> Labelled:
        return numbered(Labelled.of(features(val_split, corruption), val_split))

    names = train_split.of.names
    return Evaluation(
        config, network, replace(train, labels=y), numbered(val), len(numbers), context,
        tuple(names[n] if names else str(n) for n in numbers.tolist()), corrupted=corrupted,
    )  # fmt: skip


def _tell(evaluation: Evaluation) -> None:
    """Notes on what the figures rest on. Raises DataError if all images to measure on were seen."""
    train, val, progress = evaluation.train, evaluation.val, evaluation.context.progress
    for features in _features(evaluation):
        if features.rejected:
            progress.note(
                f"rejected files: {len(features.rejected)}, the first is {features.rejected[0]}"
            )
    if repeated := _repeated(evaluation):
        found = f"{repeated:,} of {len(val):,} images to measure on are training images too"
        if repeated == len(val):
            raise DataError(
                f"{found} (the same bytes)", expected="other images to measure on",
                fix="--val-data with images of its own",
            )  # fmt: skip
        progress.note(f"{found} (the same bytes): figures are better than on new images")
    for doubt in doubts(train.labels, val.labels):
        progress.note(doubt)


def _features(evaluation: Evaluation) -> list[Features]:
    """Those of all images: once, where one set is split."""
    return list(dict.fromkeys((evaluation.train.features, evaluation.val.features)))


def _repeated(evaluation: Evaluation) -> int:
    """How many images to measure on are images to fit on, wherever they are: of the same bytes."""
    return int(np.isin(evaluation.val.digests, evaluation.train.digests).sum())


def drawn(config: ClassificationConfig, number: int) -> dict[str, Any]:
    """Which draw metrics are of, beside those of others."""
    if config.train_list is not None:
        return {"train_list": names_in(config.train_list)[number]}
    return {"draw": config.first_draw + number} if config.shots or config.fraction else {}
