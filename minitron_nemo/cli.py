"""The command line all recipes share: help, a Hydra application, exit codes.

    python recipes/<name>.py --config-name <config> [key=value ...]

Exit codes: 0 done (or nothing to do), 2 bad input (one line on standard error), 1 a defect, 75 training stopped
and saved as asked, 130 interrupted.
"""

import gc
import inspect
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minitron_nemo.config.schema import Config
from minitron_nemo.config.setting import inner_section
from minitron_nemo.distributed.stopping import INTERRUPTED, SIGNALS, interruptible
from minitron_nemo.errors import RankError, StoppedError, UserError
from minitron_nemo.garbage import put_off
from minitron_nemo.progress import set_up_logging

if TYPE_CHECKING:
    from minitron_nemo.config.compose import Composition
    from minitron_nemo.steps.step import Recipe

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, but worth the same try again

# What is slow to import is imported where it is used: help needs no Hydra, and refusals and dry runs no torch.

USAGE = """usage: python recipes/{name}.py --config-name CONFIG [key=value ...]

  --config-name, -cn CONFIG   a file of conf/, without .yaml
  --config-dir, -cd DIR       look for CONFIG in DIR first; groups that DIR lacks come from conf/
  --cfg job                   print the composed config instead of running
  --info defaults             print which files the config was composed from
  --multirun, -m              run every combination of key=a,b
  --hydra-help                Hydra's other flags
  --processes                 print `ranks` or `one`: what a launcher has to start

exit codes: 0 done or nothing to do; 2 bad input, in one line; 1 a defect, with a traceback; 75 training was asked to
stop (SIGINT, SIGTERM, SIGUSR1) and saved, 130 interrupted: run the same command again to go on"""


def main(recipe: "Recipe", *, config: str | None = None) -> None:
    """Entry point of a recipe script; `config` is what it composes when no `--config-name` is given."""
    words = sys.argv[1:]
    asked = any(word.split("=")[0] in ("--config-name", "-cn", "--help", "-h", "--processes") for word in words)
    leave(run_command(recipe, words if asked or config is None else ["--config-name", config, *words]))


def leave(code: int) -> typing.NoReturn:
    """End the process with this exit code; once a request to stop was obeyed, another one no longer changes it.

    Nothing is collected any more: all of it goes at once.
    """
    gc.freeze()
    if code in (STOPPED, INTERRUPTED):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def run_command(recipe: "Recipe", arguments: Sequence[str]) -> int:
    """Run a recipe as its script would; returns the exit code. `--processes` asks what a launcher has to start."""
    if list(arguments) == ["--processes"]:
        print(recipe.processes)
        return 0

    def task(composition: "Composition", config: Config) -> None:
        from minitron_nemo.steps.execute import execute

        execute(recipe, config)

    return run_task(recipe.name, recipe.doc, task=task, arguments=arguments)


def run_task(name: str, doc: str, *, task: Callable[["Composition", Config], None], arguments: Sequence[str]) -> int:
    """Run a task as the Hydra application `name`, or print its help; returns the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(name, doc))
        return 0

    def logged(composition: "Composition", config: Config) -> None:
        from minitron_nemo.distributed.ranks import is_main_process

        set_up_logging(is_main=is_main_process())
        task(composition, config)

    def command() -> None:
        from minitron_nemo.config.compose import run_application

        run_application(logged, arguments)

    return run_safely(command)


def help_text(name: str, doc: str) -> str:
    """What `--help` prints: the recipe's docstring, how to call it, and the settings of its section."""
    parts = [inspect.cleandoc(doc), USAGE.format(name=name)]
    if inner_section(typing.get_type_hints(Config).get(name)) is not None:
        from minitron_nemo.config.document import settings_help

        parts.append(f"settings of {name} (docs/configuration.md has all of them):\n\n{settings_help(name)}")
    return "\n\n".join(parts)


def run_safely(command: Callable[[], None]) -> int:
    """Run a command and turn what stopped it into one line and an exit code; a defect keeps its traceback."""
    try:
        with interruptible(), put_off():
            command()
    except StoppedError as stopped:
        print(f"stopped: {stopped}; run the same command again to go on", file=sys.stderr)
        return STOPPED
    except (UserError, RankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read what was printed has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0
