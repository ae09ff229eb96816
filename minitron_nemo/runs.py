"""What training recipes share: the engine and data a config asks for, and one run from a checkpoint to a `.nemo`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minitron_nemo.checkpoint.nemo import NemoFolder, open_nemo
from minitron_nemo.cli import Job
from minitron_nemo.config import Config, CorrectTeacherConfig, DistillConfig, Precision
from minitron_nemo.data.blend import batch, build_datasets
from minitron_nemo.data.corpus_files import check_corpus, content_fingerprint, find_corpus
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.engine.model import Engine, build_model, engine_choice
from minitron_nemo.engine.optimizer import prepare_training
from minitron_nemo.engine.schedule import Batch, Objective
from minitron_nemo.engine.state import CheckpointFolder, save_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import Groups, check_divides, stage_layers
from minitron_nemo.train import GetBatch, TrainingRun, logger, train

TrainingSection = CorrectTeacherConfig | DistillConfig


def engine_of(config: Config, groups: Groups, *, layers: list[int] | None = None) -> Engine:
    """How models are built on this rank under this config; `layers` is the model's pipeline split."""
    precision = config.trainer.precision
    bf16 = precision == Precision.bf16 or (precision == Precision.auto and groups.device.type == "cuda")
    return Engine(
        groups=groups,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        recompute_activations=config.parallel.recompute_activations,
        stage_layers=layers,
    )


def layout_of(config: Config, engine: Engine) -> str:
    """What must stay the same for a training checkpoint to be resumed, in words."""
    groups = engine.groups
    return (
        f"tensor {groups.tp_size}, pipeline {groups.pp_size} (layers {engine.stage_layers or 'even'}), "
        f"data {groups.dp_size}, sequence_parallel {groups.sequence_parallel}, "
        f"use_distributed_optimizer {config.parallel.use_distributed_optimizer}, {engine.dtype}"
    )


def check_model(config: Config, name: str, model: NemoFolder, *, layers: list[int] | None = None) -> None:
    """Refuse a layout or a sequence length that the model does not fit, before any rank starts."""
    check_divides(name, model.arch, tp=config.parallel.tensor_model_parallel_size)
    stage_layers(model.arch.num_layers, config.parallel.pipeline_model_parallel_size, layers)
    if config.data.seq_length > model.arch.seq_length:
        raise UserError(
            f"data.seq_length={config.data.seq_length}: the {name} {model.path} was made for at most "
            f"{model.arch.seq_length} positions"
        )


def check_samples(config: Config, name: str, *, num_samples: int, micro_batch_size: int) -> None:
    """Refuse a number of samples that does not divide over micro-batches and ranks: none is left out in silence."""
    parallel, trainer = config.parallel, config.trainer
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    step = micro_batch_size * (trainer.devices * trainer.num_nodes // model_ranks)
    if num_samples % step:
        raise UserError(
            f"{name}.num_samples={num_samples}: must be a multiple of micro_batch_size x data-parallel ranks = {step}"
        )


def require_same_tokenizer(student: NemoFolder, teacher: NemoFolder) -> None:
    """Refuse two models whose token ids mean different things."""
    if student.arch.vocab_size != teacher.arch.vocab_size:
        raise UserError(
            f"{student.path} has a vocabulary of {student.arch.vocab_size}, {teacher.path} one of "
            f"{teacher.arch.vocab_size}: distillation compares token by token, so both need the same tokenizer"
        )
    ours, theirs = load_tokenizer(student.tokenizer), load_tokenizer(teacher.tokenizer)
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"{student.path} and {teacher.path} carry different tokenizers ({ours.fingerprint[:12]}, "
            f"{theirs.fingerprint[:12]}): prune the student from this teacher, or give the teacher it came from"
        )


