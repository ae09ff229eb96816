"""Estimators against the formulas of the paper, written out as loops."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_nemo.importance.estimators import (
    AGGREGATIONS,
    BLOCK_ROWS,
    aggregate,
    block_importance,
    cosine_sum,
    head_norms,
    moments,
)

PAIRS = list(itertools.product(AGGREGATIONS, AGGREGATIONS))
SHAPES = [(0, 7, 5, 3), (1, 1, 1, 4), (2, 16, 2, 1), (3, 5, 9, 6)]  # seed, S, B, U


def by_loop(values: list[float], how: str) -> float:
    """One aggregation, straight from the paper."""
    n = len(values)
    if how == "mean":
        return sum(abs(s) for s in values) / n
    if how == "l2":
        return math.sqrt(sum(s * s for s in values))
    average = sum(values) / n
    return sum((s - average) ** 2 for s in values) / n


def activations(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 0.5


def score(x_SBU: torch.Tensor, *, sequence: str, batch: str) -> torch.Tensor:
    return aggregate(moments(aggregate(moments(x_SBU), sequence)), batch)


@pytest.mark.parametrize(("batch", "sequence"), PAIRS)
@pytest.mark.parametrize(("seed", "S", "B", "U"), SHAPES)
def test_a_score_is_the_batch_aggregation_of_sequence_aggregations(seed, S, B, U, batch, sequence):
    x_SBU = activations(seed, S, B, U)
    expected = [by_loop([by_loop(x_SBU[:, b, u].tolist(), sequence) for b in range(B)], batch) for u in range(U)]
    assert score(x_SBU, sequence=sequence, batch=batch).tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(5))
def test_moments_of_slices_add_up_to_the_moments_of_the_whole(seed, how):
    x = activations(seed, 13, 3, 4)
    cuts = sorted(torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:3].add(1).tolist())
    pieces = torch.tensor_split(x, cuts)
    added = sum(moments(piece) for piece in pieces)
    torch.testing.assert_close(added, moments(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(aggregate(added, how), aggregate(moments(x), how), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["l2", "variance"])
def test_aggregating_slices_before_adding_them_is_wrong(how):
    x = activations(0, 12, 3, 4)
    apart = sum(aggregate(moments(piece), how) for piece in x.chunk(2))
    assert not torch.allclose(apart, aggregate(moments(x), how), rtol=1e-2)


def test_squaring_slices_before_adding_them_differs_from_squaring_the_mean_of_the_sequence():
    x = activations(0, 64, 5, 6)
    right = score(x, sequence="mean", batch="l2")
    slices = [aggregate(moments(piece), "mean") / 2 for piece in x.chunk(2)]
    squared_first = sum(piece.square() for piece in slices).sum(dim=0).sqrt()
    assert not torch.allclose(squared_first, right, rtol=1e-2)
    torch.testing.assert_close(aggregate(moments(sum(slices)), "l2"), right)


def test_the_mean_takes_absolute_values_and_the_variance_does_not():
    x = torch.tensor([-1.0, 1.0])
    assert aggregate(moments(x), "mean").item() == 1
    assert aggregate(moments(x), "variance").item() == pytest.approx(1)
    assert aggregate(moments(torch.ones(4)), "variance").item() == pytest.approx(0, abs=1e-12)


def test_moments_of_bfloat16_do_not_overflow_or_stall():
    x = torch.ones(5000, 1, 1, dtype=torch.bfloat16)
    assert moments(x).flatten().tolist() == [5000.0] * 4
    large = torch.full((4, 1, 1), 3e38, dtype=torch.bfloat16)
    assert torch.isfinite(moments(large)).all()


ROUNDING = 2.0**-24  # of a float32


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mean", "spread", "width"), [(0.0, 1.0, 37), (300.0, 0.5, 5), (-3.0, 1e-2, 1500), (0, 1e-6, 3)]
)
def test_a_long_sequence_loses_no_more_than_the_roundings_of_one_block(mean, spread, width, dtype, how):
    """Against float64, where the sum over one float32 run of the sequence would be off by far more."""
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(700, 1, width, generator=generator, dtype=torch.float64) * spread + mean).to(dtype)
    exact = aggregate(moments(x.double()), how)
    for ours in (aggregate(moments(x), how), aggregate(moments(x, of=how), how)):
        error = ((ours - exact).abs() / exact.clamp_min(1e-300)).max().item()
        assert error <= BLOCK_ROWS * ROUNDING, error


def test_blocks_end_where_the_sequence_does():
    for rows in (0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 3 * BLOCK_ROWS + 5):
        x = torch.arange(rows, dtype=torch.float32)[:, None] + 1
        expected = [rows, rows * (rows + 1) / 2, rows * (rows + 1) / 2, rows * (rows + 1) * (2 * rows + 1) / 6]
        assert moments(x).flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("of", "lost"), [("mean", {"l2", "variance"}), ("l2", {"mean", "variance"}), ("variance", {"mean"})]
)
def test_sums_that_an_aggregation_does_not_read_are_nan_and_the_others_all_there(of, lost):
    x = activations(0, 300, 2, 3)
    part = moments(x, of=of)
    for how in AGGREGATIONS:
        expected = torch.full((2, 3), torch.nan, dtype=torch.float64) if how in lost else aggregate(moments(x), how)
        torch.testing.assert_close(aggregate(part, how), expected, equal_nan=True)


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that is made while it is entered."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.largest = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, made.nbytes)
        return result


def test_summing_makes_nothing_of_the_size_of_the_activations():
    x_SBU = torch.ones(4096, 2, 64)
    y_SBU = x_SBU + 1
    with Allocations(x_SBU, y_SBU) as made:
        for how in (None, *AGGREGATIONS):
            moments(x_SBU, of=how)
        cosine_sum(x_SBU, y_SBU)
    assert 0 < made.largest <= x_SBU.nbytes / 8, made.largest


def test_an_unknown_aggregation_is_refused_by_name():
    with pytest.raises(ValueError, match="median.*mean, l2, variance"):
        aggregate(moments(torch.ones(2)), "median")


@pytest.mark.parametrize(("seed", "heads", "kv_channels"), [(0, 4, 3), (1, 1, 8), (2, 6, 1)])
def test_a_head_is_the_length_of_its_channels_at_each_token(seed, heads, kv_channels):
    x_SBC = activations(seed, 5, 2, heads * kv_channels)
    norms = head_norms(x_SBC, kv_channels)
    assert norms.shape == (5, 2, heads)
    for s, b, n in itertools.product(range(5), range(2), range(heads)):
        channels = x_SBC[s, b, n * kv_channels : (n + 1) * kv_channels].tolist()
        assert norms[s, b, n].item() == pytest.approx(math.sqrt(sum(c * c for c in channels)))


@pytest.mark.parametrize("seed", range(3))
def test_block_importance_is_one_minus_the_mean_cosine_over_tokens(seed):
    before, after = activations(seed, 6, 3, 5), activations(seed + 100, 6, 3, 5)
    cosines = []
    for s, b in itertools.product(range(6), range(3)):
        x, y = before[s, b].tolist(), after[s, b].tolist()
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        cosines.append(dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y)))
    assert block_importance(cosine_sum(before, after)).item() == pytest.approx(1 - sum(cosines) / len(cosines))


def test_block_importance_weighs_tokens_not_slices():
    before, after = activations(0, 7, 1, 5), activations(1, 7, 1, 5)
    added = cosine_sum(before[:2], after[:2]) + cosine_sum(before[2:], after[2:])
    torch.testing.assert_close(block_importance(added), block_importance(cosine_sum(before, after)))


def test_a_layer_that_changes_nothing_has_no_importance():
    x = activations(0, 4, 2, 8)
    assert block_importance(cosine_sum(x, x)).item() == pytest.approx(0, abs=1e-12)
    assert block_importance(cosine_sum(x, -x)).item() == pytest.approx(2)
