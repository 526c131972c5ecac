"""Validation while a run goes on: the loss of images it never trains on, and k-NN by their labels.

The first needs no labels: validation images are always masked alike, and show the objective's own
metrics. With labels, a k-NN probe (Wu et al. 2018, as DINO has it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from milan.config import PretrainConfig
from milan.core import rng
from milan.core.device import autocast
from milan.core.distributed import Ranks
from milan.data.dataset import CachedDataset
from milan.data.loader import Batch
from milan.data.order import Order, Stream
from milan.data.sampler import Address, Kind, split_over_ranks
from milan.errors import ConfigError
from milan.evaluation.knn import NEIGHBOURS, nearest_neighbours
from milan.evaluation.meaning import doubts
from milan.images.channels import as_colours
from milan.models.student import Student
from milan.objectives.base import JointObjective, Objective, attention_of
from milan.reporting.panels import Colours, SheetInputs, caption_of, draw_page, sheet_of_run
from milan.reporting.run_files import SHEET
from milan.store.joined import short_names

_PICTURES = 4  # images of a sheet
_PADDING = -1  # in place of a label


@dataclass(frozen=True)
class ValidationPlan:
    """Which rows are read after which epoch."""

    config: PretrainConfig
    order: Stream
    ranks: Ranks
    micro: int
    """Images at once on a device."""
    compared: int | None = None
    """How many validation images are compared with each other (JointObjective.compared)."""

    def addresses(self, epoch: int) -> list[Address]:
        """This rank's micro-batches after an epoch; every rank has as many."""
        return [
            part
            for whole in self._whole(epoch)
            for part in split_over_ranks(
                whole, rank=self.ranks.rank, ranks=self.ranks.size, micro=self.micro
            )
        ]

    def _whole(self, epoch: int) -> list[Address]:
        """What all ranks read together: view 0 of each row."""
        config, order = self.config, self.order.for_epoch(epoch)
        validation, addresses = order.validation_rows, list[Address]()

        def add(kind: Kind, rows: np.ndarray) -> None:
            addresses.append(Address(kind, epoch, rows, np.zeros_like(rows)))

        if len(validation):
            add(Kind.VALIDATION, validation[: self.compared])
        if epoch % config.picture_every == 0 or epoch + 1 == config.epochs:
            trained = order.train_rows[~np.isin(order.train_rows, order.replaced)]
            rows = validation if len(validation) else trained
            add(Kind.PICTURE, np.tile(rows[:_PICTURES], self.ranks.size))  # rank 0 draws its own
        if config.probe_every and (epoch + 1) % config.probe_every == 0:
            add(Kind.KNN_BANK, _bank(order, config))
            add(Kind.KNN_QUERY, validation)
        return addresses


