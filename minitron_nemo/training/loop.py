"""The one training loop. What it minimizes is an argument."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitron_nemo.config.schema import OnNonFinite, TrainingConfig
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.stopping import finishing
from minitron_nemo.engine.schedule import Batch, GetBatch
from minitron_nemo.errors import StoppedError, UserError
from minitron_nemo.losses.output import LOSS, TOKENS
from minitron_nemo.progress import ProgressReporter, progress
from minitron_nemo.training.checkpoints import CheckpointFolder
from minitron_nemo.training.metrics import MetricsWriter, in_words, peak_flops, peak_memory
from minitron_nemo.training.non_finite import GetSampleIds, all_finite, find
from minitron_nemo.training.objectives import Objective, batch_sums, means, micro_batch_sums, over_batch
from minitron_nemo.training.read_ahead import ReadAhead
from minitron_nemo.training.state import Position, TrainState
from minitron_nemo.training.watch import watching

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """All the loop needs besides the state and the objective."""

    name: str
    config: TrainingConfig
    groups: Groups
    checkpoints: CheckpointFolder
    logs: Path
    train_batch: GetBatch
    valid_batch: GetBatch
    seq_length: int
    flops_per_token: float  # of a training step, teacher included
    teacher_flops_per_token: float = 0.0
    sample_ids: GetSampleIds | None = None
    log_every_n_steps: int = 10
    warn_after_seconds: float = 300


def train(run: TrainingRun, state: TrainState, objective: Objective) -> None:
    """Train to `max_steps`, resuming where a stopped run was.

    Raises StoppedError when it was asked to stop, after the step that it was in is saved.
    """
    with run.checkpoints.locked():
        run.checkpoints.resume(state)
        run.checkpoints.check_space(_saves_left(run, state.position.step))
        position = state.position
        metrics = MetricsWriter(run.logs, resumed_step=position.step, enabled=run.groups.is_main)
        tokens_per_step = run.config.global_batch_size * run.seq_length
        steps = progress(
            run.config.max_steps,
            run.name,
            of=(tokens_per_step, "token"),
            done=position.step,
            enabled=run.groups.is_main,
        )
        _say_warmup(run)
        with (
            finishing() as asked,
            closing(metrics),
            watching(lambda: position.step, groups=run.groups, seconds=run.warn_after_seconds),
            steps as bar,
            ReadAhead(lambda start: _micro_batches(run, run.train_batch, start)) as ahead,
        ):
            _train(run, state, objective, ahead=ahead, metrics=metrics, bar=bar, asked=asked)


def _train(
    run: TrainingRun,
    state: TrainState,
    objective: Objective,
    *,
    ahead: ReadAhead[list[Batch]],
    metrics: MetricsWriter,
    bar: ProgressReporter,
    asked: Callable[[], bool],
) -> None:
    """The steps from the state's position on: train, log, validate, save, stop when `asked`."""
    config, position = run.config, state.position
    tokens_per_step = config.global_batch_size * run.seq_length
    seconds: list[float] = []  # of the steps since the last record
    saved = time.monotonic()
    while position.step < config.max_steps:
        started = time.monotonic()
        batches = ahead.take(position.consumed_samples, then=_samples_after(position, config))
        record = train_step(run, state, objective, batches)
        seconds.append(time.monotonic() - started)
        bar.advance(**{name: value for name, value in record.items() if name == LOSS})
        is_last = position.step == config.max_steps
        if is_last or _is_due(position.step, run.log_every_n_steps):
            speed = _speed(len(seconds) * tokens_per_step / sum(seconds), run)
            (most,) = run.groups.largest(peak_memory(run.groups.device))
            metrics.write(step=position.step, **record, **speed, peak_memory_bytes=int(most))
            seconds.clear()
        elif position.skipped_in_a_row:
            metrics.write(step=position.step, **record)
        if config.val_check_interval and (is_last or _is_due(position.step, config.val_check_interval)):
            validation = validate(run, state, objective)
            logger.info(f"{run.name}: step {position.step}: validation {in_words(validation)}")
            losses = {f"val_{name}": value for name, value in validation.items()}
            metrics.write(step=position.step, consumed_tokens=position.consumed_tokens, **losses)
        late = run.groups.is_main and 0 < config.save_every_n_minutes * 60 <= time.monotonic() - saved
        stop, late = run.groups.any_rank(asked(), late)
        if stop or (late or _is_due(position.step, config.save_every_n_steps)) and not is_last:
            run.checkpoints.save(state)
            saved = time.monotonic()
        if stop:
            raise StoppedError(f"{run.name} at step {position.step} of {config.max_steps}, saved as asked")


def _say_warmup(run: TrainingRun) -> None:
    optim, max_steps = run.config.optim, run.config.max_steps
    if run.groups.is_main and (warmup := optim.warmup_in(max_steps)) < optim.warmup_steps:
        logger.warning(
            f"{run.name}: optim.warmup_steps={optim.warmup_steps} is cut to {warmup}: the run has {max_steps} steps"
        )


