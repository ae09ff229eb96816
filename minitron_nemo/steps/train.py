"""One training run, from a checkpoint to a published `.nemo`: what correction and distillation share."""

import logging
from functools import partial
from pathlib import Path

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import NemoFolder
from minitron_nemo.config.schema import TrainingConfig
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.datasets import batches_on, build_datasets
from minitron_nemo.data.sample_ids import sample_ids
from minitron_nemo.engine.accelerations import start_tp_comm_overlap
from minitron_nemo.engine.model import BuildOptions, build_model, engine_choice
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.training.checkpoints import CheckpointFolder, save_model
from minitron_nemo.training.loop import TrainingRun, train
from minitron_nemo.training.objectives import Objective
from minitron_nemo.training.start_checks import check_teacher
from minitron_nemo.training.state import TrainState

logger = logging.getLogger(__name__)


def train_model(
    source: NemoFolder,
    output: Path,
    *,
    objective: Objective,
    options: BuildOptions,
    blend: Blend,
    training: TrainingConfig,
    run_dir: Path,
    origin: Origin,
    check_teachers: bool = False,
    log_every_n_steps: int = 10,
    warn_after_seconds: float = 300,
) -> None:
    """Load a model, train it with the objective and publish the result as the `.nemo` `output`; on all ranks.

    Training checkpoints and logs go under `run_dir`; a run of the same origin that was stopped goes on from its newest
    checkpoint. With `check_teachers` the objective's teachers are refused that cannot teach, before the first step.
    """
    groups, arch, name = options.groups, source.arch, output.name.removesuffix(".nemo")
    model = build_model(arch, options)
    start_tp_comm_overlap(model.config, groups, seq_length=blend.seq_length, micro_batch_size=training.micro_batch_size)
    load_weights(model, source.weights, groups)
    train_data, valid_data = build_datasets(
        blend,
        num_train=training.max_steps * training.global_batch_size,
        num_valid=training.limit_val_batches * training.global_batch_size,
    )
    assert train_data is not None
    assert valid_data is not None
    state = TrainState.start(
        model, training.optim, max_steps=training.max_steps, options=options, beside=objective.hidden_states
    )
    engine = engine_choice(groups.device, options.dtype, state.optimizer)
    logger.info(f"{engine}, {objective.runs_in_words(groups.device)}")
    train_batch = batches_on(groups.device, train_data, documents=blend.reset_attention_mask)
    valid_batch = batches_on(groups.device, valid_data, documents=blend.reset_attention_mask)
    for who, teacher in objective.teachers().items() if check_teachers else ():
        check_teacher(teacher, name=who, batch=valid_batch, micro_batch_size=training.micro_batch_size)
    folder = run_dir / "checkpoints" / name
    checkpoints = _checkpoints(folder, arch, options, training=training, origin=origin, objective=objective.in_words)
    run = TrainingRun(
        name=name,
        config=training,
        groups=groups,
        checkpoints=checkpoints,
        logs=run_dir / "logs" / name,
        train_batch=train_batch,
        valid_batch=valid_batch,
        seq_length=blend.seq_length,
        flops_per_token=objective.flops_per_token(arch, blend.seq_length),
        teacher_flops_per_token=objective.teacher_flops_per_token(blend.seq_length),
        sample_ids=partial(sample_ids, train_data, sources=blend.sources),
        log_every_n_steps=log_every_n_steps,
        warn_after_seconds=warn_after_seconds,
    )
    train(run, state, objective)
    tokens = state.position.consumed_tokens
    save_model(output, state.model, arch, groups, tokenizer=source.tokenizer, tokens=tokens, origin=origin)


def _checkpoints(
    folder: Path,
    arch: ModelArch,
    options: BuildOptions,
    *,
    training: TrainingConfig,
    origin: Origin,
    objective: str,
) -> CheckpointFolder:
    return CheckpointFolder(
        folder,
        origin.fingerprint,
        arch,
        options.groups,
        layout=layout_in_words(options),
        keep=training.keep_latest_k,
        optimizer_copies=1 if options.distributed_optimizer else options.groups.layout.batch_ranks,
        objective=objective,
        parents=origin.parents,
        overwrite=origin.overwrite,
    )


def layout_in_words(options: BuildOptions) -> str:
    """What must stay the same for a training checkpoint to be resumed."""
    layout = options.groups.layout
    context = f"context {layout.cp}, " if layout.cp > 1 else ""
    virtual = f" x {layout.vpp} chunks" if layout.vpp > 1 else ""
    return (
        f"tensor {layout.tp}, pipeline {layout.pp}{virtual} (layers {options.stage_layers or 'even'}), "
        f"{context}data {layout.dp}, sequence_parallel {layout.sequence_parallel}, "
        f"use_distributed_optimizer {options.distributed_optimizer}, {options.dtype}"
    )
