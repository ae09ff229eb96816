"""Random weights that do not depend on how a model is split: each tensor is seeded by its own name."""

import hashlib
import math

import torch
from torch import Tensor

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import LogicalTensor

INIT_STD = 0.02
# Matrices that write into the residual stream: 2 * num_layers of them add up (Megatron's scaled init, GPT-2).
RESIDUAL_WRITERS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


class RandomWeights(ShapedSource):
    """The start of a model made from scratch, float32, decided by the seed, the names and the shapes alone."""

    def __init__(self, arch: ModelArch, *, seed: int, init_std: float = INIT_STD) -> None:
        super().__init__(arch)
        self.seed, self.init_std = seed, init_std

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor = random_tensor(self.tensors[name], arch=self.arch, seed=self.seed, init_std=self.init_std)
        return tensor if box is None else tensor[box.slices()]


def random_tensor(logical: LogicalTensor, *, arch: ModelArch, seed: int, init_std: float = INIT_STD) -> Tensor:
    """The initial value of one logical tensor, float32, decided by (seed, key, layer) and its shape alone.

    Matrices are N(0, init_std), those that write into the residual stream divided by sqrt(2 * num_layers). Norm
    weights are one (LayerNorm1p stores them minus one: zero), biases zero.
    """
    shape, key = logical.shape(arch), logical.row.key
    if len(shape) == 1:
        is_one = key.endswith("weight") and arch.normalization != "LayerNorm1p"
        return torch.ones(shape) if is_one else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{key}/{logical.layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = init_std / math.sqrt(2 * arch.num_layers) if key.endswith(RESIDUAL_WRITERS) else init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)
