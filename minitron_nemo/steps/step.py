"""What a step is: a recipe says what it is and how it is made, a job is one step about to run."""

import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.lineage import ancestors
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, is_current, manifest_sha256, read_manifest
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import check_target
from minitron_nemo.artefacts.records import check_record_target, is_current_record
from minitron_nemo.config.schema import Config
from minitron_nemo.distributed.ranks import is_main_process
from minitron_nemo.errors import UserError

logger = logging.getLogger("minitron_nemo")


@dataclass(frozen=True)
class Job:
    """One step about to run: its output and what determines the content of that output.

    `settings` are the values (besides the parents) that shape the result; the layout of the ranks is not among
    them, because it must not matter. `inputs` are what else it reads: files and folders that are no artefacts.
    """

    output: Path
    kind: str
    settings: dict[str, Any]
    parents: dict[str, Path] = field(default_factory=dict)
    inputs: tuple[Path, ...] = ()
    overwrite: bool = False
    is_record: bool = False  # one JSON file instead of a folder
    always: bool = False  # cheap and about the present: made again every time

    @cached_property
    def origin(self) -> Origin:
        """What the artefact will say about where it comes from."""
        parents = {role: manifest_sha256(path) for role, path in self.parents.items()}
        return Origin.of(
            self.kind,
            self.settings,
            parents=parents,
            overwrite=self.overwrite,
            command=_command(),
            lineage=ancestors(self.parents),
        )

    @property
    def is_done(self) -> bool:
        if self.always:
            return False
        if self.is_record:
            return is_current_record(self.output, self.origin.fingerprint, kind=self.kind)
        return is_current(self.output, self.origin.fingerprint)

    def check_output(self) -> None:
        """Refuse an output that would damage something, of what it reads or of what is there already."""
        self._check_apart()
        if self.is_record:
            check_record_target(self.output, kind=self.kind, overwrite=self.overwrite)
        elif not self.always:
            self._check_kind()
            check_target(self.output, overwrite=self.overwrite)

    def _check_kind(self) -> None:
        """Refuse to replace an artefact of another kind: prepared data, say, by a model."""
        if (self.output / MANIFEST_FILE).is_file() and (
            kind := read_manifest(self.output, kind=None).kind
        ) != self.kind:
            raise UserError(
                f"{self.output} is a {kind} artefact, never overwritten by a {self.kind}; give another output"
            )

    def _check_apart(self) -> None:
        """Refuse to replace an input, also through a link or a folder around it, and to write into an artefact."""
        output = self.output.resolve()
        parents, others = list(self.parents.values()), list(self.inputs)
        for path in [*parents, *others]:
            given = path.resolve()
            if output == given or output in given.parents or (path in parents and given in output.parents):
                relation = "is" if output == given else "contains" if output in given.parents else "lies inside"
                raise UserError(
                    f"output {self.output} {relation} {path}, which this step reads; give an output beside it"
                )


def _command() -> str:
    """How this process was started, as one could type it; not `sys.argv`, which is Hydra's while a recipe runs."""
    program, *words = sys.orig_argv
    return shlex.join([Path(program).name, *words])


@dataclass(frozen=True)
class Recipe:
    """A step of one process; a step on ranks is a `steps.on_ranks.RankRecipe`.

    `prepare` opens and checks its inputs and names its output, `run(config, job)` makes it. `check` refuses settings
    that do not go together, from the config alone; `lines` gives what a dry run says of this recipe alone. Settings
    are in the section of the recipe's name.
    """

    name: str
    prepare: Callable[[Config], Job]
    run: Callable[..., None]
    check: Callable[[Config], None] = lambda config: None
    lines: Callable[[Config], list[str]] = lambda config: []

    @property
    def doc(self) -> str:
        """What the recipe's file says it does."""
        return (sys.modules[self.prepare.__module__].__doc__ or "").strip()

    @property
    def processes(self) -> str:
        """`one` or `ranks`: what a launcher has to start."""
        return "one"

    def section(self, config: Config) -> Any:
        """Its part of a config."""
        return getattr(config, self.name)

    def check_config(self, config: Config) -> None:
        """Refuse a config this recipe cannot run with; reads no file."""
        self.check(config)

    def check_machine(self, config: Config) -> None:
        """Refuse a config that this machine cannot run; not asked for a dry run."""

    def describe(self, config: Config) -> list[str]:
        """The lines of a dry run between the shapes and the paths."""
        return self.lines(config)

    def start(self, config: Config, job: Job) -> None:
        """Run a job, in the one process that speaks."""
        if is_main_process():
            self.run(config, job)
