"""A whole model in this process, started by nobody as a rank: for other programs that hold one and call it.

Shapes: B samples, S tokens of each, H the hidden size, V the vocabulary.
"""

import torch
from megatron.core import parallel_state
from torch import Tensor

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.ranks import Rank
from minitron_nemo.engine.groups import form_groups
from minitron_nemo.engine.model import ModelChunks
from minitron_nemo.engine.weights import local_parameters
from minitron_nemo.errors import UserError


def groups_alone() -> Groups:
    """Groups in which this process is alone, on its GPU where it sees one.

    Megatron's own groups are formed once, and left as they are where the program around has formed them already.
    Raises UserError when those split a model over several processes.
    """
    gpu = torch.cuda.is_available()
    if not parallel_state.model_parallel_is_initialized():
        form_groups(Rank(0, 0, 1), Layout(), gpu=gpu)
    degrees = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }
    if split := {name: degree for name, degree in degrees.items() if degree > 1}:
        what = ", ".join(f"{name} {degree}" for name, degree in split.items())
        raise UserError(f"Megatron splits models in this process ({what} parallel); a whole one needs degrees of 1")
    return Groups(device=torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"))


def logical_names(model: ModelChunks) -> dict[str, str]:
    """Of every parameter of a model that is whole here: its name in the module -> that of its logical tensor."""
    named = zip(model.named_parameters(), local_parameters(model), strict=True)
    return {name: logical for (name, _), (logical, _) in named}


def hidden_states(model: ModelChunks, tokens_BS: Tensor) -> Tensor:
    """The final hidden states [S, B, H] that the head takes; differentiable."""
    (chunk,) = model.gpts()
    return chunk(tokens_BS, torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS), None)


def logits(model: ModelChunks, tokens_BS: Tensor) -> Tensor:
    """The logits [B, S, V] at every token; differentiable."""
    return (hidden_states(model, tokens_BS) @ model.head_weight().T).transpose(0, 1)


def next_logits(model: ModelChunks, tokens_BS: Tensor) -> Tensor:
    """The logits [B, V] of the token after the last; those of the others are never made."""
    return hidden_states(model, tokens_BS)[-1] @ model.head_weight().T
