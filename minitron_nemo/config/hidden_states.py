"""The settings of `distill.hidden_states`."""

from dataclasses import dataclass
from enum import Enum

from minitron_nemo.config.setting import count, setting
from minitron_nemo.config.shapes import MAX_LAYERS


class HiddenStateKind(Enum):
    """The kinds of `shape/taps.py`."""

    embeddings = "embeddings"
    attention_outputs = "attention_outputs"
    mlp_outputs = "mlp_outputs"
    layer_outputs = "layer_outputs"


class HiddenStateDivergence(Enum):
    cosine = "cosine"
    mse = "mse"


@dataclass
class HiddenStatesConfig:
    """A loss between states inside of both models, added to that of the logits (paper 1); none while `kinds` is empty.

    Where the student is narrower, one linear map to the teacher's width is trained beside it.
    """

    kinds: list[HiddenStateKind] = setting(
        [],
        "which states are compared: what the embedding gives, what attention and MLP add to the residual stream, the "
        "stream behind a layer; empty: none",
        later=True,
    )
    divergence: HiddenStateDivergence = setting(
        HiddenStateDivergence.cosine, "of the states behind the norm; paper 1 found cosine best", later=True
    )
    weight: float | None = setting(
        None,
        "of the loss on hidden states; null: paper 1's, which makes it as large as the divergence of the logits was in "
        "the step before",
        above=0,
        at_most=10**6,
        later=True,
    )
    student_layers: list[int] = count(
        [], "which layers of the student are compared, counted from 1; empty: all", at_most=MAX_LAYERS, later=True
    )
    teacher_layers: list[int] = count(
        [],
        "beside each of `student_layers` the teacher's, counted from 1; empty: the one that it was by the student's "
        "`plan.json`, or that of its number where both models are equally deep",
        at_most=MAX_LAYERS,
        later=True,
    )

    @property
    def any(self) -> bool:
        return bool(self.kinds)
