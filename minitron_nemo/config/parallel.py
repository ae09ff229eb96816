"""Settings of the ranks: how a model and a batch are shared out over them, and what they keep or recompute."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from minitron_nemo.config.setting import count, setting
from minitron_nemo.config.shapes import MAX_LAYERS
from minitron_nemo.errors import UserError

MAX_RANKS = 10**4  # in the spirit of `setting.MAX_SIZE`


class RecomputeGranularity(Enum):
    full = "full"
    selective = "selective"


class RecomputeMethod(Enum):
    uniform = "uniform"
    block = "block"


class RecomputeModule(Enum):
    """Megatron's names of the parts of a layer.

    Without `layernorm`: Megatron-Core 0.16.1 recomputes norms with Transformer Engine alone, and there
    they are parts of the projections.
    """

    core_attn = "core_attn"
    mlp = "mlp"


class CudaGraphImpl(Enum):
    """Of Megatron's those that its schedules run by themselves."""

    none = "none"
    local = "local"


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again instead of finding it kept, in Megatron's words; by default nothing."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ()

    def check(self, layers: Sequence[int]) -> None:
        """Refuse layers of a chunk that do not divide into units that are recomputed together."""
        if self.method == "uniform" and any(chunk % (self.num_layers or 1) for chunk in layers):
            raise UserError(
                f"parallel.recompute_num_layers={self.num_layers}: with recompute_method=uniform it must divide the "
                f"layers of every stage or chunk, {list(layers)}; use recompute_method=block, or stage_layers that fit"
            )


@dataclass
class ParallelConfig:
    """The number of ranks must be a multiple of tensor x pipeline x context; what is left is data parallel."""

    tensor_model_parallel_size: int = count(
        1,
        "ranks that share each layer; must divide the heads, the query groups and the neurons",
        at_most=MAX_RANKS,
        how_it_runs=True,
    )
    pipeline_model_parallel_size: int = count(1, "pipeline stages", at_most=MAX_RANKS, how_it_runs=True)
    virtual_pipeline_model_parallel_size: int = count(
        1,
        "model chunks on each pipeline stage, run interleaved: the pipeline fills and empties in that part of the "
        "time, for more activations and transfers; the number of micro-batches must be a multiple of the stages",
        at_most=MAX_LAYERS,
        how_it_runs=True,
    )
    context_parallel_size: int = count(
        1,
        "ranks that share each sequence: its attention goes over all of them, all else is of their part; `seq_length` "
        "must be a multiple of twice as many",
        at_most=MAX_RANKS,
        how_it_runs=True,
    )
    sequence_parallel: bool = setting(
        False, "norms and residuals see a slice of the sequence; needs tensor parallelism", how_it_runs=True
    )
    teacher_stage_layers: list[int] | None = count(
        None,
        "layers of the teacher on each pipeline stage (`correct_teacher`, `estimate_importance`, `distill`), of each "
        "chunk in the order of the forward pass where those are interleaved; null: as even as they divide, later "
        "stages the fewest; `evaluate` always splits evenly",
        at_most=MAX_LAYERS,
        how_it_runs=True,
    )
    student_stage_layers: list[int] | None = count(
        None, "the same for the student (`distill`)", at_most=MAX_LAYERS, how_it_runs=True
    )
    use_distributed_optimizer: bool = setting(True, "share optimizer state over data-parallel ranks", how_it_runs=True)
    overlap_grad_reduce: bool | None = setting(
        None,
        "reduce gradients over data-parallel ranks during the backward pass; null: on GPUs, and with "
        "`overlap_param_gather`",
        how_it_runs=True,
    )
    overlap_param_gather: bool = setting(
        False,
        "gather what other ranks updated during the forward pass; needs `use_distributed_optimizer` and "
        "`overlap_grad_reduce`",
        how_it_runs=True,
    )
    ddp_bucket_size: int | None = count(
        None,
        "whose gradients and values cross at a time where that overlaps; null: Megatron's, 40 million or more",
        unit="parameters",
        how_it_runs=True,
    )
    gradient_accumulation_fusion: bool = setting(
        False,
        "add weight gradients up inside of their matrix products; GPUs with Apex's extension or Transformer Engine",
        how_it_runs=True,
    )
    recompute_activations: bool = setting(
        False,
        "recompute each layer in the backward pass: less memory, about a third more time; short for "
        "`recompute_granularity=full recompute_method=uniform recompute_num_layers=1`",
        how_it_runs=True,
    )
    recompute_granularity: RecomputeGranularity | None = setting(
        None, "`full`: whole layers; `selective`: `recompute_modules` of each layer; null: nothing", how_it_runs=True
    )
    recompute_method: RecomputeMethod | None = setting(
        None,
        "of `full`; `uniform`: every `recompute_num_layers` layers keep the input of the first; `block`: the first "
        "`recompute_num_layers` of a stage, or chunk, keep their inputs and the others everything",
        how_it_runs=True,
    )
    recompute_num_layers: int | None = count(
        None, "of `full`, see `recompute_method`", at_most=MAX_LAYERS, unit="layers", how_it_runs=True
    )
    recompute_modules: list[RecomputeModule] = setting([], "of `selective`; empty: `core_attn`", how_it_runs=True)

    cpu_offloading_num_layers: int = count(
        0,
        "whose activations wait for the backward pass in the host's memory, the first of each stage or chunk; not "
        "beside recomputation",
        at_least=0,
        at_most=MAX_LAYERS,
        unit="layers",
        how_it_runs=True,
    )
    tp_comm_overlap: bool = setting(
        False,
        "tensor-parallel transfers of the trained model hide behind matrix products; needs `sequence_parallel`, and "
        "Transformer Engine on GPUs",
        how_it_runs=True,
    )
    cuda_graph_impl: CudaGraphImpl = setting(
        CudaGraphImpl.none,
        "`local`: each layer of the trained model is captured as a CUDA graph by Megatron; needs GPUs; not beside "
        "offloading or recomputation",
        how_it_runs=True,
    )

    @property
    def recompute(self) -> Recompute:
        """What is recomputed. Raises UserError for settings that say nothing together."""
        granularity = self.recompute_granularity
        said = "null" if granularity is None else granularity.value
        if self.recompute_activations and granularity is not None:
            raise UserError(
                f"parallel.recompute_activations=true: is short for recompute_granularity=full; leave it out beside "
                f"recompute_granularity={said}"
            )
        for name, goes_with in _DETAILS.items():
            given = bool(getattr(self, name))
            if given and granularity is not goes_with:
                raise UserError(f"parallel.{name}: goes with recompute_granularity={goes_with.value}, not with {said}")
            if not given and granularity is goes_with is RecomputeGranularity.full:
                raise UserError(f"parallel.{name}: is not set, and recompute_granularity=full needs it")
        if self.recompute_activations:
            return Recompute("full", "uniform", 1)
        if granularity is RecomputeGranularity.selective:
            return Recompute("selective", modules=tuple(m.value for m in self.recompute_modules) or ("core_attn",))
        return Recompute(
            None if granularity is None else said,
            self.recompute_method and self.recompute_method.value,
            self.recompute_num_layers,
        )


# What says more about a granularity.
_DETAILS = {
    "recompute_method": RecomputeGranularity.full,
    "recompute_num_layers": RecomputeGranularity.full,
    "recompute_modules": RecomputeGranularity.selective,
}
