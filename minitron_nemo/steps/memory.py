"""Bytes that a training step needs on a rank, stage by stage, before anything is allocated.

Weights, gradients and the optimizer's state follow from the table of tensors and are exact but for the padding of
Megatron's buffers. Activations count what the layers of `engine/` keep for the backward pass, good to `TOLERANCE`
(fused layers of Transformer Engine keep less).
"""

import dataclasses
from collections.abc import Sequence

from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.schema import Accelerator, Config, DistillConfig, DivergenceName, Precision, TrainingConfig
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.routes import stage_of
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.taps import pairs_of
from minitron_nemo.steps.stages import Stages
from minitron_nemo.steps.teacher_memory import teacher_states, teacher_weights

TOLERANCE = 0.25  # of the activations
CONTEXTS = 1.5 * 2**30  # bytes on a GPU for CUDA, cuBLAS and NCCL: a round figure, not measured here


def kept_by_layer(arch: ModelArch, layout: Layout, *, recomputed: Sequence[str] = ()) -> float:
    """Elements that a layer keeps of each token until its backward pass, without those of its parts `recomputed`.

    Its input, the normed input and its norm's parts, the queries, keys and values before and after the rotation (and
    between norm and rotation, where queries and keys have norms), the attention and its copy for the projection, the
    same of the second norm, and the MLP's gates, activations and products.
    """
    rotated = (arch.query_size + arch.num_query_groups * arch.kv_channels) * (2 if arch.qk_layernorm else 1)
    attention = arch.query_size if "core_attn" in recomputed else 2 * arch.query_size
    mlp = 0 if "mlp" in recomputed else arch.fc1_size + 2 * arch.ffn_hidden_size
    # Of keys and values those of the whole sequence, gathered from all context-parallel ranks.
    if layout.cp > 1 and "core_attn" not in recomputed:
        attention += 2 * arch.num_query_groups * arch.kv_channels * layout.cp
    return 4 * _stream(arch, layout) + (arch.qkv_size + rotated + attention + mlp) / layout.tp


def _stream(arch: ModelArch, layout: Layout) -> float:
    """Elements of a token between two layers."""
    return arch.hidden_size / (layout.tp if layout.sequence_parallel else 1)


def kept_by_stage(
    trained: Stages, stage: int, num_microbatches: int, *, recompute: Recompute, offloaded: int = 0
) -> float:
    """Elements of each token that wait on a stage at most, and those of the unit that is being recomputed.

    The first `offloaded` layers of every chunk keep nothing.
    """
    arch, layout = trained.arch, trained.layout
    trained = dataclasses.replace(trained, layers=[max(0, layers - offloaded) for layers in trained.layers])
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
    config: Config,
    training: TrainingConfig,
    *,
    student: ModelArch,
    teacher: ModelArch | None,
    others: Sequence[ModelArch] = (),
) -> tuple[int, dict[str, float]]:
    """(stage, bytes by purpose) of the pipeline stage that needs most; without a teacher, nothing is distilled.

    `others` are the teachers beside `teacher`.
    """
    by_stage = [
        stage_memory(config, training, stage, student=student, teacher=teacher, others=others)
        for stage in range(config.layout.pp)
    ]
    most = max(range(len(by_stage)), key=lambda stage: sum(by_stage[stage].values()))
    return most, by_stage[most]


def weight_bytes(config: Config) -> int:
    """Of one weight: 4 where the config asks for float32 or for the CPU, else 2."""
    fp32 = config.trainer.precision is Precision.fp32
    on_cpu = config.trainer.precision is Precision.auto and config.trainer.accelerator is Accelerator.cpu
    return 4 if fp32 or on_cpu else 2


def stage_memory(
    config: Config,
    training: TrainingConfig,
    stage: int,
    *,
    student: ModelArch,
    teacher: ModelArch | None,
    others: Sequence[ModelArch] = (),
) -> dict[str, float]:
    """Bytes by purpose of a rank of one stage. Of several teachers a window may hold the states of all."""
    layout, parallel, item, seq = config.layout, config.parallel, weight_bytes(config), config.data.seq_length
    split = parallel.teacher_stage_layers if teacher is None else parallel.student_stage_layers
    trained = Stages.of(student, layout, split)
    parameters = trained.parameters(stage)
    share = layout.share(training.global_batch_size, training.micro_batch_size)
    tokens = seq // layout.cp * training.micro_batch_size
    kept = kept_by_stage(
        trained,
        stage,
        share.num_microbatches,
        recompute=parallel.recompute,
        offloaded=parallel.cpu_offloading_num_layers,
    )
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
        teachers = (teacher, *others)
        found["teacher"] = sum(teacher_weights(config, each, stage, item=item).device for each in teachers)
        window = min(config.distill.teacher_window or share.num_microbatches, share.num_microbatches)
        if config.distill.hidden_states.any:
            waiting = item * tokens * float(window if layout.pp > 1 else 1)
            found["hidden states"] = _hidden_states(config, trained, teacher, stage, waiting=waiting)
        if stage == layout.pp - 1:
            hidden = sum(each.hidden_size for each in teachers)
            found["teacher states"] = item * tokens * hidden * float(teacher_states(config, window))
    if stage == layout.pp - 1:
        found["head"] = _head(config, student, tokens, has_teacher=teacher is not None)
    if config.trainer.accelerator is not Accelerator.cpu:
        found["contexts"] = CONTEXTS
    return found


def _hidden_states(config: Config, trained: Stages, teacher: ModelArch, stage: int, *, waiting: float) -> float:
    """Those of the teacher that wait where they are compared, `waiting` bytes of each channel, and the map in float32
    with its gradient and Adam's moments. Left out: attention and MLP outputs that the student keeps for this alone.
    """
    section, layout, width = config.distill.hidden_states, trained.layout, trained.arch.hidden_size
    layers = section.student_layers or range(1, trained.arch.num_layers + 1)
    pairs = pairs_of([kind.value for kind in section.kinds], dict.fromkeys((layer - 1 for layer in layers), 0))
    here = sum(stage_of(pair.student, trained.layers, stages=layout.pp) == stage for pair in pairs)
    state_map = 0 if width == teacher.hidden_size else 16.0 * width * teacher.hidden_size
    return here * waiting * _stream(teacher, layout) + state_map


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
