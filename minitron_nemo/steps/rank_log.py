"""The log of every rank in the run folder, `logs/<output>/rank_00000.log`: what it said, and what it died of."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_nemo.artefacts.disk import writing
from minitron_nemo.config.schema import Config
from minitron_nemo.distributed.ranks import Rank
from minitron_nemo.steps.step import Job


def log_file(config: Config, job: Job, rank: Rank) -> Path:
    """Where a rank of a step keeps its log; a model's evaluation shares the folder of its training."""
    name = job.output.name.removesuffix(".nemo").removesuffix(".json")
    return Path(config.run_dir) / "logs" / name / f"rank_{rank.rank:05d}.log"


@contextmanager
def logging_to_file(path: Path, *, is_main: bool) -> Iterator[None]:
    """Append this rank's lines to a file: all of them, though on standard error only rank 0 says more than warnings."""
    ours = logging.getLogger("minitron_nemo")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_in_utc())
    if not is_main:
        ours.setLevel(logging.INFO)
        for other in logging.getLogger().handlers:
            other.setLevel(logging.WARNING)
    ours.addHandler(handler)
    try:
        yield
    except BaseException as error:
        handler.handle(ours.makeRecord(ours.name, logging.ERROR, "", 0, "ended by", (), _info(error)))
        raise
    finally:
        ours.removeHandler(handler)
        handler.close()


def _in_utc() -> logging.Formatter:
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    return formatter


def _info(error: BaseException) -> tuple:
    return type(error), error, error.__traceback__
