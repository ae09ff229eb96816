"""Parameters and compute of a shape are those that torch counts on transformers' model of it."""

import dataclasses
import json

import pytest
import torch
from hf_models import save_tiny_hf
from torch.utils.flop_counter import FlopCounterMode

from minitron_nemo.artefacts.origin import fingerprint_of
from minitron_nemo.checkpoint.formats.hf import arch_from_hf
from minitron_nemo.config.compose import compose
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import FAMILIES, ModelArch, billions
from minitron_nemo.shape.published import PUBLISHED, SIZES, published_as
from minitron_nemo.testing import TINY

TOKENS = 16


@pytest.fixture(scope="module", params=[(name, name == "mistral") for name in FAMILIES], ids=str)
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


# layers, hidden, ffn, heads, groups, channels, vocabulary: parameters and those without embeddings, in billions, as
# they are printed for the model (arXiv 2407.14679, 2408.11796, an error of the second's table 1 left out; the models'
# pages on the hub, Llama-3.2's without embeddings from its sizes).
PRINTED = {
    "llama31_8b": ("8.03", "6.98"),
    "mistral_nemo_12b": ("12.248", "10.906"),
    "nemotron4_15b": ("15.63", "12.48"),
    "minitron_8b": ("8.272", "6.175"),
    "qwen25_7b": ("7.6", "6.5"),
    "qwen3_8b": ("8.2", "6.95"),
    "llama32_3b": ("3.21", "2.82"),
    "llama32_1b": ("1.24", "0.97"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_published_parameters_are_counted_with_and_without_embeddings(name):
    arch = compose("llama31_width", [f"model={name}"]).model_arch()
    for printed, count in zip(PRINTED[name], (arch.num_params(), arch.num_params() - arch.num_embedding_params()),
                              strict=True):  # fmt: skip
        assert f"{count / 1e9:.{len(printed.split('.')[1])}f}" == printed


def test_a_token_of_the_cache_has_the_bytes_that_transformers_keeps(shape_and_model):
    arch, model = shape_and_model
    with torch.no_grad():
        cache = model(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values))
    assert arch.kv_cache_bytes_per_token(itemsize=4) * TOKENS == 4 * kept


def test_a_published_model_is_known_by_its_shape_and_its_figures_are_those_of_its_sizes():
    for model in PUBLISHED:
        sizes = dict(zip(SIZES, model.sizes, strict=True))
        kind = ("squared_relu", "LayerNorm1p") if model.name.startswith(("Nemotron", "Minitron")) else ()
        arch = ModelArch(**sizes, seq_length=4096, **dict(zip(("activation", "normalization"), kind, strict=False)))
        assert published_as(arch) == model
        assert billions(arch.num_params()) == f"{model.parameters:g} B"
        assert billions(arch.num_params() - arch.num_embedding_params()) == f"{model.non_embedding_parameters:g} B"
        assert published_as(dataclasses.replace(arch, hidden_size=arch.hidden_size + 1)) is None


BEFORE = "d45b39285eb1f7b4d8a5d14020fb18595bbdb55c9c70665835d91433e98a7beb"


def test_a_shape_is_written_as_before_there_were_biases_and_norms_of_heads_and_with_them_where_it_has_them():
    llama = compose("llama31_width").model_arch()
    assert fingerprint_of(llama.to_dict()) == BEFORE, "what was made of such a model would not be current any more"
    for arch in TINY.values():
        assert ModelArch.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch
    assert {"add_qkv_bias", "qk_layernorm"} & TINY["qwen3"].to_dict().keys() == {"qk_layernorm"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_qkv_bias": "yes"}, "add_qkv_bias='yes': must be true or false"),
        ({"share_embeddings_and_output_weights": 1}, "share_embeddings_and_output_weights=1: must be true"),
        ({"qk_layernorm": True, "normalization": "LayerNorm1p"}, "qk_layernorm=true: needs normalization=RMSNorm"),
    ],
)
def test_parts_that_no_model_has_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        ModelArch.from_dict({**TINY["llama"].to_dict(), **changes})
