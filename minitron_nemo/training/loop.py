"""The one training loop. What it minimizes is an argument."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_nemo.config.schema import TrainingConfig
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.stopping import finishing
from minitron_nemo.engine.schedule import Batch, GetBatch
from minitron_nemo.errors import StoppedError, UserError
from minitron_nemo.losses.output import LOSS, TOKENS
from minitron_nemo.progress import ProgressReporter, progress
from minitron_nemo.training.checkpoints import CheckpointFolder
from minitron_nemo.training.metrics import MetricsWriter, in_words, peak_flops
from minitron_nemo.training.objectives import Objective, batch_sums, means
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
        bar.advance(loss=record[LOSS])
        is_last = position.step == config.max_steps
        if is_last or _is_due(position.step, run.log_every_n_steps):
            speed = _speed(len(seconds) * tokens_per_step / sum(seconds), run)
            metrics.write(step=position.step, **record, **speed)
            seconds.clear()
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
    position = state.position
    learning_rate = state.learning_rate
    state.zero_gradients()
    sums = batch_sums(state.model, batches, objective, groups=run.groups, train=True)
    _refuse_non_finite(sums.values(), position, run.logs)
    grad_norm = state.step()
    _refuse_non_finite([grad_norm], position, run.logs)
    position.advance(samples=run.config.global_batch_size, tokens=int(sums[TOKENS]))
    facts = dict(learning_rate=learning_rate, grad_norm=grad_norm, consumed_tokens=position.consumed_tokens)
    return means(sums) | facts


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
    share = run.groups.layout.share(run.config.global_batch_size, run.config.micro_batch_size)
    return [get(first, share.micro_batch) for first in share.first_samples(run.groups.dp_rank, start=start)]


def _speed(tokens_per_second: float, run: TrainingRun) -> dict[str, float]:
    """Throughput of all ranks, model FLOP/s of one, and its share of the device's peak where that is known."""
    flops = tokens_per_second * run.flops_per_token / run.groups.layout.world_size
    peak = peak_flops(run.groups.device)
    share = {"model_flops_utilization": flops / peak} if peak else {}
    return {"tokens_per_second": tokens_per_second, "model_flops_per_second_per_rank": flops, **share}


def _refuse_non_finite(values: Iterable[float], position: Position, logs: Path) -> None:
    """Stop before anything poisoned is saved: the last training checkpoint stays good."""
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"step {position.step + 1}: the loss or its gradient is not finite (samples from "
            f"{position.consumed_samples}); the last checkpoint is good; lower optim.lr, or look at the data and {logs}"
        )
