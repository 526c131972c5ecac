"""k nearest neighbours: how well features tell classes apart, with nothing to fit.

Weighted votes as Wu et al. 2018 (arXiv 1805.01978) have them and DINO (arXiv 2104.14294) uses them:
each of the k most similar images counts exp(cosine / 0.07) for its class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from milan.core.distributed import SINGLE, Ranks
from milan.evaluation.evaluation import Evaluation
from milan.evaluation.features import Piece, Share
from milan.evaluation.meaning import few_neighbours
from milan.evaluation.outcome import Answers, percent

NEIGHBOURS = 20
_COUNTS = (10, 20, 100, 200)  # of neighbours, as DINO reports them
_TEMPERATURE = 0.07
_VOTES = 1024  # queries that vote at once: for 22 k classes that takes 90 MB
_QUERIES = 8192  # compared with the whole bank at once: 200 neighbours of each take 20 MB


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """The protocol: top-1 in percent with k neighbours and its interval, k10 to k200.

    Each rank compares the images to measure on with its share of the others; all call it together.
    None for a k that is more than there are images. Tables are those of k 20.
    """
    context, classes = evaluation.context, evaluation.classes
    counts = [k for k in _COUNTS if k <= len(evaluation.train)]
    left_out = [k for k in _COUNTS if k not in counts]
    if left_out:
        context.progress.note(
            f"k {', '.join(map(str, left_out))} left out: there are {len(evaluation.train)} images"
        )
    for doubt in few_neighbours(len(evaluation.train), max(counts, default=0)):
        context.progress.note(doubt)
    bank = Share(evaluation.train, context, change=_unit, memory=evaluation.memory)
    queries = iter(Share(evaluation.val, context, change=_unit, of=SINGLE))
    answers = {k: Answers(evaluation.val.labels, evaluation.names) for k in counts}
    total = 0
    context.progress.begin("nearest neighbours", len(evaluation.val), "images")
    while counts and (together := _take(queries, _QUERIES)):
        x = torch.cat(together)
        nearest = Nearest(x, max(counts))
        for features, labels, _ in bank:
            nearest.see(features, labels)
        context.check_stop()
        similarity, labels = nearest.of_all(context.ranks)
        for k in counts:
            votes = vote(similarity[:, :k], labels[:, :k], classes)
            answers[k].see(total, votes[:, None])
        total += len(x)
        context.progress.advance(total)
    context.progress.end()
    figures: dict[str, Any] = {}
    for k in _COUNTS:
        if k in counts:
            outcome = answers[k].of_all()  # each rank has seen all
            figures |= percent(f"k{k}", outcome.predicted == outcome.labels)
        else:
            figures |= dict.fromkeys((f"k{k}", f"k{k}_interval"))
    if shown := [k for k in counts if k <= NEIGHBOURS]:
        evaluation.write_tables(answers[max(shown)].of_all())
    return figures


def _unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1)


def _take(pieces: Iterator[Piece], count: int) -> list[torch.Tensor]:
    """Features of the next pieces, about `count` images together; none at the end."""
    taken: list[torch.Tensor] = []
    for piece in pieces:
        taken.append(piece.x)
        if sum(map(len, taken)) >= count:
            break
    return taken


class Nearest:
    """The k images of a bank most similar to each of q queries, as the bank comes in pieces."""

    def __init__(self, queries: torch.Tensor, k: int) -> None:
        """`queries` [q, F], of length 1."""
        self.queries, self.k = queries, k
        self.similarity = queries.new_empty(len(queries), 0)
        """[q, up to k] cosines, falling."""
        self.labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        """[q, up to k]"""

    def see(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Compare with a piece: features [b, F] of length 1, labels [b]."""
        similarity, index = (self.queries @ features.T).topk(min(self.k, len(features)), dim=1)
        self._keep(similarity, labels[index])

    def _keep(self, similarity: torch.Tensor, labels: torch.Tensor) -> None:
        similarity = torch.cat([self.similarity, similarity], dim=1)
        labels = torch.cat([self.labels, labels], dim=1)
        self.similarity, index = similarity.topk(min(self.k, similarity.shape[1]), dim=1)
        self.labels = labels.gather(1, index)

    def of_all(self, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        """(similarity, labels), each [q, k], over the pieces of all ranks; all must call it."""
        missing = self.k - self.similarity.shape[1]
        if ranks.size > 1:
            own = F.pad(self.similarity, (0, missing), value=-torch.inf)
            everyone = ranks.gather(own).view(ranks.size, -1, self.k)
            named = ranks.gather(F.pad(self.labels, (0, missing))).view(ranks.size, -1, self.k)
            merged = Nearest(self.queries, self.k)
            for similarity, labels in zip(everyone, named, strict=True):
                device = self.queries.device
                merged._keep(similarity.to(device), labels.to(device))
            return merged.similarity, merged.labels
        return self.similarity, self.labels


def vote(similarity: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """The class [q] that neighbours [q, k] name; `labels` are 0 to classes - 1."""
    named = []
    for weights, numbers in zip(
        (similarity / _TEMPERATURE).exp().split(_VOTES), labels.split(_VOTES), strict=True
    ):
        votes = weights.new_zeros(len(weights), classes)
        named.append(votes.scatter_add_(1, numbers, weights).argmax(dim=1))
    return torch.cat(named)


def nearest_neighbours(
    features: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
) -> int:
    """How many queries 20 neighbours name rightly.

    `features` [n, F] with `labels` [n] classify `queries` [m, F], whose classes are `query_labels`
    [m]; all on one device.
    """
    numbers, labels = torch.unique(labels, return_inverse=True)
    features, correct = _unit(features), 0
    for piece, piece_labels in zip(queries.split(_VOTES), query_labels.split(_VOTES), strict=True):
        nearest = Nearest(_unit(piece), min(NEIGHBOURS, len(features)))
        nearest.see(features, labels)
        named = vote(nearest.similarity, nearest.labels, len(numbers))
        correct += int((numbers[named] == piece_labels).sum())
    return correct
