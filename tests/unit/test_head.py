"""pytest tests/unit/test_head.py: the chunked head loss equals a float64 reference, in value and gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_nemo.losses.lm_head import HeadLoss


def reference(student, teacher, labels, mask, *, tau=1.0, kl=1.0, ce=0.0):
    """The formula of the docstring, whole and in float64: (loss, gradients of hidden states and weight)."""
    (x, w), (tx, tw) = ([t.double().requires_grad_() for t in pair] for pair in (student, teacher))
    s, t = x @ w.T, (tx @ tw.T).detach()
    log_p, log_q = log_softmax(t / tau, dim=1), log_softmax(s / tau, dim=1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    ce_N = cross_entropy(s, labels, reduction="none")
    loss = (mask.double() * (kl * tau**2 * divergence + ce * ce_N)).sum()
    loss.backward()
    sums = {
        "tokens": mask.double().sum(),
        "loss": loss,
        "cross_entropy": (ce_N * mask).sum(),
        "forward_kl": (divergence * mask).sum(),
        "top1_agreement": ((s.argmax(1) == t.argmax(1)) * mask).sum().double(),
        "teacher_entropy": -((log_p.exp() * log_p).sum(dim=1) * mask).sum(),
    }
    return loss.detach(), x.grad, w.grad, {name: value.detach() for name, value in sums.items()}


def problem(tokens=23, vocab=37, hidden=8, teacher_hidden=12, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * scale  # noqa: E731
    student, teacher = (
        (draw(tokens, hidden), draw(vocab, hidden)),
        (draw(tokens, teacher_hidden), draw(vocab, teacher_hidden)),
    )
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    return student, teacher, labels, (torch.rand(tokens, generator=generator) > 0.3).float()


def ours(student, teacher, labels, mask, **options):
    x, w = (tensor.clone().requires_grad_() for tensor in student)
    output = HeadLoss(**options)((x, w), teacher, labels_N=labels, mask_N=mask)
    output.total.backward()
    return output.total.detach(), x.grad, w.grad, output.sums


@pytest.mark.parametrize("tau", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_loss_and_gradients_equal_the_float64_formula(tau, weights, chunk):
    args = problem()
    loss, dx, dw, sums = ours(*args, vocab_size=37, kl_weight=weights[0], cross_entropy_weight=weights[1],
                              temperature=tau, chunk_tokens=chunk)  # fmt: skip
    want = reference(*args, tau=tau, kl=weights[0], ce=weights[1])
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), want[1], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(dw.double(), want[2], rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(sums, want[3], rtol=1e-5, atol=1e-5)


def test_a_model_has_no_divergence_from_itself_and_no_gradient():
    (x, w), _, labels, mask = problem()
    loss, dx, dw, sums = ours((x, w), (x, w), labels, mask, vocab_size=37)
    assert abs(loss) < 1e-4
    assert dx.abs().max() < 1e-5
    assert dw.abs().max() < 1e-5
    assert sums["top1_agreement"] == sums["tokens"]


def test_divergence_is_forward_not_reverse():
    student, teacher, labels, mask = problem()
    forward = ours(student, teacher, labels, mask, vocab_size=37)[0]
    backward = ours(teacher, student, labels, mask, vocab_size=37)[0]
    assert abs(forward - backward) > 1e-2


def test_masked_tokens_change_nothing():
    student, teacher, labels, mask = problem()
    kept = mask.bool()
    only = ours((student[0][kept], student[1]), (teacher[0][kept], teacher[1]), labels[kept], mask[kept], vocab_size=37)
    whole = ours(student, teacher, labels, mask, vocab_size=37)
    torch.testing.assert_close(whole[0], only[0])
    torch.testing.assert_close(whole[1][kept], only[1])
    assert whole[1][~kept].abs().max() == 0
    torch.testing.assert_close(whole[2], only[2], rtol=1e-5, atol=1e-6)


def test_padding_rows_of_the_vocabulary_have_no_influence_and_no_gradient():
    student, teacher, labels, mask = problem()
    want = ours(student, teacher, labels, mask, vocab_size=37)
    padded = [(x, torch.cat([w, torch.full((5, w.shape[1]), 9.0)])) for x, w in (student, teacher)]
    got = ours(*padded, labels, mask, vocab_size=37)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[2][:37], want[2])
    assert got[2][37:].abs().max() == 0


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_extreme_logits_stay_finite_and_exact(scale):
    args = problem(scale=scale**0.5 * 2)
    loss, dx, _, _ = ours(*args, vocab_size=37)
    want = reference(*args)
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dx.double(), want[1], rtol=1e-3, atol=1e-2)


class CountMatmuls(TorchDispatchMode):
    """Counts the matrix products of what runs inside, however they are called."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_teacher", [True, False])
