"""Places in each layer where an activation is heard together with the gradient of the loss, in the backward pass.

What is heard is the first-order change of the loss, with the sign turned, were the unit silent at that token:
activation times gradient, summed over the unit's channels (Molchanov et al., 1611.06440;
Michel et al., 1905.10650, for heads). The loss is the sum over tokens, so what a sample adds does not depend on the
others of its micro-batch.

Shapes: S sequence (a slice of it at norms and layers under sequence parallelism), B batch, H hidden_size, U units on
this rank, C channels of a unit.
"""

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron_nemo.distributed.spread import Spread
from minitron_nemo.errors import UserError
from minitron_nemo.importance.sites import Attach, Hear, Module, Site, first_of
from minitron_nemo.shape.arch import ModelArch


def _hear_with_gradient(x: Tensor, seen: Tensor, hear: Callable[[Tensor], None]) -> None:
    """Call `hear(seen * gradient of x)` when the backward pass reaches `x`; without one, never.

    `seen` is detached: a pipeline frees the data of what it has sent on.
    """
    if x.requires_grad:
        x.register_hook(lambda gradient: hear(seen * gradient.to(seen.dtype)))


def _float32(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def gradient_at_input_of(module: str, channels: Callable[[ModelArch], int] = lambda arch: 1) -> Attach:
    """Hears the first argument of a module times its gradient, `channels` of which make a unit."""

    def attach(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple) -> None:
            x = args[0]
            of_unit = channels(arch)
            _hear_with_gradient(x, _float32(x), lambda xg: hear(xg.unflatten(-1, (-1, of_unit)).sum(dim=-1)))

        handle: RemovableHandle = attrgetter(module)(layer).register_forward_pre_hook(hook)
        return handle

    return attach


def gradient_at_output_of_norm(norm: str, *, projection: str) -> Attach:
    """Hears a norm's output times its gradient; where the norm is fused into the projection there is no such tensor."""

    def attach(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
        if getattr(attrgetter(projection)(layer), "layer_norm_weight", None) is not None:
            raise UserError(
                f"{norm} is fused into {projection}, as Transformer Engine does: gradients of hidden channels are not "
                "heard there; use a criterion of activations for hidden_size"
            )

        def hook(_: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            x = first_of(output)
            _hear_with_gradient(x, _float32(x), hear)

        handle: RemovableHandle = attrgetter(norm)(layer).register_forward_hook(hook)
        return handle

    return attach


def gradient_of_layer(layer: Module, arch: ModelArch, hear: Hear) -> RemovableHandle:
    """Hears what a layer adds to the residual stream times the gradient there: [S, B, 1], the layer being the unit."""

    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        before, after = args[0] if args else kwargs["hidden_states"], first_of(output)
        added = _float32(after) - _float32(before)
        _hear_with_gradient(after, added, lambda xg: hear(xg.sum(dim=-1, keepdim=True)))

    handle: RemovableHandle = layer.register_forward_hook(hook, with_kwargs=True)
    return handle


def _site(name: str, attach: Attach, units: Spread, sequence: Spread) -> Site:
    return Site(f"{name}_gradient", attach, units, sequence, gradients=True)


_PROJECTION = "self_attention.linear_proj"
INPUT_NORM_GRADIENT = _site(
    "input_layernorm",
    gradient_at_output_of_norm("input_layernorm", projection="self_attention.linear_qkv"),
    Spread.REPLICATED,
    Spread.PARTIAL,
)
PRE_MLP_NORM_GRADIENT = _site(
    "pre_mlp_layernorm",
    gradient_at_output_of_norm("pre_mlp_layernorm", projection="mlp.linear_fc1"),
    Spread.REPLICATED,
    Spread.PARTIAL,
)
HEADS_GRADIENT = _site(
    "linear_proj",
    gradient_at_input_of(_PROJECTION, lambda arch: arch.kv_channels),
    Spread.SHARDED,
    Spread.REPLICATED,
)
QUERY_GROUPS_GRADIENT = _site(
    "linear_proj_groups",
    gradient_at_input_of(_PROJECTION, lambda arch: arch.heads_per_group * arch.kv_channels),
    Spread.SHARDED,
    Spread.REPLICATED,
)
NEURONS_GRADIENT = _site("linear_fc2", gradient_at_input_of("mlp.linear_fc2"), Spread.SHARDED, Spread.REPLICATED)
LAYER_GRADIENT = _site("layer", gradient_of_layer, Spread.REPLICATED, Spread.PARTIAL)
