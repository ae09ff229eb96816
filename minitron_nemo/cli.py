"""The command line all recipes share: compose, refuse or describe, skip what is done, start the ranks.

    python recipes/<name>.py --config-name <config> [key=value ...]

Exit codes: 0 done (or nothing to do), 2 bad input (one line on standard error), 1 a defect, 130 interrupted.
"""

import argparse
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from minitron_nemo.checkpoint.manifest import check_target, fingerprint_of, is_current, manifest_sha256
from minitron_nemo.checkpoint.nemo import NemoFolder, open_nemo
from minitron_nemo.checkpoint.record import check_record_target, is_current_record
from minitron_nemo.config import CONF_DIR, Config, compose
from minitron_nemo.errors import UserError
from minitron_nemo.launch import RankError, run_on_ranks
from minitron_nemo.parallel import Groups, Rank, rank_from_environment, uses_gpu
from minitron_nemo.preflight import describe

logger = logging.getLogger("minitron_nemo")


@dataclass(frozen=True)
class Job:
    """One step about to run: its output and what determines the content of that output.

    `settings` are the values (besides the parents) that shape the result; the layout of the ranks is not among
    them, because it must not matter.
    """

    output: Path
    kind: str
    settings: dict[str, Any]
    parents: dict[str, Path] = field(default_factory=dict)
    overwrite: bool = False
    is_record: bool = False  # one JSON file instead of a folder
    always: bool = False  # cheap and about the present: made again every time

    @property
    def parent_hashes(self) -> dict[str, str]:
        return {role: manifest_sha256(path) for role, path in self.parents.items()}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.kind, self.settings, self.parent_hashes)

    @property
    def is_done(self) -> bool:
        if self.always:
            return False
        if self.is_record:
            return is_current_record(self.output, self.fingerprint, kind=self.kind)
        return is_current(self.output, self.fingerprint)

    def check_output(self) -> None:
        """Refuse an output that would damage something."""
        if self.is_record:
            check_record_target(self.output, kind=self.kind, overwrite=self.overwrite)
        elif not self.always:
            check_target(self.output, overwrite=self.overwrite)

    @property
    def origin(self) -> dict[str, Any]:
        """The arguments every artefact writer takes about where its artefact comes from."""
        return dict(
            fingerprint=self.fingerprint, config=self.settings, parents=self.parent_hashes, overwrite=self.overwrite
        )


@dataclass(frozen=True)
class Recipe:
    """A step: `prepare` opens and checks its inputs and names its output, `run` makes it.

    With `on_ranks`, `run(config, job, groups)` is called on every rank of the layout, else `run(config, job)` once.
    """

    name: str
    prepare: Callable[[Config], Job]
    run: Callable[..., None]
    on_ranks: bool = False


def open_verified(path: str | None) -> NemoFolder:
    """An input model with the hash of every file checked, once: by the rank that speaks."""
    rank = rank_from_environment(dict(os.environ))
    return open_nemo(str(path), verify=rank is None or rank.rank == 0)


def main(recipe: Recipe) -> None:
    """Entry point of a recipe script."""
    sys.exit(run_command(recipe, sys.argv[1:]))


def run_command(recipe: Recipe, arguments: list[str]) -> int:
    """Run a recipe as its script would; returns the exit code."""
    options = parse_arguments(
        recipe.name,
        description=sys.modules[recipe.prepare.__module__].__doc__ or "",
        arguments=arguments,
    )
    set_up_logging()

    def command() -> None:
        execute(
            recipe, compose(options.config_name, options.overrides, recipe=recipe.name, config_dir=options.config_dir)
        )

    return run_safely(command)


class _Parser(argparse.ArgumentParser):
    """Refuses like everything else here: one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; {self.prog} --help tells more", file=sys.stderr)
        sys.exit(2)


def parse_arguments(name: str, *, description: str, arguments: list[str]) -> argparse.Namespace:
    """`--config-name`, `--config-dir` and the `key=value` overrides of a recipe's command line."""
    parser = _Parser(
        prog=f"recipes/{name}.py",
        description=description.strip(),
        epilog=f"Settings are in the section `{name}` of the config; docs/configuration.md explains them.",
    )
    parser.add_argument("--config-name", "-cn", required=True, help="a file of conf/, without .yaml")
    parser.add_argument("--config-dir", type=Path, default=CONF_DIR, help="another folder of configs (default: conf/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    return parser.parse_args(arguments)


def run_safely(command: Callable[[], None]) -> int:
    """Run a command and turn what stopped it into one line and an exit code."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def set_up_logging(*, is_main: bool = True) -> None:
    """Our lines on standard error, from one rank; of the libraries, warnings only."""
    rank = rank_from_environment(dict(os.environ))
    is_main = is_main and (rank is None or rank.rank == 0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("minitron_nemo").setLevel(logging.INFO if is_main else logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.ERROR)


def execute(recipe: Recipe, config: Config) -> bool:
    """Run one step of a composed config; returns False when its output was there already."""
    if config.dry_run:
        print(describe(config, recipe.name))
        return False
    gpu = uses_gpu(config.trainer.accelerator.value)
    job = recipe.prepare(config)
    job = dataclasses.replace(job, overwrite=config.overwrite)
    if job.is_done:
        logger.info(f"{recipe.name}: {job.output} is done, nothing to do")
        return False
    job.check_output()
    started = time.monotonic()
    if recipe.on_ranks:
        run_on_ranks(_on_rank, recipe.run, config, job, num_ranks=config.trainer.devices, gpu=gpu)
    elif (rank := rank_from_environment(dict(os.environ))) is None or rank.rank == 0:
        recipe.run(config, job)
    logger.info(f"{recipe.name}: wrote {job.output} in {time.monotonic() - started:.0f} s")
    return True


def _on_rank(rank: Rank, run: Callable[[Config, Job, Groups], None], config: Config, job: Job) -> None:
    """Form the layout and run the step on this rank."""
    from minitron_nemo.engine.layout import form_groups

    set_up_logging(is_main=rank.rank == 0)
    world = config.trainer.devices * config.trainer.num_nodes
    if rank.world_size != world:
        raise UserError(
            f"trainer.devices={config.trainer.devices} x trainer.num_nodes={config.trainer.num_nodes}: "
            f"the launcher started {rank.world_size} ranks; make the two agree"
        )
    groups = form_groups(
        rank,
        tp=config.parallel.tensor_model_parallel_size,
        pp=config.parallel.pipeline_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
        gpu=uses_gpu(config.trainer.accelerator.value),
    )
    run(config, job, groups)
