"""Parameters and compute of a shape are those that torch counts on transformers' model of it."""

import pytest
import torch
from hf_models import save_tiny_hf
from torch.utils.flop_counter import FlopCounterMode

from minitron_nemo.checkpoint.formats.hf import arch_from_hf

TOKENS = 16


@pytest.fixture(scope="module", params=[("llama", False), ("mistral", True), ("nemotron", False)], ids=str)
def shape_and_model(request, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    family, tied = request.param
    folder = save_tiny_hf(tmp_path_factory.mktemp(family), family, tie_word_embeddings=tied, tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return arch_from_hf(folder), model.eval()


def test_parameters_are_counted_once_each(shape_and_model):
    arch, model = shape_and_model
    assert arch.num_params() == sum(parameter.numel() for parameter in model.parameters())


def flops_of_a_token(model, tokens):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    return counter.get_total_flops() / tokens


def test_compute_is_that_of_the_products_of_which_causal_attention_needs_half(shape_and_model):
    arch, model = shape_and_model
    short, long = (flops_of_a_token(model, tokens) for tokens in (TOKENS, 2 * TOKENS))
    attention = long - short  # grows with the length, and nothing else does
    assert attention > 0
    # The rotary table is a product too, of one channel pair and position each.
    assert arch.flops_per_token(TOKENS) == pytest.approx(short - attention / 2, rel=1e-3)
