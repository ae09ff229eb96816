"""Places in each layer where activations are heard, each with the hook that hears there.

The model is only touched by the names of its modules, so nothing here imports Megatron: a layer has
`input_layernorm`, `self_attention.linear_qkv`, `self_attention.linear_proj`, `pre_mlp_layernorm`, `mlp.linear_fc1` and
`mlp.linear_fc2`.

Shapes: S sequence (a slice of it at norms and layers under sequence parallelism), B batch, H hidden_size, C channels
of the heads on this rank, N heads on this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from minitron_nemo.distributed.spread import Spread
from minitron_nemo.importance.estimators import head_norms
from minitron_nemo.shape.arch import ModelArch

# Megatron's modules, known here only by the names above.
Module = Any
Hear = Callable[..., None]
Attach = Callable[[Module, ModelArch, Hear], RemovableHandle]


@dataclass(frozen=True)
class Site:
    """A place in each layer where activations are heard.

    `attach(layer, arch, hear)` puts on one layer the hook that calls `hear(*tensors)`, each [S, B, ...], in every
    forward pass and without gradients; the handle takes it off. `units` says how the last dimension of what is heard
    lies over tensor-parallel ranks, `sequence` how the first does under sequence parallelism. What is heard `once` is
    heard at the decoder of the last pipeline stage, to which `attach` is then given. Where there must be `gradients`
    it is heard in the backward pass.
    """

    name: str
    attach: Attach
    units: Spread
    sequence: Spread
    once: bool = False
    gradients: bool = False


def input_of(module: str, transform: Callable[[Tensor, ModelArch], Tensor] | None = None) -> Attach:
    """Hears the first argument of a module, named from the layer, after `transform(x, arch)`."""

    def attach(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
        return _before(attrgetter(module)(layer), lambda x: hear(x if transform is None else transform(x, arch)))

    return attach


def output_of(module: str, transform: Callable[[Tensor, ModelArch], Tensor] | None = None) -> Attach:
    """Hears what a module, named from where it hangs, computes, after `transform(x, arch)`."""

    def attach(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
        @torch.no_grad()
        def hook(_: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            x = first_of(output)
            hear(x if transform is None else transform(x, arch))

        handle: RemovableHandle = attrgetter(module)(layer).register_forward_hook(hook)
        return handle

    return attach


def output_of_norm(norm: str, *, projection: str) -> Attach:
    """Hears a norm's output. Transformer Engine fuses the norm into the projection after it: then apply it here."""

    def attach(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
        linear = attrgetter(projection)(layer)
        if getattr(linear, "layer_norm_weight", None) is not None:
            return _before(linear, lambda x_SBH: hear(_fused_norm(x_SBH, linear, arch)))

        return output_of(norm)(layer, arch, hear)

    return attach


def input_of_norm(norm: str, *, projection: str) -> Attach:
    """Hears what enters a norm, normalized but not yet multiplied by its weight."""

    def attach(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
        linear = attrgetter(projection)(layer)
        fused = getattr(linear, "layer_norm_weight", None) is not None
        return _before(linear if fused else attrgetter(norm)(layer), lambda x: hear(normalized(x, arch)))

    return attach


def output_of_layer(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
    """Hears what leaves a layer, normalized: behind the last one, what the final norm makes before its weight."""
    return input_and_output(layer, arch, lambda _, after_SBH: hear(normalized(after_SBH, arch)))


def normalized(x_SBH: Tensor, arch: ModelArch) -> Tensor:
    """The norm of this model without weight and bias, at least in float32."""
    x_SBH = x_SBH.to(torch.promote_types(x_SBH.dtype, torch.float32))
    norm = functional.layer_norm if arch.has_norm_bias else functional.rms_norm
    return norm(x_SBH, (x_SBH.shape[-1],), eps=arch.norm_epsilon)


def input_and_output(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
    """Hears what enters a layer and what leaves it, [S, B, H] each."""

    @torch.no_grad()
    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        hear(args[0] if args else kwargs["hidden_states"], first_of(output))

    handle: RemovableHandle = layer.register_forward_hook(hook, with_kwargs=True)
    return handle


def _heads(x_SBC: Tensor, arch: ModelArch) -> Tensor:
    return head_norms(x_SBC, arch.kv_channels)


def _query_groups(x_SBC: Tensor, arch: ModelArch) -> Tensor:
    """A query group is as long as all of its heads together: the root of the sum of their squared lengths."""
    return head_norms(x_SBC, arch.heads_per_group * arch.kv_channels)


def _into_activation(x_SBF: Tensor, arch: ModelArch) -> Tensor:
    """Of a gated MLP the gate half, the first of each rank, which is what the activation takes; else all."""
    return x_SBF.chunk(2, dim=-1)[0] if arch.is_gated else x_SBF


def first_of(output: Tensor | tuple) -> Tensor:
    """What a Megatron module computes, of which some also return a bias."""
    return output[0] if isinstance(output, tuple) else output


def _before(module: Module, hear: Hear) -> RemovableHandle:
    @torch.no_grad()
    def hook(_: nn.Module, args: tuple) -> None:
        hear(args[0])

    handle: RemovableHandle = module.register_forward_pre_hook(hook)
    return handle


def _fused_norm(x_SBH: Tensor, projection: Module, arch: ModelArch) -> Tensor:
    x_SBH = x_SBH.to(torch.promote_types(x_SBH.dtype, torch.float32))
    weight_H = projection.layer_norm_weight.to(x_SBH.dtype)
    size = (x_SBH.shape[-1],)
    if arch.normalization == "RMSNorm":
        return functional.rms_norm(x_SBH, size, weight_H, arch.norm_epsilon)
    # LayerNorm1p stores its weight minus one.
    bias_H = projection.layer_norm_bias.to(x_SBH.dtype)
    return functional.layer_norm(x_SBH, size, weight_H + 1, bias_H, arch.norm_epsilon)


INPUT_NORM = Site(
    "input_layernorm",
    output_of_norm("input_layernorm", projection="self_attention.linear_qkv"),
    Spread.REPLICATED,
    Spread.PARTIAL,
)
PRE_MLP_NORM = Site(
    "pre_mlp_layernorm",
    output_of_norm("pre_mlp_layernorm", projection="mlp.linear_fc1"),
    Spread.REPLICATED,
    Spread.PARTIAL,
)
HEADS = Site("linear_proj", input_of("self_attention.linear_proj", _heads), Spread.SHARDED, Spread.REPLICATED)
NEURONS = Site("linear_fc2", input_of("mlp.linear_fc2"), Spread.SHARDED, Spread.REPLICATED)
LAYER = Site("layer", input_and_output, Spread.REPLICATED, Spread.PARTIAL)
# For second moments alone.
NORM_BEFORE_ATTENTION = Site(
    "input_layernorm",
    input_of_norm("input_layernorm", projection="self_attention.linear_qkv"),
    Spread.REPLICATED,
    Spread.PARTIAL,
)
NORM_BEFORE_MLP = Site(
    "pre_mlp_layernorm",
    input_of_norm("pre_mlp_layernorm", projection="mlp.linear_fc1"),
    Spread.REPLICATED,
    Spread.PARTIAL,
)
FINAL_NORM = Site("final_layernorm", output_of_layer, Spread.REPLICATED, Spread.PARTIAL)

# Of second moments, and of the criteria that are not the default.
HEAD_CHANNELS = Site("linear_proj", input_of("self_attention.linear_proj"), Spread.SHARDED, Spread.REPLICATED)
FINAL_NORM_OUTPUT = Site("final_layernorm", output_of("final_layernorm"), Spread.REPLICATED, Spread.PARTIAL, once=True)
BEFORE_ACTIVATION = Site("linear_fc1", output_of("mlp.linear_fc1", _into_activation), Spread.SHARDED, Spread.REPLICATED)
QUERY_GROUPS = Site(
    "linear_proj_groups", input_of("self_attention.linear_proj", _query_groups), Spread.SHARDED, Spread.REPLICATED
)
