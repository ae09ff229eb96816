"""The one crossing from Hydra to typed Python: YAML and overrides become a closed `Config`.

`compose` does it once; `run_application` is a recipe as the Hydra application that Hydra's users know. Whatever either
cannot take is refused in one line, before anything is allocated.
"""

import contextlib
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from minitron_nemo.config import closing
from minitron_nemo.config.arguments import Arguments, check_overrides, parse_arguments
from minitron_nemo.config.nemo_keys import advice
from minitron_nemo.config.rules import check
from minitron_nemo.config.schema import Config
from minitron_nemo.config.setting import check_ranges
from minitron_nemo.errors import UserError

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
OPEN_CONFIG = closing.opened(Config)

# What Hydra, OmegaConf and YAML raise over a text that they cannot take; the plain ones are slips of theirs.
COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, AssertionError, AttributeError, LookupError, OSError,
    OverflowError, RecursionError, TypeError, ValueError,
)  # fmt: skip

ConfigStore.instance().store(name="schema", node=OPEN_CONFIG)


class GroupsOfConf(SearchPathPlugin):
    """Lets configs in any folder pick the groups of conf/: what their own folder does not have comes from there."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if all(element.path != str(CONF_DIR) for element in search_path.get_path()):
            search_path.append("minitron_nemo", str(CONF_DIR))


Plugins.instance().register(GroupsOfConf)


@dataclass(frozen=True)
class Composition:
    """What a config was composed from, to compose it again with more overrides."""

    config_name: str
    overrides: tuple[str, ...] = ()
    config_dir: Path = CONF_DIR

    def compose(self, *more: str) -> Config:
        return compose(self.config_name, [*self.overrides, *more], config_dir=self.config_dir)


def compose(config_name: str, overrides: Sequence[str] | None = None, *, config_dir: Path = CONF_DIR) -> Config:
    """Compose `<config_name>.yaml` with `key=value` overrides into a closed, checked `Config`.

    The config is looked for in `config_dir`, then in conf/. Raises UserError for an unknown config name, key, type or
    value.
    """
    folder, overrides = Path(config_dir).resolve(), list(overrides or [])
    check_overrides(overrides)
    _check_name(config_name, folder)
    with _refusing(), _set_aside(), initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        tree = hydra.compose(config_name=config_name, overrides=overrides)
    return typed(tree)


def typed(tree: DictConfig) -> Config:
    """What Hydra composed as a `Config`: closed, complete, every path filled in, every value in its range."""
    with _refusing():
        if OmegaConf.get_type(tree) is not OPEN_CONFIG:
            raise UserError("the config is not built on the schema: its `defaults` must begin with `- schema`")
        values = OmegaConf.to_container(tree, resolve=False)
        closing.drop_unset(values, OmegaConf.to_container(_schema_tree(opened=True)), Config)
        closing.refuse_undeclared(values, Config, "")
        closed = OmegaConf.merge(_schema_tree(opened=False), values)
        closing.refuse_missing(OmegaConf.to_container(closed, resolve=False), "")
        config = OmegaConf.to_object(closed)
    assert isinstance(config, Config)
    check_ranges(config)
    check(config)
    closing.fill_places(config)
    return config


@functools.cache
def _schema_tree(*, opened: bool) -> DictConfig:
    """The schema as OmegaConf's tree, which takes as long to build as a composition; nobody writes into it."""
    return OmegaConf.structured(OPEN_CONFIG if opened else Config, flags={"readonly": True})


def run_application(task: Callable[[Composition, Config], None], arguments: Sequence[str]) -> None:
    """Run a task as a Hydra application: once, or with `--multirun` once for each combination.

    All of Hydra's flags work, but the one that unpickles. What the task raises comes out as it is; the first failure
    ends a sweep. A single run leaves no file behind unless `hydra.run.dir` is given.
    """
    asked = parse_arguments(arguments)
    folder = asked.config_dir or CONF_DIR
    name = asked.config_name
    if asked.completes:
        name, folder = _completed_config(asked)
    elif asked.needs_config:
        if name is None:
            raise UserError(f"--config-name is missing: available are {', '.join(_names(folder))}")
        _check_name(name, folder)
        if not asked.runs and not asked.multirun:
            Composition(name, asked.task_overrides, folder).compose()
    started_in = os.getpid()

    def application(tree: DictConfig) -> None:
        try:
            overrides, config = HydraConfig.get().overrides, typed(tree)
            if asked.multirun:
                print(f"#{HydraConfig.get().job.num} {' '.join(overrides.task)}", file=sys.stderr)
            searched = [text for text in overrides.hydra if text.startswith("hydra.searchpath=")]
            task(Composition(str(name), (*overrides.task, *searched), folder), config)
        except BaseException as error:
            if os.getpid() != started_in:  # a launcher's own process, where Hydra carries the failure back
                raise
            raise _Ended(error) from None

    _call_hydra(hydra.main(version_base="1.3", config_path=str(folder), config_name=name)(application), asked)


