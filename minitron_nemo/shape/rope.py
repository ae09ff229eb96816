"""Rotary frequencies of a shape, the same for every family and on every engine."""

import math

import torch
from torch import Tensor

from minitron_nemo.shape.arch import ModelArch


def rotary_inverse_frequencies(arch: ModelArch) -> Tensor:
    """Inverse frequencies of the rotary embedding, [rotary channels / 2], with Llama-3 scaling applied.

    Source: Su et al. 2104.09864 eq. 15; scaling as published with Llama 3.1: wavelengths longer than
    `original / low_freq_factor` are divided by `factor`, those shorter than `original / high_freq_factor`
    are kept, the rest interpolate.
    """
    rotary_channels = int(arch.kv_channels * arch.rotary_percent)
    exponents = torch.arange(0, rotary_channels, 2, dtype=torch.int64).float() / rotary_channels
    inverse = 1.0 / (arch.rotary_base**exponents)
    if arch.rope_scaling is None:
        return inverse
    scaling = arch.rope_scaling
    wavelength = 2 * math.pi / inverse
    ratio = scaling.original_max_position_embeddings / wavelength
    smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse
