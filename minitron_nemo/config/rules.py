"""What may not be combined: relations between settings that the range of one cannot say."""

from minitron_nemo.config.parallel import CudaGraphImpl
from minitron_nemo.config.schema import (
    Accelerator,
    Config,
    DistillConfig,
    Precision,
    TrainerConfig,
    TrainingConfig,
)
from minitron_nemo.config.shapes import ModelConfig
from minitron_nemo.config.teacher import SECTION
from minitron_nemo.config.teachers import shares
from minitron_nemo.distributed.beside import SETTING
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.taps import EMBEDDINGS


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
    if config.distill.teachers:
        _check_teachers(config)


def _check_teachers(config: Config) -> None:
    distill = config.distill
    if distill.teacher is not None:
        raise UserError(
            f"distill.teacher={distill.teacher} and distill.teachers are both given: leave one out; a teacher of all "
            "sources is an entry of distill.teachers with a weight in each"
        )
    for name in distill.teachers:
        if not name.replace("_", "a").replace("-", "a").isalnum():
            raise UserError(f"distill.teachers.{name}: a name has letters, digits, '-' and '_' alone")
    if distill.kl_weight == 0:
        raise UserError("distill.kl_weight=0: distill.teachers would not be listened to; leave them out")


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
    _check_hidden_states(distill)
    if chosen.startswith("logit_") and distill.temperature != 1:
        raise UserError(
            f"distill.temperature={distill.temperature}: distill.divergence={chosen} compares logits, which a "
            "temperature would only scale; leave it at 1"
        )


