"""What a step that runs a model on data goes by: the data it reads, the precision, and all that shapes its result."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_nemo.config.schema import Config, DistillConfig, Precision, identity
from minitron_nemo.config.teachers import running
from minitron_nemo.distributed.ranks import is_main_process, uses_gpu

if TYPE_CHECKING:
    from minitron_nemo.checkpoint.formats.nemo import NemoFolder
    from minitron_nemo.data.blend import Blend


def precision_of(config: Config) -> Precision:
    """What `trainer.precision` means here: `auto` is bf16 on GPU and fp32 on CPU."""
    if config.trainer.precision is not Precision.auto:
        return config.trainer.precision
    return Precision.bf16 if uses_gpu(config.trainer.accelerator.value) else Precision.fp32


def precision_in_words(config: Config) -> str:
    """What models compute in: `bf16`, or `bf16, fp8 hybrid delayed`; what differs in it is not the same result."""
    precision, fp8 = precision_of(config).value, config.trainer.fp8
    return precision if fp8 is None else f"{precision}, fp8 {fp8.value} {config.trainer.fp8_recipe.value}"


def role_of(name: str) -> str:
    """What a teacher is to its student, and among the parents of what it made: `teacher`, or `teacher_NAME`."""
    return f"teacher_{name}" if name else "teacher"


def teacher_paths(section: DistillConfig) -> dict[str, str]:
    """Where the teachers are, by role: one alone, or those with names."""
    if not section.teachers:
        return {role_of(""): str(section.teacher)}
    return {role_of(name): str(teacher.checkpoint) for name, teacher in section.teachers.items()}


def runs_of_teachers(config: Config) -> dict[str, float]:
    """The share of the micro-batches that each teacher runs through, by role; 1 where there is one alone."""
    section = config.distill
    blend = section.blend or config.data.blend
    if not section.teachers:
        return {role_of(""): 1.0}
    runs = running(section.teachers, blend, micro_batch_size=section.training.micro_batch_size)
    return {role_of(name): share for name, share in runs.items()}


def blend_for(
    config: Config, model: "NemoFolder", *, weights: dict[str, float] | None = None, purpose: str = ""
) -> "Blend":
    """What a step reads with this model: `weights`, the blend of its own section, or `data.blend`.

    `purpose` names the recipe where it trains: its samples come in an order of its own.
    """
    from minitron_nemo.data.blend import Blend
    from minitron_nemo.data.tokenizer import load_tokenizer

    return Blend(
        weights=weights or config.data.blend,
        prepared=Path(str(config.prepare_data.output)),
        cache=Path(config.run_dir) / "data_index",
        seq_length=config.data.seq_length,
        split=config.data.split,
        seed=config.seed,
        tokenizer=load_tokenizer(model.tokenizer),
        vocab_size=model.arch.vocab_size,
        verify=is_main_process(),
        purpose=purpose,
        reset_attention_mask=config.data.reset_attention_mask,
    )


def settings_of(section: Any, config: Config, blend: "Blend") -> dict[str, Any]:
    """What shapes the result of a step that runs a model on data: its section, the precision, and what it reads."""
    return {
        **identity(section),
        "precision": precision_in_words(config),
        "data": {**identity(config.data), **blend.identity()},
    }
