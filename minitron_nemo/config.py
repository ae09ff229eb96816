"""Schema and defaults of every configuration section, and the one crossing from Hydra to typed Python.

Defaults live here, once. YAML under `conf/` says only what differs. `compose` returns a closed `Config`:
unknown keys (also with `+`), wrong types and impossible values are refused with one line before anything is
allocated. Section names are recipe names; the words are those of Megatron-Core and NeMo.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minitron_nemo.arch import ModelArch, RopeScaling
from minitron_nemo.errors import UserError

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


class Accelerator(Enum):
    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class Precision(Enum):
    """`auto` is bf16 on GPU and float32 on CPU."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Aggregation(Enum):
    """How activations become one number (paper 1): over the sequence, then over the samples."""

    mean = "mean"
    l2 = "l2"
    variance = "variance"


@dataclass
class RopeScalingConfig:
    factor: float = MISSING
    low_freq_factor: float = MISSING
    high_freq_factor: float = MISSING
    original_max_position_embeddings: int = MISSING


@dataclass
class ModelConfig:
    """Shape of the teacher: what `dry_run` and `random_init` use. A checkpoint on disk brings its own."""

    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    kv_channels: int = MISSING
    vocab_size: int = MISSING
    seq_length: int = MISSING
    family: str = "llama"
    activation: str = "swiglu"
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: RopeScalingConfig | None = None
    share_embeddings_and_output_weights: bool = False

    def arch(self) -> ModelArch:
        values = dataclasses.asdict(self)
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return ModelArch(**values)


@dataclass
class TrainerConfig:
    """Where and how every step runs; NeMo's key names and meanings."""

    devices: int = 1  # ranks on each node
    num_nodes: int = 1
    accelerator: Accelerator = Accelerator.auto
    precision: Precision = Precision.auto
    log_every_n_steps: int = 10


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    # Layers on each pipeline stage, for each model of its own; unset: as even as they divide, the last stage (it has
    # the head) the fewest. `evaluate` always splits evenly.
    teacher_stage_layers: list[int] | None = None
    student_stage_layers: list[int] | None = None
    use_distributed_optimizer: bool = True
    recompute_activations: bool = False  # recompute each layer in the backward pass: less memory, a third more time


@dataclass
class DataConfig:
    """What training and calibration read: prepared corpora, blended by weight."""

    # Corpus name (a prefix under `prepare_data.output`, or a path prefix of a .bin/.idx pair) -> weight.
    blend: dict[str, float] = field(default_factory=dict)
    seq_length: int = 8192
    split: str = "98,2,0"  # share of the documents for training, validation, test


@dataclass
class OptimConfig:
    """Adam with a cosine schedule (paper 2; betas and decay are NeMo's recipe, the papers print none)."""

    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 40
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    gradient_clip_val: float = 1.0


@dataclass
class TrainingConfig:
    """What correction and distillation share: length, batch, optimizer, validation, checkpoints."""

    max_steps: int = 400  # paper 1's light retraining: 400 steps of 1152 samples
    global_batch_size: int = 1152
    micro_batch_size: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)
    val_check_interval: int = 100  # steps between validations; 0: never
    limit_val_batches: int = 4  # global batches per validation
    save_every_n_steps: int = 100  # steps between training checkpoints; 0: none
    save_top_k: int = 2  # newest training checkpoints to keep


@dataclass
class CorpusConfig:
    input: str = MISSING  # a text or jsonl file, or a folder of them
    glob: str = "**/*"  # which files of a folder
    exclude: list[str] = field(default_factory=list)  # globs of files to leave out
    text_key: str = "text"  # field of a jsonl line
    docstrings_only: bool = False  # of Python files: keep the docstrings, drop the code


@dataclass
class TrainTokenizerConfig:
    """A byte-level BPE for a model made from scratch; imported models bring theirs."""

    vocab_size: int = 2048
    output: str | None = None


@dataclass
class PrepareDataConfig:
    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    tokenizer: str | None = None  # folder with tokenizer.json, or a .nemo folder; default: the teacher's
    workers: int = 2
    output: str | None = None


@dataclass
class RandomInitConfig:
    """A checkpoint of random weights: the start of pre-training and of the random-init baseline."""

    like: str | None = None  # .nemo folder whose shape to take; unset: `model`
    init_method_std: float = 0.02
    tokenizer: str | None = None
    output: str | None = None


