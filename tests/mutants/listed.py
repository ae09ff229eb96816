"""Every fault of the lists beside this file, `of_*.py`."""

from importlib import import_module
from pathlib import Path

from mutants.fault import Fault

LISTS = sorted(Path(__file__).parent.glob("of_*.py"))
FAULTS: list[Fault] = [fault for file in LISTS for fault in import_module(f"mutants.{file.stem}").FAULTS]
