"""A config.json is read for all it means, or refused by the name of the field."""

import dataclasses

import pytest
import torch
from hf_models import LLAMA3_ROPE

from minitron_nemo.checkpoint.formats.hf_config import arch_from_config, config_from_arch
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch, RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131,
    "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False,
}  # fmt: skip
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
NEMOTRON = {**LLAMA, "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_act": "relu2",
            "norm_eps": 1e-5}  # fmt: skip
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False,
         "sliding_window": 32, "max_window_layers": 1}  # fmt: skip
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 12}
SCALING = RopeScaling(8.0, 1.0, 4.0, 32)


def test_each_family_brings_its_activation_norms_and_biases():
    assert arch_from_config(LLAMA) == ModelArch(2, 32, 48, 4, 2, 8, 131, 64)
    assert arch_from_config(MISTRAL) == ModelArch(2, 32, 48, 4, 2, 8, 131, 64, family="mistral")
    assert arch_from_config(NEMOTRON) == ModelArch(
        2, 32, 48, 4, 2, 8, 131, 64, family="nemotron", activation="squared_relu", normalization="LayerNorm1p",
        rotary_percent=0.5,
    )  # fmt: skip
    assert arch_from_config(QWEN2) == ModelArch(2, 32, 48, 4, 2, 8, 131, 64, family="qwen2", add_qkv_bias=True)
    assert arch_from_config(QWEN3) == ModelArch(2, 32, 48, 4, 2, 12, 131, 64, family="qwen3", qk_layernorm=True)


def test_rope_is_the_same_in_the_new_and_the_old_writing():
    theta = LLAMA3_ROPE["rope_theta"]
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    named_type = {"type" if k == "rope_type" else k: v for k, v in scaling.items()}
    writings = [
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_theta": theta, "rope_parameters": scaling},
        {"rope_theta": theta, "rope_scaling": scaling},
        {"rope_theta": theta, "rope_scaling": named_type},
    ]
    for writing in writings:
        arch = arch_from_config({**LLAMA, **writing})
        assert (arch.rotary_base, arch.rope_scaling) == (theta, SCALING)


@pytest.mark.parametrize("writing", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_rope_without_settings_is_plain_at_ten_thousand(writing):
    arch = arch_from_config({**LLAMA, **writing})
    assert (arch.rotary_base, arch.rotary_percent, arch.rope_scaling) == (10000.0, 1.0, None)


def test_partial_rotary_factor_is_read_at_both_places():
    assert arch_from_config({**NEMOTRON, "partial_rotary_factor": 0.25}).rotary_percent == 0.25
    nested = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}
    assert arch_from_config({**NEMOTRON, **nested}).rotary_percent == 0.25


def test_absent_fields_mean_what_transformers_takes():
    from transformers import AutoConfig

    needed = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
              "max_position_embeddings")  # fmt: skip
    for config in (LLAMA, MISTRAL, NEMOTRON, QWEN2, QWEN3):
        sparse = {name: config[name] for name in needed} | {"num_attention_heads": 32, "sliding_window": None}
        full = AutoConfig.for_model(**sparse).to_dict()
        assert arch_from_config(sparse) == arch_from_config(full), config["model_type"]