def check_data(config: Config, blend: dict[str, float] | None, model: NemoFolder) -> dict[str, Any]:
    """Refuse a corpus that is missing or made with another tokenizer; what identifies the data read."""
    blend = blend or config.data.blend
    if not blend:
        raise UserError("data.blend is empty: name at least one corpus and its weight, such as +data.blend.text=1.0")
    tokenizer = load_tokenizer(model.tokenizer)
    content = {}
    for name in sorted(blend):
        prefix = find_corpus(name, Path(str(config.prepare_data.output)))
        check_corpus(prefix, tokenizer=tokenizer, vocab_size=model.arch.vocab_size)
        content[name] = content_fingerprint(prefix)
    return dict(
        blend=blend, corpora=content, seq_length=config.data.seq_length, split=config.data.split, seed=config.seed
    )


def data_arguments(config: Config, blend: dict[str, float] | None, model: NemoFolder) -> dict[str, Any]:
    """The arguments that `build_datasets` and `calibration_set` share."""
    return dict(
        blend=blend or config.data.blend,
        prepared=Path(str(config.prepare_data.output)),
        cache=Path(config.run_dir) / "data_index",
        seed=config.seed,
        tokenizer=load_tokenizer(model.tokenizer),
        vocab_size=model.arch.vocab_size,
    )


def batches_on(device: torch.device, dataset: Any) -> GetBatch:
    """Reads micro-batches of a dataset onto the rank's device, by number of the first sample."""

    def get(first: int, count: int) -> Batch:
        return {name: x.to(device) for name, x in batch(dataset, range(first, first + count)).items()}

    return get


def training_job(
    config: Config,
    section: TrainingSection,
    *,
    model: NemoFolder,
    layers: list[int] | None,
    parents: dict[str, Path],
    settings: dict[str, Any] | None = None,
) -> Job:
    """The job of a recipe that trains `section.checkpoint` into `section.output`; validates data and layout."""
    check_model(config, "model", model, layers=layers)
    values = dataclasses.asdict(section.training)
    for name in ("micro_batch_size", "save_every_n_steps", "save_top_k", "val_check_interval", "limit_val_batches"):
        values.pop(name)  # they change how a run goes, not what it makes
    return Job(
        output=Path(str(section.output)),
        kind="model",
        settings={
            "training": values,
            "precision": config.trainer.precision.value,
            "data": check_data(config, section.blend, model),
            **(settings or {}),
        },
        parents=parents,
    )


def train_model(
    config: Config,
    job: Job,
    groups: Groups,
    *,
    section: TrainingSection,
    layers: list[int] | None,
    objective: Callable[[Engine], Objective],
    teacher_flops_per_token: float = 0.0,
) -> None:
    """Load the section's checkpoint, train it with the objective and publish the result as the job's `.nemo`."""
    source, training = open_nemo(str(section.checkpoint)), section.training
    engine = engine_of(config, groups, layers=layers)
    logger.info(engine_choice(groups.device, engine.dtype))
    model = build_model(source.arch, engine)
    load_weights(model, source, groups)
    datasets = build_datasets(
        config.data,
        num_train=training.max_steps * training.global_batch_size,
        num_valid=max(1, training.limit_val_batches) * training.global_batch_size,
        **data_arguments(config, section.blend, source),
    )
    name = job.output.name.removesuffix(".nemo")
    run = TrainingRun(
        name=name,
        training=prepare_training(
            model,
            training.optim,
            max_steps=training.max_steps,
            distributed=config.parallel.use_distributed_optimizer,
        ),
        config=training,
        groups=groups,
        checkpoints=CheckpointFolder(
            Path(config.run_dir) / "checkpoints" / name,
            job.fingerprint,
            source.arch,
            groups,
            layout=layout_of(config, engine),
            keep=training.save_top_k,
        ),
        logs=Path(config.run_dir) / "logs" / name,
        train_batch=batches_on(groups.device, datasets[0]),
        valid_batch=batches_on(groups.device, datasets[1]),
        seq_length=config.data.seq_length,
        flops_per_token=3 * source.arch.flops_per_token(config.data.seq_length) + teacher_flops_per_token,
        log_every_n_steps=config.trainer.log_every_n_steps,
    )
    end = train(run, objective(engine))
    save_model(
        job.output,
        run.training.model,
        source.arch,
        groups,
        tokenizer=source.tokenizer,
        tokens=end.consumed_tokens,
        origin=job.origin,
    )
