"""What only GPUs can do, most of it with Transformer Engine: refused elsewhere, and told to Megatron in its words."""

import sys
from types import SimpleNamespace

import pytest
import torch

from minitron_nemo.config.compose import compose
from minitron_nemo.config.rules import check_ranks
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine import accelerations
from minitron_nemo.engine import model as engine_model
from minitron_nemo.engine.model import BuildOptions, transformer_config
from minitron_nemo.errors import UserError
from minitron_nemo.steps import estimate
from minitron_nemo.steps.estimate import heard_by
from minitron_nemo.steps.options import build_options
from minitron_nemo.steps.settings import settings_of
from minitron_nemo.testing import LLAMA, TINY

ON_GPUS = ["trainer.accelerator=gpu", "trainer.precision=bf16"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["trainer.fp8=hybrid"], "trainer.fp8: needs GPUs"),
        (["parallel.tp_comm_overlap=true"], "parallel.tp_comm_overlap: needs GPUs"),
        (["parallel.cuda_graph_impl=local"], "parallel.cuda_graph_impl: needs GPUs"),
        (["trainer.accelerator=gpu", "trainer.precision=fp32", "trainer.fp8=e4m3"], "trainer.fp8=e4m3: goes with"),
        (["trainer.fp8_recipe=tensorwise"], "trainer.fp8_recipe=tensorwise: says how"),
        ([*ON_GPUS, "parallel.tp_comm_overlap=true", "parallel.sequence_parallel=false"], "parallel.tp_comm_overlap="),
        (["parallel.cpu_offloading_num_layers=2", "parallel.recompute_activations=true"], "parallel.cpu_offloading_"),
        ([*ON_GPUS, "parallel.cpu_offloading_num_layers=2", "parallel.cuda_graph_impl=local"], "parallel.cpu_offload"),
        ([*ON_GPUS, "parallel.cuda_graph_impl=local", "parallel.recompute_activations=true"], "parallel.cuda_graph_im"),
    ],
)  # fmt: skip
def test_what_cannot_be_or_not_together_is_refused(settings, says):
    with pytest.raises(UserError, match=f"^{says}"):
        check_ranks(compose("quickstart", settings))


def test_megatron_is_told_in_its_own_words():
    everything = BuildOptions(
        groups=Groups(Layout(tp=2, sequence_parallel=True)), dtype=torch.bfloat16, tp_comm_overlap=True,
        cuda_graph_impl="local", fp8="hybrid", fp8_recipe="tensorwise",
    )  # fmt: skip
    config = transformer_config(LLAMA, everything)
    assert (config.fp8, config.fp8_recipe, config.tp_comm_overlap) == ("hybrid", "tensorwise", True)
    assert config.cuda_graph_impl == "local"
    once = transformer_config(LLAMA, everything.computing_once())
    assert (once.fp8, once.tp_comm_overlap, once.cuda_graph_impl) == ("hybrid", False, "none")


@pytest.mark.parametrize(
    "asked", ["trainer.fp8=hybrid", "parallel.tp_comm_overlap=true"], ids=["fp8", "tp_comm_overlap"]
)
def test_without_transformer_engine_nothing_is_built(asked):
    with pytest.raises(UserError, match=f"^{asked.partition('=')[0]}: needs Transformer Engine on a GPU; install it"):
        build_options(compose("quickstart", [*ON_GPUS, asked]), Groups())


def test_eight_bits_make_another_model_and_are_in_its_fingerprint(monkeypatch):
    """And scores that were summed up in eight bits do not add up to others."""
    blend = SimpleNamespace(identity=dict)
    calibration = SimpleNamespace(fingerprint="", tokens=torch.zeros(1, 2))
    model = SimpleNamespace(tokenizer="", sha256="")
    monkeypatch.setattr(estimate, "load_tokenizer", lambda path: SimpleNamespace(fingerprint=""))
    plain, eight = (compose("quickstart", [*ON_GPUS, *more]) for more in ([], ["trainer.fp8=hybrid"]))
    for config, said in ((plain, "bf16"), (eight, "bf16, fp8 hybrid delayed")):
        assert settings_of(config.distill, config, blend)["precision"] == said
        assert heard_by(config, model, calibration).precision == said


def test_buffers_for_overlap_have_the_shape_of_a_micro_batch(monkeypatch):
    """Transformer Engine runs on no CPU: this stand-in takes what it would be given."""
    asked = []
    te = SimpleNamespace(module=SimpleNamespace(base=SimpleNamespace(initialize_ub=lambda **a: asked.append(a))))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)
    groups = Groups(Layout(tp=2, cp=2, sequence_parallel=True))
    for overlap in (False, True):
        config = transformer_config(LLAMA, BuildOptions(groups=groups, tp_comm_overlap=overlap))
        accelerations.start_tp_comm_overlap(config, groups, seq_length=64, micro_batch_size=3)
    assert asked == [dict(shape=[96, LLAMA.hidden_size], tp_size=2, use_fp8=False, bootstrap_backend="nccl")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layers_of_transformer_engine_have_the_biases_and_norms_of_the_family(family, monkeypatch):
    """It runs on no CPU: this is what Megatron is told to build them of."""
    asked, options = [], BuildOptions(groups=Groups())
    config = transformer_config(TINY[family], options)
    monkeypatch.setattr(engine_model, "has_transformer_engine", lambda device: True)
    monkeypatch.setattr(engine_model, "get_gpt_layer_with_transformer_engine_spec", lambda **a: asked.append(a))
    engine_model._block_spec(config, options, vp_stage=None)
    assert asked == [{"qk_layernorm": family == "qwen3"}]
    assert (config.add_qkv_bias, config.add_bias_linear) == (family == "qwen2", False)
