"""Every setting of every section: its type, default, range, unit and meaning, declared once.

YAML under `conf/` says only what differs. Section names are recipe names; the words are those of Megatron-Core and
NeMo. A section's docstring and its fields' help are what `--help` and docs/configuration.md print.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from minitron_nemo.config.blocks import ScoreBlocksConfig
from minitron_nemo.config.convert import ConvertConfig
from minitron_nemo.config.export import ExportHfConfig
from minitron_nemo.config.hidden_states import HiddenStatesConfig
from minitron_nemo.config.importance import CompareImportanceConfig, EstimateImportanceConfig, MergeImportanceConfig
from minitron_nemo.config.parallel import MAX_RANKS, ParallelConfig
from minitron_nemo.config.repairs import RepairsConfig
from minitron_nemo.config.setting import MAX_SIZE, count, default_of, path, setting, setting_of
from minitron_nemo.config.shapes import ModelConfig, TargetConfig
from minitron_nemo.config.teacher import TeacherParallelConfig
from minitron_nemo.config.teachers import TeacherConfig
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.budget import Fit

# Bounds in the spirit of `MAX_SIZE`.
MAX_STEPS = 10**9


class Accelerator(Enum):
    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class Precision(Enum):
    """`auto` is bf16 on GPU and float32 on CPU."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Fp8(Enum):
    e4m3 = "e4m3"
    hybrid = "hybrid"


class Fp8Recipe(Enum):
    """Transformer Engine's, by Megatron's names."""

    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


@dataclass
class TrainerConfig:
    """Where and how every step runs; NeMo's key names and meanings."""

    devices: int = count(1, "ranks on each node", at_most=1024, how_it_runs=True)
    num_nodes: int = count(1, "nodes", at_most=MAX_RANKS, how_it_runs=True)
    accelerator: Accelerator = setting(Accelerator.auto, "`auto`: GPUs where there are any", how_it_runs=True)
    precision: Precision = setting(Precision.auto, "`auto`: bf16 on GPU, fp32 on CPU")
    fp8: Fp8 | None = setting(
        None,
        "format of the matrix products inside of layers, of student and teacher: `e4m3`, or `hybrid` with e5m2 for "
        "gradients; needs bf16, and Transformer Engine on GPUs that know it; null: none",
        later=True,
    )
    fp8_recipe: Fp8Recipe = setting(
        Fp8Recipe.delayed, "how Transformer Engine scales them; `mxfp8` on Blackwell alone", later=True
    )
    log_every_n_steps: int = count(
        10, "between records in `metrics.jsonl` and TensorBoard", at_most=MAX_STEPS, unit="steps", how_it_runs=True
    )
    warn_after_seconds: int = count(
        300,
        "without a finished training step, after which every rank says where it is",
        unit="seconds",
        how_it_runs=True,
    )


def blend_setting(help: str) -> Any:
    """A blend: corpus names and their weights. Its data is hashed, with the weights, as data."""
    return setting({}, help, above=0, at_most=10**9, how_it_runs=True)


@dataclass
class DataConfig:
    """What training and calibration read: prepared corpora, blended by weight.

    Documents lie in the order of their hash, so the three shares of the split are fair draws from the corpus.
    """

    blend: dict[str, float] = blend_setting(
        "corpus name under `prepare_data.output`, or path prefix of a `.bin/.idx` pair: its weight; weights need not "
        "add up to 1"
    )
    seq_length: int = count(8192, "of a sample", unit="tokens")
    split: str = setting(
        "98,2,0",
        "shares of the documents for training, validation, test",
        pattern=r"(?!0+(\.0+)?,)[0-9]{1,9}(\.[0-9]{1,9})?(,[0-9]{1,9}(\.[0-9]{1,9})?){2}",
        form="three numbers for train,validation,test such as '98,2,0', the first above 0",
    )
    reset_position_ids: bool = setting(
        False,
        "positions begin anew with each document; needs `reset_attention_mask`, beside which it changes nothing: "
        "rotary embeddings go by differences of positions",
        how_it_runs=True,
    )
    reset_attention_mask: bool = setting(  # hashed with the data that it changes
        False,
        "documents of one sample are kept apart: no token sees those of the documents before its own, in training, "
        "importance and evaluation",
        how_it_runs=True,
    )


