"""What removed channels of the residual stream leave behind: the statistics of a norm before and after the cut.

With n the residual stream of a token as the norm makes it before weight and bias (mean square 1 over all channels; for
LayerNorm also mean 0), the norm of the pruned model makes, of the channels that stay,

    RMSNorm     n'_i = n_i / sqrt( mean over kept of n^2 )
    LayerNorm   n'_i = ( n_i - mean over kept of n ) / sqrt( variance over kept of n )

Shapes: H channels of the source, K of them kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.importance.second_moments import SecondMomentFile
from minitron_nemo.importance.sites import FINAL_NORM as FINAL_SITE
from minitron_nemo.importance.sites import NORM_BEFORE_ATTENTION, NORM_BEFORE_MLP
from minitron_nemo.shape.tensors import FINAL_NORM, LAYER, OUTPUT


@dataclass(frozen=True)
class NormRows:
    """A norm: the prefix of its tensors, the matrix that reads it, and the site where its input was heard."""

    prefix: str  # with a place for the layer
    reader: str
    site: str

    def prefix_of(self, layer: int | None) -> str:
        return self.prefix.format(layer)

    def reader_of(self, layer: int | None) -> str:
        return self.reader.format(layer)


NORMS = (
    NormRows(
        f"{LAYER}.{{}}.self_attention.linear_qkv.layer_norm_",
        f"{LAYER}.{{}}.self_attention.linear_qkv.weight",
        NORM_BEFORE_ATTENTION.name,
    ),
    NormRows(f"{LAYER}.{{}}.mlp.linear_fc1.layer_norm_", f"{LAYER}.{{}}.mlp.linear_fc1.weight", NORM_BEFORE_MLP.name),
    NormRows(f"{FINAL_NORM}.", OUTPUT, FINAL_SITE.name),
)


@dataclass(frozen=True, eq=False)
class NormMoments:
    """Means over tokens of n_i n_j, `products` [H, H], and of n_i, `means` [H], float64."""

    products: Tensor
    means: Tensor
    is_layer_norm: bool

    @classmethod
    def read(
        cls, moments: SecondMomentFile, norm: NormRows, layer: int | None, *, is_layer_norm: bool
    ) -> "NormMoments":
        """Of a layer of the source."""
        gram_HH, sum_H = moments.sums(norm.site, layer)
        return cls(gram_HH / moments.tokens, sum_H / moments.tokens, is_layer_norm)

    def scale(self, kept_K: Tensor) -> float:
        """sqrt( kept energy / energy of all ), each the mean over channels and tokens; of LayerNorm the variances.

        The pruned norm makes its output larger by the inverse of it, so that it is what its weight is to be multiplied
        by.
        """
        kept_KK = self.products[kept_K][:, kept_K]
        energy = kept_KK.diagonal().mean()
        if self.is_layer_norm:
            energy = energy - kept_KK.mean()
        return float(energy.clamp_min(0).sqrt())

    def mean_after(self, kept_K: Tensor) -> Tensor:
        """Means of n' [K], to the first order: the spread of the kept energy over the tokens is left out."""
        mean_K = self.means[kept_K]
        if self.is_layer_norm:
            mean_K = mean_K - mean_K.mean()
        return mean_K / self.scale(kept_K)

    def gram_of_output(self, weight_H: Tensor, bias_H: Tensor) -> Tensor:
        """Means over tokens of z_i z_j, with z = weight x n + bias what the norm gives the matrix behind it, [H, H]."""
        cross_HH = torch.outer(weight_H * self.means, bias_H)
        return torch.outer(weight_H, weight_H) * self.products + cross_HH + cross_HH.T + torch.outer(bias_H, bias_H)


def affine(source: TensorSource, prefix: str) -> tuple[Tensor, Tensor]:
    """What a norm multiplies by and what it adds, [H] each, float64; LayerNorm1p stores its weight minus one."""
    weight_H = source.read(f"{prefix}weight").double()
    if not source.arch.has_norm_bias:
        return weight_H, torch.zeros_like(weight_H)
    return weight_H + 1, source.read(f"{prefix}bias").double()
