"""The loss on hidden states alone: value and gradients are those of a float64 formula in plain torch."""

import pytest
import torch
from torch import Tensor

from minitron_nemo.losses.hidden_state import COSINE, MSE, HiddenStateLoss, StateNorm

S, B, H, G = 7, 3, 12, 20
RMS, LAYER_NORM = StateNorm(centred=False, epsilon=1e-5), StateNorm(centred=True, epsilon=1e-3)


def normed(x: Tensor, norm: StateNorm) -> Tensor:
    if norm.centred:
        x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + norm.epsilon).sqrt()


def formula(x: Tensor, t: Tensor, mask: Tensor, map_GH: Tensor | None, loss: HiddenStateLoss) -> Tensor:
    """Of the definition at the top of `losses/hidden_state.py`."""
    y, t = normed(x, loss.student_norm), normed(t, loss.teacher_norm)
    if map_GH is not None:
        y = torch.einsum("sbh,gh->sbg", y, map_GH)
    if loss.divergence == MSE:
        by_token = ((y - t) ** 2).sum(dim=-1) / t.shape[-1]
    else:
        by_token = 1 - (y * t).sum(dim=-1) / (y.norm(dim=-1) * t.norm(dim=-1))
    return by_token[mask.bool()].sum()


def drawn(*, mapped: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Student, teacher, mask and map in float32; states are not centred, and tokens differ in size."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0])[:, None, None]
    x = (torch.randn(S, B, H, generator=generator) + 0.5) * scale
    t = torch.randn(S, B, G if mapped else H, generator=generator) * scale.flip(0) - 1
    mask = (torch.rand(S, B, generator=generator) < 0.7).float()
    return x, t, mask, torch.randn(G, H, generator=generator) if mapped else None


@pytest.mark.parametrize("mapped", [False, True], ids=["same width", "mapped"])
@pytest.mark.parametrize("norms", [(RMS, RMS), (LAYER_NORM, RMS), (RMS, LAYER_NORM)], ids=["rms", "layer_norm", "both"])
@pytest.mark.parametrize("divergence", [COSINE, MSE])
def test_value_and_gradients_are_those_of_the_formula(divergence, norms, mapped):
    loss = HiddenStateLoss(divergence, *norms)
    x, t, mask, map_GH = drawn(mapped=mapped)
    ours = [None if value is None else value.clone().requires_grad_() for value in (x, map_GH)]
    theirs = [None if value is None else value.double().requires_grad_() for value in (x, map_GH)]
    total = loss(ours[0], t, mask_SB=mask, map_GH=ours[1])
    wanted = formula(theirs[0], t.double(), mask, theirs[1], loss)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
    (1.7 * total).backward()
    (1.7 * wanted).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        if reference is not None:
            off = (mine.grad.double() - reference.grad).norm(dim=-1)
            assert bool((off <= 1e-4 * reference.grad.norm(dim=-1) + 1e-12).all())


def test_masked_tokens_count_for_nothing():
    x, t, mask, _ = drawn(mapped=False)
    loss, other = HiddenStateLoss(COSINE, RMS, RMS), torch.where(mask.bool()[..., None], x, -3 * x.roll(1, dims=-1))
    x.requires_grad_()
    loss(x, t, mask_SB=mask).backward()
    assert not x.grad[mask == 0].any()
    assert x.grad[mask == 1].any()
    assert loss(other, t, mask_SB=mask) == loss(x, t, mask_SB=mask)


def test_a_student_that_is_its_teacher_has_no_loss():
    x, _, mask, _ = drawn(mapped=False)
    for divergence in (COSINE, MSE):
        assert float(HiddenStateLoss(divergence, RMS, RMS)(x, x, mask_SB=mask)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("divergence", [COSINE, MSE])
def test_norms_and_losses_of_bf16_states_are_taken_in_float32(divergence):
    x, t, mask, map_GH = drawn(mapped=True)
    loss = HiddenStateLoss(divergence, RMS, RMS)
    map_GH.requires_grad_()
    total = loss(x.bfloat16(), t.bfloat16(), mask_SB=mask, map_GH=map_GH)
    wanted = formula(x.bfloat16().double(), t.bfloat16().double(), mask, map_GH.double(), loss)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(wanted.item(), rel=5e-3), "the product with the map is in bf16"
    total.backward()
    assert map_GH.grad.dtype == torch.float32
    plain = loss(x.bfloat16(), t[..., :H].bfloat16(), mask_SB=mask)
    wanted = formula(x.bfloat16().double(), t[..., :H].bfloat16().double(), mask, None, loss)
    assert plain.item() == pytest.approx(wanted.item(), rel=1e-6), "without a map nothing is rounded"
