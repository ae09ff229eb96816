"""The rules of this repository, read off its syntax trees: who imports what, what never occurs, how long things are."""

import ast
import re
from pathlib import Path

import pytest
from reach import imported_names, imports_of, module_file, parsed

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "minitron_nemo").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OURS = [*PACKAGE, *RECIPES, *TESTS, *sorted((ROOT / "benchmarks").rglob("*.py"))]

# The rooms from the ground up (folders and loose modules of the package, and the recipes), each with the rooms that it
# imports. Only rooms that stand before it may be among them, and an arrow that nobody uses any more must go.
ROOMS: dict[str, str] = {
    "errors": "",
    "garbage": "",
    "progress": "",
    "losses": "",
    "shape": "errors",
    "artefacts": "errors progress",
    "distributed": "errors garbage shape",
    "config": "errors shape artefacts distributed",
    "checkpoint": "errors progress shape artefacts distributed",
    "importance": "errors shape artefacts distributed",
    "data": "errors progress artefacts config",
    "engine": "errors losses shape distributed config checkpoint",
    "pruning": "errors shape artefacts checkpoint importance",
    "distillation": "shape distributed config checkpoint engine",
    "reporting": "errors progress shape artefacts importance pruning",
    "training": "errors progress losses shape artefacts distributed config checkpoint data engine distillation",
    "evaluation": "errors progress losses distributed data engine training",
    "nemo_model": "errors shape artefacts distributed checkpoint data engine evaluation",
    "steps": "errors garbage progress losses shape artefacts distributed config checkpoint importance data engine "
    "pruning distillation training evaluation",
    "testing": "shape artefacts distributed checkpoint engine",
    "cli": "errors garbage progress distributed config steps",
    "recipes": "errors progress losses shape artefacts distributed config checkpoint data reporting training steps cli",
}
FLOORS = list(ROOMS)
ARROWS = [(room, below) for room, rooms in ROOMS.items() for below in rooms.split()]
# The public face looks into every room; `test_api.py` holds that nobody in the rooms looks back.
FACE = ROOT / "minitron_nemo" / "__init__.py"
LOOSE = {
    "__init__",
    "cli",
    "errors",
    "garbage",
    "nemo_model",
    "progress",
    "testing",
}  # the only modules of the package outside a folder

# Who may name a library: folders and files of the package. Each is a door: what is behind it can be replaced there.
DOORS = {
    "megatron": ("minitron_nemo/engine/", "minitron_nemo/data/"),
    "hydra": ("minitron_nemo/config/compose.py",),
    "omegaconf": (
        *(f"minitron_nemo/config/{name}.py" for name in ("compose", "blocks", "schema", "shapes", "teachers")),
        "minitron_nemo/nemo_model.py",
    ),
    "matplotlib": ("minitron_nemo/reporting/plots.py",),
    "huggingface_hub": ("minitron_nemo/checkpoint/formats/hf.py",),
    "tokenizers": ("minitron_nemo/data/tokenizer.py", "minitron_nemo/data/tokenizer_trial.py"),
    "cryptography": ("minitron_nemo/artefacts/signature.py",),
    "pickle": ("minitron_nemo/checkpoint/restricted_metadata.py",),
    "nemo": ("minitron_nemo/nemo_model.py",),
    "pyarrow": ("minitron_nemo/data/text_files.py",),
    "transformers": (),
    "apex": (),
    "transformer_engine": (),
    "triton": ("minitron_nemo/losses/kernels/triton_kernel.py", "minitron_nemo/engine/rope_kernel.py"),
}
# What a launcher tells a process about itself is read in one place; the others ask that.
RANK_NUMBERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"}
RANK_READER = "minitron_nemo/distributed/ranks.py"
OBJECT_COLLECTIVES = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
FILE_LINES, FUNCTION_LINES, RECIPE_LINES = 500, 60, 80


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Full names of the modules, and of what is taken from them, that a file imports, anywhere in it."""
    return {f"{module}.{name}".rstrip(".") for module, name in imported_names(path)}


def room_of(path: Path) -> str:
    """The room that a file of the package or a recipe lies in; the package's own `__init__` is in none."""
    top, *parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py") if top == "minitron_nemo" else top


