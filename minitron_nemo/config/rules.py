"""What may not be combined: relations between settings that the range of one cannot say."""

from minitron_nemo.config.schema import Config, TrainingConfig
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
    if config.distill.kl_weight == config.distill.cross_entropy_weight == 0:
        raise UserError("distill.kl_weight=0, distill.cross_entropy_weight=0: one must be above 0")


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
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and getattr(parallel, name) is False:
            raise UserError(f"parallel.{name}=false: parallel.overlap_param_gather=true needs it; leave it out")
    return layout


def check_training(training: TrainingConfig, section: str, layout: Layout) -> None:
    """Refuse a batch that the data-parallel ranks cannot share."""
    try:
        layout.share(training.global_batch_size, training.micro_batch_size)
    except UserError as error:
        raise UserError(f"{section}.training.{error}") from None
