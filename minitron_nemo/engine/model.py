"""Building a Megatron-Core GPT of a given shape on this rank: Transformer Engine where present, else torch."""

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.attention import SdpaCoreAttention
from minitron_nemo.engine.norm import Norm
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.rope import rotary_inverse_frequencies


def has_transformer_engine(device: torch.device) -> bool:
    """Whether Transformer Engine runs the layers on this device: installed, and the device is a GPU."""
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def engine_choice(device: torch.device, dtype: torch.dtype, optimizer: Any) -> str:
    """What runs the layers and the optimizer that was built on this device, in one line for the log."""
    layers = "torch layers with scaled_dot_product_attention"
    if has_transformer_engine(device):
        layers = "Transformer Engine layers"
    inner = type(getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer)
    adam = f"{inner.__module__.partition('.')[0]} {inner.__name__}"
    return f"engine: Megatron-Core on {device.type}, {layers}, {adam}, {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class BuildOptions:
    """How models are built and trained on this rank: the groups, the dtype of weights and the memory savings."""

    groups: Groups
    dtype: torch.dtype = torch.float32
    recompute_activations: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: int | None = None
    gradient_accumulation_fusion: bool = False
    reset_attention_mask: bool = False
    # Stage splits are per model, because teacher and student have their own.
    stage_layers: list[int] | None = None


def transformer_config(arch: ModelArch, options: BuildOptions) -> TransformerConfig:
    """Megatron's configuration of this shape under this layout; dropout and biases are off in every family."""
    groups, layout = options.groups, options.groups.layout
    extra: dict[str, Any] = {}
    if layout.pp > 1:
        rows = [["decoder"] * layers for layers in layout.stages(arch.num_layers, options.stage_layers)]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        extra["pipeline_model_parallel_layout"] = rows
    if options.recompute_activations:
        extra |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    te = has_transformer_engine(groups.device)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        normalization="LayerNorm" if arch.has_norm_bias else "RMSNorm",
        layernorm_zero_centered_gamma=arch.has_norm_bias,
        layernorm_epsilon=arch.norm_epsilon,
        gated_linear_unit=arch.is_gated,
        activation_func=torch.nn.functional.silu if arch.is_gated else squared_relu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        use_cpu_initialization=groups.device.type == "cpu",
        # Weights always come from a checkpoint, but only initializing marks the tensor-parallel parameters,
        # and without the marks the gradient norm would leave out the other ranks' parts.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        calculate_per_token_loss=True,  # sums over tokens; divided once by the tokens of the global batch
        gradient_accumulation_fusion=options.gradient_accumulation_fusion,
        bias_activation_fusion=te and arch.is_gated,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=te,
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=groups.device.type == "cuda",
        **extra,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def _block_spec(config: TransformerConfig, options: BuildOptions) -> ModuleSpec | TransformerBlockSubmodules:
    """What fills the slots of the layers: Transformer Engine's modules, else Megatron's with our norm and attention."""
    if has_transformer_engine(options.groups.device):
        layer = get_gpt_layer_with_transformer_engine_spec()
        if options.reset_attention_mask:  # Transformer Engine's attention goes by a mask's kind, not by its values
            layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
        return layer
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=Norm)


class HeadlessGPT(GPTModel):
    """A GPT whose last stage emits hidden states [s, b, h] for the loss to take through the head, not logits.

    The loss owns the output heads of student and teacher and works through them in chunks, so logits of a whole
    micro-batch never exist (docs/architecture.md, "The teacher emits hidden states").
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            # Called, not read: where ranks gather parameters during the forward pass, the call waits for the head's.
            self.output_layer.forward = self._shared_or_own_weight

    def _shared_or_own_weight(self) -> Tensor:
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.post_process and self.config.sequence_parallel:
            # Gathers the sequence; its backward sums the partial gradients of the ranks and scatters them.
            return tensor_parallel.gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        if self.post_process and self.config.tensor_model_parallel_size > 1:
            return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, [padded vocabulary / tp, h]; last stage only."""
        return self.output_layer()


def build_model(arch: ModelArch, options: BuildOptions) -> HeadlessGPT:
    """This rank's part of the model, weights not yet loaded (see `engine.weights.load_weights`)."""
    groups = options.groups
    groups.layout.check(arch, stages=options.stage_layers)
    config = transformer_config(arch, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of absent fused kernels; engine_choice() says it in one line
        model = HeadlessGPT(
            config=config,
            transformer_layer_spec=_block_spec(config, options),
            vocab_size=groups.layout.padded_vocab_size(arch),
            max_sequence_length=arch.seq_length,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=arch.rotary_percent,
            rotary_base=int(arch.rotary_base),
        )
    # One formula for every family: Megatron's own Llama-3 scaling fixes the original context length at 8192.
    model.rotary_pos_emb.inv_freq = rotary_inverse_frequencies(arch).to(groups.device)
    return model.to(device=groups.device, dtype=options.dtype)