@dataclass
class ImportHfConfig:
    source: str | None = None  # Hugging Face folder or hub name
    output: str | None = None


@dataclass
class CorrectTeacherConfig:
    """Fine-tune the teacher on the distillation data with cross-entropy (paper 2)."""

    checkpoint: str | None = None
    output: str | None = None
    blend: dict[str, float] = field(default_factory=dict)  # instead of data.blend
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class EstimateImportanceConfig:
    """Forward passes over calibration samples (paper 1; paper 2)."""

    checkpoint: str | None = None
    output: str | None = None
    num_samples: int = 1024
    micro_batch_size: int = 1
    sequence_aggregation: Aggregation = Aggregation.mean
    batch_aggregation: Aggregation = Aggregation.l2


@dataclass
class TargetConfig:
    """Shape to prune to; what is unset stays as it is."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    # Layers to drop, counted from 1 as in the paper; unset: the lowest block importance goes first.
    drop_layers: list[int] | None = None

    def shrink(self, source: ModelArch) -> ModelArch:
        """The target shape; `drop_layers` also sets `num_layers`."""
        num_layers = self.num_layers
        if self.drop_layers is not None:
            wrong = [n for n in self.drop_layers if not 1 <= n <= source.num_layers]
            if wrong or len(set(self.drop_layers)) != len(self.drop_layers):
                raise UserError(
                    f"prune.target.drop_layers={self.drop_layers}: layers are counted from 1 to "
                    f"{source.num_layers}, each at most once"
                )
            left = source.num_layers - len(self.drop_layers)
            if num_layers is not None and num_layers != left:
                raise UserError(f"prune.target.num_layers={num_layers}: drop_layers leaves {left}; give one of the two")
            num_layers = left
        return source.shrink(
            num_layers=num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
        )


@dataclass
class PruneConfig:
    checkpoint: str | None = None
    importance: str | None = None
    plan: str | None = None  # an existing plan.json to apply instead of making one
    target: TargetConfig = field(default_factory=TargetConfig)
    output: str | None = None


@dataclass
class DistillConfig:
    """Train the student against the frozen teacher's logits (paper 1; paper 2)."""

    checkpoint: str | None = None  # the student's start
    teacher: str | None = None
    # Shape of the teacher for `dry_run`, where it is not the model that is cut; a checkpoint on disk brings its own.
    teacher_model: ModelConfig | None = None
    output: str | None = None
    blend: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    kl_weight: float = 1.0  # forward KL; the papers use it alone
    cross_entropy_weight: float = 0.0
    chunk_tokens: int = 1024  # tokens whose logits exist at a time
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class EvaluateConfig:
    checkpoint: str | None = None
    reference: str | None = None  # the model to compare with: forward KL and top-1 agreement
    output: str | None = None
    blend: dict[str, float] = field(default_factory=dict)
    num_samples: int = 256
    micro_batch_size: int = 1
    chunk_tokens: int = 1024


@dataclass
class ExportHfConfig:
    checkpoint: str | None = None
    output: str | None = None


@dataclass
class StepConfig:
    recipe: str = MISSING
    name: str | None = None  # what the log calls the step; default: the recipe
    overrides: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)  # run once for each, `{model}` in the overrides being its name


@dataclass
class PipelineConfig:
    """Which recipes `recipes/pipeline.py` runs, in order; each may carry overrides of this same config."""

    steps: list[StepConfig] = field(
        default_factory=lambda: [
            StepConfig(recipe=name)
            for name in (
                "import_hf", "prepare_data", "correct_teacher", "estimate_importance", "prune", "distill",
                "evaluate", "export_hf",
            )
        ]
    )  # fmt: skip


@dataclass
class ReportConfig:
    # Model names, in the order of the table; each has `<name>.nemo` and `eval/<name>.json` under run_dir.
    models: list[str] = field(default_factory=list)
    output: str | None = None


