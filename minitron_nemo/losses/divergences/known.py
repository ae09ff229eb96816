"""The divergences by the names that `distill.divergence` gives them."""

from collections.abc import Callable

from minitron_nemo.losses.divergences.divergence import Divergence
from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.divergences.jensen_shannon import JensenShannon
from minitron_nemo.losses.divergences.logit_cosine import LogitCosine
from minitron_nemo.losses.divergences.logit_mse import LogitMSE
from minitron_nemo.losses.divergences.reverse_kl import ReverseKL
from minitron_nemo.losses.divergences.top_k_kl import TopKKL

KNOWN: dict[str, Callable[..., ForwardKL | Divergence]] = {
    record.name: record for record in (ForwardKL, ReverseKL, JensenShannon, LogitMSE, LogitCosine, TopKKL)
}
