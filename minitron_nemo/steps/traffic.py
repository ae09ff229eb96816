"""Bytes that a rank sends in a training step, by group and collective, from the layout and the shapes alone.

A ring is assumed: of n ranks, each sends (n-1)/n of the whole in an all-gather or a reduce-scatter and twice that in an
all-reduce. Left out are the few numbers of a step or micro-batch, sums of the log and the gradient's norm, what a
divergence other than forward KL has its ranks tell each other, and hidden states that are compared.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from minitron_nemo.config.parallel import Recompute
from minitron_nemo.distributed.beside import Beside
from minitron_nemo.distributed.flat import FlatLayer
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.losses.softmaxes import COLUMNS, STUDENT_COLUMNS
from minitron_nemo.shape.tensors import HEAD_NORMS, tensor_table
from minitron_nemo.steps.stages import Stages

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, SEND = "all-gather", "reduce-scatter", "all-reduce", "send"

# (group, collective) -> bytes that one rank sends. Groups: tp, pp, cp, and batch, which is context and data parallel;
# of a teacher laid out otherwise than its student teacher_tp, exchange and copies (`distributed/beside.py`).
Traffic = Counter[tuple[str, str]]


def sent(collective: str, whole: float, ranks: int) -> int:
    """Bytes that each of `ranks` sends for a collective whose result, or what is reduced, is `whole` bytes."""
    if collective == SEND:
        return round(whole)
    return round(whole * (ranks - 1) / ranks * (2 if collective == ALL_REDUCE else 1))


@dataclass(frozen=True)
class Step:
    """What a rank does in a training step: `microbatches` of so many tokens, in elements of `element_bytes`.

    Gradients are reduced in float32.
    """

    tokens: int  # of a micro-batch, on all context-parallel ranks together
    microbatches: int
    element_bytes: int = 2
    recompute: Recompute = Recompute()
    distributed_optimizer: bool = True

    def of_student(self, student: Stages, stage: int, *, with_teacher: bool) -> Traffic:
        """Forward and backward pass and the optimizer's step, on a rank of a pipeline stage."""
        layout, found = student.layout, Traffic()
        layers, hidden, keys = student.layers_of(stage), self._hidden(student), self._keys_and_values(student)
        attention, mlp, core = self._forward_passes(student, stage)
        _columns_and_rows(found, layout, hidden * (attention + mlp))
        _add(found, layout, "cp", ALL_GATHER, keys * core)
        # Backward the same the other way round; and the inputs of both column-parallel products are gathered once more
        # for the gradients of their weights.
        _columns_and_rows(found, layout, hidden * 2 * layers)
        if layout.sequence_parallel:
            _add(found, layout, "tp", ALL_GATHER, hidden * 2 * layers)
        _add(found, layout, "cp", REDUCE_SCATTER, keys * layers)
        self._ends(found, student, stage, trained=True)
        if stage == layout.pp - 1:
            columns = COLUMNS if with_teacher else STUDENT_COLUMNS
            tokens = self.tokens // layout.cp * self.microbatches
            _add(found, layout, "tp", ALL_GATHER, 4 * columns * tokens * layout.tp)
        self._gradients(found, student, stage)
        return found

    def of_teacher(self, teacher: Stages, stage: int) -> Traffic:
        """The forward pass of the frozen teacher, on a rank of a pipeline stage."""
        layout, layers, found = teacher.layout, teacher.layers_of(stage), Traffic()
        _columns_and_rows(found, layout, self._hidden(teacher) * 2 * layers)
        _add(found, layout, "cp", ALL_GATHER, self._keys_and_values(teacher) * layers)
        self._ends(found, teacher, stage, trained=False)
        return found

    def of_teacher_beside(self, teacher: Stages, stage: int, *, beside: Beside, shard_weights: bool = False) -> Traffic:
        """The same in a layout of its own, `teacher.layout`; weights that are shared out cross with every micro-batch.

        Copies in a student's group tell each other final states, replicas that share a copy their tokens of 8 bytes,
        and where documents are kept apart as much again, which is left out.
        """
        runs = math.ceil(self.microbatches / beside.copies) * beside.replicas
        step = replace(self, microbatches=runs)
        found = step.of_teacher(teacher, stage)
        if beside.copies * beside.replicas > 1:
            for kind in (ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE):
                found["teacher_tp", kind] = found.pop(("tp", kind), 0)
        if beside.copies > 1 and stage == teacher.layout.pp - 1:
            found["exchange", ALL_GATHER] = sent(ALL_GATHER, step._hidden(teacher) * beside.copies, beside.copies)
        if beside.replicas > 1:
            found["exchange", ALL_GATHER] = sent(ALL_GATHER, 8 * self.tokens * runs, beside.replicas)
        if shard_weights:
            ranks = teacher.layout.batch_ranks
            flat = FlatLayer.of(teacher.layer_sizes(), item=self.element_bytes, ranks=ranks)
            whole = self.element_bytes * flat.size * teacher.layers_of(stage) * runs
            found["copies", ALL_GATHER] = sent(ALL_GATHER, whole, ranks)
        return +found

    def _hidden(self, model: Stages) -> float:
        """Bytes of the hidden states that tensor-parallel ranks share, of all micro-batches."""
        return float(self.tokens // model.layout.cp * self.microbatches * model.arch.hidden_size * self.element_bytes)

    def _keys_and_values(self, model: Stages) -> float:
        """Bytes of a layer's keys and values on one tensor-parallel rank, of whole sequences and all micro-batches."""
        channels = 2 * model.arch.num_query_groups * model.arch.kv_channels // model.layout.tp
        return float(self.tokens * self.microbatches * channels * self.element_bytes)

    def _forward_passes(self, student: Stages, stage: int) -> tuple[int, int, int]:
        """How often attentions, MLPs and the attentions' cores run forward, what is recomputed included."""
        chunks = [student.layers[chunk] for chunk in student.layout.chunks_of(stage)]
        layers, again = sum(chunks), self.recompute
        if again.granularity == "selective":
            return layers, layers * (1 + ("mlp" in again.modules)), layers * (1 + ("core_attn" in again.modules))
        if again.method == "block":
            layers += sum(min(layers, again.num_layers or 0) for layers in chunks)
        return (layers * (2 if again.method == "uniform" else 1),) * 3

    def _ends(self, found: Traffic, model: Stages, stage: int, *, trained: bool) -> None:
        """The embedding, whose rows lie on several ranks, the way to the head, and that between stages."""
        layout, hidden = model.layout, self._hidden(model)
        reduce_ = REDUCE_SCATTER if layout.sequence_parallel else ALL_REDUCE
        if stage == 0:
            _add(found, layout, "tp", reduce_, hidden)
        if layout.sequence_parallel:
            _add(found, layout, "tp", ALL_GATHER, hidden * ((stage == layout.pp - 1) + (trained and stage == 0)))
        if trained and stage == layout.pp - 1:
            _add(found, layout, "tp", reduce_, hidden)
        chunks, last = layout.chunks_of(stage), layout.pp * layout.vpp - 1
        ways = sum((chunk < last) + (trained and chunk > 0) for chunk in chunks)
        _add(found, layout, "pp", SEND, hidden / (layout.tp if layout.sequence_parallel else 1) * ways)

    def _gradients(self, found: Traffic, student: Stages, stage: int) -> None:
        """Once a step: gradients over the copies of the model, and those that several ranks of one have parts of."""
        layout, arch, parameters = student.layout, student.arch, student.parameters(stage)
        if self.distributed_optimizer:
            _add(found, layout, "batch", REDUCE_SCATTER, 4 * parameters)
            _add(found, layout, "batch", ALL_GATHER, self.element_bytes * parameters)
        else:
            _add(found, layout, "batch", ALL_REDUCE, 4 * parameters)
        _add(found, layout, "tp", ALL_REDUCE, 4 * _in_parts(student, stage))
        if arch.share_embeddings_and_output_weights and stage in (0, layout.pp - 1) and layout.pp > 1:
            rows = layout.padded_vocab_size(arch) // layout.tp
            found["pp", ALL_REDUCE] += sent(ALL_REDUCE, 4 * rows * arch.hidden_size, 2)


def _columns_and_rows(found: Traffic, layout: Layout, hidden: float) -> None:
    """A column-parallel product and the row-parallel one after it: gather and scatter, or all-reduce the result."""
    if layout.sequence_parallel:
        _add(found, layout, "tp", ALL_GATHER, hidden)
        _add(found, layout, "tp", REDUCE_SCATTER, hidden)
    else:
        _add(found, layout, "tp", ALL_REDUCE, hidden)


def _in_parts(student: Stages, stage: int) -> int:
    """Elements of the parameters of a stage that every tensor-parallel rank has whole, and a part of whose gradient:
    norms where each has a part of the sequence, and those of queries and keys, as each has heads of its own.
    """
    last, total = stage == student.layout.pp - 1, 0
    for row in tensor_table(student.arch):
        if row.split is None and (student.layout.sequence_parallel or row.key in HEAD_NORMS):
            size = math.prod(row.shape(student.arch))
            total += size * (student.layers_of(stage) if row.per_layer else last)
    return total


def _add(found: Traffic, layout: Layout, group: str, collective: str, whole: float) -> None:
    ranks = layout.batch_ranks if group == "batch" else getattr(layout, group)
    if ranks > 1 and whole:
        found[group, collective] += sent(collective, whole, ranks)
