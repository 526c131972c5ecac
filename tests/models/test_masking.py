"""Which patches the student sees: a split, by the right law, at an address."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from milan.core.rng import mask_noise
from milan.errors import ConfigError
from milan.models import masking
from milan.models.masking import Mask, importance_mask, random_mask, visible_count


def noise(count: int, patches: int, seed: int = 0) -> torch.Tensor:
    """[count, patches] as a loader worker draws it, a row an image."""
    rows = np.arange(count)
    zeros = np.zeros(count, np.int64)
    return torch.from_numpy(mask_noise(seed, zeros, rows, zeros, patches))


def attention(count: int, patches: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(count, patches, generator=generator)).softmax(dim=1)


@pytest.mark.parametrize(("patches", "visible"), [(196, 49), (16, 4), (2, 1), (5, 4), (100, 1)])
def test_a_mask_is_a_split(patches: int, visible: int) -> None:
    """Disjoint, complete, ascending: a patch lost or seen twice would train in silence."""
    weights, draws = attention(32, patches), noise(32, patches)
    for mask in (
        importance_mask(weights, draws, visible=visible),
        random_mask(draws, visible=visible),
    ):
        assert mask.visible.shape == (32, visible)
        assert mask.masked.shape == (32, patches - visible)
        assert mask.visible.dtype == mask.masked.dtype == torch.int64
        both = torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values
        assert torch.equal(both, torch.arange(patches).expand(32, -1))
        for part in (mask.visible, mask.masked):
            assert (part.diff(dim=1) > 0).all()
        hidden = mask.boolean()
        assert hidden.dtype == torch.bool
        assert (hidden.sum(dim=1) == patches - visible).all()
        assert not hidden.gather(1, mask.visible).any()
        assert hidden.gather(1, mask.masked).all()


def inclusion(weights: list[float], visible: int) -> np.ndarray:
    """Probability of each item to be among `visible` drawn without replacement, by enumeration.

    Plackett-Luce: the next item is drawn with its share of the weight that is left.
    """
    found = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), visible):
        left, chance = sum(weights), 1.0
        for item in order:
            chance *= weights[item] / left
            left -= weights[item]
        found[list(order)] += chance
    return found


@pytest.mark.parametrize("visible", [1, 2, 3])
@pytest.mark.parametrize("weights", [[0.4, 0.3, 0.2, 0.07, 0.03], [5.0, 1.0, 1.0, 1.0, 1.0]])
def test_inclusion_follows_attention(weights: list[float], visible: int) -> None:
    """The exact law of drawing without replacement, to 0.005 in 100,000 draws."""
    count = 100_000
    drawn = torch.rand(count, 5, generator=torch.Generator().manual_seed(1)).clamp(1e-7, 1 - 1e-7)
    mask = importance_mask(torch.tensor(weights).expand(count, -1), drawn, visible=visible)
    share = np.bincount(mask.visible.flatten().numpy(), minlength=5) / count
    expected = inclusion(weights, visible)
    assert expected.sum() == pytest.approx(visible)
    assert np.abs(share - expected).max() < 0.005
    uniform = np.bincount(random_mask(drawn, visible=visible).visible.flatten(), minlength=5)
    assert np.abs(uniform / count - visible / 5).max() < 0.005


def test_pairs_follow_the_law_too() -> None:
    """Inclusion alone would not tell a draw without replacement from a systematic one."""
    weights, count = [0.4, 0.3, 0.2, 0.07, 0.03], 100_000
    drawn = torch.rand(count, 5, generator=torch.Generator().manual_seed(2)).clamp(1e-7, 1 - 1e-7)
    visible = importance_mask(torch.tensor(weights).expand(count, -1), drawn, visible=2).visible
    for a, b in itertools.combinations(range(5), 2):
        expected = weights[a] * weights[b] * (1 / (1 - weights[a]) + 1 / (1 - weights[b]))
        share = ((visible[:, 0] == a) & (visible[:, 1] == b)).double().mean().item()
        assert share == pytest.approx(expected, abs=0.005)


def test_addressed_noise_gives_the_law() -> None:
    """The noise that training uses is as good as a generator's: rows, views, epochs, patches."""
    weights = [0.4, 0.3, 0.2, 0.07, 0.03]
    at = np.arange(10_000)
    for address in (
        (at * 0, at, at * 0),
        (at, at * 0, at * 0),
        (at % 50, at // 50, at * 0 + 3),
    ):
        drawn = torch.from_numpy(mask_noise(0, *address, 5))
        mask = importance_mask(torch.tensor(weights).expand(len(at), -1), drawn, visible=2)
        share = np.bincount(mask.visible.flatten().numpy(), minlength=5) / len(at)
        assert np.abs(share - inclusion(weights, 2)).max() < 0.02


def test_high_attention_is_kept() -> None:
    """The direction of the preference: what the teacher looks at stays visible."""
    weights = torch.full((500, 16), 1.0)
    weights[:, [3, 7]] = 1e6
    mask = importance_mask(weights, noise(500, 16), visible=4)
    assert not mask.boolean()[:, [3, 7]].any()


@pytest.mark.parametrize("factor", [2.0, 1e-3, 1e6, 1e-30])
def test_attention_need_not_sum_to_one(factor: float) -> None:
    """The class token's share is missing from it; only ratios matter."""
    weights = attention(64, 196)
    expected = importance_mask(weights.double(), noise(64, 196), visible=49)
    got = importance_mask(weights.double() * factor, noise(64, 196), visible=49)
    assert torch.equal(got.visible, expected.visible)


def test_tiny_attention_works() -> None:
    """Softmax leaves 1e-38 of a patch: still drawn in its turn, no infinity, no tie."""
    weights = torch.full((2000, 8), 1e-38)
    mask = importance_mask(weights, noise(2000, 8), visible=2)
    share = np.bincount(mask.visible.flatten().numpy(), minlength=8) / 2000
    assert np.abs(share - 0.25).max() < 0.05
    for tiny in (1e-38, 1e-44):  # where float32 would divide to infinity, all would tie
        mask = importance_mask(torch.full((2000, 8), tiny), noise(2000, 8), visible=6)
        assert torch.equal(mask.visible, random_mask(noise(2000, 8), visible=6).visible)
    weights[:, 0] = 1.0
    mask = importance_mask(weights, noise(2000, 8), visible=2)
    assert (mask.visible[:, 0] == 0).all()
    share = np.bincount(mask.visible[:, 1].numpy(), minlength=8)[1:] / 2000
    assert np.abs(share - 1 / 7).max() < 0.05


@pytest.mark.parametrize("visible", [1, 3])
def test_the_law_without_doubles(monkeypatch: pytest.MonkeyPatch, visible: int) -> None:
    """Where a device has no float64: the same law, the same masks but for ties, no infinity."""
    weights, count = [0.4, 0.3, 0.2, 0.07, 0.03], 100_000
    drawn = torch.rand(count, 5, generator=torch.Generator().manual_seed(1)).clamp(1e-7, 1 - 1e-7)
    given = torch.tensor(weights).expand(count, -1) * 1e-30
    wide = importance_mask(given, drawn, visible=visible)
    large = attention(500, 196), noise(500, 196)
    wide_large = importance_mask(*large, visible=49)
    monkeypatch.setattr(masking, "has_float64", lambda device: False)
    narrow = importance_mask(given, drawn, visible=visible)
    share = np.bincount(narrow.visible.flatten().numpy(), minlength=5) / count
    assert np.abs(share - inclusion(weights, visible)).max() < 0.005
    assert (narrow.visible != wide.visible).any(dim=1).float().mean() < 1e-4
    narrow_large = importance_mask(*large, visible=49)
    assert (narrow_large.visible != wide_large.visible).any(dim=1).float().mean() <= 0.004


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_will_do(dtype: torch.dtype) -> None:
    """Stored attention is float32, but one's own loop may hold halves."""
    weights = attention(8, 16).to(dtype)
    mask = importance_mask(weights, noise(8, 16), visible=4)
    assert torch.equal(
        mask.visible, importance_mask(weights.double(), noise(8, 16), visible=4).visible
    )


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [
        (196, 0.75, 49), (196, 0.9, 19), (100, 0.9, 9), (256, 0.7, 76), (16, 0.75, 4),
        (2, 0.5, 1), (49, 0.75, 12), (16, 1e-9, 15),
    ],
)  # fmt: skip
def test_visible_count_is_truncated(patches: int, ratio: float, visible: int) -> None:
    """int(N (1 - ratio)) in floating point, as published: (100, .9) gives 9, not 10."""
    assert visible_count(patches, ratio) == visible


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 0.99])
def test_masks_of_all_or_nothing_are_refused(ratio: float) -> None:
    """Nothing to see, or nothing to predict."""
    with pytest.raises(ConfigError, match="of 16 patches"):
        visible_count(16, ratio)


