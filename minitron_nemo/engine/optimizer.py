"""Adam under Megatron's data-parallel wrapper, plain or distributed, with a cosine schedule counted in steps."""

import warnings
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.engine.model import BuildOptions, ModelChunks


def wrap_data_parallel(model: ModelChunks, options: BuildOptions) -> ModelChunks:
    """The model in Megatron's data-parallel wrapper, chunk by chunk; gradients reduce in float32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=options.distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        bucket_size=options.ddp_bucket_size,
        average_in_collective=False,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = ModelChunks(
        # One bucket for each later chunk: its communication has the computation of others to hide behind.
        DistributedDataParallel(config=model.config, ddp_config=config, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model)
    )
    if options.overlap_grad_reduce:
        # Without it the schedule would start the reduction with every micro-batch.
        model.config.no_sync_func = wrapped.no_sync
    return wrapped


def whole(model: ModelChunks) -> ModelChunks:
    """The model without its wrappers with every parameter as the last step left it, on all ranks. Collective.

    Where ranks gather parameters during the forward pass, those that others updated are old until the next one.
    """
    for chunk in model:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return ModelChunks(model.gpts())


def build_optimizer(wrapped: ModelChunks, optim: OptimConfig, *, distributed_optimizer: bool) -> Any:
    """Megatron's Adam over a wrapped model, with float32 main weights where the model's are bf16."""
    dtype = wrapped.config.params_dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.gradient_clip_val,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed_optimizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_megatron_optimizer(config, list(wrapped), use_gloo_process_groups=False)


def build_schedule(optimizer: Any, optim: OptimConfig, *, max_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then a cosine down to `min_lr` at `max_steps`; set to the learning rate of the first step."""
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_in(max_steps),
        lr_decay_steps=max_steps,
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=max_steps,
        wd_incr_style="constant",
    )
    schedule.step(increment=1)  # step n trains with the learning rate of step n, so the first is not zero
    return schedule
