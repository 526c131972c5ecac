"""RILS's losses against the reference's golden values and gradients, and each of its traps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from milan.errors import ConfigError
from milan.models.rils import JointOutput
from milan.models.text_encoder import caption_numbers
from milan.objectives.sentences import (
    SentenceLoss,
    sentence_divergence,
    unit,
)

MASK = [[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 0]]


def wave(shape: tuple[int, ...], a: float, b: float) -> torch.Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * steps + b).reshape(shape)


def golden(dtype: torch.dtype = torch.float64, tau: float = 0.07) -> JointOutput:
    """The reference's inputs, with gradients: four images, six patches, eight channels."""
    texts = wave((4, 8), 1.3, 0.2)
    predicted = wave((4, 7, 8), 0.91, 1.1) + 0.3 * texts[:, None]
    whole = wave((4, 7, 8), 0.37, 0.5) + 0.8 * texts[:, None]
    whole[3] = wave((7, 8), 0.53, 2.0) + 0.8 * texts[0][None]
    masked = torch.tensor(MASK).nonzero()[:, 1].view(4, 4, 1).expand(-1, -1, 8)
    at = [part[:, 1:].gather(1, masked) for part in (predicted, whole)]
    given = (whole[:, 1:].mean(1), texts, *at, torch.tensor(1 / tau))
    leaves = (part.to(dtype).detach().requires_grad_() for part in given)
    return JointOutput(*leaves, torch.arange(4))


def random_output(b: int = 4, m: int = 3, d: int = 8, seed: int = 0, **more: Any) -> JointOutput:
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randn(*shape, d, generator=draw) for shape in ((b,), (b,), (b, m), (b, m))]
    parts.append(torch.tensor(10.0))
    leaves = (part.to(**more).requires_grad_() for part in parts)
    return JointOutput(*leaves, torch.arange(b))


def similar(b: int = 4, **more: Any) -> JointOutput:
    """Outputs whose images retrieve their captions."""
    output = random_output(b, **more)
    return output._replace(images=output.texts.detach().clone().requires_grad_())


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("gather", ["detached", "full"])
def test_losses_are_the_references(dtype: torch.dtype, within: float, gather: str) -> None:
    """What is detached changes gradients, not values."""
    output = golden(dtype)
    loss, parts = SentenceLoss(gather=gather)(output)
    figures = {name: float(value) for name, value in parts.items()}
    assert figures["accuracy"] == figures["accepted"] == 0.75
    assert figures["duplicates"] == 0
    kl = sentence_divergence(output.predicted, output.target, unit(output.texts)).kl
    sharp = SentenceLoss(gather=gather, student_tau=0.04)(output).parts
    for name, found, expected, slack in (
        ("contrastive", figures["clip"], 0.35839484, 1),
        ("KL of accepted images", figures["recon"], 2.37441319, 1),
        ("the whole loss", float(loss.detach()), 1.54560143, 1),
        ("KL of all images", float(kl.mean().detach()), 2.89644280, 1),
        ("KL at student_tau 0.04", float(sharp["recon"]), 5.86973825, 3),
    ):
        print(f"{name}: {found:.8f}, {abs(found - expected):.1e} from {expected:.8f}")
        assert found == pytest.approx(expected, abs=within * slack), name


def test_divergence_of_each_patch_is_the_references() -> None:
    """All six patches of the first image, masked or not."""
    texts = wave((4, 8), 1.3, 0.2)
    predicted = wave((4, 7, 8), 0.91, 1.1)[0, 1:] + 0.3 * texts[0]
    target = wave((4, 7, 8), 0.37, 0.5)[0, 1:] + 0.8 * texts[0]
    expected = [
        1.58558882e-02, 1.27808158e00, 8.24268242e00, 8.19913185e00, 1.90125694e00, 9.34285790e-03,
    ]  # fmt: skip
    found = sentence_divergence(predicted, target, unit(texts))
    assert found.kl.tolist() == pytest.approx(expected, abs=1e-8)
    shares = (F.normalize(target, dim=-1) @ F.normalize(texts, dim=-1).T / 0.04).softmax(-1)
    assert found.entropy.tolist() == pytest.approx(
        torch.special.entr(shares).sum(-1).tolist(), abs=1e-8
    )


def test_gradients_are_the_references() -> None:
    """Of the weighted reconstruction alone; none to texts where they are detached."""
    for gather, of_texts in (("full", 0.7751743), ("detached", 0.0)):
        output = golden()
        both, clip = (SentenceLoss(w, gather=gather)(output).loss for w in (0.5, 0))
        recon = both - clip
        grad = torch.autograd.grad(recon, (output.predicted, output.texts), allow_unused=True)
        assert grad[0].norm().item() == pytest.approx(0.7115083, abs=1e-6)
        assert (grad[1].norm().item() if grad[1] is not None else 0) == pytest.approx(
            of_texts, abs=1e-6
        )


def test_what_is_compared_with_gets_no_gradient() -> None:
    """As on several devices: a text learns from the images that it asks for, and from no other."""
    output = random_output()
    loss, _ = SentenceLoss(weight=0)(output)
    (grad,) = torch.autograd.grad(loss, output.texts)
    images, texts = unit(output.images.detach()), unit(output.texts)
    asks = F.cross_entropy(output.scale.detach() * texts @ images.T, torch.arange(4)) / 2
    assert torch.allclose(grad, torch.autograd.grad(asks, output.texts)[0], atol=1e-7)


def test_target_and_rejected_images_get_no_gradient() -> None:
    """Exactly: the third image retrieves another caption."""
    output = similar()
    wrong = output.images.detach().clone()
    wrong[2] = output.texts[0].detach()
    output = output._replace(images=wrong.requires_grad_())
    loss, parts = SentenceLoss(gather="full")(output)
    loss.backward()
    assert float(parts["accepted"]) == 0.75
    assert output.target.grad is None
    assert output.predicted.grad is not None
    assert [bool(rows.any()) for rows in output.predicted.grad] == [True, True, False, True]


