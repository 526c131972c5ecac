"""torch.compile of a training step: the network in one graph, pretraining's loss in another."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from milan.core.device import autocast
from milan.core.distributed import sync_gradients
from milan.data.loader import Batch
from milan.errors import ConfigError
from milan.objectives.base import JointObjective, Objective, Prediction
from milan.training.build import Settings
from milan.training.loop import Context

T = TypeVar("T")
BACKEND: str | Callable[..., object] = "inductor"
"""The compiler; tests have one that needs no C++ compiler."""


@dataclass(frozen=True)
class StepLoss:
    """The loss of a micro-batch, a scalar: what a step differentiates."""

    objective: Objective
    network: nn.Module
    """The student, or its wrapper for several ranks; perhaps compiled."""
    loss: Callable[[Prediction], torch.Tensor]
    """The objective's; perhaps compiled."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """For a micro-batch on the network's device. Called under autocast."""
        return self.loss(self.objective.predict(self.network, batch))


def compile_step(
    step: StepLoss, trial: Callable[[], Batch], settings: Settings, context: Context
) -> StepLoss:
    """The step as the setting `compile` asks for it; all ranks call it together.

    It is tried on the micro-batch that `trial` makes. Sharded weights are gathered between any two
    blocks: for them `auto` does not compile. Raises ConfigError as `compiled` does.
    """
    config = settings.config
    choice = "off" if config.compile == "auto" and config.parallel != "ddp" else config.compile

    def build() -> StepLoss:
        # What the first step makes and keeps is there before a step is traced.
        with torch.no_grad(), autocast(context.device, settings.precision):
            step(trial())
        network: Any = compile_network(step.network, context)
        loss: Any = step.objective.loss
        if not isinstance(
            step.objective, JointObjective
        ):  # else it compares over ranks, and in pieces
            loss = torch.compile(loss, backend=BACKEND, dynamic=False, fullgraph=True)
        return replace(step, network=network, loss=loss)

    return compiled(
        step, build, lambda made: made(trial()), network=step.network,
        precision=settings.precision, choice=choice, context=context,
    )  # fmt: skip


def compile_network(network: nn.Module, context: Context) -> Any:
    """The network with its forward pass compiled: as one graph, for batches of one shape."""
    # Between ranks, gradients are sent while others are still computed: that breaks the graph.
    whole = context.ranks.size == 1
    return torch.compile(network, backend=BACKEND, dynamic=False, fullgraph=whole)


def compiled(
    plain: T,
    build: Callable[[], T],
    trial: Callable[[T], torch.Tensor],
    *,
    network: nn.Module,
    precision: str,
    choice: str,
    context: Context,
) -> T:
    """What `build` makes, or `plain` as it is, by the setting `choice`; all ranks call it together.

    `trial` gives the loss of a micro-batch, a scalar. It is run forwards and backwards, so that no
    run depends on what cannot be compiled: with `auto` it then stays as it is. Raises ConfigError
    if it must be compiled and cannot be.
    """
    device, ranks, progress = context.device, context.ranks, context.progress
    if choice == "off" or (choice == "auto" and not _pays(device)):
        return plain
    progress.note("torch.compile: the first step takes a minute or more")
    made = build()
    began, why = time.perf_counter(), ""
    try:
        with sync_gradients(network, False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own, of tensors that it looks at
            with autocast(device, precision):
                loss = trial(made)
            loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's errors have no common class
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    network.zero_grad(set_to_none=True)
    if not ranks.any_flags(1 if why else 0):
        progress.note(f"torch.compile: done in {time.perf_counter() - began:.0f} s")
        return made
    why = why or "another rank's compiler failed"
    if choice == "on":
        raise ConfigError(
            f"torch.compile failed ({why})",
            expected="a compiler for this device",
            fix="--compile off, or auto",
        )
    progress.note(f"torch.compile failed ({why}): the run goes on without it")
    return plain


def _pays(device: torch.device) -> bool:
    """Whether `auto` compiles: on GPUs, whose memory elementwise work keeps busy."""
    return device.type == "cuda"
