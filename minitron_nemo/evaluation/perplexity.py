"""Loss, perplexity and closeness to a reference model on held-out text, under any layout."""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import ModelChunks
from minitron_nemo.engine.schedule import GetBatch, calls
from minitron_nemo.errors import UserError
from minitron_nemo.losses.output import CROSS_ENTROPY, FORWARD_KL, LOSS, TOKENS, TOP1_AGREEMENT
from minitron_nemo.progress import progress
from minitron_nemo.training.objectives import Objective, batch_sums, means


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out tokens; nats for the cross-entropy and the divergence KL(reference, model).

    Without a reference there is no divergence and no agreement: None.
    """

    cross_entropy: float
    perplexity: float
    forward_kl: float | None
    top1_agreement: float | None
    held_out_tokens: int


def evaluate(
    model: ModelChunks,
    objective: Objective,
    *,
    batch: GetBatch,
    num_samples: int,
    micro_batch_size: int,
    groups: Groups,
) -> Evaluation:
    """Evaluate on samples 0..`num_samples`, split over data-parallel ranks.

    `num_samples` must be a multiple of `micro_batch_size` times the data-parallel ranks.
    """
    share = groups.layout.share(num_samples, micro_batch_size, name="num_samples")
    sums: Counter[str] = Counter()
    with torch.no_grad(), progress(num_samples, "evaluate", unit="sample", enabled=groups.is_main) as bar:
        for some in calls(share.first_samples(groups.dp_rank), stages=groups.layout.pp):
            batches = [batch(first, micro_batch_size) for first in some]
            sums.update(batch_sums(model, batches, objective, groups=groups, train=False))
            bar.advance(len(some) * micro_batch_size * groups.layout.dp)
    if not math.isfinite(sums[LOSS] + sums[CROSS_ENTROPY]):
        raise UserError(f"the held-out loss is not finite ({dict(sums)}): the model has diverged")
    result = means(sums)
    return Evaluation(
        cross_entropy=result[CROSS_ENTROPY],
        perplexity=math.exp(min(result[CROSS_ENTROPY], 700.0)),
        forward_kl=result.get(FORWARD_KL),
        top1_agreement=result.get(TOP1_AGREEMENT),
        held_out_tokens=int(sums[TOKENS]),
    )
