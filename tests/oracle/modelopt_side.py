"""A model of ours in plain Megatron-Core, pruned by ModelOpt's Minitron plugin on one CPU rank.

ModelOpt is meant for GPUs; here it has Megatron's local layers with torch's norms on a CPU. That needs two things
beside what our engine does about CUDA: a registration of `torch.nn.RMSNorm`, and a gather that gloo does not refuse.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.rope import rotary_inverse_frequencies

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
HPARAMS = ("hidden_size", "ffn_hidden_size", "num_heads_per_group", "num_query_groups")
Arrays = dict[str, np.ndarray]


def megatron_name(name: str) -> str:
    """A checkpoint's name as the module's, whose norms are not fused."""
    for fused, apart in FUSED_NORMS.items():
        name = name.replace(fused, apart)
    return name


def weights_for(arch: ModelArch, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Megatron's names; LayerNorm1p's weights, stored minus one, as those of a LayerNorm."""
    weights = {megatron_name(name): tensor for name, tensor in tensors.items()}
    return {name: tensor + 1 if arch.has_norm_bias and name.endswith("norm.weight") else tensor
            for name, tensor in weights.items()}  # fmt: skip


def build(arch: ModelArch) -> torch.nn.Module:
    """Megatron's own GPT of this shape: local layer spec, its own attention, torch's norms."""
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads, num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels, normalization="LayerNorm" if arch.has_norm_bias else "RMSNorm",
        layernorm_epsilon=arch.norm_epsilon, gated_linear_unit=arch.is_gated,
        activation_func=torch.nn.functional.silu if arch.is_gated else squared_relu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, masked_softmax_fusion=False,
        persist_layer_norm=False, bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, attention_softmax_in_fp32=True,
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = WrappedTorchNorm
    model = GPTModel(
        config=config, transformer_layer_spec=TransformerBlockSubmodules([layer] * arch.num_layers, WrappedTorchNorm),
        vocab_size=arch.vocab_size, max_sequence_length=arch.seq_length, parallel_output=False,
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights, position_embedding_type="rope",
        rotary_percent=arch.rotary_percent, rotary_base=int(arch.rotary_base),
    )  # fmt: skip
    model.rotary_pos_emb.inv_freq = rotary_inverse_frequencies(arch)
    return model.eval()


def register_rms_norm() -> None:
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.nas.traced_hp import TracedHp

    class DynamicRMSNorm(_DynamicLayerNorm):
        def _setup(self) -> None:
            shape = [*self.normalized_shape[:-1], TracedHp(list(range(1, self.normalized_shape[-1] + 1)))]
            self._register_hparam("num_features", shape[-1])
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    if torch.nn.RMSNorm not in DMRegistry:
        DMRegistry.register({torch.nn.RMSNorm: "nn.RMSNorm"})(DynamicRMSNorm)


def gather_scalars() -> None:
    """Gloo refuses to gather numbers without a dimension, which NCCL takes."""
    gather = torch.distributed.all_gather_into_tensor
    torch.distributed.all_gather_into_tensor = lambda out, one, **options: gather(out, one.reshape(-1), **options)


def logits(model: torch.nn.Module, tokens_BS: Tensor) -> Tensor:
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    mask = torch.ones(1, 1, tokens_BS.shape[1], tokens_BS.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model(tokens_BS, positions, mask)


def prune_by_modelopt(
    groups: Groups, path: Path, exports: dict[str, dict[str, int]], calibration_BS: Tensor, probe_BS: Tensor
) -> dict[str, dict[str, Any]]:
    """For each export config: ModelOpt's scores, the tensors of what it made, its logits, and those before it."""
    import modelopt.torch.nas.plugins.megatron as plugin
    import modelopt.torch.prune as prune

    register_rms_norm()
    gather_scalars()
    folder = open_nemo(path)
    weights = weights_for(folder.arch, dict(stream(folder.weights)))
    found: dict[str, dict[str, Any]] = {}
    export = plugin._DynamicMCoreLanguageModel.export
    rules = {"megatron.core.models.gpt.GPTModel": {f"{name}_divisor": 1 for name in HPARAMS}}
    for case, sizes in exports.items():
        scores: Arrays = {}

        def recorded(self: Any, scores: Arrays = scores) -> Any:
            layers = self.decoder.layers
            scores["num_layers"] = np.array([layer._scores for layer in layers]) / len(calibration_BS)
            scores["hidden_size"] = self._estimate_hidden_size_importance().numpy()
            scores["ffn_hidden_size"] = np.stack([layer.mlp._estimate_importance() for layer in layers])
            attentions = [layer.self_attention for layer in layers]
            scores["num_attention_heads"] = np.stack([one._estimate_all_head_importance() for one in attentions])
            scores["num_query_groups"] = np.stack([one._estimate_query_group_importance() for one in attentions])
            return export(self)

        plugin._DynamicMCoreLanguageModel.export = recorded
        model = build(folder.arch)
        missing, extra = model.load_state_dict(weights, strict=False)
        assert [name for name in [*missing, *extra] if "_extra_state" not in name] in ([], ["output_layer.weight"])
        before = logits(model, probe_BS)

        def forward(model: torch.nn.Module) -> None:
            for tokens in calibration_BS.split(1):
                logits(model, tokens)

        made, _ = prune.prune(model, mode=[("mcore_minitron", rules)], constraints={"export_config": dict(sizes)},
                              dummy_input=None, config={"forward_loop": forward})  # fmt: skip
        tensors = {name: tensor.numpy().copy() for name, tensor in made.state_dict().items() if torch.is_tensor(tensor)}
        found[case] = {"scores": scores, "tensors": tensors, "logits": logits(made, probe_BS).numpy(),
                       "before": before.numpy()}  # fmt: skip
    plugin._DynamicMCoreLanguageModel.export = export
    return found
