"""Linear probe: how well a linear classifier on frozen features tells classes apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from milan.core.device import has_float64
from milan.core.progress import Progress
from milan.core.waiting import Stopped
from milan.evaluation.config import EvaluationConfig, LinearProbeConfig
from milan.evaluation.corruptions import Corruption, robustness
from milan.evaluation.evaluate import evaluate
from milan.evaluation.evaluation import Evaluation
from milan.evaluation.features import Context, Piece, Share
from milan.evaluation.frozen import Frozen
from milan.evaluation.heads import scores_of
from milan.evaluation.outcome import TOP, Answers, Outcome
from milan.evaluation.protocols import PROTOCOLS
from milan.evaluation.published_probes import fit_dinov2, fit_published

_L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # strengths tried on a tenth of the training images
_TENTH = 10


def linear_probe(
    checkpoint: str | EvaluationConfig = "runs/pretrain",
    *,
    frozen: Frozen | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit a linear classifier on frozen features and measure it.

    `checkpoint` and `settings` are the command's arguments (LinearProbeConfig's fields); `frozen`
    takes another network's features in the checkpoint's place. By default a multinomial logistic
    regression on standardised features, fitted to convergence (L-BFGS), its L2 strength chosen on
    a tenth of the training images; `protocol` names those of papers. Returns top1, top5 (percent,
    with their 95 % intervals; top5 is None with 5 classes and less), chance, counts
    (repeated_images: of the validation images, those that are training images too), what was
    chosen, and the same figures of a baseline. Raises MilanError.
    """
    return evaluate(
        PROTOCOLS["linear_probe"], checkpoint, frozen=frozen, progress=progress, **settings
    )


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """The protocol: top1, top5 (percent), and with what they were found; all ranks call it."""
    config = evaluation.config
    if not isinstance(config, LinearProbeConfig) or config.protocol == "logistic":
        return {"protocol": "logistic", **_fit_to_convergence(evaluation)}
    fit = fit_published if config.protocol == "published" else fit_dinov2
    module, settings = fit(evaluation)
    val = Share(evaluation.val, evaluation.context)
    figures = measure_classifier(evaluation, val, scores_of(module))
    return {"protocol": config.protocol, **figures, **settings}


def _fit_to_convergence(evaluation: Evaluation) -> dict[str, Any]:
    context, train, classes = evaluation.context, evaluation.train, evaluation.classes
    here = replace(context, device=torch.device("cpu"))
    mean, std = mean_and_std(Share(train, here), train.features.width, context)

    def standardise(x: torch.Tensor) -> torch.Tensor:
        return (x - mean) / std

    pieces = Share(train, context, change=standardise, memory=evaluation.memory)
    context.progress.begin("linear classifiers", len(_L2) + 1, "fits")
    regression = LogisticRegression(pieces, (train.features.width, classes), context)
    strength = _choose_strength(regression, len(train))
    weight, bias = regression.fit(strength)
    context.progress.advance(len(_L2) + 1)
    context.progress.end()
    val = Share(evaluation.val, context, change=standardise)
    return {**measure_classifier(evaluation, val, lambda x: x @ weight + bias), "l2": strength}


