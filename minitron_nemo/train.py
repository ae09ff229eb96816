"""The one training loop. What it minimizes is an argument."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitron_nemo.config import TrainingConfig
from minitron_nemo.engine.optimizer import Optimization
from minitron_nemo.engine.schedule import Batch, Objective, run_batch
from minitron_nemo.engine.state import CheckpointFolder, Position
from minitron_nemo.errors import UserError
from minitron_nemo.metrics import MetricsWriter, peak_flops
from minitron_nemo.parallel import Groups
from minitron_nemo.progress import progress

logger = logging.getLogger(__name__)

GetBatch = Callable[[int, int], Batch]  # (first sample, count) -> a micro-batch


@dataclass(frozen=True)
class TrainingRun:
    """All the loop needs besides the objective."""

    name: str
    training: Optimization
    config: TrainingConfig
    groups: Groups
    checkpoints: CheckpointFolder
    logs: Path
    train_batch: GetBatch
    valid_batch: GetBatch
    seq_length: int
    flops_per_token: float  # of a training step, teacher included
    log_every_n_steps: int = 10


def train(run: TrainingRun, objective: Objective) -> Position:
    """Train to `max_steps`, resuming where a stopped run was; returns where it ended."""
    config, groups = run.config, run.groups
    position = run.checkpoints.resume(run.training)
    metrics = MetricsWriter(run.logs, resumed_step=position.step, enabled=groups.is_main)
    tokens_per_step = config.global_batch_size * run.seq_length
    total, done = config.max_steps * tokens_per_step, position.step * tokens_per_step
    seconds: list[float] = []  # of the steps since the last record
    with progress(total, run.name, unit="token", done=done, enabled=groups.is_main) as bar:
        while position.step < config.max_steps:
            started = time.monotonic()
            record = train_step(run, objective, position)
            seconds.append(time.monotonic() - started)
            bar.advance(tokens_per_step, loss=record["loss"])
            is_last = position.step == config.max_steps
            if is_last or _is_due(position.step, run.log_every_n_steps):
                speed = _speed(len(seconds) * tokens_per_step / sum(seconds), run)
                metrics.write(step=position.step, **record, **speed)
                seconds.clear()
            if config.val_check_interval and (is_last or _is_due(position.step, config.val_check_interval)):
                losses = {f"val_{name}": value for name, value in validate(run, objective).items()}
                metrics.write(step=position.step, consumed_tokens=position.consumed_tokens, **losses)
            if _is_due(position.step, config.save_every_n_steps) and not is_last:
                run.checkpoints.save(run.training, position)
    metrics.close()
    return position


def train_step(run: TrainingRun, objective: Objective, position: Position) -> dict[str, float]:
    """One global batch: forward, backward, clip, step. Moves `position` on and returns the record of the step."""
    batches = _micro_batches(run, run.train_batch, position.consumed_samples)
    learning_rate = run.training.learning_rate
    run.training.zero_gradients()
    sums = run_batch(run.training.model, batches, objective, groups=run.groups, train=True)
    _refuse_non_finite(sums.tolist(), position, run.logs)
    grad_norm = run.training.step()
    _refuse_non_finite([grad_norm], position, run.logs)
    position.step += 1
    position.consumed_samples += run.config.global_batch_size
    position.consumed_tokens += int(sums[0])
    state = dict(learning_rate=learning_rate, grad_norm=grad_norm, consumed_tokens=position.consumed_tokens)
    return _losses(sums, objective) | state


def _is_due(step: int, interval: int) -> bool:
    """Every `interval` steps; never when it is 0."""
    return interval > 0 and step % interval == 0


def validate(run: TrainingRun, objective: Objective) -> dict[str, float]:
    """The losses on the first `limit_val_batches` global batches of held-out data."""
    sums = torch.zeros(4, dtype=torch.float64, device=run.groups.device)
    with torch.no_grad():
        for index in range(run.config.limit_val_batches):
            batches = _micro_batches(run, run.valid_batch, index * run.config.global_batch_size)
            sums += run_batch(run.training.model, batches, objective, groups=run.groups, train=False)
    return _losses(sums, objective)


def _micro_batches(run: TrainingRun, get: GetBatch, first: int) -> list[Batch]:
    """This data-parallel rank's share of the global batch that starts at sample `first`."""
    size = run.config.micro_batch_size
    share = run.config.global_batch_size // run.groups.dp_size
    start = first + run.groups.dp_rank * share
    return [get(start + offset, size) for offset in range(0, share, size)]


def _losses(sums: Tensor, objective: Objective) -> dict[str, float]:
    """Means over the tokens of a global batch under their full names; `loss` is what is minimized."""
    tokens, kl, lm, agreement = sums.tolist()
    losses = {"loss": float(objective.head.combine(sums[1], sums[2])) / tokens, "lm_loss": lm / tokens}
    return losses | ({"forward_kl": kl / tokens, "top1_agreement": agreement / tokens} if objective.has_teacher else {})


def _speed(tokens_per_second: float, run: TrainingRun) -> dict[str, float]:
    """Throughput of all ranks, model FLOP/s of one, and its share of the device's peak where that is known."""
    flops = tokens_per_second * run.flops_per_token / run.groups.world_size
    peak = peak_flops(run.groups.device)
    share = {"model_flops_utilization": flops / peak} if peak else {}
    return {"tokens_per_second": tokens_per_second, "model_flops_per_second_per_rank": flops, **share}


def _refuse_non_finite(values: list[float], position: Position, logs: Path) -> None:
    """Stop before anything poisoned is saved: the last training checkpoint stays good."""
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"step {position.step + 1}: the loss or its gradient is not finite (samples from "
            f"{position.consumed_samples}); the last checkpoint is good; lower optim.lr, or look at the data and {logs}"
        )
