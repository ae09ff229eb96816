"""Which pipeline stage sends which of the teacher's hidden states to which: arithmetic of the pairs and both splits.

A stage compares the states of its own part of the student. Where the teacher's side of a pair lies on another stage,
that one sends it, once for each stage that asks for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minitron_nemo.shape.taps import EMBEDDINGS, Pair, Tap


@dataclass(frozen=True, order=True)
class Route:
    """The way of the teacher's states at a tap, from the stage that has them to one that compares with them."""

    source: int
    target: int
    tap: Tap


def stage_of(tap: Tap, chunks: Sequence[int], *, stages: int) -> int:
    """The pipeline stage of a tap in a model whose chunks have so many layers, in the order of the forward pass.

    Raises IndexError for a layer that the model does not have.
    """
    if tap.kind == EMBEDDINGS:
        return 0
    owners = [number % stages for number, layers in enumerate(chunks) for _ in range(layers)]
    return owners[tap.layer]


def routes(pairs: Iterable[Pair], *, student: Sequence[int], teacher: Sequence[int], stages: int) -> tuple[Route, ...]:
    """Every way that the teacher's states of these pairs take, each once, in one order on all ranks.

    `student` and `teacher` are the layers of each chunk, as `Layout.stages` gives them. One whose source is its target
    stays where it is.
    """

    def route(pair: Pair) -> Route:
        source, target = (
            stage_of(tap, chunks, stages=stages) for tap, chunks in ((pair.teacher, teacher), (pair.student, student))
        )
        return Route(source, target, pair.teacher)

    return tuple(sorted({route(pair) for pair in pairs}))