class Validation:
    """Metrics and pictures of a student after an epoch."""

    def __init__(
        self,
        plan: ValidationPlan,
        student: Student,
        objective: Objective,
        dataset: CachedDataset,
        device: torch.device,
        precision: str,
    ) -> None:
        self.plan, self.student, self.objective = plan, student, objective
        self.dataset, self.device, self.precision = dataset, device, precision

    def __call__(
        self, epoch: int, batches: Iterator[Batch]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics, and pictures by name; takes the batches of the plan's addresses, in order, from
        the device.

        Metrics of the objective are named val_…; all ranks call it together and get the same.
        """
        values: dict[str, list[tuple[int, torch.Tensor]]] = {}
        count, joint = 0, list[tuple[torch.Tensor, Any]]()
        knn = _KNN(self.dataset.labels) if self.plan.config.probe_every else None
        sheet: list[SheetInputs] = []
        with torch.no_grad(), autocast(self.device, self.precision):
            for address in self.plan.addresses(epoch):
                batch = next(batches)
                if address.kind is Kind.VALIDATION:
                    counted = 0 if address.padding else len(address.rows)
                    prediction = self.objective.predict(self.student, batch)
                    if self.plan.compared is not None:
                        owner = batch.rows.new_full((len(batch.rows),), -1)
                        joint.append((owner if address.padding else batch.rows, prediction.joint))
                        continue
                    for name, value in self.objective.metrics(prediction).items():
                        values.setdefault(name, []).append((counted, value))
                    count += counted
                elif address.kind is Kind.PICTURE:
                    sheet.append(sheet_inputs(self.student, self.objective, batch))
                elif knn:
                    knn.add(address, self.student.pooled_features(batch.images).float())
        ranks = self.plan.ranks
        # Read at the end: reading a value waits for the device.
        sums = [sum(n * float(value) for n, value in parts) for parts in values.values()]
        *totals, total = ranks.all_reduce_sum([*sums, float(count)])
        metrics = {f"val_{name}": value / total for name, value in zip(values, totals, strict=True)}
        if joint:
            metrics = self._compare(joint)
        if knn and knn.complete:
            metrics["knn_top1"] = knn.accuracy(ranks)
        draws = bool(sheet) and ranks.is_rank0
        return metrics, {SHEET: self._sheet(epoch, SheetInputs.joined(sheet))} if draws else {}

    def _compare(self, joint: list[tuple[torch.Tensor, Any]]) -> dict[str, float]:
        """Metrics of all images together, of every rank, in the order of their rows: (row of each
        image or -1 for padding, what was said of it) by micro-batch."""
        ranks, kind = self.plan.ranks, type(joint[0][1])
        rows = ranks.gather(torch.cat([rows for rows, _ in joint]))
        order = rows.argsort(stable=True)
        order = order[rows[order] >= 0]
        columns = zip(*(said for _, said in joint), strict=True)
        whole = kind(
            *(
                c[0] if c[0].ndim == 0 else ranks.gather(torch.cat(c))[order].to(self.device)
                for c in columns
            )
        )
        assert isinstance(self.objective, JointObjective)
        loss, parts = self.objective.joint_loss(whole)
        return {f"val_{name}": float(value) for name, value in {"loss": loss, **parts}.items()}

    def _sheet(self, epoch: int, shown: SheetInputs) -> np.ndarray:
        images = (
            "validation" if len(self.plan.order.for_epoch(epoch).validation_rows) else "training"
        )
        colours, width = None, sum(part.spec.channels for part in self.dataset.cache.parts)
        of_store = self.objective.needs_features
        if of_store and shown.features is not None and shown.features.shape[2] == width:
            colours = self._colours
        return draw_page(
            f"{images} images after epoch {epoch + 1}",
            sheet_of_run(shown, colours),
            [caption_of(self.dataset, row, 0) for row in shown.rows.tolist()],
        )

    @cached_property
    def _colours(self) -> dict[str, Colours]:
        cache = self.dataset.cache
        own = (Colours.of_store(part) for part in cache.parts)
        return dict(zip(short_names(cache), own, strict=True))


def sheet_inputs(student: Student, objective: Objective, batch: Batch) -> SheetInputs:
    """What a sheet shows of a micro-batch: targets, and what the student predicts."""
    prediction = objective.predict(student, batch)
    target, predicted = objective.picture(prediction)
    return SheetInputs(
        batch.rows.cpu().numpy(),
        batch.pixels.cpu().numpy(),
        attention_of(batch).cpu().numpy(),
        prediction.mask.boolean().cpu().numpy(),
        None if target is None else target.cpu().numpy(),
        predicted.cpu().numpy(),
        None if batch.channels is None
        else as_colours(
            batch.channels.permute(0, 2, 3, 1).float().cpu().numpy(),
            objective.config.shown_channels,
        ),
    )  # fmt: skip


class _KNN:
    """Features and labels of a k-NN probe, as they come from the batches of this rank."""

    def __init__(self, labels: np.ndarray) -> None:
        self.of_row = labels
        kinds = (Kind.KNN_BANK, Kind.KNN_QUERY)
        self.features: dict[Kind, list[torch.Tensor]] = {kind: [] for kind in kinds}
        self.labels: dict[Kind, list[torch.Tensor]] = {kind: [] for kind in kinds}

    def add(self, address: Address, features: torch.Tensor) -> None:
        """Features [B, F] of a micro-batch."""
        labels = self.of_row[address.rows]
        labels = np.full_like(labels, _PADDING) if address.padding else labels
        self.features[address.kind].append(features)
        self.labels[address.kind].append(torch.from_numpy(labels))

    @property
    def complete(self) -> bool:
        """Whether this epoch has a bank and queries."""
        return all(self.features.values())

    def accuracy(self, ranks: Ranks) -> float:
        """Percent of the queries whose label their neighbours name, over all ranks.

        Every rank has the whole bank on its device, and asks for its own queries.
        """
        pairs = []
        for kind, parts in self.features.items():
            features, labels = torch.cat(parts), torch.cat(self.labels[kind])
            if kind is Kind.KNN_BANK:
                features, labels = ranks.gather(features).to(features.device), ranks.gather(labels)
            known = labels != _PADDING
            pairs += [features[known.to(features.device)], labels[known].to(features.device)]
        right, asked = ranks.all_reduce_sum([nearest_neighbours(*pairs), len(pairs[3])])
        return 100 * right / asked


def check_labels(dataset: CachedDataset, order: Order, config: PretrainConfig) -> list[str]:
    """What makes the figures of a k-NN probe mean little, a sentence each.

    Raises ConfigError if the probe has no validation rows, or a row has no label.
    """
    rows = np.concatenate([order.validation_rows, order.train_rows])
    if not len(order.validation_rows) or (dataset.labels[rows] < 0).any():
        raise ConfigError(
            "probe_every without labels or without validation images",
            expected="a store whose images have labels, and held_out above 0",
            fix="--set probe_every=null",
        )
    bank, validation = _bank(order, config), order.validation_rows
    known, asked = dataset.labels[bank], dataset.labels[validation]
    sentences = doubts(known, asked, neighbours=NEIGHBOURS)
    digests = {*dataset.cache.content_digests(bank)}
    repeated = sum(digest in digests for digest in dataset.cache.content_digests(validation))
    if repeated:
        sentences.append(
            f"{repeated} of {len(asked)} validation images are training images too (the same "
            "bytes): k-NN is better than on new images"
        )
    if unknown := int((~np.isin(asked, known)).sum()):
        sentences.append(
            f"{unknown} of {len(asked)} validation images are of classes without others"
        )
    return [f"k-NN probe: {doubt}" for doubt in sentences]


def _bank(order: Order, config: PretrainConfig) -> np.ndarray:
    """The training rows whose labels a k-NN probe knows, ascending; int64."""
    shuffle = rng.permutation(order.seed, rng.SAMPLE, (2,), len(order.train_rows))
    bank = order.train_rows[shuffle[: config.probe_images]]
    return np.sort(bank[~np.isin(bank, order.replaced)])
