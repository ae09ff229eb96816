"""What a step would do, before anything is allocated: shapes, layout, memory. `dry_run=true` prints it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron_nemo.config.schema import Config, TrainingConfig
from minitron_nemo.distributed.layout import legal_tp
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES
from minitron_nemo.shape.figures import FIGURES, Workload
from minitron_nemo.shape.published import published_as
from minitron_nemo.steps.forecast import disk_lines, model_size, training_forecast
from minitron_nemo.steps.memory import training_memory, weight_bytes
from minitron_nemo.steps.settings import role_of, runs_of_teachers, teacher_paths
from minitron_nemo.steps.step import Recipe
from minitron_nemo.steps.teacher_memory import teacher_weights

GIB = 2**30
PATHS = ("source", "checkpoint", "teacher", "importance", "reference", "output")


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run: what is cut, what is left of it, and the teachers of the distillation by role."""

    cut: ModelArch
    student: ModelArch
    teachers: dict[str, ModelArch]

    @property
    def teacher(self) -> ModelArch:
        """The only one, or the first."""
        return next(iter(self.teachers.values()))


def shapes(config: Config) -> Shapes:
    """From checkpoints on disk, else from the config."""
    cut = _arch_on_disk(config.prune.checkpoint) or config.model_arch()
    described = config.distill.teacher_model.arch() if config.distill.teacher_model is not None else cut
    teachers = {role: _arch_on_disk(path) or described for role, path in teacher_paths(config.distill).items()}
    return Shapes(cut, pruned_shape(config, cut), teachers)


def pruned_shape(config: Config, cut: ModelArch) -> ModelArch:
    """What is left of a model: what the plan file says where one is given and there, else the target."""
    if config.prune.plan is None or not Path(config.prune.plan).is_file():
        return config.fit(cut).arch
    from minitron_nemo.pruning.plan import read_plan

    return read_plan(config.prune.plan).target


def _arch_on_disk(path: str | None) -> ModelArch | None:
    if path is None or not Path(path).exists():
        return None
    from minitron_nemo.checkpoint.formats.nemo import open_nemo  # brings torch

    return open_nemo(path).arch


def describe(recipe: Recipe, config: Config) -> str:
    """Shapes, parameter counts, the recipe's own lines and its paths."""
    lines = [f"{recipe.name} of {config.name}: dry run, nothing is allocated or written"]
    if recipe.processes == "one" and config.model is None and not Path(str(config.prune.checkpoint)).exists():
        lines.append("  shapes    not known: the config has no `model`, and no checkpoint is there yet")
    else:
        model = shapes(config)
        lines += [
            *(f"  {role:<9} {teacher.describe()}" for role, teacher in model.teachers.items()),
            *([f"  cut from  {model.cut.describe()}"] if model.cut != model.teacher else []),
            f"  student   {model.student.describe()}",
            *recipe.describe(config),
        ]
    section = recipe.section(config)
    paths = {name: getattr(section, name, None) for name in PATHS}
    paths |= {role_of(name): teacher.checkpoint for name, teacher in getattr(section, "teachers", {}).items()}
    for name, value in paths.items():
        if value is not None:
            there = " (there)" if Path(value).exists() else ""
            lines.append(f"  {name:<9} {value}{there}")
    return "\n".join(lines)


def model_lines(config: Config, arch: ModelArch) -> list[str]:
    """What a step that writes one model of this shape leaves on the disk."""
    return disk_lines(config, {"model": model_size(config, arch)})


def before_and_after(config: Config) -> list[str]:
    """What a cut changes, side by side: sizes, costs, tensor-parallel degrees, and what was published of either."""
    model, work = shapes(config), Workload(config.data.seq_length)
    pair = (model.cut, model.student)
    rows = [("", "before", "after"), *((name, *(str(axis.size(arch)) for arch in pair)) for name, axis in AXES.items())]
    for figure in FIGURES.values():
        rows.append((figure.title, *(figure.show(figure.of(arch, work)) for arch in pair)))
    rows.append(("tensor parallel", *(", ".join(map(str, legal_tp(arch)[:8])) for arch in pair)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"    {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    known = [(when, published_as(arch)) for when, arch in zip(("before", "after"), pair, strict=True)]
    return [
        f"  cut       FLOP in sequences of {work.seq_length}; memory is that of the weights",
        *lines,
        *(f"  published {when}: {model.describe()}" for when, model in known if model is not None),
    ]


def target_lines(config: Config) -> list[str]:
    """How the target came out of a budget; none where there is no budget, or a plan says what stays."""
    if config.prune.plan is not None or config.prune.target.budget is None:
        return []
    return [f"  {line}" for line in config.fit(shapes(config).cut).lines]


def weight_lines(config: Config) -> list[str]:
    """Memory of a step that only runs a model forward."""
    weights = shapes(config).cut.num_params() * weight_bytes(config) / config.layout.model_ranks
    return [f"  memory    {weights / GIB:.2f} GiB a rank for {_precision(config)} weights"]


def training_lines(config: Config, training: TrainingConfig, *, with_teacher: bool) -> list[str]:
    """Length, compute and memory of a training step; what is trained is the teacher where it does not teach.

    Memory is that of a rank of the pipeline stage that needs most (`steps/memory.py`). It is an estimate.
    """
    seq, model = config.data.seq_length, shapes(config)
    teachers = model.teachers if with_teacher else {}
    trained = model.student if with_teacher else model.teacher
    tokens = training.max_steps * training.global_batch_size * seq
    runs = runs_of_teachers(config) if with_teacher else {}
    flops = 3 * trained.flops_per_token(seq) + sum(
        runs[role] * teacher.flops_per_token(seq) for role, teacher in teachers.items()
    )
    first, *others = teachers.values() or (None,)
    stage, parts = training_memory(config, training, student=trained, teacher=first, others=others)
    memory = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    where = f" of stage {stage + 1}" if config.layout.pp > 1 else ""
    return [
        f"  training  {training.max_steps} steps x {training.global_batch_size} samples = {tokens / 1e9:.3g} B tokens, "
        f"{flops / 1e9:.3g} GFLOP a token",
        f"  memory    {sum(parts.values()) / GIB:.2f} GiB a rank{where} in {_precision(config)} (GiB: {memory})",
        *(teacher_lines(config, list(teachers.values()), stage) if with_teacher else []),
        *training_forecast(config, training, trained=trained, flops_per_token=flops),
    ]


def teacher_lines(config: Config, teachers: Sequence[ModelArch], stage: int) -> list[str]:
    """How teachers are laid out, and what of them lies in host memory, where that is not as the student is."""
    words = config.distill.teacher_parallel.in_words(config.layout)
    item = weight_bytes(config)
    host = sum(teacher_weights(config, teacher, stage, item=item).host for teacher in teachers)
    size = f", {host / GIB:.2f} GiB a rank" if host else ""
    return [f"  beside    teacher: {words}{size}"] if words else []


def _precision(config: Config) -> str:
    return "bf16" if weight_bytes(config) == 2 else "fp32"