def test_noise_is_addressed() -> None:
    """A function of (seed, epoch, row, view): batches, order and what came before do not matter."""
    generator = np.random.default_rng(0)
    epochs, rows, views = generator.integers(0, 3_000_000, (3, 40))
    epochs, views = epochs % 400, views % 8
    together = mask_noise(5, epochs, rows, views, 196)
    assert together.shape == (40, 196)
    assert together.dtype == np.float32
    for i in generator.permutation(40).tolist():
        alone = mask_noise(5, epochs[i : i + 1], rows[i : i + 1], views[i : i + 1], 196)
        assert np.array_equal(alone[0], together[i])
    shuffle = generator.permutation(40)
    assert np.array_equal(
        mask_noise(5, epochs[shuffle], rows[shuffle], views[shuffle], 196), together[shuffle]
    )
    frozen = mask_noise(5, np.array([3]), np.array([70]), np.array([2]), 4)[0]
    assert frozen.tolist() == pytest.approx([0.2750734, 0.7641765, 0.2469950, 0.8544354], abs=1e-7)


def test_every_part_of_the_address_counts() -> None:
    """Two epochs with one mask would halve what masking is for."""
    drawn = {
        mask_noise(seed, np.array([epoch]), np.array([row]), np.array([view]), 16).tobytes()
        for seed, epoch, row, view in itertools.product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2))
    }
    assert len(drawn) == 2 * 27


