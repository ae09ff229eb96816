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


def of_bin(quantity: str, name: str) -> str:
    """The name of a quantity's sum over some tokens alone, such as `forward_kl/source_code`.

    Where there is one, `tokens/source_code` counts them.
    """
    return f"{quantity}/{name}"


def bin_of(name: str) -> tuple[str, str]:
    """(quantity, bin) of a sum's name; the bin is empty where the sum is over all tokens."""
    quantity, _, inside = name.partition("/")
    return quantity, inside


@dataclass(frozen=True)
class LossOutput:
    """`total`: the loss summed over unmasked tokens, differentiable, a scalar. `sums`: detached float64 scalars by
    name, summed over the same tokens; always with `tokens` and `loss`. Who logs divides by the tokens.
    """

    total: Tensor
    sums: dict[str, Tensor]
