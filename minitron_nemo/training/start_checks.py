"""Before the first step: can the teacher teach at all?"""

import logging
import math

import torch

from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.engine.attention import own_positions
from minitron_nemo.engine.schedule import GetBatch
from minitron_nemo.errors import UserError
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.losses.output import CROSS_ENTROPY, TOKENS
from minitron_nemo.training.objectives import facts_of_tokens, in_order_of_tokens

logger = logging.getLogger(__name__)
CHUNK_TOKENS = 1024
GO_ON = "distill.check_teacher=false goes on all the same"


def check_teacher(teacher: Teacher, *, name: str, batch: GetBatch, micro_batch_size: int) -> None:
    """Refuse a teacher whose weights are all zero or not finite, or that guesses no better than chance. Collective.

    Chance gives each of V words the probability 1 / V, a cross-entropy of log V. The teacher's is taken on the first
    held-out samples, one micro-batch for each data-parallel rank; more in an interleaved pipeline, which takes as many
    as it has stages. Every rank refuses alike.
    """
    who = f"the teacher {name}" if name else "the teacher"
    _check_weights(teacher, who)
    cross_entropy, tokens = _probe(teacher, batch, micro_batch_size)
    chance = math.log(teacher.arch.vocab_size)
    found = f"cross-entropy {cross_entropy:.4f} on {tokens} held-out tokens, {chance:.4f} by chance"
    if not cross_entropy < chance:
        raise UserError(
            f"{who} guesses no better than chance: {found}; give a trained model, and data prepared with its "
            f"tokenizer; {GO_ON}"
        )
    if teacher.groups.is_main:
        logger.info(f"{who}: weights are finite, {found}")


@torch.no_grad()
def _check_weights(teacher: Teacher, who: str) -> None:
    # In float64, as squares of large bf16 weights may leave float32.
    norms = [float(torch.linalg.vector_norm(weight, dtype=torch.float64)) for weight in teacher.weights()]
    is_wrong = [not all(map(math.isfinite, norms)), not any(norms)]
    for wrong, what in zip(teacher.groups.any_rank(*is_wrong), ("not finite", "all zero"), strict=True):
        if wrong:
            raise UserError(f"{who}: its weights, or those of a rank's part, are {what}; make it again; {GO_ON}")


@torch.no_grad()
def _probe(teacher: Teacher, batch: GetBatch, micro_batch_size: int) -> tuple[float, int]:
    """The teacher's cross-entropy with the next token, and how many tokens it was taken over; the same on all ranks."""
    groups = teacher.groups
    count = groups.layout.pp if groups.layout.vpp > 1 else 1
    share = groups.layout.share(count * micro_batch_size * groups.layout.dp, micro_batch_size)
    batches = [batch(first, micro_batch_size) for first in share.first_samples(groups.dp_rank)]
    head = HeadLoss(vocab_size=teacher.arch.vocab_size, chunk_tokens=CHUNK_TOKENS, group=groups.tp)
    sums = []
    for said, whole in zip(teacher.outputs(batches), batches, strict=True):
        if said.final is None:
            continue
        own = whole
        if groups.cp is not None:  # the hidden states are of this rank's part of the samples
            own = {name: x[:, own_positions(x.shape[1], groups.cp).to(x.device)] for name, x in whole.items()}
        model = (in_order_of_tokens(said.final), teacher.head_weight())
        sums.append(head(model, **facts_of_tokens(own, head)).sums)
    found = groups.sum_over_batch(sums, head.sum_names(with_teacher=False))
    return found[CROSS_ENTROPY] / found[TOKENS] if found[TOKENS] else math.nan, int(found[TOKENS])
