"""Continuing tokens, one at a time, for a look at what a model says.

There is no cache of keys and values: each token costs a forward pass over all before it. For serving, export the model
and give it to an inference engine.

Shapes: B samples, S tokens of each so far, V the vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minitron_nemo.errors import UserError

MAX_SEED = 2**63 - 1


def check_generation(length: int, *, max_new_tokens: int, temperature: float, seed: int, seq_length: int) -> None:
    """Refuse what a model of `seq_length` positions cannot continue, or nobody can sample."""
    if length < 1:
        raise UserError("a prompt of no tokens: there is nothing to continue; give at least one token")
    if max_new_tokens < 1 or length + max_new_tokens > seq_length:
        raise UserError(
            f"max_new_tokens={max_new_tokens}: after {length} tokens, must be from 1 to {seq_length - length}, as the "
            f"model was made for {seq_length} positions"
        )
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be a finite number of at least 0, which is greedy")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed={seed}: must be from 0 to {MAX_SEED}")


@torch.no_grad()
def continued(
    next_logits: Callable[[Tensor], Tensor],
    tokens_BS: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    end: int | None = None,
) -> Tensor:
    """The tokens and up to `max_new_tokens` more, [B, S + n].

    `next_logits` gives the logits [B, V] after the last token. At temperature 0 the likeliest token is taken, else one
    is drawn from softmax(logits / temperature), the same ones for the same seed. A sample that said `end` says nothing
    else after it, and all stop when the last has.
    """
    drawing = torch.Generator(tokens_BS.device).manual_seed(seed)
    has_ended_B1 = torch.zeros(len(tokens_BS), 1, dtype=torch.bool, device=tokens_BS.device)
    for _ in range(max_new_tokens):
        logits_BV = next_logits(tokens_BS).float()
        if temperature == 0:
            next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        else:
            next_B1 = torch.multinomial(torch.softmax(logits_BV / temperature, dim=-1), 1, generator=drawing)
        if end is not None:
            next_B1 = next_B1.masked_fill(has_ended_B1, end)
            has_ended_B1 |= next_B1 == end
        tokens_BS = torch.cat([tokens_BS, next_B1], dim=1)
        if end is not None and bool(has_ended_B1.all()):
            break
    return tokens_BS
