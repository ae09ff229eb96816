"""The gradient of the head's weight: summed up in float32, and into Megatron's buffer where the weight has one."""

import pytest
import torch
from torch import nn

from minitron_nemo.losses.lm_head import HeadLoss

TOKENS, VOCAB, HIDDEN = 96, 37, 8


def problem(dtype):
    generator = torch.Generator().manual_seed(3)
    x, w, tx, tw = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (TOKENS, VOCAB) * 2)
    return x, w, (tx, tw)


def backward(x, weight, teacher, *, times=1.0):
    head = HeadLoss(vocab_size=VOCAB, chunk_tokens=4)
    labels = torch.arange(TOKENS) % VOCAB
    output = head((x, weight), teacher, labels_N=labels, mask_N=torch.ones(TOKENS))
    (output.total * times).backward()


def in_buffer(w):
    """A parameter as Megatron's data-parallel wrapper leaves it: with a buffer, and a mark that is reset each step."""
    weight = nn.Parameter(w.clone())
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(w.shape), False
    return weight


def truth(x, w, teacher):
    doubles = [tensor.double() for tensor in (x, w, *teacher)]
    weight = doubles[1].requires_grad_()
    log_q = torch.log_softmax(doubles[0] @ weight.T, dim=1)
    log_p = torch.log_softmax(doubles[2] @ doubles[3].T, dim=1)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    return weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_buffer_gets_what_autograd_would_add_up_and_more_of_its_digits(dtype):
    x, w, teacher = problem(dtype)
    plain, buffered = nn.Parameter(w.clone()), in_buffer(w)
    for weight in (plain, buffered):
        backward(x, weight, teacher, times=0.5)
        backward(x, weight, teacher, times=2.0)
    assert buffered.grad_added_to_main_grad
    assert buffered.main_grad.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(buffered.main_grad, plain.grad)
        return
    # Both round the logits and what is multiplied with the hidden states; the sums and what they become they do not.
    off = [(grad.double() - 2.5 * truth(x, w, teacher)).norm() for grad in (buffered.main_grad, plain.grad)]
    assert off[0] < 0.9 * off[1]


def test_chunks_of_bf16_add_up_in_float32():
    """In bf16 a small product is lost beside a large sum: 256 + 1 is 256."""
    from minitron_nemo.losses.weight_gradient import accumulate_

    sums = torch.full((VOCAB, HIDDEN), 256.0)
    ones = torch.ones(1, VOCAB, dtype=torch.bfloat16), torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    for _ in range(8):
        accumulate_(sums, *ones)
    assert (sums == 264).all()


def test_of_a_weight_that_is_also_the_embedding_the_embedding_s_gradient_is_left_to_autograd():
    x, w, teacher = problem(torch.float32)
    untied, tied = in_buffer(w), in_buffer(w)
    tied.zero_out_wgrad = True
    rows = torch.arange(5)
    tied[rows].sum().backward(retain_graph=False)
    embedding = tied.grad.clone()
    tied.grad = None
    hidden = tied[rows].sum() + 0 * tied.sum()
    head = HeadLoss(vocab_size=VOCAB, chunk_tokens=4)
    labels = torch.arange(TOKENS) % VOCAB
    output = head((x, tied), teacher, labels_N=labels, mask_N=torch.ones(TOKENS))
    (output.total + hidden).backward()
    assert torch.equal(tied.grad, embedding), "what the hook adds to the buffer is the embedding's part alone"
    backward(x, untied, teacher)
    assert torch.equal(tied.main_grad, untied.main_grad)