class _Ended(BaseException):
    """Carries what the task raised through Hydra, which would comment on an Exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _call_hydra(main: Callable[[], None], asked: Arguments) -> None:
    """Call a Hydra application that reads its arguments from `sys.argv` and reports failures in many lines."""
    printed, ended = io.StringIO(), None
    words = [*asked.flags, *_defaults(asked), *asked.overrides]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process(argv=[sys.argv[0], *words], HYDRA_FULL_ERROR="1"))
        if not asked.runs:
            stack.enter_context(contextlib.redirect_stderr(printed))
        stack.enter_context(_refusing())
        try:
            main()
        except _Ended as carrier:
            ended = carrier.error
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise UserError(_flat(printed.getvalue()) or f"Hydra ended with {stop.code}") from None
    if ended is not None:
        raise ended  # here and not above, so that its own cause and traceback stay as they are


def _defaults(asked: Arguments) -> list[str]:
    """Hydra's own settings as we want them; those of the user come after and win."""
    if asked.completes or not (asked.needs_config or "--hydra-help" in asked.flags):
        return []
    stem = Path(sys.argv[0]).stem
    ours = {"hydra/job_logging": "none", "hydra/hydra_logging": "none"}  # logging is set up by the command line
    ours["hydra.job.name"] = stem if re.fullmatch(r"[A-Za-z][\w-]*", stem) else "recipe"
    keys = {text.lstrip("+~").partition("=")[0] for text in asked.overrides}
    if not asked.multirun and "hydra.run.dir" not in keys:
        ours |= {"hydra.run.dir": ".", "hydra.output_subdir": "null"}
    return [f"{key}={value}" for key, value in ours.items() if key not in keys]


def _completed_config(asked: Arguments) -> tuple[str, Path]:
    """The config and folder named in the line that the shell wants completed; the bare schema when none is."""
    line = os.environ.get("COMP_LINE", "")
    found = {
        flag: re.search(rf"\s(?:--{flag}|-{short})[ =]+(\S+)\s", line)
        for flag, short in (("config-name", "cn"), ("config-dir", "cd"))
    }
    folder = Path(found["config-dir"][1]) if found["config-dir"] else asked.config_dir or CONF_DIR
    name = found["config-name"][1] if found["config-name"] else asked.config_name
    return (name if name in _names(folder) else "schema"), folder.resolve()


def _names(folder: Path) -> list[str]:
    return sorted({path.stem for place in (folder, CONF_DIR) for path in place.glob("*.yaml")})


def _check_name(config_name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    if config_name not in (available := _names(folder)):
        raise UserError(f"--config-name {config_name}: no such config; available are {', '.join(available)}")


@contextlib.contextmanager
def _set_aside() -> Iterator[None]:
    """Make room for a composition inside a running application, whose Hydra comes back afterwards."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


@contextlib.contextmanager
def _process(*, argv: list[str], **environment: str) -> Iterator[None]:
    """Arguments, environment and root logger as Hydra takes them from the process, put back afterwards."""
    root = logging.getLogger()
    before = (sys.argv, {key: os.environ.get(key) for key in environment}, root.handlers[:], root.level)
    sys.argv = argv
    os.environ.update(environment)
    try:
        yield
    finally:
        sys.argv, variables, handlers, level = before
        for key, value in variables.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        if "--info" in " ".join(argv):  # Hydra gives the root logger a handler to print with
            root.handlers[:] = handlers
            root.setLevel(level)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn what a composition raises into a UserError of one line."""
    try:
        yield
    except COMPOSITION_ERRORS as error:
        raise UserError(one_line(error)) from None


def one_line(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages in one line that begins with the key; NeMo's keys with what to write here."""
    outer = str(error)
    while isinstance(error.__cause__, (HydraException, OmegaConfBaseException)):
        error = error.__cause__
    text = str(error)
    named = re.search(r"full_key: (\S+)", text) or re.search(r"full_key: (\S+)", outer)
    key = getattr(error, "full_key", None) or (named[1] if named else "")
    if (asked := re.search(r"Could not override '([^']+)'", outer)) and (instead := advice(asked[1], text)):
        return f"{asked[1]}: {instead}"
    if key and (instead := advice(key, text)):
        return f"{key}: {instead}"
    if key and (isinstance(error, (ConfigAttributeError, ConfigKeyError)) or re.search(r"Key '.*' not in ", text)):
        owner = re.search(r"not in '(\w+)'", text)
        return closing.unknown_key(key, owner=owner[1] if owner else "")
    if isinstance(error, OverrideParseException):
        return f"{error.override!r}: cannot be read as key=value: {_flat(error.message.split('See http')[0])}"
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = ambiguous[1].partition("=")
        return (
            f"{key}={value}: write a list as {key}=[{value}], a text as {key}=\"'{value}'\", and sweep with --multirun"
        )
    if text.startswith("Config group override must be"):
        return "a group takes the name of one of its files, such as model=llama31_8b, and ~model picks none"
    if nulled := re.match(r"field '(\S+)' is not Optional", text):
        return f"{nulled[1]}=null: it cannot be null"
    text = _flat(re.split("full_key:|Config search path:", text)[0]) or type(error).__name__
    return f"{key}: {text}" if key and key not in text else text


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
