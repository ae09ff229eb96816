"""Every divergence of the registry, alone: value and gradient are those of a float64 formula in plain torch."""

import itertools
from functools import partial

import pytest
import torch
from divergence_formulas import CASES, formula
from torch import Tensor

from minitron_nemo.config.schema import DistillConfig, DivergenceName
from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.divergences.jensen_shannon import JensenShannon
from minitron_nemo.losses.divergences.known import KNOWN
from minitron_nemo.losses.divergences.top_k_kl import TopKKL
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.options import divergence_of

VOCAB, TOKENS = 37, 23
TEMPERATURES = (0.25, 1.0, 3.0, 8.0)


def whole_numbers(largest: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Logits of both models that no matrix product rounds."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(-1000, 1001, (TOKENS, VOCAB), generator=generator) for _ in "st"]
    return draw[0] * largest / 1000, draw[1] * largest / 1000


def one_hot(largest: float) -> tuple[Tensor, Tensor]:
    """A teacher that is sure, all its other logits being equal."""
    return whole_numbers(3)[0], torch.eye(VOCAB)[torch.arange(TOKENS) % VOCAB] * largest


LOGITS = {
    "usual": whole_numbers(3),
    "large": tuple(x.round() for x in whole_numbers(300)),
    "extreme": tuple(x.round() for x in whole_numbers(30000)),
    "one-hot": one_hot(100.0),
    "one-hot, soft": one_hot(5.0),
    "equal": (whole_numbers(3)[0],) * 2,
}


def ours(s, t, divergence, *, mask=None, **options):
    """(loss, gradient of the student's logits, sums); the heads are the identity."""
    x = s.clone().float().requires_grad_()
    labels = torch.arange(len(s)) % s.shape[1]
    mask = torch.ones(len(s)) if mask is None else mask
    head = HeadLoss(vocab_size=s.shape[1], divergence=divergence, **options)
    identity = torch.eye(s.shape[1])
    output = head((x, identity), (t.float(), identity), labels_N=labels, mask_N=mask)
    output.total.backward()
    return output.total.detach().double(), x.grad.double(), output.sums


def reference(s, t, divergence, *, mask=None, tau=1.0, kl=1.0, ce=0.0):
    x = s.double().requires_grad_()
    value_N = formula(x, t.double(), divergence, tau=tau)
    scale = kl * (tau**2 if divergence.tempered else 1.0)
    ce_N = torch.nn.functional.cross_entropy(x, torch.arange(len(s)) % s.shape[1], reduction="none")
    mask = torch.ones(len(s)) if mask is None else mask
    loss = ((scale * value_N + ce * ce_N) * mask.double()).sum()
    loss.backward()
    return loss.detach(), x.grad, (value_N.detach() * mask).sum(), float((scale * value_N.detach()).max())


@pytest.mark.parametrize("divergence", CASES, ids=str)
def test_value_and_gradient_are_those_of_the_formula(divergence):
    for (name, (s, t)), tau in itertools.product(LOGITS.items(), TEMPERATURES):
        message = partial("{2}, {0}, temperature {1}".format, name, tau)
        loss, grad, sums = ours(s, t, divergence, temperature=tau, kl_weight=0.7, cross_entropy_weight=0.3,
                                chunk_tokens=10)  # fmt: skip
        want = reference(s, t, divergence, tau=tau, kl=0.7, ce=0.3)
        # Float32 sums are good to 1e-6 of a nat, which tau squared multiplies.
        torch.testing.assert_close(loss, want[0], rtol=3e-6, atol=3e-6 * tau**2, msg=message)
        # A reverse KL of thousands of nats, which is part of its gradient, is good to as many of its digits.
        torch.testing.assert_close(grad, want[1], rtol=2e-5, atol=2e-6 * max(1.0, tau) + 1e-7 * want[3], msg=message)
        torch.testing.assert_close(sums[divergence.name], want[2], rtol=3e-6, atol=3e-6, msg=message)


@pytest.mark.parametrize("divergence", CASES, ids=str)
def test_masked_tokens_count_nothing_and_health_is_known_whatever_the_loss(divergence):
    s, t = LOGITS["usual"]
    mask = (torch.arange(TOKENS) % 3 > 0).float()
    loss, grad, sums = ours(s, t, divergence, mask=mask, chunk_tokens=4, cross_entropy_weight=0.3)
    want = reference(s, t, divergence, mask=mask, ce=0.3)
    torch.testing.assert_close(loss, want[0], rtol=1e-5, atol=0)
    assert grad[mask == 0].abs().max() == 0
    usual = ours(s, t, ForwardKL(), mask=mask, chunk_tokens=4, cross_entropy_weight=0.3)[2]
    for name in ("tokens", "cross_entropy", "forward_kl", "top1_agreement", "teacher_entropy"):
        assert sums[name] == usual[name]
    assert set(sums) == {*usual, divergence.name}


@pytest.mark.parametrize("divergence", CASES, ids=str)
def test_a_divergence_does_not_see_what_is_added_to_all_logits_of_a_token(divergence):
    s, t = (x.round() for x in LOGITS["usual"])
    shift = torch.arange(TOKENS)[:, None] - 11.0
    loss, grad, _ = ours(s, t, divergence)
    for other in (ours(s + shift, t, divergence), ours(s, t - shift, divergence)):
        torch.testing.assert_close(other[0], loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other[1], grad, rtol=1e-4, atol=1e-5)
    assert grad.sum(dim=1).abs().max() < 1e-5


@pytest.mark.parametrize("divergence", CASES, ids=str)
def test_rows_that_pad_the_vocabulary_change_nothing(divergence):
    s, t = LOGITS["usual"]
    want = ours(s, t, divergence, temperature=2.0, cross_entropy_weight=0.3)
    x, padded = s.clone().requires_grad_(), torch.cat([torch.eye(VOCAB), torch.full((5, VOCAB), 9.0)])
    weight = padded.clone().requires_grad_()
    head = HeadLoss(vocab_size=VOCAB, divergence=divergence, temperature=2.0, cross_entropy_weight=0.3)
    labels = torch.arange(TOKENS) % VOCAB
    output = head((x, weight), (t, padded), labels_N=labels, mask_N=torch.ones(TOKENS))
    output.total.backward()
    torch.testing.assert_close(output.total.detach().double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), want[1], rtol=1e-5, atol=1e-6)
    assert weight.grad[VOCAB:].abs().max() == 0


