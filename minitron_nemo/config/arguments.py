"""The command line of a recipe: Hydra's flags, taken apart before Hydra sees them so that we refuse in our own words.

Hydra is given what was understood here and nothing else.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from minitron_nemo.errors import UserError

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass(frozen=True)
class Arguments:
    """What a command line asks for; `flags` are Hydra's own, less those that say where configs are."""

    config_name: str | None
    config_dir: Path | None  # where configs are looked for first; None: conf/ alone
    flags: tuple[str, ...]
    overrides: tuple[str, ...]
    runs: bool  # whether the task is to run, once or for each combination
    multirun: bool
    completes: bool  # shell completion

    @property
    def task_overrides(self) -> tuple[str, ...]:
        """Those of the config, not of Hydra, but for where Hydra looks for configs."""
        return tuple(text for text in self.overrides if not _is_hydras(text) or text.startswith("hydra.searchpath="))

    @property
    def needs_config(self) -> bool:
        return self.runs or any(flag.startswith(("--cfg", "--info")) for flag in self.flags)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what cannot be an override by its look; the rest of the grammar is Hydra's."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        if text.startswith("-") or key.lstrip("+~") == "" or ("=" not in text and not text.startswith("~")):
            raise UserError(f"{text!r}: cannot be read as key=value")


def _is_hydras(override: str) -> bool:
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more")


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Take a command line apart; UserError for what it cannot mean."""
    options = _parser().parse_intermixed_args(list(arguments))
    if options.experimental_rerun is not None:
        raise UserError("--experimental-rerun: unpickles a file, which may run anything; give the config and overrides")
    if not options.shell_completion:
        check_overrides(options.overrides)
    if options.config_dir is not None and options.config_path is not None:
        raise UserError("--config-dir and --config-path: give one of the two")
    chosen = [
        f"--{name.replace('_', '-')}" for name in ("run", "multirun", "shell_completion") if options.__dict__[name]
    ]
    chosen += [f"--{name}" for name in ("cfg", "info") if options.__dict__[name] is not None]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: give one of the two")
    shown = [f"--{name.replace('_', '-')}" for name in ("version", "hydra_help") if options.__dict__[name]]
    flags = [f"--{name}={options.__dict__[name]}" for name in ("cfg", "info", "package") if options.__dict__[name]]
    flags += [flag for flag in chosen if flag in ("--run", "--multirun", "--shell-completion")] + shown
    multirun = options.multirun or any(text.lower() == "hydra.mode=multirun" for text in options.overrides)
    return Arguments(
        config_name=None if options.config_name is None else options.config_name.removesuffix(".yaml"),
        config_dir=_folder(options.config_dir or options.config_path),
        flags=(*flags, *(["--resolve"] if options.resolve else [])),
        overrides=tuple(options.overrides),
        runs=not shown and (not chosen or chosen[0] in ("--run", "--multirun")),
        multirun=multirun,
        completes=options.shell_completion,
    )


def _folder(given: str | None) -> Path | None:
    if given is None:
        return None
    if not Path(given).is_dir():
        raise UserError(f"--config-dir {given}: no such folder")
    return Path(given).resolve()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="recipes/RECIPE.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=INFO)
    parser.add_argument("--experimental-rerun")
    for flags in (
        ("--resolve",),
        ("--run", "-r"),
        ("--multirun", "-m"),
        ("--shell-completion", "-sc"),
        ("--hydra-help",),
        ("--version",),
    ):
        parser.add_argument(*flags, action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser
