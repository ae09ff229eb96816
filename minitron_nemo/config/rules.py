"""What may not be combined: relations between settings that the range of one cannot say."""

from minitron_nemo.config.schema import Config, DistillConfig, TrainingConfig
from minitron_nemo.config.shapes import ModelConfig
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError


def check(config: Config) -> None:
    """What must hold of every config, whichever step runs."""
    if config.model is not None:
        _check_model(config.model, "model")
    if config.distill.teacher_model is not None:
        _check_model(config.distill.teacher_model, "distill.teacher_model")
    for section, training in (
        ("correct_teacher", config.correct_teacher.training),
        ("distill", config.distill.training),
    ):
        optim = training.optim
        if optim.min_lr > optim.lr:
            raise UserError(
                f"{section}.training.optim.min_lr={optim.min_lr}: must not be above {section}.training.optim.lr="
                f"{optim.lr}"
            )
    _check_divergence(config.distill)


# The settings that one divergence alone has.
_OWN = {"jensen_shannon_beta": "jensen_shannon", "top_k": "top_k_kl", "top_p": "top_k_kl"}


def _check_divergence(distill: DistillConfig) -> None:
    if distill.kl_weight == distill.cross_entropy_weight == 0:
        raise UserError("distill.kl_weight=0, distill.cross_entropy_weight=0: one must be above 0")
    chosen = distill.divergence.value
    for name, owner in _OWN.items():
        value = getattr(distill, name)
        if owner != chosen and value != getattr(DistillConfig, name):
            raise UserError(
                f"distill.{name}={value}: distill.divergence={chosen} does not use it; leave it out, or choose {owner}"
            )
    if chosen.startswith("logit_") and distill.temperature != 1:
        raise UserError(
            f"distill.temperature={distill.temperature}: distill.divergence={chosen} compares logits, which a "
            "temperature would only scale; leave it at 1"
        )


def _check_model(model: ModelConfig, name: str) -> None:
    try:
        model.arch()
    except UserError as error:
        raise UserError(f"{name}.{error}") from None
    if (rotated := int(model.kv_channels * model.rotary_percent)) % 2 or not rotated:
        raise UserError(
            f"{name}.rotary_percent={model.rotary_percent}: rotates {rotated} of kv_channels={model.kv_channels}, "
            "which must be an even number above 0"
        )
    if (scaling := model.rope_scaling) is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"{name}.rope_scaling.low_freq_factor={scaling.low_freq_factor}: must be below high_freq_factor="
            f"{scaling.high_freq_factor}"
        )


def check_ranks(config: Config) -> Layout:
    """The layout of a step that runs on ranks, refused where the settings of the ranks do not fit together."""
    layout, parallel = config.layout, config.parallel
    layout.check_sequence(config.data.seq_length)
    parallel.recompute.check([])  # asking for it refuses what does not go together
    if config.data.reset_position_ids and not config.data.reset_attention_mask:
        raise UserError(
            "data.reset_position_ids=true: needs data.reset_attention_mask=true; Megatron's rotary embedding takes no "
            "positions, and only between documents that are kept apart do they not matter"
        )
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and getattr(parallel, name) is False:
            raise UserError(f"parallel.{name}=false: parallel.overlap_param_gather=true needs it; leave it out")
    return layout


def check_training(training: TrainingConfig, section: str, layout: Layout) -> None:
    """Refuse a batch that the data-parallel ranks cannot share, or that their pipeline cannot take."""
    size = training.global_batch_size
    try:
        share = layout.share(size, training.micro_batch_size)
        layout.check_schedule(share.num_microbatches, name=f"global_batch_size={size}")
    except UserError as error:
        raise UserError(f"{section}.training.{error}") from None


def check_distillation(config: Config) -> None:
    """Refuse a batch, or a window of the teacher, that the ranks cannot share or their pipeline cannot take."""
    check_training(config.distill.training, "distill", config.layout)
    window = config.distill.teacher_window
    config.layout.check_schedule(window, name=f"distill.teacher_window={window}")


def check_one_chunk(config: Config, section: str) -> None:
    """Refuse layouts for a step that needs the layers of a stage to follow each other, and whole sequences."""
    for name in ("virtual_pipeline_model_parallel_size", "context_parallel_size"):
        if (degree := getattr(config.parallel, name)) > 1:
            raise UserError(f"parallel.{name}={degree}: {section} does not run so; set it to 1 for this step")


def check_samples(layout: Layout, samples: int, micro_batch: int, *, name: str) -> None:
    """Refuse a number of samples that the ranks cannot share, or their pipeline cannot take."""
    share = layout.share(samples, micro_batch, name=name)
    layout.check_schedule(share.num_microbatches, name=f"{name}={samples}")
