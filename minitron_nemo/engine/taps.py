"""Hidden states heard while a model runs, and losses on them that join the backward pass where they were heard.

Megatron's modules give a tensor, or a tuple whose first entry it is. Shapes: S sequence (a slice of it under sequence
parallelism), B batch, H hidden_size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from minitron_nemo.engine.model import ModelChunks
from minitron_nemo.shape.taps import EMBEDDINGS, Tap

# (where, the states [s, b, h]) -> what goes on in their place, None where they do.
Hear = Callable[[Tap, Tensor], Tensor | None]

_MODULES = {"attention_outputs": "self_attention", "mlp_outputs": "mlp", "layer_outputs": ""}  # named from the layer


@contextmanager
def tapping(model: ModelChunks, taps: Iterable[Tap], hear: Hear) -> Iterator[None]:
    """Inside, `hear` is called for those of the taps that this rank has, in every forward pass.

    Also in those that compute again what was not kept for the backward pass.
    """
    wanted = set(taps)
    with ExitStack() as attached:
        for tap, module in _places(model):
            if tap in wanted:
                attached.callback(module.register_forward_hook(partial(_pass_on, tap, hear)).remove)
        yield


def _places(model: ModelChunks) -> Iterator[tuple[Tap, nn.Module]]:
    """Every tap of this rank and the module that gives its states."""
    for gpt in model.gpts():
        if gpt.pre_process:
            yield Tap(EMBEDDINGS), gpt.embedding
        for layer in gpt.decoder.layers:
            for kind, name in _MODULES.items():
                yield Tap(kind, layer.layer_number - 1), layer.get_submodule(name)


def _pass_on(tap: Tap, hear: Hear, _: nn.Module, args: tuple, output: Any) -> Any:
    several = isinstance(output, tuple)
    replaced = hear(tap, output[0] if several else output)
    if replaced is None:
        return None
    return (replaced, *output[1:]) if several else replaced


def attached(x_SBH: Tensor, loss: Tensor) -> Tensor:
    """`x_SBH`, whose backward pass is also that of `loss`, a scalar: as though it were added to what is minimized.

    A pipeline stage has no other way to a loss of its own: Megatron's schedule asks the last stage alone for one.
    """
    joined = _Join.apply(x_SBH, loss)
    # Megatron frees what a stage has sent, which it does not do to a view.
    return make_viewless_tensor(joined, requires_grad=joined.requires_grad, keep_graph=True)


class _Join(torch.autograd.Function):
    """The first of (x, loss); backward, the loss gets the gradient of a summand of what is minimized: one."""

    @staticmethod
    def forward(ctx, x_SBH, loss):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(loss)
        return x_SBH

    @staticmethod
    def backward(ctx, grad_SBH):  # type: ignore[no-untyped-def]
        (loss,) = ctx.saved_tensors
        return grad_SBH, torch.ones_like(loss)
