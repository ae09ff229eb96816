"""The frozen teacher beside the student: its own pipeline split, its own forward-only schedule, its own layout.

Only hidden states cross from teacher to student, so a depth-pruned student, uneven stages, another split or another
tensor-parallel degree need no special case.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.config.teacher import TeacherParallelConfig
from minitron_nemo.distillation.delivery import delivered
from minitron_nemo.distillation.layers_on_demand import LayersOnDemand, OnDemand
from minitron_nemo.distillation.sharing import shared_out
from minitron_nemo.distributed.routes import Route
from minitron_nemo.engine.groups import TeacherGroups, form_teacher_groups
from minitron_nemo.engine.model import BuildOptions, ModelChunks, build_model
from minitron_nemo.engine.schedule import Batch, forward_hidden
from minitron_nemo.engine.taps import tapping
from minitron_nemo.engine.weights import load_head, load_weights
from minitron_nemo.shape.taps import Tap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says of a micro-batch, on the stage where the student is told: `final` hidden states [s, b, h]
    on the last one, None elsewhere; the states at `taps` [s, b, h], of a slice of the sequence under sequence
    parallelism, where the student's side of their pairs is.
    """

    final: Tensor | None
    taps: Mapping[Tap, Tensor] = field(default_factory=dict)


class Teacher:
    """A model held for forward passes only; never trained, never part of a training checkpoint.

    `options` are of the student's ranks; `parallel` says how the teacher differs, by default not at all. Collective.
    """

    def __init__(
        self, weights: TensorSource, options: BuildOptions, parallel: TeacherParallelConfig | None = None
    ) -> None:
        parallel = parallel or TeacherParallelConfig()
        self.arch = weights.arch
        self.groups = options.groups  # the student's
        if words := parallel.in_words(options.groups.layout):
            logger.info(f"teacher: {words}")
        self.own_groups = form_teacher_groups(options.groups, parallel.tensor_model_parallel_size)
        own = replace(options.computing_once(), groups=self.own_groups.groups, own_groups=self.own_groups.megatron)
        self.model = build_model(weights.arch, own, on_meta=parallel.on_demand)
        self._head = _head_of_student(self.model, weights, options, self.own_groups)
        ends = [parameter for parameter in self.model.parameters() if not parameter.is_meta]
        load_weights(self.model, weights, own.groups, only=ends)
        self.on_demand = _on_demand(self.model, weights, own, parallel) if parallel.on_demand else None
        self.model.requires_grad_(False).eval()

    def weights(self) -> Iterator[Tensor]:
        """What this rank holds of the model, on the device or elsewhere."""
        yield from self.model.parameters()
        yield from () if self._head is None else (self._head,)
        yield from () if self.on_demand is None else self.on_demand.shares

    def outputs(self, batches: list[Batch], routes: Sequence[Route] = ()) -> Iterator[TeacherOutputs]:
        """What it says of every micro-batch; `routes` are the ways of hidden states beside the final ones.

        A teacher of another tensor-parallel degree than the student's has no routes (`config/rules.py`).
        Alone on its stage the teacher runs just before each micro-batch is needed. In a pipeline it runs through all of
        `batches` at once, before this returns: its transfers must not meet the student's between two stages.
        """
        if self.own_groups.exchange is not None:
            assert not routes
            return self._shared_out(batches)
        if self.groups.pp is None:
            return (self._run([batch], routes)[0] for batch in batches)
        return iter(self._run(batches, routes))

    def _shared_out(self, batches: list[Batch]) -> Iterator[TeacherOutputs]:
        """In a degree of its own: with the other copies, or for the other replicas."""
        run = partial(forward_hidden, self.model)
        if self.groups.pp is None:
            return map(TeacherOutputs, shared_out(batches, run, self.own_groups, at_once=1))
        final: list[Any] = [*shared_out(batches, run, self.own_groups, at_once=len(batches))]
        return map(TeacherOutputs, final or [None] * len(batches))

    def _run(self, batches: list[Batch], routes: Sequence[Route]) -> list[TeacherOutputs]:
        heard: dict[Tap, list[Tensor]] = defaultdict(list)

        def hear(tap: Tap, x_SBH: Tensor) -> None:
            heard[tap].append(x_SBH.clone())  # without gradients Megatron adds the residual stream into these in place

        own = {route.tap for route in routes if route.source == self.groups.pp_rank}
        with tapping(self.model, own, hear):
            final: list[Tensor | None] = [*forward_hidden(self.model, batches)] or [None] * len(batches)
        states = [{tap: heard[tap][number] for tap in own} for number in range(len(batches))]
        if self.groups.pp is not None:
            empty = partial(self._empty_state, batches[0])
            states = delivered(states, routes, groups=self.groups, empty=empty)
        return [TeacherOutputs(*both) for both in zip(final, states, strict=True)]

    def _empty_state(self, batch: Batch) -> Tensor:
        """Room for what a rank has of the states between two layers, [s, b, h]."""
        layout, (size, length) = self.groups.layout, batch["tokens"].shape
        tokens = length // layout.cp // (layout.tp if layout.sequence_parallel else 1)
        shape = (tokens, size, self.arch.hidden_size)
        return torch.empty(shape, dtype=self.model.config.params_dtype, device=self.groups.device)

    @torch.no_grad()
    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, split as the student's, [padded vocabulary / tp, h]; last stage only."""
        return self.model.head_weight() if self._head is None else self._head


def _head_of_student(
    model: ModelChunks, weights: TensorSource, options: BuildOptions, groups: TeacherGroups
) -> Tensor | None:
    """The teacher's head split over the ranks of the student's, where it is not split so already.

    The loss goes through both heads with the same rows on each rank. The model's own is dropped.
    """
    if groups.beside.student.tp == groups.beside.teacher.tp or not options.groups.is_last_stage:
        return None
    model.gpts()[-1].output_layer.weight = None
    return load_head(weights, options.groups, dtype=options.dtype)


def _on_demand(
    model: ModelChunks, weights: TensorSource, options: BuildOptions, parallel: TeacherParallelConfig
) -> LayersOnDemand:
    return LayersOnDemand(
        [(chunk, list(chunk.decoder.layers)) for chunk in model.gpts()],
        dtype=options.dtype,
        load=lambda parameters: load_weights(model, weights, options.groups, only=parameters),
        how=OnDemand(
            ahead=parallel.prefetch_layers,
            device=options.groups.device,
            in_host_memory=parallel.cpu_offloading_weights,
            group=options.groups.batch if parallel.shard_weights else None,
        ),
    )
