"""What a step would do, before anything is allocated: shapes, layout, memory. `dry_run=true` prints it."""

from dataclasses import dataclass
from pathlib import Path

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import Config, TrainingConfig
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.steps.step import Recipe

GIB = 2**30
PATHS = ("source", "checkpoint", "teacher", "importance", "reference", "output")


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run: what is cut, what is left of it, and the teacher of the distillation."""

    cut: ModelArch
    student: ModelArch
    teacher: ModelArch


def shapes(config: Config) -> Shapes:
    """From checkpoints on disk, else from the config."""
    cut = _arch_on_disk(config.prune.checkpoint) or config.model_arch()
    described = config.distill.teacher_model.arch() if config.distill.teacher_model is not None else cut
    return Shapes(cut, config.prune.target.shrink(cut), _arch_on_disk(config.distill.teacher) or described)


def _arch_on_disk(path: str | None) -> ModelArch | None:
    return open_nemo(path).arch if path is not None and Path(path).is_dir() else None


def describe(recipe: Recipe, config: Config) -> str:
    """Shapes, parameter counts, the recipe's own lines and its paths."""
    model = shapes(config)
    lines = [
        f"{recipe.name} of {config.name}: dry run, nothing is allocated or written",
        f"  teacher   {model.teacher.describe()}",
        *([f"  cut from  {model.cut.describe()}"] if model.cut != model.teacher else []),
        f"  student   {model.student.describe()}",
        *recipe.describe(config),
    ]
    section = recipe.section(config)
    for name in PATHS:
        if (value := getattr(section, name, None)) is not None:
            there = " (there)" if Path(value).exists() else ""
            lines.append(f"  {name:<9} {value}{there}")
    return "\n".join(lines)


def weight_lines(config: Config) -> list[str]:
    """Memory of a step that only runs a model forward."""
    weights = shapes(config).cut.num_params() * 2 / config.layout.model_ranks
    return [f"  memory    {weights / GIB:.2f} GiB a rank for bf16 weights"]


def training_lines(config: Config, training: TrainingConfig, *, with_teacher: bool) -> list[str]:
    """Length, compute and memory of a training step; what is trained is the teacher where it does not teach.

    Memory per rank counts weights (teacher and student), float32 gradients, Adam's two moments and the float32
    main weights where weights are bf16 (sharded over data-parallel ranks with the distributed optimizer), one
    micro-batch of activations kept by layer, and the chunk of logits the loss works on. It is an estimate.
    """
    layout, seq, teacher = config.layout, config.data.seq_length, shapes(config).teacher
    trained = shapes(config).student if with_teacher else teacher
    tokens = training.max_steps * training.global_batch_size * seq
    flops = 3 * trained.flops_per_token(seq) + (teacher.flops_per_token(seq) if with_teacher else 0)
    weights = trained.num_params() / layout.model_ranks
    kept = 1 if config.parallel.recompute_activations else 16  # tensors of [s, b, h] kept by layer, a rule of thumb
    states = seq * training.micro_batch_size * trained.hidden_size * trained.num_layers
    parts = {
        "weights": 2 * (weights + with_teacher * teacher.num_params() / layout.model_ranks),
        "gradients": 4 * weights,
        "optimizer": 12 * weights / (layout.dp if config.parallel.use_distributed_optimizer else 1),
        "activations": 2 * kept * states / layout.model_ranks,
        "teacher states": 2 * seq * teacher.hidden_size * _states_held(layout, training) * with_teacher,
        "logits": 12 * config.distill.chunk_tokens * trained.vocab_size / layout.tp,
    }
    memory = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return [
        f"  training  {training.max_steps} steps x {training.global_batch_size} samples = {tokens / 1e9:.3g} B tokens, "
        f"{flops / 1e9:.3g} GFLOP a token",
        f"  memory    {sum(parts.values()) / GIB:.2f} GiB a rank in bf16 (GiB: {memory})",
    ]


def _states_held(layout: Layout, training: TrainingConfig) -> int:
    """Samples whose teacher states wait on the last stage: all of a step in a pipeline, else one micro-batch."""
    share = layout.share(training.global_batch_size, training.micro_batch_size)
    return share.samples if layout.pp > 1 else share.micro_batch
