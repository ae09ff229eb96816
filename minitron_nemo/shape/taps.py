"""Places inside of a model where its hidden states are compared with a teacher's, and which place goes with which.

Layers count from 0. The kinds are those that paper 1 (2407.14679) compares states of: what the embedding gives, what
attention and MLP add to the residual stream, and the stream behind a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EMBEDDINGS = "embeddings"
KINDS = (EMBEDDINGS, "attention_outputs", "mlp_outputs", "layer_outputs")


@dataclass(frozen=True, order=True)
class Tap:
    """A place in a model: what a layer of this number gives at that kind; embeddings are given before layer 0."""

    kind: str
    layer: int = 0


@dataclass(frozen=True, order=True)
class Pair:
    """Two places of one kind whose states are compared."""

    student: Tap
    teacher: Tap

    def __str__(self) -> str:
        """`30:14`, the teacher's layer first, counted from 1."""
        return f"{self.teacher.layer + 1}:{self.student.layer + 1}"


def pairs_of(kinds: Sequence[str], layers: Mapping[int, int]) -> tuple[Pair, ...]:
    """The pairs of all kinds: embeddings once, every other kind at each student layer: teacher layer."""
    return tuple(
        Pair(Tap(kind, student), Tap(kind, teacher))
        for kind in kinds
        for student, teacher in ([(0, 0)] if kind == EMBEDDINGS else sorted(layers.items()))
    )
