"""The documentation says what the code does: every setting, every command, every file it names."""

import dataclasses
import enum
import re
import shlex
import typing
from pathlib import Path

import pytest

from minitron_nemo.config import CONF_DIR, DEFAULT_PLACES, Config, ModelConfig, TrainingConfig, compose

ROOT = CONF_DIR.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md"), *ROOT.glob("tests/*.md")])
CONFIGURATION = ROOT / "docs" / "configuration.md"
# One table serves `correct_teacher.training` and `distill.training`.
SECTIONS_SHARED = {TrainingConfig: "training", ModelConfig: "model"}
ROW = re.compile(r"^\| `([^`]+)` \| (.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)
TYPES = {int: "int", float: "float", bool: "bool", str: "text"}


def _type_name(hint):
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return f"list of {_type_name(arguments[0])}"
    if typing.get_origin(hint) is dict:
        return f"name: {_type_name(arguments[1])}"
    if type(None) in arguments:
        return f"{_type_name(arguments[0])} or null"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    return TYPES.get(hint, "section")


def _default_text(field):
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        if isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            return "eight steps"
    elif field.default == "???":
        return "required"
    else:
        value = field.default
    value = value.value if isinstance(value, enum.Enum) else value
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f"`{value}`"


def _inner(hint):
    """(what to add to the key, dataclass) inside a hint, None when there is none."""
    suffix = {dict: ".<name>", list: "[]"}.get(typing.get_origin(hint), "")
    return next(((suffix, part) for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)


def rows_of(schema=Config, prefix=""):
    """{dotted key: (type, default)} of every setting, as docs/configuration.md writes them."""
    rows = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, inner = prefix + field.name, _inner(hints[field.name])
        is_section = dataclasses.is_dataclass(hints[field.name])
        if not is_section:
            rows[key] = (_type_name(hints[field.name]), _default_text(field))
        if inner is not None:
            suffix, part = inner
            rows |= rows_of(part, f"{SECTIONS_SHARED.get(part, key + suffix)}.")
    return rows


def test_every_setting_is_documented_with_its_type_and_default():
    documented = {key: (kind, default) for key, kind, default, _ in ROW.findall(CONFIGURATION.read_text())}
    assert documented == rows_of()


def test_every_default_place_is_documented():
    text = CONFIGURATION.read_text()
    for (section, name), place in DEFAULT_PLACES.items():
        assert f"| `{section}.{name}` | `{place}` |" in text


def _commands():
    """(page, words) of every recipe started in a page; placeholders in capitals stay out."""
    starts = re.compile(r"(?:python|sbatch|launch/\w+\.sh|torchrun)\b")
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        quoted = re.findall(r"`([^`\n]+)`", text)
        indented = re.findall(r"^(?:    |\t)(.+)$", text, re.MULTILINE)
        fenced = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        for command in sorted({*quoted, *indented, *fenced}):
            if not starts.search(command) or not re.search(r"recipes/|launch/", command):
                continue
            words = shlex.split(command, comments=True)
            if (parsed := _recipe_and_config(words)) is not None:
                found.append(pytest.param(*parsed, id=f"{page.name}: {' '.join(words)[:80]}"))
    return found


def _recipe_and_config(words):
    """(recipe, config, overrides) of a command line, None where a name is a placeholder or missing."""
    for index, word in enumerate(words):
        if match := re.fullmatch(r"recipes/(\w+)\.py", word):
            rest = words[index + 1 :]
            if rest[:1] != ["--config-name"]:
                return None
            recipe, config, overrides = match[1], rest[1], rest[2:]
        elif word in ("launch/slurm.sbatch", "launch/docker.sh", "launch/enroot.sh"):
            rest = [w for w in words[index + 1 :] if w != "run"]
            if len(rest) < 2:
                return None
            recipe, config, overrides = rest[0], rest[1], rest[2:]
        elif word == "launch/pipeline.sh" and len(words) > index + 1:
            recipe, config, overrides = "pipeline", words[index + 1], words[index + 2 :]
        else:
            continue
        return None if recipe.isupper() or config.isupper() else (recipe, config, overrides)
    return None


@pytest.mark.parametrize(("recipe", "config", "overrides"), _commands())
def test_every_command_in_the_docs_names_a_recipe_and_composes(recipe, config, overrides):
    assert (ROOT / "recipes" / f"{recipe}.py").is_file()
    if not any(re.fullmatch(r"\[.*|\.\.\.\]?", word) for word in overrides):
        compose(config, overrides, recipe=recipe)


def test_the_docs_have_commands_to_check():
    assert len(_commands()) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def _tree():
    """Paths of the file tree in the README."""
    block = re.search(r"## Files\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    folders, paths = {-1: Path()}, []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders[depth - 1] / line.split()[0]
        folders[depth] = path
        paths.append(path.as_posix())
    return paths


def test_the_file_tree_is_that_of_the_repository():
    listed = set(_tree())
    assert not [path for path in listed if not (ROOT / path).exists()]
    sources = [*ROOT.glob("minitron_nemo/**/*.py"), *ROOT.glob("recipes/*.py"), *ROOT.glob("conf/*.yaml")]
    names = {path.relative_to(ROOT).as_posix() for path in sources if path.name != "__init__.py"}
    assert names <= listed
