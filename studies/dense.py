"""Fresh crops out of one map of the whole image, an experiment: `python -m studies.dense`.

The teacher sees each image once, whole, at its own size or at twice that (its positions
interpolated). The features of a crop are cut out of that map (RoIAlign, mirrored with the crop), so
that every epoch can have a crop of its own. Compared with exact targets: by cosine, and by what a
student learns.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from milan.data.dataset import CachedDataset
from milan.data.loader import Batch
from milan.images.decode import decode_pixels
from milan.images.views import View, render
from milan.store.cache import TargetCache
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec
from studies.online import GivenTargets
from studies.setting import Setting, add_images, small
from studies.steps import Figures, flags, markdown

MEASURES = ("k-NN", "linear")
AREAS = (0.2, 0.4, 0.6, 0.8, 1.01)
"""Bounds of the shares of the image that a crop has."""


def make_maps(setting: Setting, store: Path, out: Path, times: int) -> None:
    """Features and attention of all images of a store, whole, at `times` the teacher's size.

    `out` has features [rows, 1 + C, G, G] float16, of which the last channel is the attention,
    the class token [rows, C] float16, and the images' edge in pixels.
    """
    if out.exists():
        return
    dataset = CachedDataset(TargetCache(store))
    size = dataset.cache.view_spec.size
    spec = TeacherSpec(setting.teacher["teacher"], setting.teacher["pretrained"],
                       img_size=times * size)  # fmt: skip
    teacher = load_teacher(spec, device="cpu")
    maps, tokens = [], []
    for rows in np.array_split(dataset.good, -(-len(dataset.good) // 64)):
        images = [decode_pixels(dataset.source.read(int(row))) for row in rows]
        edge = images[0].shape[0]
        assert all(image.shape[:2] == (edge, edge) for image in images)
        whole = [render(image, View(0, 0, edge, edge, False), size=times * size)
                 for image in images]  # fmt: skip
        features, attention = teacher.targets(np.stack(whole))
        both = torch.cat([F.normalize(features[:, 1:], dim=-1), attention[..., None]], dim=-1)
        grid = round(both.shape[1] ** 0.5)
        maps.append(both.transpose(1, 2).reshape(len(rows), -1, grid, grid).half())
        tokens.append(features[:, 0].half())
    assert (dataset.good == np.arange(len(dataset.good))).all()
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"maps": torch.cat(maps), "tokens": torch.cat(tokens), "edge": edge}, out)


def cut(maps: torch.Tensor, crops: torch.Tensor, *, edge: int, grid: int) -> torch.Tensor:
    """The maps [B, C, G, G] of images of `edge` pixels below crops [B, 5], as [B, C, grid, grid].

    A crop is (top, left, height, width, flip); what is mirrored is cut, then mirrored.
    """
    top, left, height, width = crops[:, :4].float().unbind(1)
    number = torch.arange(len(crops)).float()
    boxes = torch.stack([number, left, top, left + width, top + height], dim=1)
    found = roi_align(
        maps.float(), boxes, output_size=grid, spatial_scale=maps.shape[-1] / edge,
        sampling_ratio=2, aligned=True,
    )  # fmt: skip
    return torch.where(crops[:, 4].bool()[:, None, None, None], found.flip(3), found)


class DenseTargets(GivenTargets):
    """MILAN's objective with the targets of each crop cut out of a map (`objective.maps`).

    The class token is the whole image's: a map has no other.
    """

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What `make_maps` left."""
        return torch.load(self.config.objective_args["maps"])

    def made(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut out of the maps."""
        crops = torch.from_numpy(self.cache.crops(batch.rows.numpy(), batch.views.numpy()))
        grid = round(batch.noise.shape[1] ** 0.5)
        found = cut(self.kept["maps"][batch.rows], crops, edge=self.kept["edge"], grid=grid)
        found = found.flatten(2).transpose(1, 2)  # [B, N, C + 1]
        tokens = self.kept["tokens"][batch.rows].float()[:, None]
        attention = found[..., -1].clamp_min(torch.finfo(torch.float32).tiny)
        return torch.cat([tokens, found[..., :-1]], dim=1), attention


def cosines(store: Path, maps: Path, rows: int) -> dict[str, float]:
    """Mean cosine of cut to exact features of patches, by the crop's share of the image.

    And of the exact ones to those of another image at the same place: what says nothing.
    """
    cache, kept = TargetCache(store), torch.load(maps)
    edge, shares, near, far = kept["edge"], [], [], []
    for view in range(cache.views):
        at = np.arange(rows)
        targets = cache.read(at, np.full(rows, view))
        codes = torch.from_numpy(targets.codes)
        scale = None if targets.scale is None else torch.from_numpy(targets.scale)
        exact = cache.codec.decode(codes, scale)[:, 1:]
        crops = torch.from_numpy(cache.crops(at, np.full(rows, view)))
        found = cut(kept["maps"][:rows], crops, edge=edge, grid=cache.grid)
        found = found.flatten(2).transpose(1, 2)[..., :-1]
        near.append(F.cosine_similarity(found, exact, dim=-1).mean(dim=1))
        far.append(F.cosine_similarity(exact, exact.roll(1, dims=0), dim=-1).mean(dim=1))
        shares.append((crops[:, 2] * crops[:, 3]).float() / edge**2)
    share, cosine = torch.cat(shares), torch.cat(near)
    result = {"another image": float(torch.cat(far).mean())}
    for low, high in pairwise(AREAS):
        inside = (share >= low) & (share < high)
        result[band(low, high)] = float(cosine[inside].mean())
    return result


def band(low: float, high: float) -> str:
    """A range of shares, in words."""
    return f"{low:.0%} to {min(high, 1):.0%}"


def measure(given: argparse.Namespace, setting: Setting, figures: Figures, seed: int) -> None:
    """All ways by one seed. The fresh crops are those of a store with a view for each epoch."""
    folder = given.work / f"stores/{setting.name}"
    for method, (views, times) in ways(given).items():
        run = given.work / f"dense/{method.replace(' ', '-')}-{seed}"

        def train(
            method: str = method, views: int = views, times: int = times, run: Path = run
        ) -> float:
            store = setting.store(given.work, codec="float16", views=views, images=given.images)
            how: dict[str, Any] = {}
            if times:
                maps = folder / f"maps-{given.images}-{times}.pt"
                make_maps(setting, store, maps, times)
                how = {"objective": "studies.dense:DenseTargets",
                       "objective_args": {"maps": str(maps)}}  # fmt: skip
                if seed == 0:
                    for name, value in cosines(store, maps, given.rows).items():
                        figures.keep(method, 0, f"cosine, {name}", round(value, 4))
            return setting.train(
                store, run, seed, epochs=given.epochs, warmup_epochs=given.epochs / 10, **how
            )

        figures.run(method, seed, train, setting.probes(run, MEASURES))


def ways(given: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Method -> (views of the store, times the teacher's size of the map; 0: exact targets)."""
    return {
        "exact, 1 view": (1, 0),
        "exact, 4 views": (4, 0),
        "map": (given.epochs, 1),
        "map of twice the size": (given.epochs, 2),
        "exact, a view an epoch": (given.epochs, 0),
    }


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = flags("dense", __doc__)
    add_images(parser)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rows", type=int, default=500, help="images whose cosines are measured")
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    for seed in range(given.seeds):
        measure(given, setting, figures, seed)
    bands = [band(low, high) for low, high in pairwise(AREAS)]
    shown = [*(f"cosine, {name}" for name in ("another image", *bands))]
    rows = [["targets", *MEASURES, *shown]]
    for method in ways(given):
        cells = [figures.cell(method, name, "{:.3f}") for name in shown]
        rows.append([method, *(figures.cell(method, m) for m in MEASURES), *cells])
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
