"""The gradient of a loss that compares all images of a step with each other, in micro-batches.

A device that holds only some of the images takes them twice: once without gradient, for what the
student says of each; and, once the loss of all has told how it should change, a second time for the
gradients of the weights (GradCache, arXiv 2101.06983). The result is that of all images at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from milan.core.device import autocast, manual_seed
from milan.core.distributed import sync_gradients
from milan.objectives.base import JointLoss


class JointStep:
    """Forwards and backwards through `network` for all images of this rank in a step."""

    def __init__(
        self,
        output: Callable[[Any], Any],
        loss: Callable[[Any], JointLoss],
        *,
        network: nn.Module,
        device: torch.device,
        precision: str,
    ) -> None:
        """`output` gives what `network` says of a micro-batch, a NamedTuple of tensors, each with
        a row an image, or a scalar that is the same for all; `loss` that of their rows together.
        """
        self.output, self.loss, self.network = output, loss, network
        self.device, self.precision = device, precision

    def backward(
        self,
        batches: Sequence[Any],
        seeds: Sequence[int],
        scale: Callable[[torch.Tensor], torch.Tensor],
    ) -> JointLoss:
        """Add the gradients of the step, scaled, to those of the weights; all ranks call it.

        What a micro-batch draws (drop path) follows from its seed, both times.
        """
        if len(batches) == 1:
            output = self._output(batches[0], seeds[0])
            joint = self.loss(output)
            scale(joint.loss).backward()
            return joint._replace(loss=joint.loss.detach())
        with torch.no_grad():
            said = [self._output(b, seed) for b, seed in zip(batches, seeds, strict=True)]
        kind, counts = type(said[0]), [len(output[0]) for output in said]
        whole = [p[0].clone() if p[0].ndim == 0 else torch.cat(p) for p in zip(*said, strict=True)]
        del said
        for part in whole:
            part.requires_grad_(part.is_floating_point())
        joint = self.loss(kind(*whole))
        scale(joint.loss).backward()
        grads = [None if p.grad is None else _of_micro(p.grad, counts) for p in whole]
        for i, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            with sync_gradients(self.network, i + 1 == len(batches)):
                output = self._output(batch, seed)
                taught = [
                    (part, grad[i])
                    for part, grad in zip(output, grads, strict=True)
                    if grad is not None and part.requires_grad
                ]
                torch.autograd.backward([part for part, _ in taught], [grad for _, grad in taught])
        return joint._replace(loss=joint.loss.detach())

    def _output(self, batch: Any, seed: int) -> Any:
        manual_seed(seed, self.device)
        with autocast(self.device, self.precision):  # a context each: it keeps weights it has cast
            return self.output(batch)


def _of_micro(grad: torch.Tensor, counts: list[int]) -> Sequence[torch.Tensor]:
    """A gradient cut into micro-batches; a scalar's goes to the last one, whose way is synced."""
    if grad.ndim:
        return grad.split(counts)
    return [torch.zeros_like(grad)] * (len(counts) - 1) + [grad]
