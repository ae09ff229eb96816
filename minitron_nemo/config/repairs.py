"""The settings of `prune.repairs`."""

from dataclasses import dataclass
from enum import Enum

from minitron_nemo.config.setting import setting


class HeadResidual(Enum):
    """What a removed head leaves in the queries of the kept one that it is paired with (paper 1)."""

    none = "none"
    plus = "plus"
    minus = "minus"


@dataclass
class RepairsConfig:
    """Changes of the weights that stay, made while the model is cut; docs/results/repairs.md says which help.

    All but `head_residual` need `estimate_importance.second_moments`.
    """

    head_residual: HeadResidual = setting(
        HeadResidual.none,
        "`plus`: a kept head's queries become kept + (kept - removed), as paper 1 prints; `minus`: kept - (kept - "
        "removed); needs half of the heads of a group to stay",
        later=True,
    )
    norm_scale: bool = setting(
        False, "multiply the weights of norms by the root of the kept share of the mean square", later=True
    )
    projections: bool = setting(
        False, "least squares of `linear_proj` and `linear_fc2` over the heads and neurons that stay", later=True
    )
    residual_stream: bool = setting(
        False,
        "least squares of `linear_qkv`, `linear_fc1` and an untied output head over the channels that stay",
        later=True,
    )
    norm_bias: bool = setting(
        False,
        "let the biases of norms take what removed channels gave in the mean; LayerNorm1p alone has any",
        later=True,
    )
    ridge: float = setting(
        1e-3,
        "of the least squares, towards the weights as they were cut; in units of the mean square of the inputs",
        above=0,
        at_most=10**3,
        later=True,
    )

    @property
    def need_second_moments(self) -> bool:
        return self.norm_scale or self.projections or self.residual_stream or self.norm_bias

    @property
    def any(self) -> bool:
        return self.need_second_moments or self.head_residual is not HeadResidual.none
