"""A teacher of another tensor-parallel degree on the ranks of a student: who holds what, all arithmetic.

Both have the same pipeline stages and share sequences alike; only tensor parallelism differs, and with it how many
copies of the teacher there are. Of a smaller degree several copies lie in the tensor-parallel group of a student; of a
larger one a copy spans the groups of several data-parallel replicas.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from minitron_nemo.distributed.layout import Layout, Place
from minitron_nemo.errors import UserError

SETTING = "distill.teacher_parallel.tensor_model_parallel_size"


@dataclass(frozen=True)
class Beside:
    """The layouts of a student and of its teacher on the same ranks."""

    student: Layout
    teacher: Layout

    @classmethod
    def of(cls, student: Layout, tp: int | None) -> "Beside":
        """A teacher of tensor-parallel degree `tp` (None: the student's) beside a student in its layout.

        Raises UserError for a degree whose groups and the student's would overlap in part.
        """
        tp = student.tp if tp is None else tp
        larger, smaller = max(tp, student.tp), min(tp, student.tp)
        if larger % smaller or (student.tp * student.dp) % tp:
            raise UserError(
                f"{SETTING}={tp}: beside parallel.tensor_model_parallel_size={student.tp} on {student.dp} "
                f"data-parallel ranks it must divide {student.tp}, or be a multiple of it that divides "
                f"{student.tp * student.dp}"
            )
        teacher = Layout(
            tp=tp,
            pp=student.pp,
            cp=student.cp,
            vpp=student.vpp,
            dp=student.tp * student.dp // tp,
            sequence_parallel=student.sequence_parallel and tp > 1,
        )
        return cls(student, teacher)

    @property
    def copies(self) -> int:
        """Copies of the teacher in one tensor-parallel group of the student, which share out its micro-batches."""
        return max(1, self.student.tp // self.teacher.tp)

    @property
    def replicas(self) -> int:
        """Data-parallel replicas of the student that one copy of the teacher serves."""
        return max(1, self.teacher.tp // self.student.tp)

    def teacher_place(self, place: Place) -> Place:
        """The teacher's ranks of a rank of the student."""
        if self.replicas > 1:
            tp, dp = place.dp % self.replicas * self.student.tp + place.tp, place.dp // self.replicas
        else:
            tp, dp = place.tp % self.teacher.tp, place.dp * self.copies + place.tp // self.teacher.tp
        return Place(tp=tp, cp=place.cp, dp=dp, pp=place.pp)

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that share each layer of a copy of the teacher."""
        return self._groups(lambda own: (own.dp, own.cp, own.pp), of_teacher=True)

    def batch_groups(self) -> list[list[int]]:
        """Ranks that hold the same weights of the teacher."""
        return self._groups(lambda own: (own.tp, own.pp), of_teacher=True)

    def exchange_groups(self) -> list[list[int]]:
        """Ranks that tell each other what went through the teacher.

        One of each copy in a student's group, in the order of the copies: they exchange hidden states. Or one of each
        replica that a copy serves, in the order of the replicas: they exchange tokens.
        """
        if self.replicas > 1:
            return self._groups(lambda own: (own.tp, own.cp, own.dp // self.replicas, own.pp))
        return self._groups(lambda own: (own.tp % self.teacher.tp, own.cp, own.dp, own.pp))

    def _groups(self, key: Callable[[Place], Hashable], *, of_teacher: bool = False) -> list[list[int]]:
        found: dict[Hashable, list[int]] = {}
        for rank in range(self.student.world_size):
            place = self.student.place(rank)
            found.setdefault(key(self.teacher_place(place) if of_teacher else place), []).append(rank)
        return list(found.values())
