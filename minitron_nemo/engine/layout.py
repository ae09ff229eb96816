"""Layout of the ranks: Megatron's process groups for the asked degrees."""

from megatron.core import parallel_state, tensor_parallel

from minitron_nemo.arch import ModelArch
from minitron_nemo.engine.cpu import pretend_cuda_is_cpu
from minitron_nemo.parallel import Groups, Rank, check_divides, stage_layers, start


def form_groups(rank: Rank, *, tp: int, pp: int, sequence_parallel: bool = False, gpu: bool = False) -> Groups:
    """Start this rank and form the tensor-, pipeline- and data-parallel groups; forms them anew when called again."""
    device = start(rank, gpu=gpu)
    if not gpu:
        pretend_cuda_is_cpu()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        create_gloo_process_groups=False,
    )
    # Megatron forks its generators even where nothing is drawn; there is no dropout and weights are never drawn here.
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    dp = rank.world_size // (tp * pp)
    return Groups(
        tp=parallel_state.get_tensor_model_parallel_group() if tp > 1 else None,
        pp=parallel_state.get_pipeline_model_parallel_group() if pp > 1 else None,
        dp=parallel_state.get_data_parallel_group() if dp > 1 else None,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp,
        rank=rank.rank,
        world_size=rank.world_size,
        sequence_parallel=sequence_parallel and tp > 1,
        device=device,
    )


def check_layout(name: str, arch: ModelArch, *, groups: Groups, asked_stages: list[int] | None = None) -> None:
    """Refuse a layout the shape cannot be split over, naming the sizes."""
    check_divides(name, arch, tp=groups.tp_size)
    stage_layers(arch.num_layers, groups.pp_size, asked_stages)
