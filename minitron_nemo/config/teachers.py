"""Settings of several teachers: where each is, and what it weighs in each source of data."""

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import MISSING

from minitron_nemo.config.setting import path, setting
from minitron_nemo.errors import UserError


@dataclass
class TeacherConfig:
    checkpoint: str = path("the frozen model", default=MISSING)
    sources: dict[str, float] = setting(
        {},
        "name of a corpus of the blend: weight of this teacher in it; over the teachers the weights of a corpus are "
        "divided by their sum",
        above=0,
        at_most=10**9,
    )


def shares(teachers: Mapping[str, TeacherConfig], blend: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By teacher and source, the teacher's share in the loss of a token; the shares in a source add up to 1.

    Raises UserError for a source that the blend does not have, and for one that no teacher has a weight in.
    """
    if not blend:
        raise UserError(
            "distill.teachers: the blend is empty, so no teacher has a source; name corpora in data.blend or "
            "distill.blend"
        )
    for name, teacher in teachers.items():
        if not teacher.sources:
            raise UserError(
                f"distill.teachers.{name}.sources is empty: it would teach nothing; give it a weight in some of "
                f"{_listed(blend)}"
            )
        for source in teacher.sources:
            if source not in blend:
                raise UserError(
                    f"distill.teachers.{name}.sources.{source}: the blend has no such corpus, only {_listed(blend)}"
                )
    for source in blend:
        if not any(source in teacher.sources for teacher in teachers.values()):
            raise UserError(
                f"distill.teachers: no teacher has a weight in {source}, which the blend has; give one a weight in it"
            )
    sums = {source: sum(teacher.sources.get(source, 0.0) for teacher in teachers.values()) for source in blend}
    return {
        name: {source: weight / sums[source] for source, weight in teacher.sources.items()}
        for name, teacher in teachers.items()
    }


def running(
    teachers: Mapping[str, TeacherConfig], blend: Mapping[str, float], *, micro_batch_size: int
) -> dict[str, float]:
    """The share of the micro-batches that each teacher runs through, to be expected: those with a sample of its own.

    Megatron spreads the samples of a corpus evenly over the blend, every 1 / share samples.
    """
    total = sum(blend.values())
    own = {name: sum(blend[source] for source in teacher.sources) / total for name, teacher in teachers.items()}
    return {name: min(1.0, micro_batch_size * share) for name, share in own.items()}


def _listed(blend: Mapping[str, float]) -> str:
    return ", ".join(sorted(blend))