@dataclass
class Config:
    name: str = MISSING
    run_dir: str = "runs/${name}"
    seed: int = 1234
    dry_run: bool = False  # compose, validate, print shapes, layout and memory, allocate nothing
    overwrite: bool = False  # replace an output that was made by another configuration
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train_tokenizer: TrainTokenizerConfig = field(default_factory=TrainTokenizerConfig)
    prepare_data: PrepareDataConfig = field(default_factory=PrepareDataConfig)
    random_init: RandomInitConfig = field(default_factory=RandomInitConfig)
    import_hf: ImportHfConfig = field(default_factory=ImportHfConfig)
    correct_teacher: CorrectTeacherConfig = field(default_factory=CorrectTeacherConfig)
    estimate_importance: EstimateImportanceConfig = field(default_factory=EstimateImportanceConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export_hf: ExportHfConfig = field(default_factory=ExportHfConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


# Where each artefact is when no path is given: (section, field) -> place under run_dir.
DEFAULT_PLACES = {
    ("train_tokenizer", "output"): "tokenizer",
    ("prepare_data", "tokenizer"): "teacher.nemo",
    ("prepare_data", "output"): "data",
    ("random_init", "tokenizer"): "tokenizer",
    ("random_init", "output"): "random_init.nemo",
    ("import_hf", "output"): "teacher.nemo",
    ("correct_teacher", "checkpoint"): "teacher.nemo",
    ("correct_teacher", "output"): "corrected_teacher.nemo",
    ("estimate_importance", "checkpoint"): "corrected_teacher.nemo",
    ("estimate_importance", "output"): "importance",
    ("prune", "checkpoint"): "corrected_teacher.nemo",
    ("prune", "importance"): "importance",
    ("prune", "output"): "pruned.nemo",
    ("distill", "checkpoint"): "pruned.nemo",
    ("distill", "teacher"): "corrected_teacher.nemo",
    ("distill", "output"): "student.nemo",
    ("evaluate", "checkpoint"): "student.nemo",
    ("evaluate", "reference"): "corrected_teacher.nemo",
    ("export_hf", "checkpoint"): "student.nemo",
    ("report", "output"): "report.html",
}


def compose(
    config_name: str, overrides: list[str] | None = None, *, recipe: str = "", config_dir: Path = CONF_DIR
) -> Config:
    """Compose `conf/<config_name>.yaml` with `key=value` overrides into a closed, validated `Config`.

    `recipe` names the section about to run, whose batch sizes must then fit the layout. Raises UserError for an
    unknown config name, key, type or value.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    available = sorted(path.stem for path in Path(config_dir).glob("*.yaml"))
    if config_name not in available:
        raise UserError(f"--config-name {config_name}: no such config; available are {', '.join(available)}")
    try:
        with initialize_config_dir(config_dir=str(Path(config_dir).resolve()), version_base="1.3"):
            tree = hydra_compose(config_name=config_name, overrides=list(overrides or []))
        _refuse_undeclared(OmegaConf.to_container(tree, resolve=False), Config, "")
        config = OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_one_line(error)) from None
    assert isinstance(config, Config)
    _fill_default_places(config)
    _check(config, recipe)
    return config


def _one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's messages, flattened: the innermost cause names the key and the type."""
    while error.__cause__ is not None and isinstance(error.__cause__, (HydraException, OmegaConfBaseException)):
        error = error.__cause__
    key = getattr(error, "full_key", None)
    text = re.sub(r"\s+", " ", str(error).split("full_key:")[0]).strip()
    return f"{key}: {text}" if key and key not in text else text


def _refuse_undeclared(values: Any, schema: Any, path: str) -> None:
    """`+foo=1` walks past a structured config, so compare keys with the declared fields ourselves."""
    if dataclasses.is_dataclass(schema) and isinstance(values, dict):
        hints = typing.get_type_hints(schema)
        for key, value in values.items():
            dotted = f"{path}.{key}" if path else str(key)
            if key not in hints:
                raise UserError(f"{dotted}: unknown key; {path or 'the config'} has {', '.join(hints)}")
            _refuse_undeclared(value, _plain_type(hints[key]), dotted)
    elif typing.get_origin(schema) is dict and isinstance(values, dict):
        for key, value in values.items():
            _refuse_undeclared(value, _plain_type(typing.get_args(schema)[1]), f"{path}.{key}")
    elif typing.get_origin(schema) is list and isinstance(values, list):
        for index, value in enumerate(values):
            _refuse_undeclared(value, _plain_type(typing.get_args(schema)[0]), f"{path}[{index}]")


def _plain_type(hint: Any) -> Any:
    """The type inside `X | None`."""
    inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return inner[0] if typing.get_origin(hint) not in (dict, list) and len(inner) == 1 else hint


def _fill_default_places(config: Config) -> None:
    for (section, name), place in DEFAULT_PLACES.items():
        if getattr(getattr(config, section), name) is None:
            setattr(getattr(config, section), name, str(Path(config.run_dir) / place))
    if config.evaluate.output is None:
        config.evaluate.output = str(Path(config.run_dir) / "eval" / f"{_stem(config.evaluate.checkpoint)}.json")
    if config.export_hf.output is None:
        config.export_hf.output = str(Path(config.run_dir) / f"{_stem(config.export_hf.checkpoint)}_hf")


def _stem(path: str | None) -> str:
    return Path(str(path)).name.removesuffix(".nemo")


def _check(config: Config, recipe: str) -> None:
    """Relations between fields that types cannot say."""
    config.model.arch()
    parallel, trainer = config.parallel, config.trainer
    world = trainer.devices * trainer.num_nodes
    for name in ("trainer.devices", "trainer.num_nodes", "trainer.log_every_n_steps",
                 "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
                 "data.seq_length", "distill.chunk_tokens", "evaluate.chunk_tokens", "evaluate.num_samples",
                 "evaluate.micro_batch_size", "estimate_importance.num_samples",
                 "estimate_importance.micro_batch_size", "prepare_data.workers",
                 "train_tokenizer.vocab_size"):  # fmt: skip
        section, key = name.split(".")
        if (value := getattr(getattr(config, section), key)) < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world % model_ranks:
        raise UserError(
            f"trainer.devices={trainer.devices} on {trainer.num_nodes} node(s) gives {world} ranks: must be a multiple "
            f"of tensor_model_parallel_size x pipeline_model_parallel_size = {model_ranks}"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError("parallel.sequence_parallel=true: needs tensor_model_parallel_size of at least 2")
    if parallel.sequence_parallel and config.data.seq_length % parallel.tensor_model_parallel_size:
        raise UserError(
            f"data.seq_length={config.data.seq_length}: sequence parallelism needs a multiple of "
            f"tensor_model_parallel_size={parallel.tensor_model_parallel_size}"
        )
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?){2}", config.data.split):
        raise UserError(f"data.split={config.data.split!r}: three numbers for train,validation,test such as '98,2,0'")
    for section in ("data", "correct_teacher", "distill", "evaluate"):
        for name, value in getattr(config, section).blend.items():
            if value <= 0:
                raise UserError(f"{section}.blend.{name}={value}: a blend weight must be above 0")
    if config.distill.temperature <= 0:
        raise UserError(f"distill.temperature={config.distill.temperature}: must be above 0")
    weights = (config.distill.kl_weight, config.distill.cross_entropy_weight)
    if min(weights) < 0 or max(weights) == 0:
        raise UserError(
            f"distill.kl_weight={weights[0]}, cross_entropy_weight={weights[1]}: both at least 0 and one above 0"
        )
    if recipe in ("correct_teacher", "distill"):
        _check_training(getattr(config, recipe).training, recipe, world // model_ranks)


def _check_training(training: TrainingConfig, section: str, data_parallel: int) -> None:
    for name in ("max_steps", "global_batch_size", "micro_batch_size"):
        if (value := getattr(training, name)) < 1:
            raise UserError(f"{section}.training.{name}={value}: must be at least 1")
    step = training.micro_batch_size * data_parallel
    if training.global_batch_size % step:
        raise UserError(
            f"{section}.training.global_batch_size={training.global_batch_size}: must be a multiple of "
            f"micro_batch_size x data-parallel ranks = {training.micro_batch_size} x {data_parallel}"
        )
    optim = training.optim
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"{section}.training.optim.betas={optim.betas}: two numbers in [0, 1)")
    if optim.lr <= 0 or not 0 <= optim.min_lr <= optim.lr:
        raise UserError(
            f"{section}.training.optim.lr={optim.lr}, min_lr={optim.min_lr}: needs 0 <= min_lr <= lr, lr > 0"
        )
