"""Sums by kind of token, for the log: where in its sample a token stands, and which source of data it is from.

N tokens, S places of a sample, B samples; K ways to sort tokens, C bins of all ways together, Q quantities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.losses.output import of_bin

POSITION_BINS = 8  # equal parts of a sample, fewer where it has fewer tokens


@dataclass(frozen=True)
class Tallies:
    """How tokens are sorted: by place into equal parts of a sample of `seq_length` tokens, and by source.

    `sources` are the names that `sources` of a micro-batch counts; one alone has no bin, as all tokens are its own.
    """

    seq_length: int
    sources: tuple[str, ...] = ()

    @property
    def _starts(self) -> list[int]:
        """The first place of each part, and the end of the last."""
        return sorted({round(part * self.seq_length / POSITION_BINS) for part in range(POSITION_BINS + 1)})

    @property
    def bins(self) -> tuple[str, ...]:
        """The names: `position_0-1023` has the first 1024 tokens of every sample, `source_code` those of `code`."""
        starts = self._starts
        places = [f"position_{start}-{end - 1}" for start, end in zip(starts, starts[1:], strict=False)]
        return (*places, *(f"source_{name}" for name in self.sources if len(self.sources) > 1))

    def sort(self, positions_S: Tensor, sources_BS: Tensor) -> Tensor:
        """[K, N], the number of the bin of each token, in the order [s, b] of hidden states.

        `positions_S` are places in the whole sample, of which a context-parallel rank has some.
        """
        starts, (samples, places) = self._starts, sources_BS.shape
        inner = torch.tensor(starts[1:-1], device=positions_S.device)
        position_N = torch.bucketize(positions_S, inner, right=True)[:, None].expand(places, samples).reshape(-1)
        if len(self.sources) <= 1:
            return position_N[None]
        return torch.stack([position_N, sources_BS.T.reshape(-1) + len(starts) - 1])

    def sum_names(self, quantities: Sequence[str]) -> list[str]:
        """The names of `tally`'s sums, flat."""
        return [of_bin(quantity, name) for quantity in quantities for name in self.bins]

    def tally(self, values_QN: Tensor, bins_KN: Tensor) -> Tensor:
        """[Q, C], the sums over the tokens of each bin."""
        number_C = torch.arange(len(self.bins), device=bins_KN.device)
        inside_CN = (bins_KN[:, None, :] == number_C[None, :, None]).any(dim=0)
        # No product with zeros and ones: what is not finite stays in its own bin.
        return torch.where(inside_CN, values_QN[:, None, :], torch.zeros_like(values_QN[:, None, :])).sum(dim=2)
