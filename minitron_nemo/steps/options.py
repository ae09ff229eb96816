"""The build options that a config asks for."""

import torch

from minitron_nemo.config.schema import Config, Precision
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.steps.settings import precision_of

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


def build_options(config: Config, groups: Groups, *, stages: list[int] | None = None) -> BuildOptions:
    """How models are built on this rank under this config; `stages` is the model's pipeline split."""
    return BuildOptions(
        groups=groups,
        dtype=DTYPES[precision_of(config)],
        recompute_activations=config.parallel.recompute_activations,
        distributed_optimizer=config.parallel.use_distributed_optimizer,
        stage_layers=stages,
    )
