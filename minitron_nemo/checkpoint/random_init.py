"""Random weights that do not depend on how a model is split: each tensor is seeded by its own name."""

import hashlib
import math

import torch
from torch import Tensor

from minitron_nemo.arch import ModelArch
from minitron_nemo.parameters import Parameter

INIT_STD = 0.02
# Matrices that write into the residual stream: 2 * num_layers of them add up (Megatron's scaled init, GPT-2).
RESIDUAL_WRITERS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def random_tensor(
    parameter: Parameter, layer: int | None, *, arch: ModelArch, seed: int, init_std: float = INIT_STD
) -> Tensor:
    """The initial value of one logical tensor, float32, decided by (seed, key, layer) and its shape alone.

    Matrices are N(0, init_std), those that write into the residual stream divided by sqrt(2 * num_layers). Norm
    weights are one (LayerNorm1p stores them minus one: zero), biases zero.
    """
    shape = parameter.shape(arch)
    if len(shape) == 1:
        is_one = parameter.key.endswith("weight") and arch.normalization != "LayerNorm1p"
        return torch.ones(shape) if is_one else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{parameter.key}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = init_std / math.sqrt(2 * arch.num_layers) if parameter.key.endswith(RESIDUAL_WRITERS) else init_std
    return torch.empty(shape).normal_(0.0, std, generator=generator)
