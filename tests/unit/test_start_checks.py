"""A teacher that cannot teach is refused: weights alone here, its guesses with the recipes."""

from types import SimpleNamespace

import pytest
import torch

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.errors import UserError
from minitron_nemo.training.start_checks import _check_weights


def teacher(*weights: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(weights=lambda: iter(weights), groups=Groups())


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([torch.zeros(3, 2), torch.zeros(2)], "the teacher: its weights, or those of a rank's part, are all zero"),
        ([torch.ones(3), torch.tensor([1.0, torch.nan])], "are not finite"),
        ([torch.tensor([torch.inf, 1.0])], "are not finite"),
    ],
)
def test_weights_that_are_not_finite_or_all_zero_are_refused(weights, said):
    with pytest.raises(UserError, match=said):
        _check_weights(teacher(*weights), "the teacher")


def test_large_weights_and_rows_of_zeros_pass():
    """The square of a bf16 weight may be more than float32 holds; rows that pad a vocabulary are zero."""
    _check_weights(teacher(torch.tensor([3e38, 1.0]).bfloat16(), torch.zeros(4, 2)), "the teacher")
