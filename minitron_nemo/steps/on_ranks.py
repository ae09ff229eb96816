"""Steps that run on ranks: checked, described and started for the layout of the config."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.disk import writing
from minitron_nemo.artefacts.signature import trusting
from minitron_nemo.config.rules import check_ranks
from minitron_nemo.config.schema import Config
from minitron_nemo.config.teacher import TeacherParallelConfig
from minitron_nemo.distributed.ranks import Rank, uses_gpu, visible_gpus
from minitron_nemo.errors import UserError
from minitron_nemo.progress import set_up_logging
from minitron_nemo.steps.describe import shapes
from minitron_nemo.steps.inputs import require
from minitron_nemo.steps.rank_log import log_file, logging_to_file
from minitron_nemo.steps.step import Job, Recipe

if TYPE_CHECKING:
    from minitron_nemo.distributed.groups import Groups

MODELS = ("checkpoint", "teacher", "reference")  # fields of sections: models that a step takes


@dataclass(frozen=True)
class RankRecipe(Recipe):
    """A recipe whose `run(config, job, groups)` is called on every rank of the layout."""

    @property
    def processes(self) -> str:
        return "ranks"

    def check_config(self, config: Config) -> None:
        check_ranks(config)
        self.check(config)

    def describe(self, config: Config) -> list[str]:
        """The layout and the data, then the recipe's own lines; refuses a shape that cannot be laid out."""
        layout, parallel, model = config.layout, config.parallel, shapes(config)
        beside = getattr(self.section(config), "teacher_parallel", TeacherParallelConfig())
        for role, teacher in model.teachers.items():
            beside.check_teacher(teacher, layout, name=role, stages=parallel.teacher_stage_layers)
        layout.check(model.student, name="student", stages=parallel.student_stage_layers)
        blend = getattr(self.section(config), "blend", None) or config.data.blend
        total = sum(blend.values())
        names = ", ".join(f"{weight / total:.0%} {name}" for name, weight in blend.items()) or "no blend"
        nodes = f"{config.trainer.num_nodes} node(s) x {config.trainer.devices} ranks"
        return [
            f"  layout    {nodes}: {layout.describe()}",
            f"  data      {names}, {config.data.seq_length} tokens a sample",
            *self.lines(config),
        ]

    def check_machine(self, config: Config) -> None:
        """Refuse inputs that are not there, and more ranks than there are GPUs, before anything is read."""
        section = self.section(config)
        given = [getattr(section, name) for name in MODELS if hasattr(section, name)]
        several = [teacher.checkpoint for teacher in getattr(section, "teachers", {}).values()]
        require(*(path for path in (*given, *several) if path is not None))
        devices = config.trainer.devices
        if uses_gpu(config.trainer.accelerator.value) and (visible := visible_gpus()) < devices:
            raise UserError(
                f"trainer.devices={devices}: {visible} GPU(s) are visible on this node; set trainer.devices={visible}, "
                "or trainer.accelerator=cpu"
            )

    def start(self, config: Config, job: Job) -> None:
        from minitron_nemo.distributed.launch import run_on_ranks  # brings torch

        gpu = uses_gpu(config.trainer.accelerator.value)
        run_on_ranks(_on_rank, self.run, config, job, num_ranks=config.trainer.devices, gpu=gpu)


def _on_rank(rank: Rank, run: "Callable[[Config, Job, Groups], None]", config: Config, job: Job) -> None:
    """Check the world that this rank finds itself in, form the groups of the layout and run the step; keeps its log."""
    set_up_logging(is_main=rank.rank == 0)
    is_main = rank.rank == 0
    # A rank that this node started is another process, which knows nothing of what its parent trusts.
    with (
        trusting(config.verify_key),
        logging_to_file(log_file(config, job, rank), is_main=is_main),
        writing(job.output),
    ):
        _run(rank, run, config, job)


def _run(rank: Rank, run: "Callable[[Config, Job, Groups], None]", config: Config, job: Job) -> None:
    from minitron_nemo.engine.groups import form_groups

    layout = config.layout
    if rank.world_size != layout.world_size:
        raise UserError(
            f"trainer.devices={config.trainer.devices} x trainer.num_nodes={config.trainer.num_nodes}: "
            f"the launcher started {rank.world_size} ranks; make the two agree"
        )
    run(config, job, form_groups(rank, layout, gpu=uses_gpu(config.trainer.accelerator.value)))