def arrows() -> dict[tuple[str, str], str]:
    """(room, room it imports) with one import that makes it so, for every pair in the tree."""
    found = {}
    for path in [path for path in [*PACKAGE, *RECIPES] if path != FACE]:
        for target in imports_of(path, ROOT):
            if room_of(path) != room_of(target):
                found[room_of(path), room_of(target)] = f"{name_of(path)} imports {name_of(target)}"
    return found


def circle(files: dict[Path, set[Path]]) -> list[Path]:
    """Some files that import each other in a ring, empty when there is no ring."""
    done: set[Path] = set()

    def follow(trail: list[Path]) -> list[Path]:
        for target in sorted(files.get(trail[-1], ())):
            if target in trail:
                return trail[trail.index(target) :]
            if target not in done and (found := follow([*trail, target])):
                return found
        done.add(trail[-1])
        return []

    return next((found for file in files if file not in done and (found := follow([file]))), [])


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


def test_the_rooms_are_those_of_the_tree():
    folders = {path.name for path in (ROOT / "minitron_nemo").iterdir() if list(path.rglob("*.py"))}
    modules = {path.stem for path in (ROOT / "minitron_nemo").glob("*.py")}
    assert modules == LOOSE
    assert folders | modules - {"__init__"} | {"recipes"} == set(FLOORS)


def test_a_room_imports_only_rooms_below_it():
    """So there is no circle between rooms. What is for tests is imported by nothing but them."""
    for room, below in ARROWS:
        assert below in FLOORS[: FLOORS.index(room)], f"{room}: {below}"
        assert below not in ("testing", "recipes"), f"{room}: {below}"


def test_every_import_between_rooms_is_in_the_table():
    assert not sorted(why for arrow, why in arrows().items() if arrow not in ARROWS)


def test_every_arrow_of_the_table_is_used():
    assert not sorted(set(ARROWS) - set(arrows()))
    assert len(ARROWS) == len(set(ARROWS))


def test_no_files_import_each_other_in_a_circle():
    found = circle({path: imports_of(path, ROOT) for path in [*PACKAGE, *RECIPES]})
    assert not [name_of(path) for path in found]


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_only_behind_its_door(library):
    named = [name_of(path) for path in [*PACKAGE, *RECIPES] if library in {m.split(".")[0] for m in imports(path)}]
    assert not [name for name in named if not name.startswith(DOORS[library])]
    unused = [door for door in DOORS[library] if not any(name.startswith(door) for name in named)]
    assert not unused, f"nothing of {library} is imported behind these doors"


def test_rank_numbers_are_read_in_one_place():
    readers = {
        name_of(path)
        for path in [*PACKAGE, *RECIPES]
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in RANK_NUMBERS
    }
    assert readers == {RANK_READER}


def test_the_package_does_not_import_tests():
    tests = {path.stem for path in TESTS} | {"tests"}
    for path in PACKAGE:
        assert not {module.split(".")[0] for module in imports(path)} & tests, name_of(path)


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


def test_imports_are_seen_wherever_they_stand(tmp_path):
    """At the top, in a function, of a module through its package, of a name, of a package's own `__init__`."""
    (tmp_path / "p" / "q").mkdir(parents=True)
    for name in ("p/__init__", "p/a", "p/b", "p/q/__init__", "p/q/c"):
        (tmp_path / f"{name}.py").touch()
    main = tmp_path / "main.py"
    main.write_text("import os, p.a\nfrom p.q import c, d\nfrom os import path\ndef f():\n    from p.b import g\n")
    seen = {path.relative_to(tmp_path).as_posix() for path in imports_of(main, tmp_path)}
    assert seen == {"p/a.py", "p/q/c.py", "p/q/__init__.py", "p/b.py"}
    assert module_file("os", tmp_path) is None


def test_a_circle_is_found_through_any_number_of_files():
    a, b, c, d = (Path(name) for name in "abcd")
    assert circle({a: {b, c}, b: {c}, c: {d}, d: set()}) == []
    assert set(circle({a: {b}, b: {c}, c: {d}, d: {b}})) == {b, c, d}
    assert circle({a: {b}, b: {b}}) == [b]


def test_the_rules_would_notice():
    """A rule that sees nothing would pass for ever."""
    assert any(module.startswith("megatron.") for path in PACKAGE for module in imports(path))
    assert any(function == "np.load" for path in PACKAGE for _, function, _ in calls(path))
    assert len(RECIPES) > 10
    assert len(arrows()) > 40
