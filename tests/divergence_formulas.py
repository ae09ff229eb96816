"""Divergences as a page of mathematics has them: whole, in float64, differentiated by autograd."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.divergences.jensen_shannon import JensenShannon
from minitron_nemo.losses.divergences.logit_cosine import LogitCosine
from minitron_nemo.losses.divergences.logit_mse import LogitMSE
from minitron_nemo.losses.divergences.reverse_kl import ReverseKL
from minitron_nemo.losses.divergences.top_k_kl import TopKKL

CASES = (
    ForwardKL(), ReverseKL(), JensenShannon(), JensenShannon(beta=0.1), LogitMSE(), LogitCosine(), TopKKL(top_k=1),
    TopKKL(top_k=5), TopKKL(top_k=20, top_p=0.9),
)  # fmt: skip


def formula(s_NV: Tensor, t_NV: Tensor, divergence, *, tau: float = 1.0) -> Tensor:
    """The divergence of each token [N]; logits are divided by no temperature yet."""
    log_q, log_p = log_softmax(s_NV / tau, dim=1), log_softmax(t_NV / tau, dim=1)
    match divergence.name:
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
        case "jensen_shannon":
            beta = torch.tensor(divergence.beta, dtype=torch.float64)
            log_m = torch.logaddexp(beta.log() + log_p, (1 - beta).log() + log_q)
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        case "logit_mse":
            return (s_NV - t_NV).var(dim=1, correction=0)
        case "logit_cosine":
            return 1 - cosine_similarity(*(x - x.mean(dim=1, keepdim=True) for x in (s_NV, t_NV)), dim=1)
        case "top_k_kl":
            return kl(*(with_rest(x, tokens(log_p, divergence)) for x in (log_p, log_q)))
    raise ValueError(divergence.name)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(log_p > -1e29, log_p.exp() * (log_p - log_q), torch.zeros_like(log_p)).sum(dim=1)


def tokens(log_p: Tensor, divergence) -> Tensor:
    """[N, V]: the likeliest, of equal ones the lower id, until `top_k` or, together, `top_p`."""
    order = log_p.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(log_p, dtype=torch.bool)
    for token in range(len(log_p)):
        mass = 0.0
        for place in order[token][: divergence.top_k]:
            if divergence.top_p < 1 and mass >= divergence.top_p:
                break
            chosen[token, place] = True
            mass += float(log_p[token, place].exp())
    return chosen


def with_rest(log_p: Tensor, chosen: Tensor) -> Tensor:
    """[N, V + 1]: the log probabilities of the tokens, the others being one outcome more."""
    nothing = torch.full_like(log_p, -1e30)
    rest = torch.where(chosen, nothing, log_p).logsumexp(dim=1, keepdim=True)
    return torch.cat([torch.where(chosen, log_p, nothing), rest], dim=1)