def test_noise_is_inside_and_uniform() -> None:
    """0 and 1 have no use as logarithms; neighbours at an address are not alike."""
    drawn = noise(5000, 16)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert abs(drawn.mean().item() - 0.5) < 0.005
    assert abs(drawn.var().item() - 1 / 12) < 0.002
    correlation = np.corrcoef(drawn.T.numpy()) - np.eye(16)
    assert np.abs(correlation).max() < 0.06
    between_rows = np.corrcoef(drawn[:-1, 0].numpy(), drawn[1:, 0].numpy())[0, 1]
    assert abs(between_rows) < 0.06


def test_extreme_noise_is_drawn_first_or_last() -> None:
    """The ends of the interval give finite times of arrival."""
    eps = float(np.finfo(np.float32).eps)
    drawn = torch.tensor([[eps, 0.5, 1 - eps, 0.4]])
    mask = importance_mask(torch.ones(1, 4), drawn, visible=1)
    assert mask.visible.tolist() == [[2]]
    assert mask.masked.tolist() == [[0, 1, 3]]


def test_mask_is_two_index_sets() -> None:
    """The names that the rest of the program uses."""
    mask = Mask(torch.tensor([[0, 2]]), torch.tensor([[1, 3]]))
    assert mask.boolean().tolist() == [[False, True, False, True]]