def _saves_left(run: TrainingRun, step: int) -> int:
    """How many training checkpoints are to come at most, those by time counted as one."""
    config = run.config
    by_steps = (config.max_steps - 1) // config.save_every_n_steps if config.save_every_n_steps else 0
    before = step // config.save_every_n_steps if config.save_every_n_steps else 0
    return max(0, by_steps - before) + (config.save_every_n_minutes > 0)


def _samples_after(position: Position, config: TrainingConfig) -> int | None:
    """Where the batches of the step after this one begin; None with the last."""
    return position.consumed_samples + config.global_batch_size if position.step + 1 < config.max_steps else None


def train_step(run: TrainingRun, state: TrainState, objective: Objective, batches: list[Batch]) -> dict[str, float]:
    """One global batch: forward, backward, clip, step. Moves the position on and returns the record of the step.

    `batches` are this data-parallel rank's micro-batches of it.
    """
    position, learning_rate = state.position, state.learning_rate
    state.zero_gradients()
    by_micro_batch = micro_batch_sums(state.model, batches, objective, train=True)
    sums = over_batch(by_micro_batch, objective, groups=run.groups, train=True)
    skips = run.config.on_non_finite is OnNonFinite.skip
    # Only a run that may skip asks before the optimizer is given the gradient: the norm is then worked out twice.
    is_finite = all_finite(sums) and (not skips or math.isfinite(state.gradient_norm()))
    found: dict[str, float] = {}
    if is_finite:
        found = means(sums) | dict(grad_norm=state.step())
        is_finite = math.isfinite(found["grad_norm"])
    if is_finite:
        position.advance(samples=run.config.global_batch_size, tokens=int(sums[TOKENS]))
    else:
        _stop_or_skip(run, state, by_micro_batch, total=sums)
    skipped = dict(skipped_steps=position.skipped_steps) if skips else {}
    return found | skipped | dict(learning_rate=learning_rate, consumed_tokens=position.consumed_tokens)


def _stop_or_skip(
    run: TrainingRun, state: TrainState, by_micro_batch: list[dict[str, Tensor]], *, total: dict[str, float]
) -> None:
    """Of a step that is not finite: drop the gradient and go on, where that is allowed; else stop.

    A run stops before anything poisoned is saved: the last training checkpoint stays good.
    """
    config, position = run.config, state.position
    first_samples = _first_samples(run, position.consumed_samples)
    samples = [range(first, first + config.micro_batch_size) for first in first_samples]
    found = find(position.step + 1, by_micro_batch, samples=samples, groups=run.groups, ids=run.sample_ids, total=total)
    if run.groups.is_main:
        found.write(run.logs)
    allowed = config.max_skipped_steps if config.on_non_finite is OnNonFinite.skip else 0
    if position.skipped_in_a_row >= allowed:
        raise UserError(
            f"{found}{f', after {allowed} skipped steps' if allowed else ''}; the last checkpoint is good; lower "
            f"optim.lr, look at the samples (all in {run.logs}), or "
            f"{'raise max_skipped_steps' if allowed else 'go on from there with on_non_finite=skip'}"
        )
    state.skip()
    position.skip(samples=config.global_batch_size)
    if run.groups.is_main:
        logger.warning(
            f"{run.name}: {found}: its gradient is dropped, {position.skipped_in_a_row} in a row of at most {allowed}"
        )


def _is_due(step: int, interval: int) -> bool:
    """Every `interval` steps; never when it is 0."""
    return interval > 0 and step % interval == 0


def validate(run: TrainingRun, state: TrainState, objective: Objective) -> dict[str, float]:
    """The losses on the first `limit_val_batches` global batches of held-out data."""
    total: Counter[str] = Counter()
    with torch.no_grad():
        for index in range(run.config.limit_val_batches):
            batches = _micro_batches(run, run.valid_batch, index * run.config.global_batch_size)
            total.update(batch_sums(state.model, batches, objective, groups=run.groups, train=False))
    return means(total)


def _micro_batches(run: TrainingRun, get: GetBatch, start: int) -> list[Batch]:
    """This data-parallel rank's share of the global batch that starts at sample `start`."""
    return [get(first, run.config.micro_batch_size) for first in _first_samples(run, start)]


def _first_samples(run: TrainingRun, start: int) -> Sequence[int]:
    """The first sample of each of these micro-batches."""
    share = run.groups.layout.share(run.config.global_batch_size, run.config.micro_batch_size)
    return share.first_samples(run.groups.dp_rank, start=start)


def _speed(tokens_per_second: float, run: TrainingRun) -> dict[str, float]:
    """Throughput of all ranks; of one rank model FLOP/s, the teacher's and the student's part of them, and their share
    of the device's peak where that is known.
    """
    each = tokens_per_second / run.groups.layout.world_size
    flops, teacher = each * run.flops_per_token, each * run.teacher_flops_per_token
    peak = peak_flops(run.groups.device)
    share = {"model_flops_utilization": flops / peak} if peak else {}
    split = dict(student_flops_per_second_per_rank=flops - teacher, teacher_flops_per_second_per_rank=teacher)
    return {
        "tokens_per_second": tokens_per_second,
        "model_flops_per_second_per_rank": flops,
        **(split if teacher else {}),
        **share,
    }
