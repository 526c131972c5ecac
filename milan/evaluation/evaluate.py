"""Measure checkpoints by a protocol: ranks, each checkpoint, its baseline, its metrics file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from milan.core.atomic import digest_of, write_json
from milan.core.config_resolver import from_call
from milan.core.distributed import Ranks
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.core.waiting import Stopped
from milan.errors import ConfigError
from milan.evaluation.board import write_board
from milan.evaluation.classifier import classifier_robustness
from milan.evaluation.config import (
    ClassificationConfig,
    EvaluationConfig,
    LabelledConfig,
    SupervisedConfig,
)
from milan.evaluation.draws import over_draws
from milan.evaluation.evaluation import FACTS, Measurement, drawn
from milan.evaluation.features import Context, features_folder
from milan.evaluation.frozen import Frozen, frozen_encoder
from milan.evaluation.protocols import Protocol, get_protocol
from milan.evaluation.ranks import on_ranks
from milan.evaluation.splits import open_draws
from milan.evaluation.table import write_table
from milan.images.channels import Channels
from milan.models.weights import find_weights

Load = Callable[..., Any]
"""Makes the teacher's network: of settings and a device a Frozen; of others as they take it."""


def evaluate(
    protocol: Protocol | str,
    /,
    checkpoint: str | Sequence[str] | LabelledConfig = "runs/pretrain",
    *,
    load_teacher: Load | None = None,
    frozen: Frozen | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
    write: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Measure checkpoints by `protocol` (or its name), and a baseline beside each.

    `checkpoint` and `settings` are the command's arguments; `load_teacher` makes the network of
    checkpoint teacher, or `frozen` is one. Returns the metrics; those of several checkpoints by
    their names; ranks after the first return {}. `write`: as soon as a checkpoint is measured, its
    metrics are written to `protocol.metrics_path`, tables of the classes and the figures for
    TensorBoard beside them. With several GPUs it starts a rank for each, as pretraining does. Asked
    to stop, or by SIGINT, SIGTERM or SIGUSR1, it returns {"stopped_by": signal}; features that were
    computed stay. Raises MilanError, and RankError if other ranks are out of reach.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    config = from_call(protocol.settings, "checkpoint", checkpoint, settings, protocol.name)
    configs: Sequence[Any] = config.each()
    if getattr(config, "corruptions", False) and not protocol.classifies:
        raise ConfigError(
            f"corruptions with {protocol.name}",
            expected="a protocol that fits a classifier",
            fix="milan linear-probe --corruptions",
        )
    if not isinstance(config, EvaluationConfig):
        try:
            run = partial(protocol.load(), stop=stop, progress=progress)
            if load_teacher and getattr(config, "takes_teacher", False):
                run = partial(run, load=load_teacher)
            metrics = _train_all(protocol, configs, run, stop, progress, write=write)
        except Stopped as stopped:
            return {"stopped_by": stopped.by}
        return _whole(metrics, config, write)
    if frozen and ((config.devices or 1) > 1 or len(configs) > 1):
        found = f"devices {config.devices}" if len(configs) == 1 else f"{len(configs)} checkpoints"
        raise ConfigError(
            f"{found} with a network of this process",
            expected="devices=1, one checkpoint",
            fix="devices=1, and a call for each checkpoint",
        )
    work = partial(_measure_all, protocol, configs, _Loaders(frozen, load_teacher), write=write)
    metrics = on_ranks(work, config, alone=bool(frozen), stop=stop, progress=progress)
    return metrics if "stopped_by" in metrics or not metrics else _whole(metrics, config, write)


def _whole(metrics: dict[str, Any], config: LabelledConfig, write: bool) -> dict[str, Any]:
    """The metrics of a checkpoint that is alone; of several all, also in their file."""
    if len(metrics) == 1:
        return next(iter(metrics.values()))
    if write and config.out:
        write_table(Path(config.out), metrics)
    return metrics


# --- protocols that train -------------------------------------------------------------------------


def _train_all(
    protocol: Protocol,
    configs: Sequence[Any],
    run: Callable[[LabelledConfig], dict[str, Any]],
    stop: Stop | None,
    progress: Progress | None,
    *,
    write: bool,
) -> dict[str, Any]:
    """Metrics of each checkpoint, one `run` after the other; a stop ends all of them."""
    given, count = Ranks.from_environment(), sum(len(_draws(config)) for config in configs)
    if given and given.size > 1 and count > 1:
        raise ConfigError(
            f"{count} runs of {protocol.command} by ranks that others started",
            expected="one: they meet once",
            fix="a line for each checkpoint and draw (--first-draw)",
        )
    shapes = _shapes(configs) if len(configs) > 1 else {}
    beside: dict[str | None, dict[str, Any]] = {}  # the random baseline of a shape
    by_checkpoint: dict[str, Any] = {}
    for number, config in enumerate(configs, 1):
        if progress and len(configs) > 1:
            progress.note(f"checkpoint {number} of {len(configs)}: {config.checkpoint}")
        shape, trained = shapes.get(config.checkpoint), isinstance(config, SupervisedConfig)
        if trained and (shape in beside or "random" in shapes):
            config = replace(config, baseline="none")
        metrics = _train(protocol, config, run, stop, progress)
        if "stopped_by" in metrics or not metrics:
            return {config.checkpoint: metrics}
        if trained and "baseline" in metrics:  # other protocols have the teacher, like none
            beside[shape] = metrics["baseline"] | {"like": config.checkpoint}
        if shape in beside:
            metrics["baseline"] = beside[shape]
        by_checkpoint[config.checkpoint] = metrics
        if write:
            _write(protocol, config, metrics)
    return by_checkpoint


def _shapes(configs: Sequence[LabelledConfig]) -> dict[str, str]:
    """What a baseline has of each checkpoint, by name: a bad one is found before hours of work, and
    those of one shape have one baseline."""
    shapes = {}
    for config in configs:
        if config.checkpoint in ("random", "teacher"):
            shapes[config.checkpoint] = config.checkpoint
        else:
            weights = find_weights(config.checkpoint, flag="--checkpoint", model=config.model)
            values: list[Any] = [weights.model, weights.args, weights.size, weights.channels]
            values += [list(weights.mean), list(weights.std)]
            shapes[config.checkpoint] = digest_of(values)
    return shapes


def _train(
    protocol: Protocol,
    config: LabelledConfig,
    run: Callable[[LabelledConfig], dict[str, Any]],
    stop: Stop | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Metrics of a checkpoint, over all draws of its training images."""
    if not isinstance(config, ClassificationConfig):
        return run(config)
    draws, path = config.each_draw(), protocol.metrics_path(config).with_suffix("")
    by_draw = []
    for number, draw in enumerate(draws):
        if len(draws) > 1:
            draw = replace(draw, out=str(path.with_name(f"{path.name}-draws") / f"{number}.json"))
            if progress:
                progress.note(f"draw {number + 1} of {len(draws)}")
        metrics = run(draw)
        if "stopped_by" in metrics or not metrics:
            return metrics
        if draw.corruptions:
            beside = metrics.get("baseline", {})
            for one in (metrics, beside) if "run" in beside else (metrics,):
                one |= classifier_robustness(draw, one, stop or Stop(), progress)
        by_draw.append(metrics | drawn(config, number))
    return over_draws(by_draw, protocol.columns) | _chosen(config)


def _draws(config: LabelledConfig) -> Sequence[Any]:
    """The settings of each draw of training images; one where none are drawn."""
    return config.each_draw() if isinstance(config, ClassificationConfig) else [config]


def _chosen(config: ClassificationConfig) -> dict[str, Any]:
    """How training images were chosen, for the metrics."""
    names = ("fraction", "shots", "train_list")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def _write(protocol: Protocol, config: LabelledConfig, metrics: dict[str, Any]) -> None:
    path = protocol.metrics_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, metrics)
    if not isinstance(config, SupervisedConfig):  # a training has its own
        keys = [column.key for column in protocol.columns]
        write_board(protocol.tables_folder(config), protocol.name, keys, metrics)


# --- protocols on features ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaders:
    """Where networks come from."""

    frozen: Frozen | None
    teacher: Load | None

    def network(self, config: EvaluationConfig, context: Context) -> Frozen:
        """That of the checkpoint."""
        if self.frozen:
            return self.frozen
        teacher = self.teacher if config.checkpoint == "teacher" else None
        return (teacher or frozen_encoder)(config, context.device)

    def baseline(self, config: EvaluationConfig, context: Context) -> Frozen | None:
        """What is measured beside it, if anything."""
        # Of a network that others load nobody knows what it is without its weights.
        given = self.frozen or config.checkpoint in ("random", "teacher")
        if given or config.baseline == "none":
            return None
        other = replace(config, checkpoint="random", like=config.checkpoint)
        return frozen_encoder(other, context.device)


def _measure_all(
    protocol: Protocol,
    configs: Sequence[EvaluationConfig],
    loaders: _Loaders,
    context: Context,
    *,
    write: bool,
) -> dict[str, Any]:
    """Metrics of each checkpoint. Images are listed once, a baseline is measured once a shape; a
    random encoder that is named is measured first, and is the baseline of those of its shape."""
    seen = list[Channels]()
    for config in configs:  # a bad one is found before hours of work
        network = loaders.network(config, context)
        if network.channels:
            seen.append(network.channels)
            if config.corruptions:
                raise ConfigError(
                    f"corruptions for {network.name}, which sees channels "
                    f"{network.channels.spelled} of files",
                    expected="an encoder of RGB: corruptions are of 8-bit pictures",
                    fix="without --corruptions",
                )
        if network.said:
            context.progress.note(f"{config.checkpoint} was read {network.said}")
    # One rank lists the images: what the others listed might be something else by then.
    splits = context.ranks.on_rank0(lambda: open_draws(configs[0], context.progress))
    for split in (*splits[0], splits[1]):
        split.of.beside.check(*seen)
    known: dict[str, dict[str, Any]] = {}  # by the network's identity
    shapes: dict[str, str] = {}  # the first checkpoint whose shape a baseline has
    by_checkpoint: dict[str, Any] = {}
    in_order = sorted(configs, key=lambda config: config.checkpoint != "random")
    for number, config in enumerate(in_order, 1):
        began = time.perf_counter()
        if len(configs) > 1:
            context.progress.note(f"checkpoint {number} of {len(configs)}: {config.checkpoint}")
            network = loaders.network(config, context)
        other = loaders.baseline(config, context)
        tables = protocol.tables_folder(config) if write else None
        with features_folder(config, network, context) as folder:
            job = Measurement(protocol, config, splits, folder, context)
            metrics = job.measure(network, known, tables)
            beside = job.measure(other, known, None, quiet=True) if other else None
        metrics = {"checkpoint": network.name, **metrics, **_chosen(config)}
        metrics["seconds"] = round(time.perf_counter() - began, 1)
        if other and beside:
            figures = {key: value for key, value in beside.items() if key not in FACTS}
            like = shapes.setdefault(digest_of(other.identity), config.checkpoint)
            metrics["baseline"] = {"checkpoint": other.name, **figures, "like": like}
        by_checkpoint[config.checkpoint] = metrics
        if write and context.ranks.is_rank0:
            _write(protocol, config, metrics)
    return {config.checkpoint: by_checkpoint[config.checkpoint] for config in configs}
