"""Building a Megatron-Core GPT of a given shape on this rank: Transformer Engine where present, else torch."""

import dataclasses
import importlib.util
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from minitron_nemo.config.parallel import Recompute
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.accelerations import allow_cuda_graphs
from minitron_nemo.engine.attention import SdpaCoreAttention
from minitron_nemo.engine.norm import Norm
from minitron_nemo.engine.offload import offload_activations
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
    recompute: Recompute = Recompute()
    cpu_offloading_num_layers: int = 0
    tp_comm_overlap: bool = False
    cuda_graph_impl: str = "none"
    fp8: str | None = None
    fp8_recipe: str = "delayed"
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: int | None = None
    gradient_accumulation_fusion: bool = False
    reset_attention_mask: bool = False
    # Stage splits are per model, because teacher and student have their own.
    stage_layers: list[int] | None = None
    own_groups: ProcessGroupCollection | None = None  # None: Megatron's of the ranks' layout

    def computing_once(self) -> "BuildOptions":
        """The same for a model that is not trained, or whose every activation is heard."""
        return dataclasses.replace(
            self, recompute=Recompute(), cpu_offloading_num_layers=0, tp_comm_overlap=False, cuda_graph_impl="none"
        )


def transformer_config(arch: ModelArch, options: BuildOptions) -> TransformerConfig:
    """Megatron's configuration of this shape under this layout.

    Dropout is off in every family, and so are biases but for those of queries, keys and values.
    """
    groups, layout = options.groups, options.groups.layout
    extra: dict[str, Any] = {}
    if layout.pp > 1:
        rows = [["decoder"] * layers for layers in layout.stages(arch.num_layers, options.stage_layers)]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        extra["pipeline_model_parallel_layout"] = rows
    te, on_gpu = has_transformer_engine(groups.device), groups.device.type == "cuda"
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
        add_qkv_bias=arch.add_qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        # Weights always come from a checkpoint, but only initializing marks the tensor-parallel parameters,
        # and without the marks the gradient norm would leave out the other ranks' parts.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        calculate_per_token_loss=True,  # sums over tokens; divided once by the tokens of the global batch
        gradient_accumulation_fusion=options.gradient_accumulation_fusion,
        bias_activation_fusion=on_gpu and arch.is_gated,  # by torch.compile
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=te or _has_rope_kernel(groups.device),
        deallocate_pipeline_outputs=True,
        # Interleaved, two stages send to each other both ways at a time, which a batch would mix up. Sending while the
        # next chunk runs needs CUDA's streams: gloo would send what is overwritten already.
        batch_p2p_comm=on_gpu and layout.vpp == 1,
        overlap_p2p_comm=on_gpu and layout.vpp > 1,
        **_asked_for(options),
        **extra,
    )


def _asked_for(options: BuildOptions) -> dict[str, Any]:
    """What trades memory, precision and time, in Megatron's words."""
    recompute = options.recompute
    return dict(
        recompute_granularity=recompute.granularity,
        recompute_method=recompute.method,
        recompute_num_layers=recompute.num_layers,
        recompute_modules=list(recompute.modules) or None,
        tp_comm_overlap=options.tp_comm_overlap,
        cuda_graph_impl=options.cuda_graph_impl,
        fp8=options.fp8,
        fp8_recipe=options.fp8_recipe,
    )


def _has_rope_kernel(device: torch.device) -> bool:
    """Whether Triton turns queries and keys on this device; Megatron is told of it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from minitron_nemo.engine.rope_kernel import serve_megatron

    serve_megatron()
    return True


def _leave(weight: Tensor) -> Tensor:
    return weight


def _block_spec(
    config: TransformerConfig, options: BuildOptions, *, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """What fills the slots of the layers: Transformer Engine's modules, else Megatron's with our norm and attention."""
    if has_transformer_engine(options.groups.device):
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if options.reset_attention_mask:  # Transformer Engine's attention goes by a mask's kind, not by its values
            layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
        return layer
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)


class HeadlessGPT(GPTModel):
    """A GPT whose last stage emits hidden states [s, b, h] for the loss to take through the head, not logits.

    The loss owns the output heads of student and teacher and works through them in chunks, so logits of a whole
    micro-batch never exist (docs/architecture.md, "The teacher emits hidden states").
    """

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        self.own_groups = pg_collection
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
            return tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        if self.post_process and self.config.tensor_model_parallel_size > 1:
            return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, [padded vocabulary / tp, h]; last stage only."""
        return self.output_layer()


