"""Initial weights depend on the seed, the name and the layer, and have the published spread."""

import dataclasses
import math

import pytest
import torch

from minitron_nemo.checkpoint.random_init import random_tensor
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import LogicalTensor, logical_tensors, tensor_table

ARCH = ModelArch(2, 64, 96, 4, 2, 24, 131, 64)
NEMOTRON = dataclasses.replace(ARCH, family="nemotron", activation="squared_relu", normalization="LayerNorm1p")


def test_the_same_seed_gives_the_same_weights_in_any_order_and_whatever_the_global_seed():
    tensors = list(logical_tensors(ARCH).values())
    first = [random_tensor(logical, arch=ARCH, seed=3) for logical in tensors]
    torch.manual_seed(99)
    again = [random_tensor(logical, arch=ARCH, seed=3) for logical in reversed(tensors)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_two_matrices_share_their_numbers():
    starts = {
        tuple(random_tensor(logical, arch=ARCH, seed=seed).flatten()[:4].tolist())
        for logical in logical_tensors(ARCH).values()
        for seed in (1, 2)
        if len(logical.row.dims) == 2
    }
    assert len(starts) == 2 * (2 + 4 * ARCH.num_layers)


def test_matrices_have_std_0_02_and_those_into_the_residual_stream_less():
    for name, logical in logical_tensors(ARCH).items():
        if len(logical.row.dims) == 2:
            into_residual = "linear_proj" in name or "linear_fc2" in name
            expected = 0.02 / math.sqrt(2 * ARCH.num_layers) if into_residual else 0.02
            tensor = random_tensor(logical, arch=ARCH, seed=1)
            assert tensor.std().item() == pytest.approx(expected, rel=0.05)
            assert abs(tensor.mean().item()) < 0.03 * expected * 3


@pytest.mark.parametrize(("arch", "weight"), [(ARCH, 1.0), (NEMOTRON, 0.0)], ids=["RMSNorm", "LayerNorm1p"])
def test_a_fresh_norm_is_the_identity_as_stored(arch, weight):
    norms = [row for row in tensor_table(arch) if len(row.dims) == 1]
    for row in norms:
        logical = LogicalTensor(row, 0 if row.per_layer else None)
        expected = weight if row.key.endswith("weight") else 0.0
        assert torch.equal(random_tensor(logical, arch=arch, seed=1), torch.full((64,), expected))
    assert len(norms) == (6 if arch is NEMOTRON else 3)
