"""A model in memory as a source of tensors, for tests that change weights."""

import torch
from torch import Tensor

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import ShapedSource, stream


class InMemory(ShapedSource):
    """Random weights that make logits differ: norms too, biases not zero."""

    def __init__(self, arch, dtype=torch.float32):
        super().__init__(arch)
        generator = torch.Generator().manual_seed(1)
        self.model = {}
        for name, drawn in stream(RandomWeights(arch, seed=0)):
            noise = torch.randn(drawn.shape, generator=generator)
            self.model[name] = (3 * drawn if drawn.dim() > 1 else drawn + 0.3 * noise).to(dtype)

    def dtype(self, name: str) -> torch.dtype:
        return self.model[name].dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self.model[name] if box is None else self.model[name][box.slices()]