def test_head_dim_is_taken_as_given_and_else_divided():
    assert arch_from_config({**LLAMA, "head_dim": 12}).kv_channels == 12
    assert arch_from_config({**LLAMA, "head_dim": None}).kv_channels == 8
    with pytest.raises(UserError, match="head_dim is absent and hidden_size=33"):
        arch_from_config({**LLAMA, "hidden_size": 33})


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA, {"model_type": "gemma"}, "model_type='gemma': supported are llama, mistral, nemotron, qwen2, qwen3"),
        (LLAMA, {"model_type": "qwen2"}, "architectures="),
        (QWEN2, {"use_sliding_window": True}, "sliding_window=32"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        (QWEN3, {"attention_bias": True}, "attention_bias=True"),
        (QWEN2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: qwen2"),
        (LLAMA, {"model_type": ["llama"]}, "model_type="),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        (LLAMA, {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map="),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (LLAMA, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts=8"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (NEMOTRON, {"hidden_act": "silu"}, "hidden_act='silu'"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type='linear'"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings=None"),
        (LLAMA, {"rope_parameters": {**LLAMA3_ROPE, "factor": "8"}}, "factor='8'"),
        (LLAMA, {"rope_parameters": [1]}, "rope_parameters="),
        (LLAMA, {"rope_theta": float("nan")}, "rope_theta=nan"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (NEMOTRON, {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
        (MISTRAL, {"sliding_window": 32}, "sliding_window=32"),
        (MISTRAL, {"sliding_window": "all"}, "sliding_window='all'"),
        (LLAMA, {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types="),
        (LLAMA, {"hidden_size": "32"}, "hidden_size='32'"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        (LLAMA, {"vocab_size": True}, "vocab_size=True"),
        (LLAMA, {"vocab_size": None}, "vocab_size=None"),
        (LLAMA, {"num_attention_heads": 0}, "=0"),
        (LLAMA, {"num_key_value_heads": 3}, "num_query_groups=3"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps=0"),
        (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base, changes, message):
    with pytest.raises(UserError) as caught:
        arch_from_config({**base, **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sliding_window_that_hides_nothing_is_accepted_and_an_absent_one_is_4096():
    assert arch_from_config({**MISTRAL, "sliding_window": 64}).family == "mistral"
    without = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    assert arch_from_config({**without, "max_position_embeddings": 4096}).seq_length == 4096
    with pytest.raises(UserError, match="sliding_window=4096"):
        arch_from_config({**without, "max_position_embeddings": 32768})


ARCHES = [
    ModelArch(2, 32, 48, 4, 2, 12, 131, 64, rope_scaling=SCALING, rotary_base=5e5),
    ModelArch(2, 32, 48, 4, 2, 8, 131, 64, share_embeddings_and_output_weights=True),
    ModelArch(3, 32, 48, 4, 4, 8, 131, 9000, family="mistral", norm_epsilon=1e-6),
    ModelArch(2, 32, 48, 4, 2, 8, 131, 64, family="nemotron", activation="squared_relu",
              normalization="LayerNorm1p", rotary_percent=0.25),
    ModelArch(2, 32, 48, 4, 2, 8, 131, 64, family="qwen2", add_qkv_bias=True, rotary_base=1e6),
    ModelArch(2, 32, 48, 4, 2, 12, 131, 64, family="qwen3", qk_layernorm=True, rotary_base=1e6),
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES, ids=["llama3", "tied", "mistral", "nemotron", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_nested", [True, False])
def test_the_written_config_reads_back_as_the_same_shape(arch, is_nested):
    base = {"model_type": arch.family, "rope_parameters": {}} if is_nested else None
    config = config_from_arch(arch, dtype=torch.bfloat16, base=base)
    assert ("rope_parameters" in config, "rope_theta" in config) == (is_nested, not is_nested)
    assert arch_from_config(config) == arch


def test_a_pruned_shape_keeps_the_harmless_fields_of_its_source():
    source = {**LLAMA, "head_dim": 8, "torch_dtype": "bfloat16", "eos_token_id": [1, 2], "rope_theta": 10000.0,
              "layer_types": ["full_attention"] * 2}  # fmt: skip
    small = dataclasses.replace(arch_from_config(source), num_layers=1, hidden_size=16)
    config = config_from_arch(small, dtype=torch.float32, base=source)
    assert arch_from_config(config) == small
    assert config["eos_token_id"] == [1, 2]
    assert config["layer_types"] == ["full_attention"]
    assert config["torch_dtype"] == "float32"
    assert "dtype" not in config


def test_a_window_of_qwen_counts_only_where_the_config_says_so():
    assert arch_from_config({**QWEN2, "use_sliding_window": True, "sliding_window": 64}).seq_length == 64
    written = config_from_arch(arch_from_config(QWEN3), dtype=torch.float32, base=QWEN3)
    assert (written["use_sliding_window"], written["head_dim"]) == (False, 12)


@pytest.mark.parametrize(
    ("family", "part"),
    [("llama", "add_qkv_bias"), ("llama", "qk_layernorm"), ("qwen2", "add_qkv_bias"), ("qwen3", "qk_layernorm")],
)
def test_a_shape_that_no_model_of_its_family_has_is_not_written_as_one(family, part):
    arch = ModelArch(2, 32, 48, 4, 2, 8, 131, 64, family=family, **{part: family == "llama"})
    with pytest.raises(UserError, match=f"{part}={family == 'llama'}: no .*ForCausalLM has that"):
        config_from_arch(arch, dtype=torch.float32)
