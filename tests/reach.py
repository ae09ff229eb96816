"""How much of our code each recipe reaches by imports: `python tests/reach.py [CHECKOUT]` prints a Markdown table.

Counts files that say something and their lines, the recipe's own among them. An import inside a function counts like
one at the top of a file; what `importlib` loads by a name made at run time does not.
"""

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGE = "minitron_nemo"


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(path: Path) -> set[tuple[str, str]]:
    """(module, "") of every `import module` and (module, name) of every `from module import name` in a file.

    Nobody here imports relatively. What only a type checker reads is no import.
    """
    unread = {
        id(inner)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(parsed(path)):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import"  # noqa: PT018
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def module_file(module: str, root: Path) -> Path | None:
    """The file of a module of the checkout, None for a library's."""
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports_of(path: Path, root: Path) -> set[Path]:
    """Files of the checkout that a file names in its imports; `from package import module` names the module's."""
    files = set()
    for module, name in imported_names(path):
        file = (module_file(f"{module}.{name}", root) if name else None) or module_file(module, root)
        if file is not None:
            files.add(file)
    return files


def reached(path: Path, root: Path) -> set[Path]:
    """A file and all that importing it runs: what it names, the packages that lies in, and so on."""
    found: set[Path] = set()
    waiting = {path}
    while waiting:
        file = waiting.pop()
        found.add(file)
        folders = [folder for folder in file.parents if root in folder.parents]
        packages = {folder / "__init__.py" for folder in folders if (folder / "__init__.py").is_file()}
        waiting |= (imports_of(file, root) | packages) - found
    return found


def table(root: Path) -> str:
    recipes = sorted((root / "recipes").glob("*.py"))
    reach = {recipe.stem: reached(recipe, root) for recipe in recipes}
    reach["together"] = set().union(*reach.values())
    reach["the package"] = set((root / PACKAGE).rglob("*.py"))
    rows = ["| recipe | files | lines |", "|---|---:|---:|"]
    for name, files in reach.items():
        lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
        rows.append(f"| {name} | {len([count for count in lines if count])} | {sum(lines)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("error: give at most one checkout")
    root = Path(sys.argv[1] if len(sys.argv) == 2 else Path(__file__).parent.parent).resolve()
    if not (root / PACKAGE).is_dir() or not (root / "recipes").is_dir():
        sys.exit(f"error: {root} has no {PACKAGE}/ and recipes/")
    print(table(root))