@dataclass
class OptimConfig:
    """Adam with a cosine schedule (paper 2; betas and decay are NeMo's recipe, the papers print none)."""

    lr: float = setting(1e-4, "peak learning rate", above=0, at_most=10)
    min_lr: float = setting(1e-5, "learning rate at the last step, not above `lr`", at_least=0, at_most=10)
    warmup_steps: int = count(
        40, "of linear warm-up; at most `max_steps - 1` of them are made", at_least=0, at_most=MAX_STEPS, unit="steps"
    )
    weight_decay: float = setting(0.1, "decoupled weight decay", at_least=0, at_most=10)
    betas: list[float] = setting([0.9, 0.95], "Adam's averages", at_least=0, below=1, length=2)
    eps: float = setting(1e-8, "Adam's epsilon; NeMo's recipes use 1e-5", above=0, at_most=1)
    gradient_clip_val: float = setting(
        1.0, "largest norm of the whole gradient; 0: no clipping", at_least=0, at_most=10**6
    )

    def warmup_in(self, max_steps: int) -> int:
        """Steps of warm-up in a run of `max_steps`: at least one step is left for the cosine."""
        return min(self.warmup_steps, max_steps - 1)


class OnNonFinite(Enum):
    """What a training step does whose loss or gradient is not finite."""

    stop = "stop"
    skip = "skip"


@dataclass
class TrainingConfig:
    """What `correct_teacher.training` and `distill.training` have.

    The schedule is a linear warm-up to `lr`, then a cosine down to `min_lr` at `max_steps`.
    """

    # Paper 1's light retraining: 400 steps of 1152 samples.
    max_steps: int = count(400, "of the optimizer", at_most=MAX_STEPS, unit="steps")
    global_batch_size: int = count(
        1152, "in a step, all ranks together; a multiple of micro-batch x data-parallel ranks", unit="samples"
    )
    micro_batch_size: int = count(1, "in a forward pass", unit="samples", how_it_runs=True)
    optim: OptimConfig = field(default_factory=OptimConfig)
    val_check_interval: int = count(
        100, "between validations; 0: never", at_least=0, at_most=MAX_STEPS, unit="steps", how_it_runs=True
    )
    limit_val_batches: int = count(4, "in a validation", unit="global batches", how_it_runs=True)
    save_every_n_steps: int = count(
        100, "between training checkpoints; 0: none", at_least=0, at_most=MAX_STEPS, unit="steps", how_it_runs=True
    )
    save_every_n_minutes: int = count(
        0, "the same by the clock of rank 0, as well; 0: by steps alone", at_least=0, unit="minutes", how_it_runs=True
    )
    keep_latest_k: int = count(2, "how many of the newest training checkpoints stay", how_it_runs=True)
    # How it runs, so that a run that stopped goes on from its checkpoint when it is told to skip.
    on_non_finite: OnNonFinite = setting(
        OnNonFinite.stop,
        "when a loss or a gradient is not finite: end the run, or drop the gradient of that step and go on",
        how_it_runs=True,
    )
    max_skipped_steps: int = count(
        10, "in a row with `on_non_finite: skip`, before the run ends", unit="steps", how_it_runs=True
    )


@dataclass
class CorpusConfig:
    input: str = path(
        "a text file, a `.jsonl`, `.json` or `.parquet` file, a folder of them, or `stdlib`: the running Python's "
        "standard library; `.gz` and `.zst` are unpacked",
        default=MISSING,
    )
    glob: str = setting(
        "**/*", "which files of a folder; where it names no suffix, those that are not known to be text are left out"
    )
    exclude: list[str] = setting([], "globs of files to leave out")
    text_key: str = setting("text", "field of a JSON object, or column of a table, that holds the text")
    docstrings_only: bool = setting(False, "of Python files keep the docstrings")