def test_evaluation_computes_no_gradient(with_teacher):
    """Of a model that could be trained: its parameters require gradients while it is evaluated."""
    student, teacher, labels, mask = problem()
    x, w = (tensor.clone().requires_grad_() for tensor in student)
    head = HeadLoss(vocab_size=37, cross_entropy_weight=1.0, chunk_tokens=12)
    arguments = dict(labels_N=labels, mask_N=mask)
    with CountMatmuls() as trained:
        head((x, w), teacher if with_teacher else None, **arguments)
    with CountMatmuls() as evaluated, torch.no_grad():
        output = head((x, w), teacher if with_teacher else None, **arguments)
    chunks = 2
    assert evaluated.count == chunks * (1 + with_teacher), "the logits and nothing else"
    assert trained.count == evaluated.count + chunks * 2, "and the two gradients"
    assert not output.total.requires_grad
    if with_teacher:
        want = reference(student, teacher, labels, mask, ce=1.0)[3]
        torch.testing.assert_close(output.sums, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 100.0])
@pytest.mark.parametrize("largest", [3.0, 300.0, 3e4])
def test_any_temperature_is_exact_for_extreme_logits(tau, largest):
    """With logits in whole numbers, so that nothing but the loss itself can round."""
    generator = torch.Generator().manual_seed(5)
    s, t = (torch.randint(-1000, 1001, (23, 37), generator=generator).float() * round(largest) / 1000 for _ in "st")
    identity = torch.eye(37)
    labels = torch.randint(0, 37, (23,), generator=generator)
    args = (s.round(), identity), (t.round(), identity), labels, torch.ones(23)
    loss, ds, _, sums = ours(*args, vocab_size=37, temperature=tau, cross_entropy_weight=0.5)
    want = reference(*args, tau=tau, ce=0.5)
    # Float32 sums of exponentials are good to 1e-6 of a nat, which tau squared multiplies.
    torch.testing.assert_close(loss.double(), want[0], rtol=3e-6, atol=1e-6 * tau**2)
    torch.testing.assert_close(ds.double(), want[1], rtol=1e-5, atol=1e-6 * max(1.0, tau))
    torch.testing.assert_close(sums["forward_kl"], want[3]["forward_kl"], rtol=3e-6, atol=1e-6)


def test_the_loss_asks_the_device_nothing():
    """On a GPU, what the host must know before it goes on (nonzero, item, a boolean index) makes it wait."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket not in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense), func
            return func(*args, **(kwargs or {}))

    student, teacher, labels, mask = problem()
    with Refuse():
        ours(student, teacher, labels, mask, vocab_size=37, cross_entropy_weight=0.3, temperature=2.0)


def test_gradients_are_given_away_once():
    student, teacher, labels, mask = problem()
    x, w = (tensor.clone().requires_grad_() for tensor in student)
    total = HeadLoss(vocab_size=37)((x, w), teacher, labels_N=labels, mask_N=mask).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away once"):
        total.backward()


def test_without_a_teacher_there_is_no_divergence_to_speak_of():
    student, _, labels, mask = problem()
    head = HeadLoss(vocab_size=37, kl_weight=0.0, cross_entropy_weight=1.0)
    output = head(student, labels_N=labels, mask_N=mask)
    assert tuple(output.sums) == head.sum_names(with_teacher=False) == ("tokens", "loss", "cross_entropy")
    assert output.sums["loss"] == output.sums["cross_entropy"]
    assert head.sum_names(with_teacher=True)[3:] == ("forward_kl", "top1_agreement", "teacher_entropy")
