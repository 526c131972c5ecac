"""Images compared with the texts of classes: by class token, by the mean of patches, by each patch.

b images, N patches, P classes, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from milan.core.distributed import Ranks
from milan.core.size import Size
from milan.evaluation.frozen import Frozen
from milan.evaluation.meaning import accuracy_interval
from milan.evaluation.outcome import TOP, Outcome
from milan.images.channels import Channels, centre_crop
from milan.images.samples import Bands
from milan.inference.pictures import Pictures

_Input = tuple[Size, Channels | None]
"""Edge, and channels in place of RGB."""


class Seen:
    """What a network said of the images."""

    def __init__(self) -> None:
        self._labels: list[np.ndarray] = []
        self._ranks: dict[str, list[np.ndarray]] = {"token": [], "mean": []}
        self._best: dict[str, list[np.ndarray]] = {"token": [], "mean": []}
        self.maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """row -> (pixels, cosines [N, P]) of the images that are shown"""

    @property
    def labels(self) -> np.ndarray:
        """int64 [m]"""
        return np.concatenate(self._labels)

    def add(self, labels: torch.Tensor, vectors: dict[str, torch.Tensor | None],
            texts: torch.Tensor) -> None:  # fmt: skip
        """How many classes are more like each image [b, C] than its own, and which one most."""
        self._labels.append(labels.cpu().numpy())
        for name, x in vectors.items():
            if x is None:
                continue
            cosine = F.normalize(x, dim=1) @ texts.T
            own = cosine.gather(1, labels[:, None])
            rank = (cosine > own).sum(dim=1)
            best = torch.where(rank == 0, labels, cosine.argmax(dim=1))
            self._ranks[name].append(rank.cpu().numpy())
            self._best[name].append(best.cpu().numpy())

    def gather(self, ranks: Ranks) -> None:
        """Add what the other ranks saw; all must call it."""
        parts = [seen for _, seen in ranks.gather_objects(self)]
        self._labels = [labels for part in parts for labels in part._labels]
        self._ranks, self._best = (
            {name: [values for kind in kinds for values in kind[name]] for name in kinds[0]}
            for kinds in ([p._ranks for p in parts], [p._best for p in parts])
        )
        self.maps = {row: map_ for part in parts for row, map_ in part.maps.items()}

    def figures(self, classes: int) -> dict[str, Any]:
        """top1, its interval, and top5 of the class token and of the mean of patches."""
        figures: dict[str, Any] = {}
        for name, parts in self._ranks.items():
            if not parts:
                figures |= {f"{name}_top1": None, f"{name}_top{TOP}": None}
                continue
            ranks = np.concatenate(parts)
            top5 = round(100 * float((ranks < TOP).mean()), 2) if classes > TOP else None
            figures |= {
                f"{name}_top1": round(100 * float((ranks < 1).mean()), 2),
                f"{name}_top1_interval": accuracy_interval(ranks < 1),
                f"{name}_top{TOP}": top5,
            }
        return figures

    def outcome(self, names: list[str]) -> Outcome:
        """What the class token says, or without one the mean of patches."""
        kind = "token" if self._ranks["token"] else "mean"
        ranks, best = (np.concatenate(kinds[kind]) for kinds in (self._ranks, self._best))
        return Outcome(self.labels, best, ranks < TOP, names)


def look(
    networks: list[Frozen],
    pictures: Pictures,
    texts: torch.Tensor,
    *,
    shown: list[int],
    crop_share: float,
    bands: Bands | None = None,
) -> list[Seen]:
    """Show all images to all networks, whose tokens are as wide as the `texts` [P, C] of length 1.

    Labels are numbers of texts. `bands`: of which a network of RGB has its colours, if not as
    pictures have them. `shown`: rows whose maps are kept. Each rank shows its share, and
    all return the same. Raises Stopped.
    """
    progress, device = pictures.progress, texts.device
    inputs = {(network.size, network.channels) for network in networks}

    def prepare(row: int, data: bytes, beside: bytes) -> dict[_Input, np.ndarray]:
        return {
            (size, law): centre_crop(
                law, data, beside, share=crop_share, size=size, bands=bands
            )
            for size, law in inputs
        }  # fmt: skip

    seen = [Seen() for _ in networks]
    progress.begin("zero-shot", len(pictures), "images")
    for batch in pictures.batches(prepare):
        labels = torch.from_numpy(pictures.labels[[p.row for p in batch]]).to(device)
        for network, one in zip(networks, seen, strict=True):
            assert network.tokens is not None
            own = network.size, network.channels
            pixels = torch.from_numpy(np.stack([p.prepared[own] for p in batch]))
            with torch.inference_mode():
                first, patches = network.tokens(pixels.to(device))
                unit = F.normalize(patches.float(), dim=-1)
                mean = (unit if network.directions else patches.float()).mean(dim=1)
                one.add(labels, {"token": first, "mean": mean}, texts)
                for i, picture in enumerate(batch):
                    if picture.row in shown:
                        cosines = (unit[i] @ texts.T).cpu().numpy()
                        seen_there, law = picture.prepared[own], network.channels
                        view = law.shown(seen_there.transpose(1, 2, 0)) if law else seen_there
                        one.maps[picture.row] = view, cosines
    progress.end()
    for one in seen:
        one.gather(pictures.context.ranks)
    return seen
