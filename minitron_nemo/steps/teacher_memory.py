"""What a frozen teacher needs on a rank: bytes of its weights, by where they lie, and states that wait."""

import math
from dataclasses import dataclass

from minitron_nemo.config.schema import Config
from minitron_nemo.distributed.flat import FlatLayer
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.steps.stages import Stages


@dataclass(frozen=True)
class TeacherWeights:
    """Bytes on the device and in pinned host memory, which on a CPU are the same."""

    device: float
    host: float = 0.0


def teacher_weights(config: Config, teacher: ModelArch, stage: int, *, item: int) -> TeacherWeights:
    """Of a rank of a pipeline stage, for weights of `item` bytes; what is before and after the layers stays there."""
    how = config.distill.teacher_parallel
    beside = how.beside(config.layout)
    own = Stages.of(teacher, beside.teacher, config.parallel.teacher_stage_layers)
    sizes, layers = own.layer_sizes(), own.layers_of(stage)
    ends = own.parameters(stage) - layers * sum(sizes)
    if stage == beside.teacher.pp - 1 and beside.teacher.tp != beside.student.tp:
        # The head is split as the student's, in the place of the model's own; a tied one is the embedding's.
        is_tied = teacher.share_embeddings_and_output_weights and stage == 0
        ends += Stages(teacher, beside.student, own.layers).head_size() - (0 if is_tied else own.head_size())
    if not how.on_demand:
        return TeacherWeights(float(item * (ends + layers * sum(sizes))))
    flat = FlatLayer.of(sizes, item=item, ranks=beside.teacher.batch_ranks if how.shard_weights else 1)
    chunk = max(own.layers[chunk] for chunk in beside.teacher.chunks_of(stage))
    buffers, shares = min(how.prefetch_layers + 1, chunk) * flat.size, layers * flat.share
    if how.cpu_offloading_weights:
        return TeacherWeights(float(item * (ends + buffers)), float(item * shares))
    return TeacherWeights(float(item * (ends + buffers + shares)))


def teacher_states(config: Config, window: int) -> int:
    """Most micro-batches whose final hidden states are on a rank of the last stage, of a window of so many.

    Those that wait for the student; those of its own copy, that were run for others too; those of the replica that is
    being served, beside a rank's own.
    """
    beside = config.distill.teacher_parallel.beside(config.layout)
    if beside.copies > 1:
        return beside.copies + 1 if config.layout.pp == 1 else window + math.ceil(window / beside.copies)
    return (1 if config.layout.pp == 1 else window) * (2 if beside.replicas > 1 else 1)
