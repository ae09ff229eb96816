"""The head loss over ranks that share a vocabulary: exact, the same on each of them, one collective a chunk."""

import math

import pytest
import torch
import torch.distributed as dist
from divergence_formulas import CASES as DIVERGENCES
from divergence_formulas import formula
from torch import Tensor
from torch.nn import functional

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.divergences.jensen_shannon import JensenShannon
from minitron_nemo.losses.divergences.top_k_kl import TopKKL
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.testing import run_layout

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 23, 37, 8, 12
# 48 rows over two ranks; 64 over four, of which the last holds nothing but padding.
ROWS = {2: 24, 4: 16}
FORWARD = ForwardKL()
CASES = [  # temperature, weight of the divergence, weight of the cross-entropy, tokens in a chunk, divergence
    (1.0, 1.0, 0.0, 1000, FORWARD),
    (0.5, 1.0, 0.0, 7, FORWARD),
    (2.0, 0.7, 0.3, 7, FORWARD),
    (1.0, 0.0, 1.0, 5, FORWARD),
    (1.0, 0.0, 1.0, 1000, None),
    *[(2.0 if other.tempered else 1.0, 0.7, 0.3, 7, other) for other in DIVERGENCES if other != FORWARD],
    (0.25, 1.0, 0.0, 1000, JensenShannon()),
    (1.0, 1.0, 0.0, 5, TopKKL(top_k=1000)),
]


def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "x": (TOKENS, HIDDEN),
        "w": (VOCAB, HIDDEN),
        "tx": (TOKENS, TEACHER_HIDDEN),
        "tw": (VOCAB, TEACHER_HIDDEN),
    }
    drawn = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    drawn["labels"] = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    drawn["labels"][0], drawn["labels"][1] = 0, VOCAB - 1
    drawn["mask"] = (torch.rand(TOKENS, generator=generator) > 0.3).float()
    drawn["mask"][:2] = 1.0
    return drawn


def reference(case) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of the hidden states, gradient of the head) by torch's own losses in float64."""
    tau, kl_weight, ce_weight, _, divergence = case
    p = {name: t.double() if t.is_floating_point() else t for name, t in problem().items()}
    x, w = p["x"].requires_grad_(), p["w"].requires_grad_()
    logits = x @ w.T
    loss = ce_weight * functional.cross_entropy(logits, p["labels"], reduction="none")
    if divergence is not None:
        scale = kl_weight * (tau**2 if divergence.tempered else 1.0)
        loss = loss + scale * formula(logits, p["tx"] @ p["tw"].T, divergence, tau=tau)
    loss = (loss * p["mask"]).sum()
    loss.backward()
    return loss.detach(), x.grad, w.grad


def rows_of_rank(weight: Tensor, groups: Groups) -> Tensor:
    """This rank's rows; what pads the vocabulary is large, so that it shows where it takes part."""
    rows = ROWS[groups.layout.tp]
    padded = torch.full((rows * groups.layout.tp, weight.shape[1]), 9.0)
    padded[:VOCAB] = weight
    return padded[groups.tp_rank * rows :][:rows].clone()


def solve(groups: Groups) -> list[dict]:
    """Every case on this rank's part of the vocabulary: values of all ranks, whole gradients, collectives counted."""
    calls = 0
    original = dist.all_gather

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    answers = []
    for tau, kl_weight, ce_weight, chunk, divergence in CASES:
        p = problem()
        x, w = p["x"].requires_grad_(), rows_of_rank(p["w"], groups).requires_grad_()
        teacher = (p["tx"], rows_of_rank(p["tw"], groups)) if divergence is not None else None
        head = HeadLoss(vocab_size=VOCAB, kl_weight=kl_weight, cross_entropy_weight=ce_weight, temperature=tau,
                        chunk_tokens=chunk, group=groups.tp, divergence=divergence or FORWARD)  # fmt: skip
        calls, dist.all_gather = 0, counting
        output = head((x, w), teacher, labels_N=p["labels"], mask_N=p["mask"])
        output.total.backward()
        dist.all_gather = original
        count = calls
        assert x.grad is not None
        assert w.grad is not None
        parts = [torch.empty_like(w.grad) for _ in range(groups.layout.tp)]
        dist.all_gather(parts, w.grad, group=groups.tp)
        dist.all_reduce(x.grad, group=groups.tp)
        answers.append({
            "values": groups.share_json([output.total.item().hex(), *(x.item().hex() for x in output.sums.values())]),
            "collectives": groups.share_json(count),
            "dx": x.grad.numpy(),
            "dw": torch.cat(parts).numpy(),
        })  # fmt: skip
    return answers


@pytest.mark.parametrize("ranks", ROWS)
def test_vocabulary_parallel_loss_is_exact(ranks):
    for case, answer in zip(CASES, run_layout(solve, Layout(tp=ranks)), strict=True):
        loss, dx, dw = reference(case)
        ours = torch.tensor(float.fromhex(answer["values"][0][0]), dtype=torch.float64)
        torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0, msg=lambda text, case=case: f"{case}: {text}")
        torch.testing.assert_close(torch.from_numpy(answer["dx"]).double(), dx, rtol=1e-4, atol=2e-5)
        gradient = torch.from_numpy(answer["dw"]).double()
        torch.testing.assert_close(gradient[:VOCAB], dw, rtol=1e-4, atol=5e-5)
        assert gradient[VOCAB:].abs().max() == 0, "padding rows have no gradient"
        assert all(values == answer["values"][0] for values in answer["values"]), f"{case}: ranks differ in some bit"
        calls = math.ceil(TOKENS / case[3]) + getattr(case[4], "knows_whole", False)
        assert answer["collectives"] == [calls] * ranks, (
            f"{case}: one for each chunk, and one more for all in two turns"
        )


def near_teacher() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and the heads of a student and of a teacher that often agree with each other."""
    p = problem()
    return p["x"], p["w"], p["w"] + 0.6 * torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(8))


def sums_of_near_teacher(groups: Groups) -> dict[str, float]:
    x, w, tw = near_teacher()
    head = HeadLoss(vocab_size=VOCAB, chunk_tokens=7, group=groups.tp)
    teacher = (x, rows_of_rank(tw, groups))
    ones, labels = torch.ones(TOKENS), problem()["labels"]
    output = head((x, rows_of_rank(w, groups)), teacher, labels_N=labels, mask_N=ones)
    return {name: float(value) for name, value in output.sums.items()}


@pytest.mark.parametrize("ranks", ROWS)
def test_the_most_likely_token_is_that_of_the_whole_vocabulary(ranks):
    x, w, tw = near_teacher()
    best, wanted = ((x.double() @ rows.double().T).argmax(dim=1) for rows in (w, tw))
    agreed, high = best == wanted, best >= ROWS[ranks]
    assert min(int((agreed & high).sum()), int((agreed & ~high).sum()), int((~agreed).sum())) > 1, "each case occurs"
    assert run_layout(sums_of_near_teacher, Layout(tp=ranks))["top1_agreement"] == int(agreed.sum())
