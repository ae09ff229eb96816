"""Least squares: what the inputs that stay can say for those that go.

Shapes: T tokens, O outputs, U inputs of the source, K of them kept, R removed.
"""

import torch
from torch import Tensor


def refit(weight_OU: Tensor, kept_K: Tensor, gram_UU: Tensor, *, ridge: float) -> Tensor:
    """The weight [O, K] of the kept inputs whose outputs are nearest to those of all inputs, float64.

    With inputs X [T, U] and `gram_UU` = X^T X it is W_K + D, where D minimizes

        || X_R W_R^T - X_K D^T ||^2 + lambda || D ||^2,        lambda = ridge x mean of the diagonal of X_K^T X_K

    so that the ridge pulls to the weights as they were cut: D = 0 is allowed, and on these inputs the outputs are never
    further off than without the repair. Nothing removed means nothing changed.
    """
    weight_OU, gram_UU = weight_OU.double(), gram_UU.double()
    removed_R = complement(kept_K, weight_OU.shape[1])
    gram_KK = gram_UU[kept_K][:, kept_K]
    wanted_OK = weight_OU[:, removed_R] @ gram_UU[removed_R][:, kept_K]
    return weight_OU[:, kept_K] + ridge_solve(gram_KK, wanted_OK.T, ridge=ridge).T


def ridge_solve(gram_KK: Tensor, wanted: Tensor, *, ridge: float) -> Tensor:
    """(G + ridge x mean of G's diagonal x I)^-1 wanted, for a G that is positive semidefinite; float64.

    Inputs that are always zero make no difference: they get zero where G is zero altogether.
    """
    scale = gram_KK.diagonal().mean()
    if scale <= 0:
        return torch.zeros_like(wanted)
    damped_KK = gram_KK + ridge * scale * torch.eye(len(gram_KK), dtype=gram_KK.dtype)
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(damped_KK))


def complement(kept_K: Tensor, units: int) -> Tensor:
    """The units that are not kept, ascending."""
    is_kept = torch.zeros(units, dtype=torch.bool)
    is_kept[kept_K] = True
    return torch.nonzero(~is_kept).flatten()
