"""The paper's parts, each with and without: `python -m studies.ablation`.

Target x decoder x masking x tokens in the loss, all together, at equal steps from one store. Blocks
are a control that the product does not have. Leaves a picture: what each part is worth.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from milan.config import PretrainConfig
from milan.data.loader import Batch
from milan.models.masking import Mask, visible_count
from milan.objectives.base import Objective, Prediction
from milan.objectives.features import FeatureRegression
from milan.objectives.pixels import PixelRegression, pixel_regression
from milan.store.cache import TargetCache
from studies import pictures
from studies.setting import Setting, add_images, small
from studies.steps import Figures, flags, markdown, spread

MEASURES = ("k-NN", "linear")


class Cell(NamedTuple):
    """A student: one choice of each part."""

    target: str
    decoder: str
    masking: str
    loss: str

    @property
    def name(self) -> str:
        """In the table."""
        return ", ".join(self)


PARTS = {
    "target": ("pixels", "CLIP"),
    "decoder": ("mae", "prompt"),
    "masking": ("random", "semantic", "block"),
    "loss": ("masked", "all"),
}
"""Part -> its choices; the first is that of the published baseline."""
CELLS = [Cell(*choice) for choice in itertools.product(*PARTS.values())]


def block_mask(noise: torch.Tensor, *, visible: int) -> Mask:
    """Mask one block: the patches nearest to a drawn centre, by the greater of both distances.

    `noise` [B, N] in (0, 1); its first three draw centre and shape (3:4 to 4:3). A block at the
    edge grows to the other side, so that M patches are masked always.
    """
    side = round(noise.shape[1] ** 0.5)
    at = (torch.arange(side, device=noise.device) + 0.5) / side
    stretch = (4 / 3) ** (noise[:, 2:3] - 0.5)
    down = (at - noise[:, 0:1]).abs() * stretch  # [B, side]
    across = (at - noise[:, 1:2]).abs() / stretch
    distance = torch.maximum(down[:, :, None], across[:, None, :]).flatten(1)
    order = distance.argsort(dim=1, stable=True)
    masked = noise.shape[1] - visible
    return Mask(order[:, masked:].sort(1).values, order[:, :masked].sort(1).values)


class _Ablated(Objective):
    """Masks in blocks, if its own setting `masking` says so."""

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """Its own settings are those of `measure`."""

    def mask(self, batch: Batch) -> Mask:
        """As the objective's, or a block."""
        if self.config.objective_args["masking"] != "block":
            return super().mask(batch)
        return block_mask(batch.noise, visible=visible_count(batch.noise.shape[1], self.mask_ratio))


class AblatedFeatures(_Ablated, FeatureRegression):
    """MILAN's objective; probes see the class token of all students, also if it is in no loss."""

    def __init__(self, cache: TargetCache, **settings: Any) -> None:
        super().__init__(cache, **settings)
        self.pooling = "both"


class AblatedPixels(_Ablated, PixelRegression):
    """MAE's objective, of all patches or of the masked ones alone (`predict`)."""

    def loss(self, prediction: Prediction) -> torch.Tensor:
        """Squared error of normalised pixels, mean over the patches in the loss."""
        counted = prediction.mask.boolean() | (self.config.predict == "all")
        return pixel_regression(
            prediction.patches, prediction.images, counted, patch=prediction.patch_size
        )


OBJECTIVES = {"CLIP": "AblatedFeatures", "pixels": "AblatedPixels"}


def measure(given: argparse.Namespace, setting: Setting, figures: Figures, seed: int) -> None:
    """All cells by one seed."""
    for cell in CELLS:
        run = given.work / f"ablation/{'-'.join(cell)}-{seed}"

        def train(cell: Cell = cell, run: Path = run) -> float:
            store = setting.store(given.work, codec="int8", views=given.views, images=given.images)
            return setting.train(
                store, run, seed, epochs=given.epochs, warmup_epochs=given.epochs / 10,
                objective=f"studies.ablation:{OBJECTIVES[cell.target]}",
                objective_args={"masking": cell.masking}, predict=cell.loss,
                decoder_kind=cell.decoder,
                masking="semantic" if cell.masking == "semantic" else "random",
            )  # fmt: skip

        figures.run(cell.name, seed, train, setting.probes(run, MEASURES))


def effects(figures: Figures, measure: str, seeds: int) -> dict[str, list[float]]:
    """'part: choice, target' -> what it adds to the part's first choice, by seed.

    A mean over all choices of the other parts; by target, because the parts were made for one.
    """
    found: dict[str, list[float]] = {}
    for part, (first, *others) in PARTS.items():
        for choice in others:
            for target in PARTS["target"] if part != "target" else ("",):
                cells = [
                    cell for cell in CELLS
                    if getattr(cell, part) == choice and (not target or cell.target == target)
                ]  # fmt: skip
                found[f"{part}: {choice}" + f", for {target}" * bool(target)] = [
                    statistics.mean(
                        figures.value(cell.name, seed, measure)
                        - figures.value(cell._replace(**{part: first}).name, seed, measure)
                        for cell in cells
                    )
                    for seed in range(seeds)
                ]
    return found


def main() -> None:
    """All runs and their figures, seed by seed, then the tables and the picture."""
    parser = flags("ablation", __doc__)
    add_images(parser)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/study-ablation.png"))
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    for seed in range(given.seeds):
        measure(given, setting, figures, seed)
    rows = [[*PARTS, *MEASURES]]
    for cell in sorted(CELLS, key=lambda cell: -figures.mean(cell.name, "linear")):
        rows.append([*cell, *(figures.cell(cell.name, m) for m in MEASURES)])
    print("\n" + markdown(rows))
    found = {m: effects(figures, m, given.seeds) for m in MEASURES}
    rows = [["part, and what it adds", *MEASURES]]
    for name in found["linear"]:
        cells = [spread(found[m][name], "{:+.1f}") for m in MEASURES]
        rows.append([name, *cells])
    print(markdown(rows))
    pictures.effects(found, given.picture)


if __name__ == "__main__":
    main()