@dataclass
class TrainTokenizerConfig:
    """A byte-level BPE trained on `prepare_data.corpora`, for models made from scratch."""

    vocab_size: int = setting(2048, "ids, the end-of-text token included", at_least=257, at_most=MAX_SIZE)
    output: str | None = path("tokenizer folder", place="tokenizer")


@dataclass
class PrepareDataConfig:
    """Text becomes tokens in Megatron's `.bin/.idx`."""

    corpora: dict[str, CorpusConfig] = setting({}, "corpus name: its source, see below")
    tokenizer: str | None = path("folder with `tokenizer.json`, or a `.nemo` folder", place="teacher.nemo")
    add_bos: bool | None = setting(
        None, "begin every document with the begin-of-sequence token; null: as the tokenizer's post-processor does"
    )
    workers: int = count(2, "processes that tokenize", at_most=1024, how_it_runs=True)
    output: str | None = path("folder of the `.bin/.idx/.json` files", place="data")


@dataclass
class RandomInitConfig:
    """A checkpoint of random weights: the start of pre-training and of the random-init baseline."""

    like: str | None = path("`.nemo` folder whose shape to take; null: `model`")
    init_method_std: float = setting(
        0.02,
        "standard deviation of the matrices; those that write into the residual stream are divided by sqrt(2 x layers)",
        at_least=0,
        at_most=10,
    )
    tokenizer: str | None = path("tokenizer folder to put in", place="tokenizer")
    output: str | None = path("`.nemo` folder", place="random_init.nemo")


@dataclass
class ImportHfConfig:
    """The shape comes from the folder, not from `model`."""

    source: str | None = path("Hugging Face folder, or hub name; has no default")
    output: str | None = path("`.nemo` folder", place="teacher.nemo")


@dataclass
class CorrectTeacherConfig:
    """Fine-tune the teacher on the distillation data with cross-entropy (paper 2)."""

    checkpoint: str | None = path("model to fine-tune", place="teacher.nemo")
    output: str | None = path("`.nemo` folder", place="corrected_teacher.nemo")
    blend: dict[str, float] = blend_setting("instead of `data.blend`")
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class PruneConfig:
    """Cut a model to a smaller shape by its scores, or by a plan that exists."""

    checkpoint: str | None = path("model to cut", place="corrected_teacher.nemo")
    importance: str | None = path("its scores", place="importance")
    blocks: str | None = path("scores of its blocks, for `target.drop_by`", place="blocks")
    plan: str | None = path("a `plan.json` to apply; `target` is then not used, `importance` by repairs alone")
    target: TargetConfig = field(default_factory=TargetConfig)
    repairs: RepairsConfig = field(default_factory=RepairsConfig)
    proof: bool = setting(
        True,
        "before it is published, compare what the cut model computes with the masked source, on calibration text that "
        "lies beside the scores, or on random tokens; on a GPU where there is one",
        how_it_runs=True,
    )
    output: str | None = path("`.nemo` folder, with `plan.json` inside", place="pruned.nemo")


