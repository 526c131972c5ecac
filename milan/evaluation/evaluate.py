"""How every protocol is run: ranks, splits, features, a baseline, and the metrics they share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.core.config_resolver import from_call
from milan.core.device import pick_device, ranks_here
from milan.core.distributed import Ranks
from milan.core.launch import as_rank, launch
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.core.units import parse_bytes
from milan.core.waiting import Stopped
from milan.errors import ConfigError, DataError
from milan.evaluation.features import (
    Context,
    Features,
    Labelled,
    features_folder,
)
from milan.evaluation.frozen import Frozen, frozen_encoder
from milan.evaluation.meaning import chance, doubts
from milan.evaluation.outcome import Outcome
from milan.evaluation.patches import features_for
from milan.evaluation.protocols import EvaluationConfig, LabelledConfig, Protocol, get_protocol
from milan.evaluation.splits import Split, open_splits

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


def evaluate(
    protocol: Protocol | str,
    /,
    checkpoint: str | LabelledConfig = "runs/pretrain",
    *,
    load: Callable[..., Any] = frozen_encoder,
    frozen: Frozen | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
    tables: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a checkpoint by `protocol` (or its name), and a baseline beside it.

    `checkpoint` and `settings` are the command's arguments; `load` makes the network from settings
    and device (for a protocol without features: as that one takes it), or `frozen` is one; `tables`
    is a folder for the tables of the classes. Returns the metrics; ranks after the first return {}.
    With several GPUs it starts a rank for each, as pretraining does. Asked to stop, or by SIGINT,
    SIGTERM or SIGUSR1, it returns {"stopped_by": signal}; features that were computed stay. Raises
    MilanError, and RankError if other ranks are out of reach.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    config = from_call(protocol.settings, "checkpoint", checkpoint, settings, protocol.name)
    config.check()
    if not isinstance(config, EvaluationConfig):
        loader = {} if load is frozen_encoder else {"load": load}
        return protocol.load()(config, stop=stop, progress=progress, **loader)
    device = pick_device(config.device)
    given = Ranks.from_environment()
    if frozen and (config.devices or 1) > 1:
        raise ConfigError(
            f"devices {config.devices} with a network of this process", expected="devices=1"
        )
    count = 1 if given or frozen else ranks_here(config.device, device, config.devices)
    stop = stop or Stop()
    stop.kept = "features that were computed stay"
    progress = progress if progress and not (given and given.rank) else NoProgress()
    try:
        if count > 1:
            return launch(
                partial(evaluate, protocol),
                {"checkpoint": config, "load": load, "tables": tables},
                ranks=count,
                restarts=0,
                restart_arguments=dict,
                progress=progress,
            )
        with as_rank(given, device, stop=stop, progress=progress) as (ranks, own):
            context = Context(own, ranks, progress, stop)
            make = (lambda *_: frozen) if frozen else load
            metrics = _measure(protocol, config, make, context, tables)
            return metrics if ranks.is_rank0 else {}
    except Stopped as stopped:
        return {"stopped_by": stopped.by}
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"the device's memory is full with {config.batch_size} images at once",
            fix=f"--batch-size {max(1, config.batch_size // 2)}, or --memory 1GB",
        ) from None


def _measure(
    protocol: Protocol,
    config: EvaluationConfig,
    load: Callable[[EvaluationConfig, torch.device], Frozen],
    context: Context,
    tables: Path | None,
) -> dict[str, Any]:
    began, run = time.perf_counter(), protocol.load()
    frozen = load(config, context.device)
    # One rank lists the images: what the others listed might be something else by then.
    splits = context.ranks.on_rank0(lambda: open_splits(config, context.progress))
    with features_folder(config, frozen, context) as folder:
        evaluation = _evaluation(frozen, splits, folder, config, context)
        _tell(evaluation)
        figures, baseline = run(replace(evaluation, tables=tables)), None
        # Of a network that others load nobody knows what it is without its weights.
        if load is frozen_encoder and (other := _baseline(config)):
            network = frozen_encoder(other, context.device)
            beside = _evaluation(network, splits, folder, config, context)
            quiet = replace(context, progress=NoProgress())  # what there is to say has been said
            baseline = {"checkpoint": network.name, **run(replace(beside, context=quiet))}
        train, val = evaluation.train, evaluation.val
        return {
            "checkpoint": frozen.name,
            **figures,
            "chance": round(chance(train.labels, val.labels), 2),
            "classes": evaluation.classes,
            "features": train.features.width,
            "train_images": len(train),
            "val_images": len(val),
            "repeated_images": _repeated(evaluation),
            "seconds": round(time.perf_counter() - began, 1),
            **({"baseline": baseline} if baseline else {}),
        }


def _evaluation(
    frozen: Frozen,
    splits: tuple[Split, Split],
    folder: Path,
    config: EvaluationConfig,
    context: Context,
) -> Evaluation:
    """The features of both splits. Raises DataError if nothing can be learnt or measured."""
    kept: dict[str, Features] = {}
    for split in splits:  # of one set, if no other is given to measure on
        if split.of.identity not in kept:
            kept[split.of.identity] = features_for(frozen, split.of, folder, config, context)
    train, val = (Labelled.of(kept[split.of.identity], split) for split in splits)
    if len(train) < 2 or not len(val):
        raise DataError(
            f"{len(train)} images to fit on and {len(val)} to measure on",
            expected="2 and more, and some to measure on",
        )
    numbers, y = np.unique(train.labels, return_inverse=True)  # of classes that can be told apart
    if len(numbers) < 2:
        raise DataError(
            f"all {len(y)} images to fit on are of one class", expected="at least two classes"
        )
    found = np.searchsorted(numbers, val.labels).clip(max=len(numbers) - 1)
    val_y = np.where(numbers[found] == val.labels, found, -1)
    labelled = replace(train, labels=y), replace(val, labels=val_y)
    names = splits[0].of.names
    named = tuple(names[n] if names else str(n) for n in numbers.tolist())
    return Evaluation(config, frozen, *labelled, len(numbers), context, named)


def _tell(evaluation: Evaluation) -> None:
    """Notes on what the figures rest on. Raises DataError if all images to measure on were seen."""
    train, val, progress = evaluation.train, evaluation.val, evaluation.context.progress
    for features in dict.fromkeys((train.features, val.features)):
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


def _repeated(evaluation: Evaluation) -> int:
    """How many images to measure on are images to fit on, wherever they are: of the same bytes."""
    return int(np.isin(evaluation.val.digests, evaluation.train.digests).sum())


def _baseline(config: EvaluationConfig) -> EvaluationConfig | None:
    """The settings of the network to measure beside this one, if there is one."""
    if config.baseline == "none" or config.checkpoint == "random":
        return None
    return replace(config, checkpoint="random", like=config.checkpoint)
