"""Loss, perplexity and closeness to a reference model on held-out text, under any layout."""

import math
from dataclasses import dataclass

import torch

from minitron_nemo.engine.model import HeadlessGPT
from minitron_nemo.engine.schedule import Objective, run_batch
from minitron_nemo.errors import UserError
from minitron_nemo.parallel import Groups
from minitron_nemo.progress import progress
from minitron_nemo.train import GetBatch


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out tokens; nats for the loss and the divergence KL(reference, model)."""

    validation_loss: float
    perplexity: float
    forward_kl: float
    top1_agreement: float
    held_out_tokens: int


def evaluate(
    model: HeadlessGPT,
    objective: Objective,
    *,
    batch: GetBatch,
    num_samples: int,
    micro_batch_size: int,
    groups: Groups,
) -> Evaluation:
    """Evaluate on samples 0..`num_samples`, split over data-parallel ranks; without a reference the KL is 0.

    `num_samples` must be a multiple of `micro_batch_size` times the data-parallel ranks.
    """
    share = num_samples // groups.dp_size
    sums = torch.zeros(4, dtype=torch.float64, device=groups.device)
    with torch.no_grad(), progress(num_samples, "evaluate", unit="sample", enabled=groups.is_main) as bar:
        for first in range(groups.dp_rank * share, (groups.dp_rank + 1) * share, micro_batch_size):
            sums += run_batch(model, [batch(first, micro_batch_size)], objective, groups=groups, train=False)
            bar.advance(micro_batch_size * groups.dp_size)
    tokens, kl, lm, agreement = sums.tolist()
    if not math.isfinite(kl + lm):
        raise UserError(f"the held-out loss is not finite (cross-entropy {lm}, KL {kl}): the model has diverged")
    return Evaluation(
        validation_loss=lm / tokens,
        perplexity=math.exp(min(lm / tokens, 700.0)),
        forward_kl=kl / tokens,
        top1_agreement=agreement / tokens,
        held_out_tokens=int(tokens),
    )