class DivergenceName(Enum):
    """What is minimized between the logits of teacher and student; docs/method.md has the formulas."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jensen_shannon = "jensen_shannon"
    logit_mse = "logit_mse"
    logit_cosine = "logit_cosine"
    top_k_kl = "top_k_kl"


@dataclass
class DistillConfig:
    """Train the student against the frozen teacher's logits (paper 1; paper 2)."""

    checkpoint: str | None = path("the student's start", place="pruned.nemo")
    teacher: str | None = path("the frozen teacher", place="corrected_teacher.nemo", unless="teachers")
    teachers: dict[str, TeacherConfig] = setting(
        {}, "instead of `teacher`, several: a name, its checkpoint and its weights by source of data", later=True
    )
    check_teacher: bool = setting(
        True,
        "before the first step: its weights are finite and not all zero, and on held-out text it guesses better than "
        "chance",
        how_it_runs=True,
    )
    teacher_model: ModelConfig | None = setting(
        None,
        "fields of `model`: shape of the teacher for `dry_run`, where it is not the model that is cut",
        how_it_runs=True,
    )
    output: str | None = path("`.nemo` folder of the student", place="student.nemo")
    blend: dict[str, float] = blend_setting("instead of `data.blend`")
    divergence: DivergenceName = setting(
        DivergenceName.forward_kl, "of the student from the teacher; the papers' is forward KL", later=True
    )
    jensen_shannon_beta: float = setting(
        0.5, "the teacher's share of the mixture, for `jensen_shannon`", above=0, below=1, later=True
    )
    top_k: int = count(1024, "of the teacher's likeliest, for `top_k_kl`", unit="tokens", later=True)
    top_p: float = setting(
        1.0, "for `top_k_kl`: of these, the fewest whose probability reaches it; 1: all", above=0, at_most=1, later=True
    )
    temperature: float = setting(1.0, "divides both logits in divergences between distributions", above=0, at_most=1000)
    kl_weight: float = setting(
        1.0, "weight of the divergence; the papers use forward KL alone", at_least=0, at_most=10**6
    )
    cross_entropy_weight: float = setting(0.0, "weight of the cross-entropy with the text", at_least=0, at_most=10**6)
    hidden_states: HiddenStatesConfig = field(default_factory=HiddenStatesConfig)
    chunk_tokens: int = count(
        1024, "whose logits exist at a time; `correct_teacher` uses it too", unit="tokens", how_it_runs=True
    )
    teacher_window: int = count(
        32,
        "whose teacher states wait on the stages of a pipeline; 0: all of a step; the pipeline fills and empties "
        "for each window, which costs (stages - 1) / window of the time",
        at_least=0,
        unit="micro-batches",
        how_it_runs=True,
    )
    teacher_parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class EvaluateConfig:
    """Loss on held-out text, and closeness to a reference model."""

    checkpoint: str | None = path("model to evaluate", place="student.nemo")
    reference: str | None = path(
        "model to compare with: forward KL and top-1 agreement", place="corrected_teacher.nemo"
    )
    output: str | None = path("JSON file", place="eval/{checkpoint}.json")
    blend: dict[str, float] = blend_setting("instead of `data.blend`")
    num_samples: int = count(256, "held out; a multiple of micro-batch x data-parallel ranks", unit="samples")
    micro_batch_size: int = count(1, "in a forward pass", unit="samples", how_it_runs=True)
    chunk_tokens: int = count(1024, "whose logits exist at a time", unit="tokens", how_it_runs=True)


@dataclass
class StepConfig:
    recipe: str = setting(MISSING, "a file of `recipes/`, without `.py`")
    name: str | None = setting(None, "what the log calls the step; null: the recipe")
    overrides: list[str] = setting([], "overrides for this step alone, as on the command line")
    models: list[str] = setting([], "run the step once for each name, which replaces `{model}` in the overrides")


PAPER_CHAIN = (
    "import_hf", "prepare_data", "correct_teacher", "estimate_importance", "prune", "distill", "evaluate", "export_hf",
)  # fmt: skip


@dataclass
class PipelineConfig:
    """Which recipes `recipes/pipeline.py` runs, in order; each may carry overrides of this same config."""

    steps: list[StepConfig] = setting(
        [StepConfig(recipe=name) for name in PAPER_CHAIN],
        "what `recipes/pipeline.py` runs, in order; the default is the paper's chain of eight recipes, see above",
    )
    notice: str | None = setting(None, "said before the first step: how long they take, and where that was measured")


@dataclass
class ReportConfig:
    """One table and one page of plots for all models of a run."""

    models: list[str] = setting(
        [], "model names in the order of the table; each needs `<name>.nemo` and `eval/<name>.json` under `run_dir`"
    )
    output: str | None = path("HTML file; the JSON of the same name goes beside it", place="report.html")


