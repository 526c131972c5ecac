"""A step whose images are compared with each other does not depend on how they are spread."""

from __future__ import annotations

from typing import Any

import joint_worker
import pytest
import torch
from joint_worker import IMAGES, step

from milan.core.distributed import SINGLE
from milan.core.launch import launch
from milan.core.progress import NoProgress

EXACT: dict[str, Any] = {"dtype": torch.float64, "precision": "fp32", "drop_path": 0.0}


def assert_same(one: dict[str, Any], other: dict[str, Any], *, within: float) -> None:
    apart = max(float((other["grads"][n] - one["grads"][n]).abs().max()) for n in one["grads"])
    loss = one["parts"]["loss"], other["parts"]["loss"]
    print(f"loss {loss[0]:.8f}, {abs(loss[0] - loss[1]):.1e} apart; gradients {apart:.1e}")
    assert other["parts"].keys() == one["parts"].keys()
    for name, value in one["parts"].items():
        assert other["parts"][name] == pytest.approx(value, abs=within), name
    assert other["grads"].keys() == one["grads"].keys()
    for name, grad in one["grads"].items():
        assert (other["grads"][name] - grad).abs().max() < within, name


@pytest.mark.parametrize("gather", ["detached", "full"])
def test_micro_batches_change_nothing(gather: str) -> None:
    """Loss, parts and every gradient of the whole batch, from six micro-batches and from twelve."""
    whole = step(SINGLE, IMAGES, gather=gather, **EXACT)
    assert 0.3 < whole["parts"]["accepted"] < 0.9
    assert whole["parts"]["duplicates"] == pytest.approx(1 / IMAGES)
    assert whole["grads"]["logit_scale"].abs() > 1e-4
    assert whole["grads"]["decoder.mask_token"].abs().max() > 1e-4
    for micro in (2, 1):
        parts = step(SINGLE, micro, gather=gather, **EXACT)
        assert_same(whole, parts, within=1e-10)


def test_what_is_drawn_is_drawn_again() -> None:
    """Drop path leaves out the same both times: else gradients would be of another network."""
    drops = EXACT | {"drop_path": 0.5}
    one, again = (step(SINGLE, 2, **drops) for _ in range(2))
    assert_same(one, again, within=1e-12)
    plain = step(SINGLE, 2, **EXACT)
    assert abs(one["parts"]["loss"] - plain["parts"]["loss"]) > 1e-4
    # Forward passes of a micro-batch agree, or the loss would not fall along its gradient.
    assert_same(one, step_along(drops), within=1e-12)


def step_along(drops: dict[str, Any]) -> dict[str, Any]:
    """The same step, in which the second pass is compared with the first."""
    said: list[torch.Tensor] = []
    output = joint_worker.output

    def noted(network: Any, batch: Any) -> Any:
        found = output(network, batch)
        said.append(found.images.detach())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_worker, "output", noted)
        found = step(SINGLE, 2, **drops)
    first, second = said[: len(said) // 2], said[len(said) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_half_precision_teaches_the_same(precision: str) -> None:
    """Weights that autocast has cast without gradient are not used with it: all of them learn."""
    settings = {"dtype": torch.float32, "precision": precision, "drop_path": 0.0}
    whole, parts = (step(SINGLE, micro, **settings) for micro in (IMAGES, 3))
    assert_same(whole, parts, within=1e-5 if precision == "fp32" else 0.05)
    exact = step(SINGLE, IMAGES, **EXACT)
    for name in ("image_projection", "text.projection", "encoder.cls_token"):
        one, other = exact["grads"][name].flatten(), whole["grads"][name].double().flatten()
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
        assert cosine > 0.98, name
        assert other.norm() == pytest.approx(float(one.norm()), rel=0.1), name


@pytest.mark.parametrize(
    "loss", [{"gather": "detached"}, {"gather": "full"}, {"gather": "detached", "weight": 0.0}],
    ids=["detached", "full", "plain CLIP"],
)  # fmt: skip
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_ranks_change_nothing(loss: dict[str, Any], ranks: int, forked_ranks: None) -> None:
    """1, 2 and 3 ranks, of which one accepts no image: the same loss, parts and gradients."""
    alone = step(SINGLE, IMAGES, **loss, **EXACT)
    assert ("decoder.mask_token" in alone["grads"]) == ("weight" not in loss)
    found = launch(
        joint_worker.as_one_of, {"micro": 2, **loss, **EXACT}, ranks=ranks,
        restarts=0, restart_arguments=dict, progress=NoProgress(),
    )  # fmt: skip
    assert_same(alone, found, within=1e-10)
    shares = [share for _, share in found["accepted"]]
    assert len(shares) == ranks
    if ranks == 3:
        assert (shares[0], shares[2]) == (1, 0)


def test_the_published_average_depends_on_ranks(forked_ranks: None) -> None:
    """With a normaliser of its own, a rank with few accepted images weighs them more."""
    alone = step(SINGLE, IMAGES, normaliser="local", **EXACT)
    found = launch(
        joint_worker.as_one_of, {"micro": 2, "normaliser": "local", **EXACT}, ranks=2,
        restarts=0, restart_arguments=dict, progress=NoProgress(),
    )  # fmt: skip
    assert found["parts"]["clip"] == pytest.approx(alone["parts"]["clip"], abs=1e-10)
    assert abs(found["parts"]["recon"] - alone["parts"]["recon"]) > 1e-4
