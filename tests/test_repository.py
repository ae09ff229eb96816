"""The rules of this repository, read off its syntax trees: who imports what, what never occurs, how long things are."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "minitron_nemo").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OURS = [*PACKAGE, *RECIPES, *TESTS, *sorted((ROOT / "benchmarks").rglob("*.py"))]

# Who may name a library: folders and files of the package and the recipes.
MAY_IMPORT = {
    "megatron": ("minitron_nemo/engine/", "minitron_nemo/data/"),
    "hydra": ("minitron_nemo/config.py",),
    "omegaconf": ("minitron_nemo/config.py",),
    "nemo": (),
    "transformers": (),
    "pickle": ("minitron_nemo/checkpoint/restricted_pickle.py",),
    "apex": (),
    "transformer_engine": (),
}
# The maths knows torch and shapes; its modules may import one another and nothing else of ours.
MATHS = (
    "minitron_nemo/errors.py",
    "minitron_nemo/arch.py",
    "minitron_nemo/parameters.py",
    "minitron_nemo/importance/",
    "minitron_nemo/pruning/",
    "minitron_nemo/distillation/head.py",
)
# Who may import the engine: it, and what sits above it.
ABOVE_ENGINE = (
    "minitron_nemo/engine/",
    "minitron_nemo/distillation/teacher.py",
    "minitron_nemo/evaluation/",
    "minitron_nemo/objectives.py",
    "minitron_nemo/train.py",
    "minitron_nemo/runs.py",
    "minitron_nemo/cli.py",
    "minitron_nemo/testing.py",
    "recipes/",
)
OBJECT_COLLECTIVES = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
FILE_LINES, FUNCTION_LINES, RECIPE_LINES = 500, 80, 100


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it; nobody here imports relatively."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def dotted(node: ast.AST) -> str:
    """`torch.load` of the node of a call's function, the last name where there is more than names and dots."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def calls(path: Path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield f"{name_of(path)}:{node.lineno}", dotted(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    return next((getattr(word.value, "value", ...) for word in call.keywords if word.arg == name), None)


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_libraries_are_imported_only_where_they_belong(library):
    for path in [*PACKAGE, *RECIPES]:
        if any(module.split(".")[0] == library for module in imports(path)):
            assert name_of(path).startswith(MAY_IMPORT[library]), f"{name_of(path)} imports {library}"


def test_the_maths_imports_nothing_of_ours_but_the_maths():
    for path in PACKAGE:
        if name_of(path).startswith(MATHS):
            ours = [module for module in imports(path) if module.startswith("minitron_nemo.")]
            allowed = tuple(part.removesuffix("/").removesuffix(".py").replace("/", ".") for part in MATHS)
            assert all(module.startswith(allowed) for module in ours), f"{name_of(path)}: {ours}"


def test_only_what_sits_above_the_engine_imports_it():
    for path in [*PACKAGE, *RECIPES]:
        if any(module.startswith("minitron_nemo.engine") for module in imports(path)):
            assert name_of(path).startswith(ABOVE_ENGINE), f"{name_of(path)} imports the engine"


def test_the_package_does_not_import_recipes_or_tests():
    for path in PACKAGE:
        assert not any(module.split(".")[0] in ("recipes", "tests") for module in imports(path)), name_of(path)


def test_nothing_unsafe_is_called():
    for path in OURS:
        for place, function, call in calls(path):
            last = function.split(".")[-1]
            assert last not in ("extractall", "unpack_archive"), place
            assert not (isinstance(call.func, ast.Name) and function in ("eval", "exec")), place
            assert function not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), place
            assert last not in OBJECT_COLLECTIVES, place
            assert keyword(call, "trust_remote_code") is not True, place
            assert keyword(call, "shell") is not True, place
            if function == "torch.load":
                assert keyword(call, "weights_only") is True, f"{place}: torch.load without weights_only=True"
            if last == "load" and function.startswith(("np.", "numpy.")):
                assert keyword(call, "allow_pickle") is False, f"{place}: numpy.load without allow_pickle=False"


def test_no_failure_is_passed_over():
    for path in [*PACKAGE, *RECIPES]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler):
                silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
                assert not (silent and broad), f"{name_of(path)}:{node.lineno}"


def test_every_module_says_what_it_is_for():
    for path in [*PACKAGE, *RECIPES]:
        assert ast.get_docstring(parsed(path)) or not path.read_text().strip(), name_of(path)


def test_nothing_is_too_long():
    for path in OURS:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= (RECIPE_LINES if path in RECIPES else FILE_LINES), f"{name_of(path)}: {lines} lines"
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= FUNCTION_LINES, f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines"


def test_sources_are_ascii_and_without_loose_ends():
    for path in [*PACKAGE, *RECIPES, *sorted((ROOT / "conf").rglob("*.yaml"))]:
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), name_of(path)
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), name_of(path)


def test_names_of_test_files_are_unique():
    names = [path.name for path in TESTS]
    assert sorted(set(names)) == sorted(names)


def test_the_rules_would_notice():
    """A rule that sees nothing would pass for ever."""
    assert any(module.startswith("megatron.") for path in PACKAGE for module in imports(path))
    assert any(function == "torch.load" for path in PACKAGE for _, function, _ in calls(path))
    assert len(RECIPES) > 10
    assert {"minitron_nemo/config.py"} == {name_of(path) for path in PACKAGE if "hydra" in imports(path)}
