"""Training from a store against the teacher in every step: `python -m studies.online`.

The same students, steps, views and masks by one loop; only where the targets come from differs.
What is compared: the curves of the loss, and probes of what was learnt. Leaves a picture.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milan.config import PretrainConfig
from milan.data.loader import Batch
from milan.objectives.base import Prediction
from milan.objectives.features import FeatureRegression
from milan.reporting.log import read_log
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec
from studies import pictures
from studies.setting import Setting, add_images, small
from studies.steps import Figures, flags, markdown

ONLINE = "teacher in every step"
CODECS = ("float16", "int8", "pq:16")
MEASURES = ("k-NN", "linear")


class OnlineTargets(FeatureRegression):
    """MILAN's objective with the teacher in every step: it sees the pixels that the student sees.

    Its files are the settings `objective.teacher` and `objective.pretrained`. Of the store only
    the views are used.
    """

    needs_features = False

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """Its own settings are those of `online`."""

    @cached_property
    def teacher(self) -> Teacher:
        """Loaded at the first step."""
        files = self.config.objective_args
        return load_teacher(TeacherSpec(files["teacher"], files["pretrained"]), device="cpu")

    def predict(self, network: nn.Module, batch: Batch) -> Prediction:
        """As MILAN's, by the targets that the teacher gives now."""
        features, attention = self.teacher.targets(batch.pixels)
        # Cloned: what was computed in inference mode cannot be kept for a gradient.
        given = batch._replace(codes=features.clone(), attention=attention.clone())
        return super().predict(network, given)

    def features(self, prediction: Prediction) -> torch.Tensor:
        """The teacher's own numbers, [B, T, C] float32."""
        codes, tokens = prediction.batch.codes, prediction.tokens.shape[1]
        assert codes is not None
        rows = prediction.mask.rows[..., None].expand(-1, -1, codes.shape[2])
        return codes.gather(1, rows)[:, -tokens:]


def online(setting: Setting) -> dict[str, Any]:
    """Settings of pretraining with the teacher of `setting` in every step."""
    return {"objective": "studies.online:OnlineTargets", "objective_args": setting.teacher}


def keep_curve(figures: Figures, method: str, seed: int, run: Path) -> None:
    """The losses of a run's log, each the mean over the steps since the last one."""
    for line in read_log(run, 2**31):
        figures.keep(method, seed, f"loss, step {line['step']}", line["loss"])


def curve(figures: Figures, method: str, seed: int) -> dict[int, float]:
    """Step -> loss."""
    prefix = "loss, step "
    return {
        int(name.removeprefix(prefix)): value
        for (one, of, name), value in figures.known.items()
        if (one, of) == (method, str(seed)) and name.startswith(prefix)
    }


def difference(figures: Figures, method: str, seeds: int) -> float:
    """The largest difference between a method's curve and the online one, over all seeds."""
    return max(
        abs(loss - curve(figures, ONLINE, seed)[step])
        for seed in range(seeds)
        for step, loss in curve(figures, method, seed).items()
    )


def measure(given: argparse.Namespace, setting: Setting, figures: Figures, seed: int) -> None:
    """All methods by one seed."""
    for method in (ONLINE, *given.codecs):
        run = given.work / f"online/{method.replace(' ', '-').replace(':', '')}-{seed}"

        def train(method: str = method, run: Path = run) -> float:
            codec = "float16" if method == ONLINE else method
            store = setting.store(given.work, codec=codec, views=given.views, images=given.images)
            how = online(setting) if method == ONLINE else {}
            spent = setting.train(
                store, run, seed, epochs=given.epochs, warmup_epochs=given.epochs / 10, **how
            )
            keep_curve(figures, method, seed, run)
            return spent

        figures.run(method, seed, train, setting.probes(run, MEASURES))


def main() -> None:
    """All runs and their figures, seed by seed, then the table and the picture."""
    parser = flags("online", __doc__)
    add_images(parser)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/study-online.png"))
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    for seed in range(given.seeds):
        measure(given, setting, figures, seed)
    rows = [["targets", "largest difference of the loss", *MEASURES, "CPU s"]]
    for method in (ONLINE, *given.codecs):
        apart = "" if method == ONLINE else f"{difference(figures, method, given.seeds):.0e}"
        rows.append([method, apart, *(figures.cell(method, m) for m in (*MEASURES, "CPU s"))])
    print("\n" + markdown(rows))
    curves = {method: curve(figures, method, 0) for method in (ONLINE, *given.codecs)}
    pictures.losses(curves, ONLINE, given.picture)


if __name__ == "__main__":
    main()
