"""Settings of the teacher's own layout: how far each of its layers is split, and where its weights lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from minitron_nemo.config.parallel import MAX_RANKS
from minitron_nemo.config.setting import count, setting
from minitron_nemo.distributed.beside import SETTING, Beside
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

SECTION = SETTING.rpartition(".")[0]


@dataclass
class TeacherParallelConfig:
    """The teacher's own layout, results being the same; by default it is the student's, all weights on the device.

    Stages and parts of sequences are those of `parallel`; docs/architecture.md says what crosses between ranks.
    """

    tensor_model_parallel_size: int | None = count(
        None,
        "ranks that share each layer of the teacher; a divisor of the student's, whose ranks then share out the "
        "micro-batches, or a multiple, which spans several data-parallel replicas; null: the student's",
        at_most=MAX_RANKS,
        how_it_runs=True,
    )
    shard_weights: bool = setting(
        False,
        "ranks that would hold the same layers of the teacher each keep a share of the weights; a layer is gathered "
        "before it runs",
        how_it_runs=True,
    )
    cpu_offloading_weights: bool = setting(
        False,
        "the teacher's layers lie in pinned host memory; a layer comes to the device before it runs",
        how_it_runs=True,
    )
    prefetch_layers: int = count(
        1,
        "that are on their way while one runs, with `shard_weights` or `cpu_offloading_weights`; each takes the memory "
        "of a layer",
        at_least=0,
        at_most=100,
        unit="layers",
        how_it_runs=True,
    )

    @property
    def on_demand(self) -> bool:
        """Whether layers lie elsewhere while they do not run."""
        return self.shard_weights or self.cpu_offloading_weights

    def beside(self, student: Layout) -> Beside:
        """The layouts of a student and of its teacher. Raises UserError where they cannot share ranks."""
        return Beside.of(student, self.tensor_model_parallel_size)

    def in_words(self, student: Layout) -> str:
        """How the teacher is laid out, where that is not as the student is; else nothing."""
        beside = self.beside(student)
        words = [] if beside.teacher == beside.student else [beside.teacher.describe()]
        if self.shard_weights:
            words.append(f"weights of layers shared out over {beside.teacher.batch_ranks} ranks")
        if self.cpu_offloading_weights:
            words.append("layers in host memory")
        return "; ".join(words)

    def check_teacher(
        self, arch: ModelArch, student: Layout, *, stages: Sequence[int] | None, name: str = "teacher"
    ) -> None:
        """Refuse a teacher that its layout cannot be laid over."""
        setting = {} if self.tensor_model_parallel_size is None else {"setting": SETTING}
        self.beside(student).teacher.check(arch, name=name, stages=stages, **setting)

    def check(self, student: Layout, *, seq_length: int) -> None:
        """Refuse what does not go together on the ranks of a student."""
        teacher = self.beside(student).teacher
        teacher.check_sequence(seq_length, setting=SETTING)
        if self.shard_weights and teacher.batch_ranks == 1:
            raise UserError(
                f"{SECTION}.shard_weights=true: no two ranks hold the same layers of the teacher in the layout "
                f"{teacher.describe()}; leave it out"
            )