def test_nothing_accepted_keeps_the_graph() -> None:
    """The reconstruction is 0 then, and so is every gradient of it; none is missing."""
    output = similar()
    output = output._replace(images=output.texts.detach().roll(1, 0).requires_grad_())
    loss, parts = SentenceLoss()(output)
    loss.backward()
    assert float(parts["recon"]) == float(parts["accepted"]) == 0
    assert output.predicted.grad is not None
    assert not output.predicted.grad.any()


def test_equal_captions_do_not_fool_the_gate() -> None:
    """The first of equals is retrieved: published code rejects the image of the second."""
    output = similar()
    twice = output.texts.detach().clone()
    twice[3] = twice[1]
    output = output._replace(
        images=twice.clone().requires_grad_(),
        texts=twice.clone().requires_grad_(),
        captions=torch.tensor([0, 1, 2, 1]),
    )
    parts = SentenceLoss()(output).parts
    figures = {name: float(parts[name]) for name in ("accuracy", "accepted", "duplicates")}
    assert figures == {"accuracy": 0.75, "accepted": 1.0, "duplicates": 0.25}


def test_equal_sentences_count_as_often_as_they_are_there() -> None:
    """m times the same column adds log m to its logit on both sides; order does not matter."""
    output, sentences = random_output(), unit(random_output(seed=3).texts)
    patches = output.predicted, output.target
    found = sentence_divergence(*patches, sentences[[0, 1, 2, 3, 1, 1]]).kl
    logs = torch.tensor([1.0, 3, 1, 1]).log()
    log_p, log_t = (
        F.log_softmax(unit(x) @ sentences.T / tau + logs, -1)
        for x, tau in zip(patches, (0.1, 0.04), strict=True)
    )
    assert torch.allclose(found, (log_t.exp() * (log_t - log_p)).sum(-1), atol=1e-5)
    shuffled = sentence_divergence(*patches, sentences[[1, 3, 1, 0, 2, 1]]).kl
    assert torch.allclose(found, shuffled, atol=1e-5)


def test_caption_numbers_tell_captions_apart() -> None:
    """Also those that differ in their order or in one id."""
    ids = torch.cat([torch.cartesian_prod(*[torch.arange(8)] * 4), torch.zeros(2, 4).long()])
    numbers = caption_numbers(ids)
    assert len(numbers.unique()) == 8**4
    assert numbers[-1] == numbers[0]
    assert torch.equal(numbers, caption_numbers(ids.int()))


def test_equal_temperatures_keep_the_teachers_cosines() -> None:
    """With the published ones the optimum is stretched: a student equal to the target is wrong."""
    output, sentences = random_output(), unit(random_output(seed=3).texts)
    same = sentence_divergence(output.target, output.target, sentences, student_tau=0.04).kl
    assert not same.any()
    (grad,) = torch.autograd.grad(same.sum(), output.target)
    assert grad.abs().max() < 1e-5
    assert sentence_divergence(output.target, output.target, sentences).kl.mean() > 0.01


def test_chunks_change_nothing_and_bound_the_memory() -> None:
    """Values, gradients, and what is kept for the way back: no table of logits."""
    many, kept = unit(random_output(b=64, seed=3).texts).detach().double(), []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    found = []
    for at_once in (1 << 30, 7 * 64 * 8, 1):
        output, sentences = (
            random_output(b=16, m=9, dtype=torch.float64),
            many.clone().requires_grad_(),
        )
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            kl = sentence_divergence(output.predicted, output.target, sentences, at_once=at_once).kl
        assert max(kept) <= output.predicted.numel()
        grads = torch.autograd.grad(kl.square().sum(), (output.predicted, sentences))
        found.append((kl, *grads))
    for parts in zip(*found, strict=True):
        for part in parts[1:]:
            assert torch.allclose(part, parts[0], rtol=1e-9, atol=1e-9)


def test_logits_are_float32_under_autocast_and_for_half_inputs() -> None:
    """The same figures as of the same numbers in float32; a vector of zeros is no NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        output = random_output(dtype=dtype)
        with torch.no_grad():
            output.predicted[0, 0], output.target[1, 1] = 0, 0
        wide = (part.detach().float().requires_grad_() for part in output[:5])
        wide = JointOutput(*wide, output.captions)
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = SentenceLoss()(output)
        expected, others = SentenceLoss()(wide)
        assert torch.equal(loss, expected)
        assert all(torch.equal(value, others[name]) for name, value in parts.items())
        loss.backward()
        assert output.predicted.grad is not None
        assert output.predicted.grad.isfinite().all()


def test_sharp_distributions_are_finite() -> None:
    """A share of 0 times a logit without bottom would be NaN; one sentence teaches nothing."""
    output = random_output(b=2)
    sharp = SentenceLoss(teacher_tau=1e-4, student_tau=1e-4)(output)
    assert sharp.loss.isfinite()
    assert SentenceLoss()(random_output(b=1)).loss == 0
    with pytest.raises(ConfigError, match="detached or full"):
        SentenceLoss(gather="all")


def test_parts_are_not_weighted_and_inputs_stay() -> None:
    """Published logs have the reconstruction halved already, and the loss changes its mask."""
    output = random_output()
    before = [part.detach().clone() for part in output]
    loss, parts = SentenceLoss(weight=0.5)(output)
    assert float(loss.detach()) == pytest.approx(float(parts["clip"] + 0.5 * parts["recon"]))
    assert all(torch.equal(now, then) for now, then in zip(output, before, strict=True))