@dataclass
class Config:
    """A whole composed config: what every recipe is given."""

    name: str = setting(
        MISSING,
        "name of the run; every config sets it",
        pattern=r"[^/\s.][^/\n]*",
        form="without '/' and not begin with '.': it names a folder",
        how_it_runs=True,
    )
    run_dir: str = path("where artefacts are made when no path is given", default="runs/${name}")
    seed: int = setting(1234, "order of the data, calibration samples, random weights", at_least=0, at_most=2**32 - 1)
    dry_run: bool = setting(
        False, "compose, check, print shapes, layout, memory, hours, disk; allocate and write nothing", how_it_runs=True
    )
    overwrite: bool = setting(
        False,
        "replace an output that another configuration made; what is up to date is still skipped",
        how_it_runs=True,
    )
    verify_key: str | None = path(
        "PEM file of a public key: a checkpoint of any format that it did not sign, or that is not what was signed, is "
        "refused; null: none"
    )
    model: ModelConfig | None = setting(
        None, "shape of the teacher, see below; null: only checkpoints on disk have shapes"
    )
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train_tokenizer: TrainTokenizerConfig = field(default_factory=TrainTokenizerConfig)
    prepare_data: PrepareDataConfig = field(default_factory=PrepareDataConfig)
    random_init: RandomInitConfig = field(default_factory=RandomInitConfig)
    import_hf: ImportHfConfig = field(default_factory=ImportHfConfig)
    correct_teacher: CorrectTeacherConfig = field(default_factory=CorrectTeacherConfig)
    estimate_importance: EstimateImportanceConfig = field(default_factory=EstimateImportanceConfig)
    merge_importance: MergeImportanceConfig = field(default_factory=MergeImportanceConfig)
    compare_importance: CompareImportanceConfig = field(default_factory=CompareImportanceConfig)
    score_blocks: ScoreBlocksConfig = field(default_factory=ScoreBlocksConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export_hf: ExportHfConfig = field(default_factory=ExportHfConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def fit(self, source: ModelArch) -> Fit:
        """The shape that `prune.target` makes of a model, and how a budget in it was met."""
        tp = self.parallel.tensor_model_parallel_size
        return self.prune.target.fit(source, tp=tp, seq_length=self.data.seq_length)

    def model_arch(self) -> ModelArch:
        """The shape in `model`; UserError where the config has none."""
        if self.model is None:
            raise UserError("model.num_layers is not set: this needs the sizes of `model`, or a checkpoint on disk")
        try:
            return self.model.arch()
        except UserError as error:
            raise UserError(f"model.{error}") from None

    @property
    def layout(self) -> Layout:
        """How the ranks of `trainer` are shared out by `parallel`."""
        trainer, parallel = self.trainer, self.parallel
        try:
            return Layout.of_world(
                trainer.devices * trainer.num_nodes,
                tp=parallel.tensor_model_parallel_size,
                pp=parallel.pipeline_model_parallel_size,
                cp=parallel.context_parallel_size,
                vpp=parallel.virtual_pipeline_model_parallel_size,
                sequence_parallel=parallel.sequence_parallel,
            )
        except UserError as error:
            if str(error).startswith("parallel."):
                raise
            raise UserError(f"trainer.devices={trainer.devices} on {trainer.num_nodes} node(s): {error}") from None


def identity(section: Any) -> dict[str, Any]:
    """What a section makes, as plain values for a fingerprint: every field but those marked as how it runs.

    A field marked as later is in when it is not at its default, a section in it when it says something.
    """
    values = {}
    for known in dataclasses.fields(section):
        value, said = getattr(section, known.name), setting_of(known)
        if said.how_it_runs or (said.later and value == default_of(known)):
            continue
        plain = _plain(value)
        if plain != {} or not dataclasses.is_dataclass(value):
            values[known.name] = plain
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return identity(value)
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.value if isinstance(value, Enum) else value
