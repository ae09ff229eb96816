"""Megatron's process groups for a layout."""

from megatron.core import parallel_state, tensor_parallel

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.ranks import Rank, start
from minitron_nemo.engine.cpu import pretend_cuda_is_cpu


def form_groups(rank: Rank, layout: Layout, *, gpu: bool = False) -> Groups:
    """Start this rank and form the groups of the layout; forms them anew when called again."""
    device = start(rank, gpu=gpu)
    if not gpu:
        pretend_cuda_is_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        create_gloo_process_groups=False,
    )
    # Megatron forks its generators even where nothing is drawn; there is no dropout and weights are never drawn here.
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    return Groups(
        layout=layout,
        tp=parallel_state.get_tensor_model_parallel_group() if layout.tp > 1 else None,
        pp=parallel_state.get_pipeline_model_parallel_group() if layout.pp > 1 else None,
        cp=parallel_state.get_context_parallel_group() if layout.cp > 1 else None,
        dp=parallel_state.get_data_parallel_group() if layout.dp > 1 else None,
        batch=parallel_state.get_data_parallel_group(with_context_parallel=True) if layout.batch_ranks > 1 else None,
        rank=rank.rank,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=device,
    )
