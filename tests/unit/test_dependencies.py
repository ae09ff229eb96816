"""What is declared is what is imported, read off the syntax trees; constraints.txt pins all of it."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from reach import imported_names

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Torch for CUDA brings the one that it was built with; without a GPU only tests need it.
WITH_TORCH = {"triton"}
# Imported for us by another library, which does not declare it.
THROUGH_ANOTHER = {"tensorboard": "torch.utils.tensorboard"}


def imported(*folders: str) -> set[str]:
    """Distributions of the third-party modules that files under these folders import, anywhere in them."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    modules = {module.split(".")[0] for path in files for module, _ in imported_names(path)}
    by_their_name = [path for path in files if "minitron_nemo" not in path.relative_to(ROOT).parts]
    ours = {"minitron_nemo", "recipes", "tests"}
    ours |= {name for path in by_their_name for name in (path.stem, path.parent.name)}
    known = packages_distributions()
    third = modules - ours - set(sys.stdlib_module_names)
    return {canonicalize_name(known[module][0]) for module in third if module in known} | (third - set(known))


def declared(requirements: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in requirements}


def test_the_package_declares_what_it_imports_and_nothing_else():
    extras = PROJECT["optional-dependencies"]
    names = set(declared(PROJECT["dependencies"] + extras["sign"]))
    assert names - set(THROUGH_ANOTHER) == imported("minitron_nemo", "recipes") - WITH_TORCH


def test_what_another_library_imports_for_us_is_used():
    text = "".join(path.read_text() for path in (ROOT / "minitron_nemo").rglob("*.py"))
    for name, module in THROUGH_ANOTHER.items():
        assert name in declared(PROJECT["dependencies"])
        assert f"from {module} import" in text


def test_tests_import_nothing_that_dev_does_not_bring():
    extras = PROJECT["optional-dependencies"]
    names = set(declared(PROJECT["dependencies"] + extras["dev"] + extras["oracle"] + extras["bench"]))
    known_as = {"modelopt": "nvidia-modelopt", "liger_kernel": "liger-kernel"}  # where it is not installed
    assert {known_as.get(name, name) for name in imported("tests", "benchmarks")} <= names


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_requirement_is_pinned_to_a_version_that_satisfies_it(python):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    wanted = declared(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert not set(wanted) - set(pins)
    assert [name for name, need in wanted.items() if not need.specifier.contains(pins[name])] == []


def test_the_torch_of_an_ngc_image_satisfies_the_requirement():
    torch = declared(PROJECT["dependencies"])["torch"].specifier
    assert torch.contains("2.10.0a0+b558c986e8.nv25.11", prereleases=None)
    assert not torch.contains("2.9.1")


def test_transformer_engine_is_installed_against_the_torch_that_is_there():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for command in re.findall(r"pip install[^\n#]*\[gpu\]", path.read_text()):
            assert "--no-build-isolation" in command, path.name
