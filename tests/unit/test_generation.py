"""Continuing tokens: greedy takes the likeliest, sampling draws from the softmax, and the end ends."""

import pytest
import torch

from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.generation import check_generation, continued


def counting(tokens_BS):
    """Logits that prefer the next number, of ten."""
    return torch.nn.functional.one_hot((tokens_BS[:, -1] + 1) % 10, 10).float() * 3


def test_greedy_takes_the_likeliest_and_keeps_the_prompt():
    tokens = torch.tensor([[4, 7], [0, 1]])
    wanted = torch.tensor([[4, 7, 8, 9, 0], [0, 1, 2, 3, 4]])
    assert torch.equal(continued(counting, tokens, max_new_tokens=3), wanted)


def test_a_sample_that_ended_says_nothing_more_and_all_stop_when_the_last_has():
    tokens = torch.tensor([[7], [5]])
    wanted = torch.tensor([[7, 8, 8, 8], [5, 6, 7, 8]])
    assert torch.equal(continued(counting, tokens, max_new_tokens=9, end=8), wanted)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_drawn_from_the_softmax_of_the_logits_over_the_temperature(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = continued(lambda tokens_BS: logits.expand(len(tokens_BS), 4), torch.zeros(40_000, 1, dtype=torch.long),
                      max_new_tokens=1, temperature=temperature, seed=3)  # fmt: skip
    share = torch.bincount(drawn[:, 1], minlength=4) / len(drawn)
    torch.testing.assert_close(share, torch.softmax(logits / temperature, dim=0), rtol=0, atol=0.01)


def test_the_generator_of_the_program_is_left_alone():
    before = torch.get_rng_state()
    continued(counting, torch.tensor([[1]]), max_new_tokens=2, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("length", "changed", "says"),
    [
        (0, {}, "a prompt of no tokens"),
        (5, {"max_new_tokens": 0}, "max_new_tokens=0: after 5 tokens, must be from 1 to 3"),
        (5, {"max_new_tokens": 4}, "as the model was made for 8 positions"),
        (5, {"temperature": -0.1}, "temperature=-0.1"),
        (5, {"temperature": float("inf")}, "temperature=inf"),
        (5, {"seed": 2**63}, "seed=9223372036854775808"),
    ],
)
def test_what_cannot_be_continued_is_refused(length, changed, says):
    settings = {"max_new_tokens": 3, "temperature": 0.0, "seed": 0, "seq_length": 8, **changed}
    with pytest.raises(UserError) as refused:
        check_generation(length, **settings)
    assert says in str(refused.value)
    check_generation(5, max_new_tokens=3, temperature=0.0, seed=0, seq_length=8)
