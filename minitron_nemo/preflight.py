"""What a step would do, before anything is allocated: shapes, layout, memory. `dry_run=true` prints it."""

from pathlib import Path

from minitron_nemo.arch import ModelArch
from minitron_nemo.checkpoint.nemo import open_nemo
from minitron_nemo.config import Config, TrainingConfig
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import check_divides, stage_layers

GIB = 2**30


def teacher_arch(config: Config) -> ModelArch:
    """The shape that is cut: the checkpoint's when it is on disk, else the config's `model`."""
    path = Path(str(config.prune.checkpoint))
    return open_nemo(path).arch if path.is_dir() else config.model.arch()


def describe(config: Config, recipe: str) -> str:
    """Shapes, parameter counts, layout and estimated memory of a recipe, as text; refuses what cannot be laid out.

    Memory per rank counts weights (teacher and student), float32 gradients, Adam's two moments and the float32
    master weights where weights are bf16 (sharded over data-parallel ranks with the distributed optimizer), one
    micro-batch of activations kept by layer, and the chunk of logits the loss works on. It is an estimate.
    """
    teacher = teacher_arch(config)
    student = config.prune.target.shrink(teacher)
    parallel, trainer = config.parallel, config.trainer
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, arch, asked in (
        ("teacher", teacher, config.distill.teacher_stage_layers),
        ("student", student, parallel.pipeline_stage_layers),
    ):
        check_divides(name, arch, tp=tp)
        _check_stages(name, arch, pp=pp, asked=asked)
    world = trainer.devices * trainer.num_nodes
    lines = [
        f"{recipe} of {config.name}: dry run, nothing is allocated or written",
        f"  teacher   {teacher.describe()}",
        f"  student   {student.describe()}",
        f"  layout    {trainer.num_nodes} node(s) x {trainer.devices} ranks: tensor {tp}, pipeline {pp}, "
        f"data {world // (tp * pp)}" + (", sequence parallel" if parallel.sequence_parallel else ""),
        f"  data      {_blend(config)}, {config.data.seq_length} tokens a sample",
    ]
    if recipe in ("correct_teacher", "distill"):
        training = config.distill.training if recipe == "distill" else config.correct_teacher.training
        lines += _training_lines(config, training, teacher, student if recipe == "distill" else None)
    else:
        lines.append(f"  memory    {teacher.num_params() * 2 / (tp * pp) / GIB:.2f} GiB a rank for bf16 weights")
    section = getattr(config, recipe, None)
    for name in ("source", "checkpoint", "teacher", "importance", "reference", "output"):
        if (value := getattr(section, name, None)) is not None:
            there = " (there)" if Path(value).exists() else ""
            lines.append(f"  {name:<9} {value}{there}")
    return "\n".join(lines)


def _check_stages(name: str, arch: ModelArch, *, pp: int, asked: list[int] | None) -> None:
    try:
        stage_layers(arch.num_layers, pp, asked)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _blend(config: Config) -> str:
    total = sum(config.data.blend.values())
    return ", ".join(f"{weight / total:.0%} {name}" for name, weight in config.data.blend.items()) or "no blend"


def _training_lines(
    config: Config, training: TrainingConfig, teacher: ModelArch, student: ModelArch | None
) -> list[str]:
    """Length, compute and memory of a training step; the trained model is the teacher when there is no student."""
    parallel = config.parallel
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    data_ranks = config.trainer.devices * config.trainer.num_nodes // model_ranks
    trained = student or teacher
    seq = config.data.seq_length
    tokens = training.max_steps * training.global_batch_size * seq
    flops = 3 * trained.flops_per_token(seq) + (teacher.flops_per_token(seq) if student else 0)
    optimizer_shards = data_ranks if parallel.use_distributed_optimizer else 1
    weights = trained.num_params() / model_ranks
    kept = 1 if parallel.recompute_activations else 16  # tensors of [s, b, h] kept by layer, a rule of thumb
    parts = {
        "weights": 2 * (weights + (teacher.num_params() / model_ranks if student else 0)),
        "gradients": 4 * weights,
        "optimizer": 12 * weights / optimizer_shards,
        "activations": 2 * kept * seq * training.micro_batch_size * trained.hidden_size * trained.num_layers / model_ranks,
        "logits": 12 * config.distill.chunk_tokens * trained.vocab_size / parallel.tensor_model_parallel_size,
    }  # fmt: skip
    memory = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return [
        f"  training  {training.max_steps} steps x {training.global_batch_size} samples = {tokens / 1e9:.3g} B tokens, "
        f"{flops / 1e9:.3g} GFLOP a token",
        f"  memory    {sum(parts.values()) / GIB:.2f} GiB a rank in bf16 (GiB: {memory})",
    ]
