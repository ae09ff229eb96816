"""Bytes that a training step needs on a rank, stage by stage, before anything is allocated.

Weights, gradients and the optimizer's state follow from the table of tensors and are exact but for the padding of
Megatron's buffers. Activations count what the layers of `engine/` keep for the backward pass, good to `TOLERANCE`
(fused layers of Transformer Engine keep less).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.schema import Accelerator, Config, DistillConfig, DivergenceName, Precision, TrainingConfig
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import EMBEDDING, tensor_table

TOLERANCE = 0.25  # of the activations
CONTEXTS = 1.5 * 2**30  # bytes on a GPU for CUDA, cuBLAS and NCCL: a round figure, not measured here


@dataclass(frozen=True)
class Stages:
    """A model laid over the ranks: its shape, the layout and the layers of each of its chunks."""

    arch: ModelArch
    layout: Layout
    layers: Sequence[int]

    @classmethod
    def of(cls, arch: ModelArch, layout: Layout, split: Sequence[int] | None) -> "Stages":
        return cls(arch, layout, layout.stages(arch.num_layers, split))

    def parameters(self, stage: int) -> int:
        """Elements of the parameters that a rank of this stage holds, the vocabulary's padding included.

        The last stage of a pipeline has a copy of a tied embedding.
        """
        first, last, total = stage == 0, stage == self.layout.pp - 1, 0
        layers = sum(self.layers[chunk] for chunk in self.layout.chunks_of(stage))
        for row in tensor_table(self.arch):
            shape = row.shape(self.arch)
            if row.is_vocabulary:
                shape = (self.layout.padded_vocab_size(self.arch), *shape[1:])
            size = math.prod(shape) // (1 if row.split is None else self.layout.tp)
            if row.per_layer:
                total += size * layers
            elif row.key == EMBEDDING:
                total += size * (first or (last and self.arch.share_embeddings_and_output_weights))
            else:
                total += size * last
        return total

    def waiting_layers(self, stage: int, num_microbatches: int) -> int:
        """Most layers of this stage that wait for their backward pass, each counted once for each micro-batch.

        The schedule's order: forward passes to fill the pipeline, then one forward and one backward in turn. Of an
        interleaved pipeline `pp` micro-batches go through a chunk, then through the next; backward the other way.
        """
        pp, vpp = self.layout.pp, self.layout.vpp
        chunks = [self.layers[chunk] for chunk in self.layout.chunks_of(stage)]
        group, ahead = (1, pp - stage - 1) if vpp == 1 else (pp, 2 * (pp - stage - 1) + (vpp - 1) * pp)
        groups = min(num_microbatches // group, 2 * (ahead + pp))  # after those nothing changes
        forward = [layers for _ in range(groups) for layers in chunks for _ in range(group)]
        backward = [layers for _ in range(groups) for layers in reversed(chunks) for _ in range(group)]
        held = most = sum(forward[:ahead])
        for begun, ended in zip(forward[ahead:], backward, strict=False):
            most = max(most, held + begun)
            held += begun - ended
        return most


def kept_by_layer(arch: ModelArch, layout: Layout, *, recomputed: Sequence[str] = ()) -> float:
    """Elements that a layer keeps of each token until its backward pass, without those of its parts `recomputed`.

    Its input, the normed input and its norm's parts, the queries, keys and values before and
    after the rotation, the attention and its copy for the projection, the same of the second norm, and the MLP's
    gates, activations and products.
    """
    rotated = arch.query_size + arch.num_query_groups * arch.kv_channels
    attention = arch.query_size if "core_attn" in recomputed else 2 * arch.query_size
    mlp = 0 if "mlp" in recomputed else arch.fc1_size + 2 * arch.ffn_hidden_size
    # Of keys and values those of the whole sequence, gathered from all context-parallel ranks.
    if layout.cp > 1 and "core_attn" not in recomputed:
        attention += 2 * arch.num_query_groups * arch.kv_channels * layout.cp
    return 4 * _stream(arch, layout) + (arch.qkv_size + rotated + attention + mlp) / layout.tp


def _stream(arch: ModelArch, layout: Layout) -> float:
    """Elements of a token between two layers."""
    return arch.hidden_size / (layout.tp if layout.sequence_parallel else 1)


def kept_by_stage(trained: Stages, stage: int, num_microbatches: int, *, recompute: Recompute) -> float:
    """Elements of each token that wait on a stage at most, and those of the unit that is being recomputed."""
    arch, layout = trained.arch, trained.layout
    waiting, stream = trained.waiting_layers(stage, num_microbatches), _stream(arch, layout)
    whole, size = kept_by_layer(arch, layout), recompute.num_layers or 1
    if recompute.granularity is None:
        return waiting * whole
    if recompute.granularity == "selective":
        some = kept_by_layer(arch, layout, recomputed=recompute.modules)
        return waiting * some + whole - some
    if recompute.method == "uniform":
        return waiting * stream / size + size * whole
    chunks = [trained.layers[chunk] for chunk in layout.chunks_of(stage)]
    share = sum(min(layers, size) for layers in chunks) / sum(chunks)
    return waiting * (share * stream + (1 - share) * whole) + whole


def training_memory(
    config: Config, training: TrainingConfig, *, student: ModelArch, teacher: ModelArch | None
) -> tuple[int, dict[str, float]]:
    """(stage, bytes by purpose) of the pipeline stage that needs most; without a teacher, nothing is distilled."""
    stages = range(config.layout.pp)
    by_stage = [stage_memory(config, training, stage, student=student, teacher=teacher) for stage in stages]
    most = max(stages, key=lambda stage: sum(by_stage[stage].values()))
    return most, by_stage[most]


def weight_bytes(config: Config) -> int:
    """Of one weight: 4 where the config asks for float32 or for the CPU, else 2."""
    fp32 = config.trainer.precision is Precision.fp32
    on_cpu = config.trainer.precision is Precision.auto and config.trainer.accelerator is Accelerator.cpu
    return 4 if fp32 or on_cpu else 2


def stage_memory(
    config: Config, training: TrainingConfig, stage: int, *, student: ModelArch, teacher: ModelArch | None
) -> dict[str, float]:
    """Bytes by purpose of a rank of one stage."""
    layout, parallel, item, seq = config.layout, config.parallel, weight_bytes(config), config.data.seq_length
    split = parallel.teacher_stage_layers if teacher is None else parallel.student_stage_layers
    trained = Stages.of(student, layout, split)
    parameters = trained.parameters(stage)
    share = layout.share(training.global_batch_size, training.micro_batch_size)
    tokens = seq // layout.cp * training.micro_batch_size
    kept = kept_by_stage(trained, stage, share.num_microbatches, recompute=parallel.recompute)
    found = {
        "weights": item * float(parameters),
        "gradients": 4.0 * parameters,
        # Two moments, and float32 weights beside others.
        "optimizer": (8 if item == 4 else 12)
        * parameters
        / (layout.batch_ranks if parallel.use_distributed_optimizer else 1),
        "activations": item * tokens * kept,
    }
    if teacher is not None:
        own = Stages.of(teacher, layout, parallel.teacher_stage_layers)
        found["teacher"] = item * float(own.parameters(stage))
    if stage == layout.pp - 1:
        if teacher is not None:
            window = min(config.distill.teacher_window or share.num_microbatches, share.num_microbatches)
            found["teacher states"] = item * tokens * teacher.hidden_size * float(window if layout.pp > 1 else 1)
        found["head"] = _head(config, student, tokens, has_teacher=teacher is not None)
    if config.trainer.accelerator is not Accelerator.cpu:
        found["contexts"] = CONTEXTS
    return found


def _beside(distill: DistillConfig) -> int:
    """Matrices of a chunk beside both models' logits: the exponentials that a temperature sets apart; of the other
    divergences what torch makes on its way, two chunks waiting in Jensen-Shannon and top-k sorting 64-bit keys.
    """
    if distill.divergence is DivergenceName.forward_kl:
        return int(distill.temperature != 1.0 and distill.cross_entropy_weight > 0)
    return 6 if distill.divergence in (DivergenceName.jensen_shannon, DivergenceName.top_k_kl) else 4


def _head(config: Config, arch: ModelArch, tokens: int, *, has_teacher: bool) -> float:
    """A chunk's matrices of logits, and the gradients of the head's weight and of the hidden states."""
    item, rows = weight_bytes(config), config.layout.padded_vocab_size(arch) // config.layout.tp
    matrices = 2 + _beside(config.distill) if has_teacher else 1
    # Beside each other while one becomes the other: a product in the weights' type and in float32.
    chunk = min(config.distill.chunk_tokens, tokens) * rows * (4 * matrices + (item if item < 4 else 0))
    return chunk + arch.hidden_size * (rows * (4 + (item if item < 4 else 0)) + 2 * tokens * item)