class ModelChunks(nn.ModuleList):
    """This rank's part of a model in the order of the forward pass: a chunk for each virtual stage, else one.

    A chunk is a `HeadlessGPT`, or one inside of data-parallel wrappers.
    """

    @property
    def config(self) -> Any:
        """Megatron's configuration, which all chunks share."""
        return self[0].config

    @property
    def own_groups(self) -> ProcessGroupCollection | None:
        """Megatron's record of groups where they are not those of the ranks' layout."""
        return self.gpts()[0].own_groups

    @property
    def context(self) -> ProcessGroup:
        """The ranks that share each sequence, of one where nobody does."""
        return self.gpts()[0].pg_collection.cp

    def gpts(self) -> list[HeadlessGPT]:
        """The chunks without wrappers."""
        return [unwrap(chunk) for chunk in self]

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, [padded vocabulary / tp, h]; last stage only."""
        return self.gpts()[-1].head_weight()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Inside, no chunk reduces its gradients; for wrapped chunks."""
        stack = ExitStack()
        for chunk in self:
            stack.enter_context(chunk.no_sync())  # type: ignore[operator]
        return stack


def unwrap(chunk: Any) -> HeadlessGPT:
    """The GPT inside data-parallel wrappers."""
    while not isinstance(chunk, HeadlessGPT):
        chunk = chunk.module
    return chunk


def build_model(arch: ModelArch, options: BuildOptions, *, on_meta: bool = False) -> ModelChunks:
    """This rank's part of the model, weights not yet loaded (see `engine.weights.load_weights`).

    `on_meta`: layers have shapes and no memory; what is before and after them has.
    """
    layout = options.groups.layout
    layout.check(arch, stages=options.stage_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Transformer Engine would not need recomputed
        config = transformer_config(arch, options)
    allow_cuda_graphs(config)
    device: AbstractContextManager[Any] = nullcontext()
    if on_meta:
        # Transformer Engine asks Megatron where its weights go; the others take the default, if no GPU is named.
        te = config.init_model_with_meta_device = has_transformer_engine(options.groups.device)
        config.use_cpu_initialization = not te
        device = nullcontext() if te else torch.device("meta")
    with device:
        model = ModelChunks(_build_chunk(arch, options, config, number=number) for number in range(layout.vpp))
    if on_meta:
        for chunk in model.gpts():
            _give_memory_to_ends(chunk, options)
    return model


def _give_memory_to_ends(chunk: HeadlessGPT, options: BuildOptions) -> None:
    """Memory, not values, for the parameters of a chunk on the meta device that belong to no layer."""
    in_layers = {id(parameter) for parameter in chunk.decoder.layers.parameters()}
    for module in chunk.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in in_layers and parameter.is_meta:
                there = torch.empty(parameter.shape, dtype=options.dtype, device=options.groups.device)
                module.register_parameter(name, nn.Parameter(there))


def _build_chunk(arch: ModelArch, options: BuildOptions, config: TransformerConfig, *, number: int) -> HeadlessGPT:
    """The chunk of this number, from 0, on this rank."""
    groups = options.groups
    vp_stage = number if groups.layout.vpp > 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of absent fused kernels; engine_choice() says it in one line
        model = HeadlessGPT(
            config=config,
            transformer_layer_spec=_block_spec(config, options, vp_stage=vp_stage),
            vocab_size=groups.layout.padded_vocab_size(arch),
            max_sequence_length=arch.seq_length,
            pre_process=groups.is_first_stage and number == 0,
            post_process=groups.is_last_stage and number == groups.layout.vpp - 1,
            vp_stage=vp_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_percent=arch.rotary_percent,
            rotary_base=int(arch.rotary_base),
            pg_collection=options.own_groups,
        )
    # One formula for every family: Megatron's own Llama-3 scaling fixes the original context length at 8192.
    with torch.device("cpu"):
        model.rotary_pos_emb.inv_freq = rotary_inverse_frequencies(arch).to(groups.device)
    offload_activations(model.decoder.layers[: options.cpu_offloading_num_layers])
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return model.to(device=None if on_meta else groups.device, dtype=options.dtype)