def _check_hidden_states(distill: DistillConfig) -> None:
    section, name = distill.hidden_states, "distill.hidden_states"
    kinds = [kind.value for kind in section.kinds]
    for field, values in (("kinds", kinds), ("student_layers", section.student_layers)):
        if len(set(values)) < len(values):
            raise UserError(f"{name}.{field}={values}: each at most once")
    if section.teacher_layers and len(section.teacher_layers) != len(section.student_layers):
        raise UserError(
            f"{name}.teacher_layers={section.teacher_layers}: needs one for each of {name}.student_layers="
            f"{section.student_layers}; leave it out to go by the student's plan.json"
        )
    if section.student_layers and not set(kinds) - {EMBEDDINGS}:
        raise UserError(
            f"{name}.student_layers={section.student_layers}: {name}.kinds={kinds} compares no layers; name kinds that "
            "do, or leave the layers out"
        )
    if section.any and section.weight is None and distill.kl_weight == 0:
        raise UserError(
            f"{name}.weight=null: makes the loss as large as that of the logits, which distill.kl_weight=0 leaves out; "
            f"give {name}.weight a number"
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


def check_ranks(config: Config) -> Layout:
    """The layout of a step that runs on ranks, refused where the settings of the ranks do not fit together."""
    layout, parallel = config.layout, config.parallel
    layout.check_sequence(config.data.seq_length)
    parallel.recompute.check([])  # asking for it refuses what does not go together
    _check_accelerations(config, layout)
    if config.data.reset_position_ids and not config.data.reset_attention_mask:
        raise UserError(
            "data.reset_position_ids=true: needs data.reset_attention_mask=true; Megatron's rotary embedding takes no "
            "positions, and only between documents that are kept apart do they not matter"
        )
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and getattr(parallel, name) is False:
            raise UserError(f"parallel.{name}=false: parallel.overlap_param_gather=true needs it; leave it out")
    return layout


def _check_accelerations(config: Config, layout: Layout) -> None:
    """Refuse what only GPUs can do on a CPU, and what excludes each other there."""
    trainer, parallel = config.trainer, config.parallel
    on_gpus = {
        "trainer.fp8": trainer.fp8 is not None,
        "parallel.tp_comm_overlap": parallel.tp_comm_overlap,
        "parallel.cuda_graph_impl": parallel.cuda_graph_impl is not CudaGraphImpl.none,
    }
    if trainer.accelerator is Accelerator.cpu and any(on_gpus.values()):
        name = next(name for name, is_set in on_gpus.items() if is_set)
        raise UserError(f"{name}: needs GPUs, and trainer.accelerator=cpu; leave it out")
    if trainer.fp8 is not None and trainer.precision is Precision.fp32:
        raise UserError(f"trainer.fp8={trainer.fp8.value}: goes with trainer.precision=bf16, not with fp32")
    if trainer.fp8 is None and trainer.fp8_recipe is not TrainerConfig.fp8_recipe:
        raise UserError(f"trainer.fp8_recipe={trainer.fp8_recipe.value}: says how trainer.fp8 scales; set that too")
    if parallel.tp_comm_overlap and not layout.sequence_parallel:
        raise UserError(
            "parallel.tp_comm_overlap=true: hides the transfers of parallel.sequence_parallel=true; set it, with "
            "tensor_model_parallel_size above 1"
        )
    recomputes, captures = parallel.recompute.granularity is not None, on_gpus["parallel.cuda_graph_impl"]
    if (offloaded := parallel.cpu_offloading_num_layers) and (recomputes or captures):
        raise UserError(
            f"parallel.cpu_offloading_num_layers={offloaded}: does not go with recomputation or CUDA graphs; leave "
            "one of them out"
        )
    if recomputes and captures:
        raise UserError("parallel.cuda_graph_impl=local: does not go with recomputation; leave one of them out")


def check_training(training: TrainingConfig, section: str, layout: Layout) -> None:
    """Refuse a batch that the data-parallel ranks cannot share, or that their pipeline cannot take."""
    size = training.global_batch_size
    try:
        share = layout.share(size, training.micro_batch_size)
        layout.check_schedule(share.num_microbatches, name=f"global_batch_size={size}")
    except UserError as error:
        raise UserError(f"{section}.training.{error}") from None


def check_distillation(config: Config) -> None:
    """Refuse a batch, or a window of the teacher, that the ranks cannot share or their pipeline cannot take, and
    several teachers that do not fit the blend.
    """
    distill = config.distill
    check_training(distill.training, "distill", config.layout)
    window = distill.teacher_window
    config.layout.check_schedule(window, name=f"distill.teacher_window={window}")
    _check_teacher(config)


def _check_teacher(config: Config) -> None:
    """Refuse what teachers do not go with: their own layout, the blend, and what is compared inside of them."""
    distill, how, layout = config.distill, config.distill.teacher_parallel, config.layout
    how.check(layout, seq_length=config.data.seq_length)
    own_degree = how.beside(layout).teacher.tp
    if own_degree != layout.tp and distill.hidden_states.any:
        raise UserError(
            f"{SETTING}={how.tensor_model_parallel_size}: distill.hidden_states compares what ranks of the same degree "
            f"have; leave it out, or set it to {layout.tp}"
        )
    name = f"{SECTION}.{'shard_weights' if how.shard_weights else 'cpu_offloading_weights'}"
    if how.on_demand and config.trainer.fp8 is not None:
        raise UserError(
            f"{name}=true: layers come and go in the precision of the checkpoint; leave out "
            f"trainer.fp8={config.trainer.fp8.value}"
        )
    if not distill.teachers:
        return
    shares(distill.teachers, distill.blend or config.data.blend)
    if distill.hidden_states.any:
        raise UserError("distill.hidden_states: goes with one teacher; leave it out, or distill.teachers")
    if how.shard_weights or own_degree > layout.tp:
        given = f"{name}=true" if how.shard_weights else f"{SETTING}={own_degree}"
        raise UserError(
            f"{given}: its ranks run the same micro-batches, and with distill.teachers replicas ask other teachers; "
            "leave one of them out"
        )


def check_one_chunk(config: Config, section: str) -> None:
    """Refuse layouts for a step that needs the layers of a stage to follow each other, and whole sequences."""
    for name in ("virtual_pipeline_model_parallel_size", "context_parallel_size"):
        if (degree := getattr(config.parallel, name)) > 1:
            raise UserError(f"parallel.{name}={degree}: {section} does not run so; set it to 1 for this step")


def check_samples(layout: Layout, samples: int, micro_batch: int, *, name: str) -> None:
    """Refuse a number of samples that the ranks cannot share, or their pipeline cannot take."""
    share = layout.share(samples, micro_batch, name=name)
    layout.check_schedule(share.num_microbatches, name=f"{name}={samples}")
