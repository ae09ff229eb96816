"""Adam under Megatron's data-parallel wrapper, plain or distributed, with a cosine schedule counted in steps."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from minitron_nemo.config import OptimConfig
from minitron_nemo.engine.model import HeadlessGPT


@dataclass(frozen=True)
class Optimization:
    """The wrapped model, its optimizer and the learning-rate schedule."""

    model: Any
    optimizer: Any
    schedule: OptimizerParamScheduler

    def step(self) -> float:
        """Clip, step and advance the schedule; returns the gradient norm before clipping."""
        succeeded, grad_norm, _ = self.optimizer.step()
        assert succeeded, "the optimizer skipped a step, which only loss scaling does, and none is used here"
        self.schedule.step(increment=1)
        return float(grad_norm)

    def zero_gradients(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def prepare_training(model: HeadlessGPT, optim: OptimConfig, *, max_steps: int, distributed: bool) -> Optimization:
    """Wrap the model for data parallelism and attach optimizer and schedule; gradients reduce in float32."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=False,
        average_in_collective=False,
    )
    wrapped = DistributedDataParallel(config=model.config, ddp_config=ddp_config, module=model)
    model.config.finalize_model_grads_func = finalize_model_grads
    bf16 = model.config.params_dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.betas[0],
                adam_beta2=optim.betas[1],
                adam_eps=optim.eps,
                clip_grad=optim.gradient_clip_val,
                bf16=bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=distributed,
            ),
            [wrapped],
            use_gloo_process_groups=False,
        )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=min(optim.warmup_steps, max_steps - 1),
        lr_decay_steps=max_steps,
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=max_steps,
        wd_incr_style="constant",
    )
    schedule.step(increment=1)  # step n trains with the learning rate of step n, so the first is not zero
    return Optimization(wrapped, optimizer, schedule)
