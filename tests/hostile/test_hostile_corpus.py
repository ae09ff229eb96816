"""Artefacts of somebody who means harm: each is refused in one line that names it, at once, and nothing of it runs."""

import hashlib
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
from hf_models import save_tiny_tokenizer
from hostile.case import CANARY, OPENERS, Case, write_sound
from hostile.corpus import CASES

from minitron_nemo.checkpoint.audit import audit
from minitron_nemo.errors import UserError

# An audit does not look into the tokenizer; what goes on until a budget is spent is tried once.
AUDITED = [
    name for name, case in CASES.items() if case.base in ("nemo", "tar", "hf") and case.says is not None
    and "token" not in name and not name.startswith("metadata of")
][::9]  # fmt: skip
SECONDS = 6  # of processor time; alone on a core every one takes below two
MEMORY = 512 * 2**20  # bytes beyond what the process had
STATUS = Path("/proc/self/status")
LONGEST = 1000  # characters of a refusal


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_sound(tmp_path_factory.mktemp("sound"), save_tiny_tokenizer)


def seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def forget_the_peak() -> None:
    """The most memory that this process had is counted from here on, on Linux."""
    if STATUS.exists():
        (STATUS.parent / "clear_refs").write_text("5")


def memory(which: str) -> int:
    if not STATUS.exists():
        return 0
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def around(folder: Path) -> dict[str, str]:
    """Everything in a folder but the artefact, with the hash of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.parent == folder}


def copied(sound: dict[str, Path], case: Case, folder: Path) -> Path:
    path = folder / sound[case.base].name
    (shutil.copytree if sound[case.base].is_dir() else shutil.copyfile)(sound[case.base], path)
    (folder / "neighbour").write_text("stays as it is")
    return path


@pytest.mark.parametrize("base", OPENERS)
def test_what_the_corpus_is_made_of_is_sound(base, sound):
    OPENERS[base](sound[base])


def test_the_corpus_is_as_large_as_it_should_be():
    assert len(CASES) >= 150
    assert sum(case.says is not None for case in CASES.values()) >= 150


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_artefact_is_refused_at_once_in_one_line_and_nothing_runs(name, sound, tmp_path, monkeypatch, capfd):
    case = CASES[name]
    path = copied(sound, case, tmp_path)
    case.poison(path)
    monkeypatch.chdir(tmp_path)
    before, listed = around(tmp_path), sorted(os.listdir(tmp_path))
    forget_the_peak()
    began, had = seconds(), memory("VmRSS")
    refusal = None
    try:
        OPENERS[case.base](path)
    except UserError as error:
        refusal = str(error)
    assert memory("VmHWM") - had < MEMORY
    assert seconds() - began < SECONDS
    assert "Error" not in capfd.readouterr().err  # what a library says behind the back of the refusal
    assert not (tmp_path / CANARY).exists()
    assert (around(tmp_path), sorted(os.listdir(tmp_path))) == (before, listed)
    if case.says is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert re.search(case.says, refusal), refusal
        assert str(path) in refusal
        assert refusal.isprintable()
        assert len(refusal) < LONGEST


@pytest.mark.parametrize("name", AUDITED)
def test_an_audit_of_a_hostile_artefact_says_what_is_wrong_and_never_raises(name, sound, tmp_path):
    path = copied(sound, CASES[name], tmp_path)
    CASES[name].poison(path)
    found = audit(path, values=True)
    assert found.fault is not None
    assert found.fault.isprintable()
    assert not (tmp_path / CANARY).exists()
