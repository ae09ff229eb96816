"""What Megatron wants started before it overlaps transfers or captures CUDA graphs. GPUs only."""

import importlib

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.groups import SEED


def start_tp_comm_overlap(config: TransformerConfig, groups: Groups, *, seq_length: int, micro_batch_size: int) -> None:
    """Give Transformer Engine the buffers that `tp_comm_overlap` sends through, for a model that asks for it.

    They have the shape of one model's hidden states, so one model of a process may overlap: the one that is trained.
    """
    if not config.tp_comm_overlap:
        return
    te = importlib.import_module("transformer_engine.pytorch")
    te.module.base.initialize_ub(
        shape=[seq_length // groups.layout.cp * micro_batch_size, config.hidden_size],
        tp_size=groups.layout.tp,
        use_fp8=config.fp8 is not None,
        bootstrap_backend="nccl",
    )


def allow_cuda_graphs(config: TransformerConfig) -> None:
    """Make Megatron's generators, from which nothing is drawn, ones that a graph may hold where a model is captured."""
    if config.cuda_graph_impl != "none":
        tensor_parallel.model_parallel_cuda_manual_seed(SEED, use_cudagraphable_rng=True, force_reset_rng=True)
