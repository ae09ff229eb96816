"""Several frozen teachers beside one student: who teaches a token follows from the source of its text."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from minitron_nemo.distillation.teacher import Teacher, TeacherOutputs
from minitron_nemo.engine.schedule import Batch


class TeachersBySource:
    """Teachers by name, with the share of each in the loss of a token of every source.

    `shares[name]` has a number for each of `sources`, which are counted as `sources` of a micro-batch counts them; the
    shares in a source add up to 1.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], shares: Mapping[str, Sequence[float]], *, sources: Sequence[str]
    ) -> None:
        self.teachers = dict(teachers)
        self.shares = {name: list(shares[name]) for name in self.teachers}
        self.sources = list(sources)
        self.layout = next(iter(self.teachers.values())).groups.layout

    @property
    def in_pipeline(self) -> bool:
        return self.layout.pp > 1

    @property
    def in_words(self) -> str:
        """`code (code 0.75), general (code 0.25, prose 1)`"""
        return ", ".join(
            f"{name} ({', '.join(f'{source} {share:g}' for source, share in self._own(name).items())})"
            for name in self.teachers
        )

    def _own(self, name: str) -> dict[str, float]:
        """The sources that a teacher has a share in."""
        return {source: share for source, share in zip(self.sources, self.shares[name], strict=True) if share}

    def share_of(self, name: str, batch: Batch) -> Tensor:
        """[N], the share of a teacher in each token of a micro-batch, in the order [s * b]."""
        sources_N = batch["sources"].T.reshape(-1)
        return torch.tensor(self.shares[name], device=sources_N.device)[sources_N]

    def outputs(self, batches: list[Batch]) -> Iterator[dict[str, TeacherOutputs]]:
        """For every micro-batch, by name, what `Teacher.outputs` gives of each teacher that has a share in it.

        A teacher runs through those micro-batches alone. Which they are follows from the samples, which all ranks of a
        model read, so its stages agree.
        """
        if not batches:
            return iter(())
        # One question to the device for all micro-batches.
        rows = torch.stack([batch["sources"][:, 0] for batch in batches]).tolist()
        asked = [[name for name in self.teachers if any(self.shares[name][source] for source in row)] for row in rows]
        running = {}
        for name, teacher in self.teachers.items():
            if own := [batch for batch, names in zip(batches, asked, strict=True) if name in names]:
                running[name] = teacher.outputs(self._whole_groups(own))
        return ({name: next(running[name]) for name in names} for names in asked)

    def _whole_groups(self, batches: list[Batch]) -> list[Batch]:
        """What an interleaved pipeline takes: as many micro-batches as there are stages at a time, the last again."""
        missing = -len(batches) % self.layout.pp if self.layout.vpp > 1 else 0
        return batches + batches[-1:] * missing
