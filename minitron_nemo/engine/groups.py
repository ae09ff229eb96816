"""Megatron's process groups for a layout, and those of a teacher whose tensor-parallel degree is its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_nemo.distributed.beside import Beside
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.ranks import TIMEOUT, Rank, start
from minitron_nemo.engine.cpu import pretend_cuda_is_cpu

SEED = 1234  # of Megatron's generators


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
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
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


@dataclass(frozen=True)
class TeacherGroups:
    """A teacher's groups on the ranks of its student.

    `groups` are as though the ranks were laid out for the teacher, `megatron` the same in Megatron's record; over
    `exchange` its copies, or the replicas that it serves, tell each other what went through it (None: nobody to tell).
    """

    beside: Beside
    groups: Groups
    megatron: ProcessGroupCollection
    exchange: dist.ProcessGroup | None

    @property
    def number(self) -> int:
        """Which of its copies, or of the replicas that it serves, this rank is one of."""
        return 0 if self.exchange is None else self.exchange.rank()


def form_teacher_groups(student: Groups, tp: int | None = None) -> TeacherGroups:
    """The groups of a teacher of tensor-parallel degree `tp` (None: the student's). Collective over all ranks.

    Stages and parts of sequences stay on their ranks, so only the groups of tensor parallelism and of the copies are
    formed, and none where the degrees are the same.
    """
    beside = Beside.of(student.layout, tp)
    layout, exchange = beside.teacher, None
    tensor = parallel_state.get_tensor_model_parallel_group()
    batch = parallel_state.get_data_parallel_group(with_context_parallel=True)
    groups = student
    if layout.tp != student.layout.tp:
        place = beside.teacher_place(student.layout.place(student.rank))
        tensor, batch, exchange = (
            _group(ranks) for ranks in (beside.tensor_groups(), beside.batch_groups(), beside.exchange_groups())
        )
        groups = replace(
            student,
            layout=layout,
            tp=tensor if layout.tp > 1 else None,
            dp=None,  # a teacher is never trained: nothing is summed over its copies
            batch=batch if layout.batch_ranks > 1 else None,
            tp_rank=place.tp,
            dp_rank=place.dp,
        )
    megatron = ProcessGroupCollection(
        tp=tensor,
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=batch,
        # What they are for, gradients and first values of tied embeddings, a frozen model has none of.
        embd=None,
        pos_embd=None,
    )
    return TeacherGroups(beside, groups, megatron, exchange)


def _group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """This rank's of some groups that all ranks form together."""
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in groups], timeout=TIMEOUT)
    assert own is not None
    return own
