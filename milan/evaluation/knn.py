"""k nearest neighbours: how well features tell classes apart, with nothing to fit."""

from __future__ import annotations

import torch
from torch.nn import functional as F

NEIGHBOURS = 20
_TEMPERATURE = 0.07
_CHUNK = 1024  # queries at once: their votes for 22 k classes take 90 MB


def nearest_neighbours(
    features: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
) -> float:
    """Top-1 accuracy in percent of a weighted k-NN classifier.

    `features` [n, F] with `labels` [n] classify `queries` [m, F], whose classes are `query_labels`
    [m]. The 20 nearest by cosine similarity vote with weights exp(cosine / 0.07) (Wu et al. 2018,
    arXiv 1805.01978, as used by DINO, arXiv 2104.14294).
    """
    features, correct = F.normalize(features, dim=1), 0
    numbers, labels = torch.unique(labels, return_inverse=True)
    neighbours = min(NEIGHBOURS, len(features))
    for chunk, chunk_labels in zip(queries.split(_CHUNK), query_labels.split(_CHUNK), strict=True):
        similarity, index = (F.normalize(chunk, dim=1) @ features.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(chunk), len(numbers))
        votes.scatter_add_(1, labels[index], (similarity / _TEMPERATURE).exp())
        correct += int((numbers[votes.argmax(dim=1)] == chunk_labels).sum())
    return 100 * correct / len(queries)
