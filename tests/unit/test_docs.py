"""The documentation says what the code does: every setting, every command, every file it names."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from minitron_nemo.config.compose import CONF_DIR, compose
from minitron_nemo.config.document import documented
from minitron_nemo.config.rules import check_ranks, check_training

ROOT = CONF_DIR.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md"), *ROOT.glob("tests/*.md")])
CONFIGURATION = ROOT / "docs" / "configuration.md"
ROW = re.compile(r"^\| `([^`]+)` \| ", re.MULTILINE)
FLAGS = {"-m", "--multirun", "--resolve"}
FLAGS_WITH_VALUE = {"--config-dir", "-cd", "--config-path", "-cp", "--cfg", "--info", "--package"}


def test_the_tables_of_settings_are_those_of_the_schema():
    text = CONFIGURATION.read_text()
    assert documented(text) == text, "run python -m minitron_nemo.config.document docs/configuration.md"


def test_every_setting_has_a_row():
    """By a walk of a composed config, which knows nothing of how the tables are made."""
    keys = set(ROW.findall(CONFIGURATION.read_text()))
    for section, shared in (("correct_teacher.", "training"), ("distill.", "training"), ("distill.", "teacher_model")):
        keys |= {f"{section}{key}" for key in keys if key.startswith(f"{shared}.")}
    keys |= {f"distill.teacher_{key}" for key in keys if key.startswith("model.")}
    for name in ("nemotron4_4b", "llama31_width"):
        for key in _leaves(dataclasses.asdict(compose(name)), ""):
            assert key in keys, key


def _leaves(values, prefix):
    for name, value in values.items():
        inner = isinstance(value, dict) and not (prefix + name).endswith(("blend", "corpora"))
        yield from _leaves(value, f"{prefix}{name}.") if inner else [prefix + name]


def test_every_default_place_is_documented():
    config, text = compose("llama31_width", ["run_dir=R"]), CONFIGURATION.read_text()
    places = dict(re.findall(r"^\| `(\w+\.\w+)` \| `([^`]+)` \|$", text, re.MULTILINE))
    for key, value in ((f"{a}.{b}", getattr(getattr(config, a), b)) for a, b in (key.split(".") for key in places)):
        assert value == "R/" + places[key].replace("<name of the checkpoint>", "student")
    under_run_dir = {key for key in _leaves(dataclasses.asdict(config), "") if _at(config, key).startswith("R/")}
    assert under_run_dir == set(places)


def _at(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return str(config)


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


def _without_flags(words):
    """({flag: value}, overrides) of a recipe's command line; of the values of a sweep, the first."""
    options, overrides, words = {}, [], iter(words)
    for word in words:
        if word in FLAGS_WITH_VALUE or word == "--config-name":
            options[word] = next(words, "CONFIG")
        elif word in FLAGS:
            options[word] = ""
        else:
            overrides.append(word)
    if FLAGS & set(options):
        overrides = [re.sub(r"^([\w.]+=[^,\[{'\"]+),.*", r"\1", text) for text in overrides]
    return options, overrides


def _recipe_and_config(words):
    """(recipe, config, overrides) of a command line, None where a name is a placeholder or missing."""
    for index, word in enumerate(words):
        if match := re.fullmatch(r"recipes/(\w+)\.py", word):
            options, rest = _without_flags(words[index + 1 :])
            if "--config-name" not in options:
                return None
            recipe, config, overrides = match[1], options["--config-name"], rest
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
        composed = compose(config, overrides)
        if recipe in ("correct_teacher", "distill"):
            check_training(getattr(composed, recipe).training, recipe, check_ranks(composed))


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
    rooms = [path.parent for path in ROOT.glob("minitron_nemo/*/__init__.py")]
    sources = [*rooms, *ROOT.glob("minitron_nemo/*.py"), *ROOT.glob("recipes/*.py"), *ROOT.glob("conf/*.yaml")]
    names = {path.relative_to(ROOT).as_posix() for path in sources if path.name != "__init__.py"}
    assert names <= listed


def test_the_architecture_page_names_every_room():
    table = (ROOT / "docs" / "architecture.md").read_text().split("Libraries have doors")[0]
    for room in ROOT.glob("minitron_nemo/*/__init__.py"):
        assert f"| `{room.parent.name}/` |" in table
