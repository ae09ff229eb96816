"""What every loss gives back: the number to minimize, and what the log and the reports are made of."""

from dataclasses import dataclass

from torch import Tensor

# The one vocabulary of sums and means. Cross-entropy is that with the next token of the text, in nats, as is entropy.
TOKENS = "tokens"
LOSS = "loss"
CROSS_ENTROPY = "cross_entropy"
FORWARD_KL = "forward_kl"
TOP1_AGREEMENT = "top1_agreement"
TEACHER_ENTROPY = "teacher_entropy"


@dataclass(frozen=True)
class LossOutput:
    """`total`: the loss summed over unmasked tokens, differentiable, a scalar. `sums`: detached float64 scalars by
    name, summed over the same tokens; always with `tokens` and `loss`. Who logs divides by the tokens.
    """

    total: Tensor
    sums: dict[str, Tensor]
