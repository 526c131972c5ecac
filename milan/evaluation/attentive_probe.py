"""Attentive probe: learnt queries look at the patches of a frozen network, and a classifier at what
they find.

Networks that were trained by masking say of an image by its patches what others say by a class
token. So attention gathers it, trained with the classifier; the network is not. With `tokens: all`
the class token, by which a CLIP was trained, is among the x_n too.

    class   each class c has a query q_c and weights w_c, as wide as a patch:
            score_c = sum_n softmax_n(q_c . x_n / sqrt(E)) (w_c . x_n) + b_c
    one     a query for each of a few heads; the head's mean of patches goes through a matrix of its
            own, [E, E / heads], and a linear classifier takes them all side by side

A product of query and key matrices, both learnt, is a vector again where the query does not depend
on the image; so there are no key matrices (arXiv 2506.10178 finds the same).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from milan.evaluation.config import AttentiveProbeConfig
from milan.evaluation.evaluation import Evaluation
from milan.evaluation.features import Share
from milan.evaluation.heads import Head, Steps, at_most, best_of, of_step, scores_of
from milan.evaluation.linear_probe import mean_and_std, measure_classifier
from milan.evaluation.patches import file_rows

_GRID = {"lr": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.0, 0.1)}
_OTHERWISE = {"lr": 1e-2, "weight_decay": 0.1}  # with too few images to choose
_SAMPLE = 8192  # images by whose patches the channels are standardised


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """The protocol: top1, top5 (percent), and the settings that a tenth of the images chose."""
    config, images = evaluation.config, len(evaluation.train)
    assert isinstance(config, AttentiveProbeConfig)
    width, classes = evaluation.train.features.width, evaluation.classes
    heads = config.heads_of(width)
    standardise = _standardisation(evaluation)

    def make(lr: float, weight_decay: float) -> Head:
        module: nn.Module
        if config.queries == "class":
            module = ClassQueries(width, classes)
        else:
            module = OneQuery(width, classes, heads)
        decayed = [p for p in module.parameters() if p.ndim > 1]
        others = [p for p in module.parameters() if p.ndim == 1]
        module = module.to(evaluation.context.device)
        return Head(
            module,
            [
                {"params": decayed, "lr": lr, "weight_decay": weight_decay},
                {"params": others, "lr": lr, "weight_decay": 0.0},
            ],
        )

    step_images = of_step(config.step_images, images, most=256, steps=78)
    epochs = config.epochs or at_most(12_500, 20, images, step_images)
    grid = [dict(zip(_GRID, values, strict=True)) for values in product(*_GRID.values())]
    steps = Steps(
        epochs, step_images, torch.optim.AdamW, warmup=epochs / 20, change=standardise
    )  # fmt: skip
    module, chosen = best_of(
        evaluation, grid, make, steps, "attentive classifiers", otherwise=_OTHERWISE
    )
    settings = {"queries": config.queries, "tokens": config.tokens, "epochs": epochs}
    settings |= {"step_images": step_images, **chosen}
    val = Share(evaluation.val, evaluation.context, change=standardise)
    return {**measure_classifier(evaluation, val, scores_of(module)), **settings}


def _standardisation(evaluation: Evaluation) -> Callable[[torch.Tensor], torch.Tensor]:
    """Patches [b, N, E] to float32, each channel of mean 0 and deviation 1 over a sample's."""
    here = replace(evaluation.context, device=torch.device("cpu"))
    sample = Share(evaluation.train, here, files=-(-_SAMPLE // file_rows()))
    mean, std = mean_and_std(sample, evaluation.train.features.width, evaluation.context)
    return lambda x: (x.float() - mean) / std


class ClassQueries(nn.Module):
    """Patches [b, N, E] to scores [b, classes], each by a query of its own."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(classes, width))
        self.weight = nn.Parameter(0.01 * torch.randn(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the module's docstring has it."""
        attention = (F.linear(x, self.queries) * x.shape[-1] ** -0.5).softmax(dim=1)
        return (attention * F.linear(x, self.weight)).sum(dim=1) + self.bias


class OneQuery(nn.Module):
    """Patches [b, N, E] to scores [b, classes], by one query with several heads."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(heads, width))
        self.values = nn.Parameter(width**-0.5 * torch.randn(heads, width, width // heads))
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the module's docstring has it."""
        attention = (F.linear(x, self.queries) * x.shape[-1] ** -0.5).softmax(dim=1)
        means = torch.einsum("bnh,bne->bhe", attention, x)
        return self.classifier(torch.einsum("bhe,hed->bhd", means, self.values).flatten(1))