def measure_classifier(
    evaluation: Evaluation, val: Share, classify: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """top1, top5 and their intervals of `classify`, features [b, ...] to scores [b, classes].

    With them what corruptions leave of top1, where that is asked for; `val` changes features.
    """
    context, classes = evaluation.context, evaluation.classes

    def outcome_of(share: Share) -> Outcome:
        answers = Answers(share.labelled.labels, evaluation.names)
        for x, _, first in share:
            answers.see(first, classify(x).topk(min(TOP, classes), dim=1).indices)
        return answers.of_all(context.ranks)

    def top1_of(corruption: Corruption) -> float:
        assert evaluation.corrupted is not None
        share = Share(evaluation.corrupted(corruption), context, change=val.change)
        return outcome_of(share).figures()["top1"]

    if classes <= TOP:
        context.progress.note(f"top-5 is left out: with {classes} classes it means nothing")
    outcome = outcome_of(val)
    evaluation.write_tables(outcome)
    figures = outcome.figures()
    if evaluation.config.corruptions:
        figures |= robustness(top1_of, figures["top1"])
    return figures


def mean_and_std(
    pieces: Iterable[Piece], width: int, context: Context
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each feature, [F] float32 on the context's device, over all ranks.

    `pieces` are a rank's share, on the CPU, with features last; added up in float64.
    """

    def total(centre: torch.Tensor, power: int) -> tuple[torch.Tensor, float]:
        own, count = torch.zeros_like(centre), 0
        for x, _, _ in pieces:
            own += ((x.reshape(-1, width).double() - centre) ** power).sum(dim=0)
            count += x[..., 0].numel()
        context.ranks.add_up(own)
        return own, context.ranks.all_reduce_sum([float(count)])[0]

    total_of_all, count = total(torch.zeros(width, dtype=torch.float64), 1)
    mean = total_of_all / count
    std = (total(mean, 2)[0] / (count - 1)).sqrt()
    return mean.float().to(context.device), std.float().clamp_min(1e-6).to(context.device)


class LogisticRegression:
    """Multinomial logistic regression on pieces of features, which all ranks fit together.

    Each pass adds up the gradient piece by piece. So memory holds one piece with its scores, the 45
    copies of the weights that L-BFGS needs, and three matrices [F, F], whatever the number of
    images.
    """

    def __init__(self, pieces: Iterable[Piece], shape: tuple[int, int], context: Context) -> None:
        """`pieces` are this rank's share of standardised features; `shape` is (F, classes)."""
        self.pieces, self.shape, self.context = pieces, shape, context
        self.exact = torch.float64 if has_float64(context.device) else torch.float32
        covariance = torch.zeros(shape[0], shape[0], dtype=self.exact, device=context.device)
        count = 0
        for x, y, _ in pieces:
            covariance += x.T @ x
            count += len(y)
        context.ranks.add_up(covariance)
        (self.images,) = context.ranks.all_reduce_sum([float(count)])
        mean = (covariance / self.images).cpu().double()
        self.spread, self.axes = context.ranks.on_rank0(lambda: torch.linalg.eigh(mean))

    def fit(self, l2: float, *, without_tenth: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [F, classes] and bias [classes] that minimise mean cross-entropy + l2/2 |weight|².

        From zero, by L-BFGS: no learning rate to tune. It moves along the principal axes of the
        features, each scaled so that the loss is about as curved along all of them; else features
        that are nearly multiples of each other would take tens of thousands of passes. With
        `without_tenth` every tenth image counts for nothing. Raises Stopped.
        """
        device, ranks, stop = self.context.device, self.context.ranks, self.context.stop
        scale = (self.spread.clamp_min(0) / self.shape[1] + l2).rsqrt()
        basis = (self.axes * scale).T.float().to(device)
        # Classes first: a product with few rows is several times faster than with few columns.
        free = torch.zeros(self.shape[::-1], device=device, requires_grad=True)
        bias = torch.zeros(self.shape[1], 1, device=device, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [free, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=1e-5, tolerance_change=1e-9,
        )  # fmt: skip
        left_out = sum(int(_tenth(piece).sum()) for piece in self.pieces) if without_tenth else 0
        images = self.images - ranks.all_reduce_sum([float(left_out)])[0]

        @torch.no_grad()
        def closure() -> float:
            weight = free @ basis
            gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
            own = torch.zeros((), dtype=self.exact, device=device)
            for piece in self.pieces:
                losses, slopes = cross_entropy(weight @ piece.x.T + bias, piece.y)
                slopes /= images
                if without_tenth:
                    tenth = _tenth(piece)
                    losses, slopes = losses.masked_fill(tenth, 0), slopes.masked_fill(tenth, 0)
                gradient += slopes @ piece.x
                bias_gradient += slopes.sum(dim=1, keepdim=True)
                own += losses.sum(dtype=self.exact)
            stopping = own.new_tensor([float(bool(stop.by))])
            parts = gradient.flatten(), bias_gradient.flatten(), own[None] / images, stopping
            total = torch.cat([part.to(self.exact) for part in parts])
            ranks.add_up(total)
            loss, stops = total[-2:].tolist()
            if stops:
                raise Stopped(stop.by or "a signal to another rank")
            of_weight, of_bias = total[:-2].to(weight).split([weight.numel(), bias.numel()])
            free.grad = (of_weight.view_as(weight) + l2 * weight) @ basis.T
            bias.grad = of_bias.view_as(bias)
            return loss + 0.5 * l2 * weight.square().sum(dtype=self.exact).item()

        optimiser.step(closure)  # type: ignore[arg-type]
        return (free.detach() @ basis).T, bias.detach().flatten()


def cross_entropy(scores: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of scores [classes, b] and classes [b]: losses [1, b], slopes by the scores [classes, b].

    Scores are changed. Both are exact to the last bits of float32 even where they are near zero,
    as for images that are told apart with ease: `-log_softmax` and `softmax - one-hot` lose what
    is below 1e-7 of one, and a line search on them ends before the fit has converged.
    """
    at = y[None]
    scores -= scores.gather(0, at)
    largest = scores.amax(dim=0, keepdim=True)  # at least 0, the score of the image's own class
    others = scores.sub_(largest).exp_().scatter_(0, at, 0)
    rest = others.sum(dim=0, keepdim=True)
    own = (-largest).expm1_()  # less one
    losses = torch.log1p(rest + own).add_(largest)
    return losses, others.scatter_(0, at, -rest).div_(rest + own + 1)


def _tenth(piece: Piece) -> torch.Tensor:
    """Which images choose the strength, [b] bool: rows are permuted, so these are a fair sample."""
    first, device = piece.first, piece.y.device
    return torch.arange(first, first + len(piece.y), device=device) % _TENTH == 0


def _choose_strength(regression: LogisticRegression, images: int) -> float:
    """The strength whose classifier is right most often on a tenth that it was not fitted on."""
    context = regression.context
    if -(-images // _TENTH) < 2 or images - -(-images // _TENTH) < 2:
        return _L2[1]
    scores = list[float]()
    for l2 in _L2:
        context.progress.advance(len(scores))
        weight, bias = regression.fit(l2, without_tenth=True)
        right = torch.zeros((), dtype=torch.int64, device=context.device)
        for piece in regression.pieces:
            right += ((piece.x @ weight + bias).argmax(dim=1) == piece.y)[_tenth(piece)].sum()
        scores += context.ranks.all_reduce_sum([right.item()])
    return _L2[max(range(len(_L2)), key=scores.__getitem__)]
