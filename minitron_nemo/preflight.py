"""What a step would do, before anything is allocated: shapes, layout, memory. `dry_run=true` prints it."""

from pathlib import Path

from minitron_nemo.arch import ModelArch
from minitron_nemo.checkpoint.nemo import open_nemo
from minitron_nemo.config import Config, TrainingConfig
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import check_divides, stage_layers

GIB = 2**30


def shapes(config: Config) -> tuple[ModelArch, ModelArch, ModelArch]:
    """(what is cut, the student, the teacher of the distillation): from checkpoints on disk, else from the config."""
    cut = _arch_on_disk(config.prune.checkpoint) or config.model.arch()
    student = config.prune.target.shrink(cut)
    described = config.distill.teacher_model.arch() if config.distill.teacher_model is not None else cut
    return cut, student, _arch_on_disk(config.distill.teacher) or described


def _arch_on_disk(path: str | None) -> ModelArch | None:
    return open_nemo(path).arch if path is not None and Path(path).is_dir() else None


def describe(config: Config, recipe: str) -> str:
    """Shapes, parameter counts, layout and estimated memory of a recipe, as text; refuses what cannot be laid out.

    Memory per rank counts weights (teacher and student), float32 gradients, Adam's two moments and the float32
    master weights where weights are bf16 (sharded over data-parallel ranks with the distributed optimizer), one
    micro-batch of activations kept by layer, and the chunk of logits the loss works on. It is an estimate.
    """
    cut, student, teacher = shapes(config)
    parallel, trainer = config.parallel, config.trainer
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, arch, asked in (
        ("teacher", teacher, parallel.teacher_stage_layers),
        ("student", student, parallel.student_stage_layers),
    ):
        check_divides(name, arch, tp=tp)
        _check_stages(name, arch, pp=pp, asked=asked)
    world = trainer.devices * trainer.num_nodes
    lines = [
        f"{recipe} of {config.name}: dry run, nothing is allocated or written",
        f"  teacher   {teacher.describe()}",
        *([f"  cut from  {cut.describe()}"] if cut != teacher else []),
        f"  student   {student.describe()}",
        f"  layout    {trainer.num_nodes} node(s) x {trainer.devices} ranks: tensor {tp}, pipeline {pp}, "
        f"data {world // (tp * pp)}" + (", sequence parallel" if parallel.sequence_parallel else ""),
        f"  data      {_blend(config, recipe)}, {config.data.seq_length} tokens a sample",
    ]
    if recipe == "correct_teacher":
        lines += _training_lines(config, config.correct_teacher.training, teacher, None)
    elif recipe == "distill":
        lines += _training_lines(config, config.distill.training, teacher, student)
    else:
        lines.append(f"  memory    {cut.num_params() * 2 / (tp * pp) / GIB:.2f} GiB a rank for bf16 weights")
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


def _blend(config: Config, recipe: str) -> str:
    blend = getattr(getattr(config, recipe, None), "blend", None) or config.data.blend
    total = sum(blend.values())
    return ", ".join(f"{weight / total:.0%} {name}" for name, weight in blend.items()) or "no blend"


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
    states = seq * training.micro_batch_size * trained.hidden_size * trained.num_layers
    parts = {
        "weights": 2 * (weights + (teacher.num_params() / model_ranks if student else 0)),
        "gradients": 4 * weights,
        "optimizer": 12 * weights / optimizer_shards,
        "activations": 2 * kept * states / model_ranks,
        "teacher states": 2 * seq * teacher.hidden_size * _states_held(config, training, data_ranks) * bool(student),
        "logits": 12 * config.distill.chunk_tokens * trained.vocab_size / parallel.tensor_model_parallel_size,
    }  # fmt: skip
    memory = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return [
        f"  training  {training.max_steps} steps x {training.global_batch_size} samples = {tokens / 1e9:.3g} B tokens, "
        f"{flops / 1e9:.3g} GFLOP a token",
        f"  memory    {sum(parts.values()) / GIB:.2f} GiB a rank in bf16 (GiB: {memory})",
    ]


def _states_held(config: Config, training: TrainingConfig, data_ranks: int) -> int:
    """Samples whose teacher states wait on the last stage: all of a step in a pipeline, else one micro-batch."""
    if config.parallel.pipeline_model_parallel_size > 1:
        return training.global_batch_size // data_ranks
    return training.micro_batch_size