def test_the_ends_of_the_family_are_the_kullback_leibler_divergences():
    s, t = LOGITS["usual"]
    forward, reverse = ours(s, t, ForwardKL())[0], ours(s, t, KNOWN["reverse_kl"]())[0]
    torch.testing.assert_close(ours(s, t, JensenShannon(beta=1e-4))[0] / 1e-4, forward, rtol=3e-3, atol=0)
    torch.testing.assert_close(ours(s, t, JensenShannon(beta=1 - 1e-4))[0] / 1e-4, reverse, rtol=3e-3, atol=0)
    torch.testing.assert_close(ours(s, t, JensenShannon())[0], ours(t, s, JensenShannon())[0])


def test_all_tokens_are_the_whole_divergence_and_the_rest_bounds_it_from_below():
    """Putting outcomes together loses information (the chain rule of the divergence): more tokens, more of it."""
    s, t = LOGITS["usual"]
    whole = ours(s, t, ForwardKL())
    for all_of_them in (TopKKL(top_k=VOCAB), TopKKL(top_k=1000)):
        got = ours(s, t, all_of_them)
        torch.testing.assert_close(got[0], whole[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(got[1], whole[1], rtol=1e-4, atol=1e-6)
    values = [ours(s, t, TopKKL(top_k=k))[0] for k in (1, 2, 5, 20, VOCAB)]
    assert all(less < more for less, more in zip(values, values[1:], strict=False))
    assert ours(s, t, TopKKL(top_k=20, top_p=0.5))[0] < values[3]


def test_the_setting_names_every_divergence_of_the_registry():
    assert [name.value for name in DivergenceName] == list(KNOWN)
    section = DistillConfig(divergence=DivergenceName.jensen_shannon, jensen_shannon_beta=0.2)
    assert divergence_of(section) == JensenShannon(beta=0.2)
    section = DistillConfig(divergence=DivergenceName.top_k_kl, top_k=7, top_p=0.8)
    assert divergence_of(section) == TopKKL(top_k=7, top_p=0.8)
    assert divergence_of(DistillConfig()) == ForwardKL()
    head = HeadLoss(vocab_size=5, divergence=TopKKL(top_k=7, top_p=0.8), temperature=2, cross_entropy_weight=0.5)
    assert head.in_words == "1 x top_k_kl (top_k=7, top_p=0.8) at temperature 2 + 0.5 x cross_entropy"
    assert head.runs_in_words(torch.device("cpu"), with_teacher=True) == "top_k_kl by torch"
