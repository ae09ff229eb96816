"""The build options, and the divergence, that a config asks for."""

import torch

from minitron_nemo.config.schema import Config, DistillConfig, Precision
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.errors import UserError
from minitron_nemo.losses.divergences.divergence import Divergence
from minitron_nemo.losses.divergences.forward_kl import ForwardKL
from minitron_nemo.losses.divergences.known import KNOWN
from minitron_nemo.steps.settings import precision_of

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


def build_options(config: Config, groups: Groups, *, stages: list[int] | None = None) -> BuildOptions:
    """How models are built on this rank under this config; `stages` is the model's pipeline split."""
    parallel, on_gpu = config.parallel, groups.device.type == "cuda"
    if parallel.gradient_accumulation_fusion and not on_gpu:
        raise UserError("parallel.gradient_accumulation_fusion=true: needs a GPU; leave it false on the CPU")
    overlap = parallel.overlap_grad_reduce
    if overlap is None:
        overlap = on_gpu or parallel.overlap_param_gather
    return BuildOptions(
        groups=groups,
        dtype=DTYPES[precision_of(config)],
        recompute=parallel.recompute,
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
