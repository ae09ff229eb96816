"""A model laid over the ranks on paper: the parameters of each stage, and the layers that wait in its schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron_nemo.distributed.layout import Layout
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import EMBEDDING, TensorRow, tensor_table


@dataclass(frozen=True)
class Stages:
    """A model laid over the ranks: its shape, the layout and the layers of each of its chunks."""

    arch: ModelArch
    layout: Layout
    layers: Sequence[int]

    @classmethod
    def of(cls, arch: ModelArch, layout: Layout, split: Sequence[int] | None) -> "Stages":
        return cls(arch, layout, layout.stages(arch.num_layers, split))

    def parameters(self, stage: int) -> int:
        """Elements of the parameters that a rank of this stage holds, the vocabulary's padding included.

        The last stage of a pipeline has a copy of a tied embedding.
        """
        first, last = stage == 0, stage == self.layout.pp - 1
        total = sum(self.layer_sizes()) * self.layers_of(stage)
        for row in tensor_table(self.arch):
            if row.key == EMBEDDING:
                total += self._size(row) * (first or (last and self.arch.share_embeddings_and_output_weights))
            elif not row.per_layer:
                total += self._size(row) * last
        return total

    def layers_of(self, stage: int) -> int:
        """How many layers a pipeline stage has."""
        return sum(self.layers[chunk] for chunk in self.layout.chunks_of(stage))

    def layer_sizes(self) -> list[int]:
        """Elements of each parameter of a layer on a rank."""
        return [self._size(row) for row in tensor_table(self.arch) if row.per_layer]

    def head_size(self) -> int:
        """Elements of a rank's part of the output head, the vocabulary's padding included."""
        return self.layout.padded_vocab_size(self.arch) // self.layout.tp * self.arch.hidden_size

    def _size(self, row: TensorRow) -> int:
        shape = row.shape(self.arch)
        if row.is_vocabulary:
            shape = (self.layout.padded_vocab_size(self.arch), *shape[1:])
        return math.prod(shape) // (1 if row.split is None else self.layout.tp)

    def waiting_layers(self, stage: int, num_microbatches: int) -> int:
        """Most layers of this stage that wait for their backward pass, each counted once for each micro-batch.

        The schedule's order: forward passes to fill the pipeline, then one forward and one backward in turn. Of an
        interleaved pipeline `pp` micro-batches go through a chunk, then through the next; backward the other way.
        """
        pp, vpp = self.layout.pp, self.layout.vpp
        chunks = [self.layers[chunk] for chunk in self.layout.chunks_of(stage)]
        group, ahead = (1, pp - stage - 1) if vpp == 1 else (pp, 2 * (pp - stage - 1) + (vpp - 1) * pp)
        groups = min(num_microbatches // group, 2 * (ahead + pp))  # after those nothing changes
        forward = [layers for _ in range(groups) for layers in chunks for _ in range(group)]
        backward = [layers for _ in range(groups) for layers in reversed(chunks) for _ in range(group)]
        held = most = sum(forward[:ahead])
        for begun, ended in zip(forward[ahead:], backward, strict=False):
            most = max(most, held + begun)
            held += begun - ended
        return most
