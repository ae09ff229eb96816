"""A model run with blocks of its layers left out, each from where it parts from the whole model, in any layout.

A block is a `range` of layers counted from 0. One pass of the whole model keeps the hidden states between the layers
of each pipeline stage; every block is then one more micro-batch of the same call of the schedule, which goes on from
the state that enters the block. Stages before that one have nothing to compute: they send their cached output again,
because the schedule wants something, and the block's own stage does not look at it.
So a block that starts at layer a costs the layers after it and not those before: of L layers, all L - n + 1 blocks of
length n together cost (L - n)(L - n + 1) / 2 evaluations of a layer, half of what as many whole passes of the cut
model would (`importance.blocks.layer_evaluations`). Kept of a micro-batch are the L + 1 states, divided over stages.

Shapes: S sequence (a slice of it under sequence parallelism), B batch, H hidden_size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from minitron_nemo.engine.model import ModelChunks
from minitron_nemo.engine.schedule import Batch, forward_variants


class RemovalRuns:
    """Runs a model whole and without blocks; the model is as it was after each pass, however that ends.

    `states` are those between the layers of this stage, [S, B, H] each, of the last micro-batch; `first` is the number
    of its first layer from 0; `evaluations` counts the layers that this stage has evaluated.
    """

    def __init__(self, model: ModelChunks) -> None:
        (self.gpt,) = model.gpts()  # an interleaved pipeline has several: not supported
        self.model = model.eval()  # in training mode recomputed layers are found by their place in the list
        self.states: list[Tensor] = []
        self.evaluations = 0
        self._decoder = self.gpt.decoder
        self._layers = self._decoder.layers
        self.first = int(self._layers[0].layer_number) - 1

    def run(self, batch: Batch, blocks: Sequence[range], *, consume: Callable[[Tensor, int], Any]) -> list[Any]:
        """What `consume(hidden, number)` makes of the final hidden states of the whole model (number 0) and of the
        model without each block (1, 2, ...), [s, b, h] each; on the last stage, an empty list elsewhere.
        """
        variants = (self._without(block) for block in (None, *blocks))
        return forward_variants(self.model, batch, variants, count=1 + len(blocks), consume=consume)

    @contextmanager
    def _without(self, block: range | None) -> Iterator[None]:
        modules = self._whole() if block is None else self._after(block)
        self._decoder.layers = nn.ModuleList(modules)
        try:
            yield
        finally:
            self._decoder.layers = self._layers

    def _whole(self) -> Sequence[nn.Module]:
        self.states = []
        layers = [_Evaluated(self, layer, keeps=True) for layer in self._layers]
        return [*layers, _Evaluated(self, None, keeps=True)]

    def _after(self, block: range) -> Sequence[nn.Module]:
        """What this stage has to run: nothing before the block, its own layers after it."""
        start, stop = block.start - self.first, block.stop - self.first
        layers = [_Evaluated(self, layer) for layer in self._layers[max(stop, 0) :]]
        if start < 0:  # the state that comes from the stage before has parted from the whole model's already
            return layers
        return [_Resumed(self.states[min(start, len(self._layers))]), *layers]


class _Evaluated(nn.Module):
    """A layer that is counted when it runs; `keeps` its input among the states. None is no layer: the end."""

    def __init__(self, runs: RemovalRuns, layer: nn.Module | None, *, keeps: bool = False) -> None:
        super().__init__()
        self._runs, self._layer, self._keeps = runs, layer, keeps

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        if self._keeps:
            self._runs.states.append(hidden_states)
        if self._layer is None:
            return hidden_states, None
        self._runs.evaluations += 1
        return self._layer(hidden_states=hidden_states, **options)


class _Resumed(nn.Module):
    """Stands for all layers up to a state that is known, whatever comes in."""

    def __init__(self, state_SBH: Tensor) -> None:
        super().__init__()
        self._state_SBH = state_SBH

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        return self._state_SBH, None
