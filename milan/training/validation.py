"""How a run is judged while it goes on: by rows it never trains on, and by its neighbours' labels.

No labels are needed for the first: the loss on held-out rows, always masked alike, and how near the
prediction is to what the teacher said. With labels, a k-NN probe (Wu et al. 2018, as DINO has it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from milan.config import PretrainConfig
from milan.core import rng
from milan.core.device import autocast
from milan.core.distributed import Ranks
from milan.data.dataset import Batch, CachedDataset
from milan.data.order import ASKED, DRAWN, JUDGED, KNOWN, REPEATED, Address, Order, Stream
from milan.errors import ConfigError
from milan.evaluation.knn import nearest_neighbours
from milan.reporting.log import SHEET
from milan.reporting.panels import SheetInputs, draw_sheet

_SHOWN = 4  # images of a sheet
_REPEATED = -1  # in place of a label


class Validation:
    """Which rows come after an epoch, and what they say of the student."""

    def __init__(
        self,
        config: PretrainConfig,
        dataset: CachedDataset,
        stream: Stream,
        *,
        measure: Callable[[Batch], tuple[torch.Tensor, torch.Tensor | None]],
        represent: Callable[[Batch], torch.Tensor],
        show: Callable[[Batch], SheetInputs],
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        """What is called on a batch on this rank's device.

        `measure` gives the mean loss, and the mean cosine to the teacher of hidden patches if there
        is one; `represent` gives features [B, F]; `show` what a picture is made of.
        """
        self.config, self.dataset, self.stream = config, dataset, stream
        self.measure, self.represent, self.show = measure, represent, show
        self.ranks, self.device = ranks, device

    def addresses(self, epoch: int) -> list[Address]:
        """What is asked for after an epoch, for all ranks."""
        order = self.stream.of_epoch(epoch)
        held, found = order.held, list[Address]()
        if len(held):
            found.append((JUDGED, held, np.zeros_like(held)))
        if epoch % self.config.picture_every == 0 or epoch + 1 == self.config.epochs:
            rows = held if len(held) else order.good[~np.isin(order.good, order.replaced)]
            drawn = np.tile(rows[:_SHOWN], self.ranks.size)  # rank 0 draws what it has
            found.append((DRAWN, drawn, np.zeros_like(drawn)))
        if self.config.probe_every and (epoch + 1) % self.config.probe_every == 0:
            mix = rng.permutation(order.seed, rng.SAMPLE, (2,), len(order.good))
            known = order.good[mix[: self.config.probe_images]]
            known = np.sort(known[~np.isin(known, order.replaced)])
            found += [(KNOWN, known, np.zeros_like(known)), (ASKED, held, np.zeros_like(held))]
        return found

    def __call__(
        self, mine: list[Address], batches: Iterator[Batch]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Figures, and pictures, of this rank's addresses, of which `batches` are what was read."""
        sums, comparable = [0.0, 0.0, 0.0], False
        features: dict[int, list[torch.Tensor]] = {KNOWN: [], ASKED: []}
        labels: dict[int, list[torch.Tensor]] = {KNOWN: [], ASKED: []}
        shown: list[SheetInputs] = []
        with torch.no_grad(), autocast(self.device, self.config.precision):
            for kind, rows, _ in mine:
                batch, counted = next(batches), 0 if kind & REPEATED else len(rows)
                kind &= ~REPEATED
                if kind == JUDGED:
                    loss, cosine = self.measure(batch)
                    sums[0] += counted * float(loss)
                    sums[2] += counted
                    if cosine is not None:
                        comparable = True
                        sums[1] += counted * float(cosine)
                elif kind == DRAWN:
                    shown.append(self.show(batch))
                else:
                    features[kind].append(self.represent(batch).float())
                    names = self.dataset.labels[rows] if counted else np.full_like(rows, _REPEATED)
                    labels[kind].append(torch.from_numpy(names))
        loss_sum, cosine_sum, count = self.ranks.all_reduce_sum(sums)
        figures: dict[str, float] = {}
        if count:
            figures["val_loss"] = loss_sum / count
        if comparable:
            figures["val_cosine"] = cosine_sum / count
        if features[ASKED] and features[KNOWN]:
            found = []
            for kind in (KNOWN, ASKED):
                named = self.ranks.gather(torch.cat(labels[kind]))
                seen = self.ranks.gather(torch.cat(features[kind]))
                found += [seen[named != _REPEATED], named[named != _REPEATED]]
            figures["knn_top1"] = nearest_neighbours(*found)
        pictures = (
            {SHEET: draw_sheet(SheetInputs.joined(shown))} if shown and self.ranks.is_rank0 else {}
        )
        return figures, pictures


def check_labels(dataset: CachedDataset, order: Order) -> None:
    """Raises ConfigError if a k-NN probe has no rows to ask for, or no label of some row."""
    rows = np.concatenate([order.held, order.good])
    if not len(order.held) or (dataset.labels[rows] < 0).any():
        raise ConfigError(
            "probe_every without labels or without held-out rows",
            expected="a store whose images have labels, and held_out above 0",
            fix="--set probe_every=null",
        )
