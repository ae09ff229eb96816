"""The build options, and the loss of the output heads, that a config asks for."""

import torch

from minitron_nemo.config.schema import Config, DistillConfig, Precision
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import BuildOptions, has_transformer_engine
from minitron_nemo.errors import UserError
from minitron_nemo.losses.divergences.divergence import Divergence
from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.divergences.known import KNOWN
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.losses.tallies import Tallies
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.steps.settings import precision_of

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


def build_options(config: Config, groups: Groups, *, stages: list[int] | None = None) -> BuildOptions:
    """How models are built on this rank under this config; `stages` is the model's pipeline split."""
    trainer, parallel, on_gpu = config.trainer, config.parallel, groups.device.type == "cuda"
    if parallel.gradient_accumulation_fusion and not on_gpu:
        raise UserError("parallel.gradient_accumulation_fusion=true: needs a GPU; leave it false on the CPU")
    engine = {"trainer.fp8": trainer.fp8 is not None, "parallel.tp_comm_overlap": parallel.tp_comm_overlap}
    if any(engine.values()) and not has_transformer_engine(groups.device):
        name = next(name for name, is_set in engine.items() if is_set)
        raise UserError(
            f"{name}: needs Transformer Engine on a GPU; install it with pip install .[gpu], or leave it out"
        )
    overlap = parallel.overlap_grad_reduce
    if overlap is None:
        overlap = on_gpu or parallel.overlap_param_gather
    return BuildOptions(
        groups=groups,
        dtype=DTYPES[precision_of(config)],
        recompute=parallel.recompute,
        cpu_offloading_num_layers=parallel.cpu_offloading_num_layers,
        tp_comm_overlap=parallel.tp_comm_overlap,
        cuda_graph_impl=parallel.cuda_graph_impl.value,
        fp8=trainer.fp8 and trainer.fp8.value,
        fp8_recipe=trainer.fp8_recipe.value,
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=parallel.overlap_param_gather,
        ddp_bucket_size=parallel.ddp_bucket_size,
        gradient_accumulation_fusion=parallel.gradient_accumulation_fusion,
        reset_attention_mask=config.data.reset_attention_mask,
        stage_layers=stages,
    )


def divergence_of(section: DistillConfig) -> ForwardKL | Divergence:
    """The divergence that the section names, with the settings that are its own."""
    own = {
        "jensen_shannon": {"beta": section.jensen_shannon_beta},
        "top_k_kl": {"top_k": section.top_k, "top_p": section.top_p},
    }
    name = section.divergence.value
    return KNOWN[name](**own.get(name, {}))


def head_loss(section: DistillConfig, arch: ModelArch, groups: Groups, *, tallies: Tallies | None = None) -> HeadLoss:
    """The loss between the output heads of a student of this shape and its teacher."""
    return HeadLoss(
        vocab_size=arch.vocab_size,
        kl_weight=section.kl_weight,
        cross_entropy_weight=section.cross_entropy_weight,
        temperature=section.temperature,
        chunk_tokens=section.chunk_tokens,
        group=groups.tp,
        divergence=divergence_of(section),
        tallies=tallies,
    )
