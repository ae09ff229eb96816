"""Gradients of activations alone: a backward pass through a model whose weights are frozen."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from minitron_nemo.engine.model import ModelChunks


@contextmanager
def gradients_of_activations(model: ModelChunks) -> Iterator[None]:
    """Inside, a training schedule gives gradients to activations and to no weight: a third less work, and no memory.

    The embeddings stand for the first thing that needs a gradient; later pipeline stages ask for that of their input.
    """
    frozen = [weight for weight in model.parameters() if weight.requires_grad]
    with ExitStack() as undo:
        for weight in frozen:
            weight.requires_grad_(False)
            undo.callback(weight.requires_grad_, True)
        if (first := model.gpts()[0]).pre_process:
            undo.callback(first.embedding.register_forward_hook(_require_gradient).remove)
        yield


def _require_gradient(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_()
