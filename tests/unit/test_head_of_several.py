"""The head beside several teachers equals its formula in float64: shares of the divergence, cross-entropy once."""

import pytest
import torch
from divergence_formulas import CASES, formula
from torch import Tensor
from torch.nn.functional import cross_entropy

from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.lm_head import HeadLoss, TeacherHead, names_of_each

TOKENS, VOCAB = 23, 37


def problem() -> tuple[tuple[Tensor, Tensor], dict[str, TeacherHead], Tensor, Tensor]:
    """Teachers of their own widths; the first has no share in some tokens, the third is alone in some."""
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    shares = torch.tensor([[0.0, 0.25, 0.5], [1.0, 0.75, 0.0], [0.0, 0.0, 0.5]])[:, torch.arange(TOKENS) % 3]
    teachers = {
        name: TeacherHead(draw(TOKENS, width), draw(VOCAB, width), share)
        for name, width, share in zip("abc", (12, 8, 16), shares, strict=True)
    }
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) > 0.3).float()
    return (draw(TOKENS, 8), draw(VOCAB, 8)), teachers, labels, mask


@pytest.mark.parametrize("case", [ForwardKL(), *CASES], ids=str)
@pytest.mark.parametrize("chunk", [4, 1000])
def test_value_and_gradient_equal_the_formula(case, chunk):
    tau = 2.0 if case.tempered else 1.0
    student, teachers, labels, mask = problem()
    x, w = (tensor.clone().requires_grad_() for tensor in student)
    head = HeadLoss(vocab_size=VOCAB, kl_weight=0.7, cross_entropy_weight=0.3, temperature=tau, chunk_tokens=chunk,
                    divergence=case)  # fmt: skip
    output = head.of_several((x, w), teachers, labels_N=labels, mask_N=mask)
    output.total.backward()

    X, W = (tensor.double().requires_grad_() for tensor in student)
    s = X @ W.T
    each = {}
    for name, teacher in teachers.items():
        t = teacher.hidden_NH.double() @ teacher.weight_VH.double().T
        each[name] = {which: formula(s, t, of, tau=tau) for which, of in (("own", case), ("kl", ForwardKL()))}
    cross = cross_entropy(s, labels, reduction="none")
    divergence = sum(each[name]["own"] * teacher.share_N.double() for name, teacher in teachers.items())
    scale = 0.7 * (tau**2 if case.tempered else 1.0)
    loss = ((scale * divergence + 0.3 * cross) * mask).sum()
    loss.backward()
    torch.testing.assert_close(output.total.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), X.grad, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(w.grad.double(), W.grad, rtol=1e-4, atol=5e-5)
    wanted = {"tokens": mask.double().sum(), "cross_entropy": (cross * mask).sum()}
    for name, teacher in teachers.items():
        weight = teacher.share_N.double() * mask
        wanted |= zip(names_of_each([name]), (weight.sum(), (each[name]["kl"] * weight).sum()), strict=True)
    wanted["forward_kl"] = sum(wanted[f"forward_kl/teacher_{name}"] for name in teachers)
    for name, value in wanted.items():
        torch.testing.assert_close(output.sums[name], value.detach(), rtol=1e-5, atol=1e-5, msg=name)


def test_one_teacher_with_the_whole_share_is_one_teacher():
    student, teachers, labels, mask = problem()
    a, head = teachers["a"], HeadLoss(vocab_size=VOCAB, cross_entropy_weight=0.5, chunk_tokens=5)
    whole = {"a": TeacherHead(a.hidden_NH, a.weight_VH, torch.ones(TOKENS))}
    facts = dict(labels_N=labels, mask_N=mask)
    several, alone = head.of_several(student, whole, **facts), head(student, (a.hidden_NH, a.weight_VH), **facts)
    assert torch.equal(several.total, alone.total)
    assert alone.sums.items() <= several.sums.items()


def test_two_halves_of_the_same_teacher_are_that_teacher():
    student, teachers, labels, mask = problem()
    a, head = teachers["a"], HeadLoss(vocab_size=VOCAB, cross_entropy_weight=0.5, chunk_tokens=5)
    half = TeacherHead(a.hidden_NH, a.weight_VH, torch.full((TOKENS,), 0.5))
    found = []
    for some in ({"": TeacherHead(a.hidden_NH, a.weight_VH)}, {"first": half, "second": half}):
        x, w = (tensor.clone().requires_grad_() for tensor in student)
        output = head.of_several((x, w), some, labels_N=labels, mask_N=mask)
        output.total.backward()
        found.append((output.total.detach(), x.grad, w.grad, output.sums["top1_agreement"].float()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
