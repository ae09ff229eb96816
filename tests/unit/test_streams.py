"""A stream whose writer fails is over at once, and a kill at any point leaves an artefact that somebody meant."""

import errno
import gc
import os
import threading
from itertools import count

import pytest
import torch
from hf_models import save_tiny_tokenizer
from hostile.case import ARCH

from minitron_nemo.artefacts import publishing as module
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.checkpoint import buffers
from minitron_nemo.checkpoint.formats.known import FORMATS, open_checkpoint
from minitron_nemo.checkpoint.formats.nemo import write_nemo
from minitron_nemo.checkpoint.hashed_files import HashingFile
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.pruning.proof import Digests
from minitron_nemo.steps.convert import convert

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = save_tiny_tokenizer(folder / "words", vocab_size=131)
    tensors = stream(RandomWeights(ARCH, seed=1))
    write_nemo(folder / "m.nemo", ARCH, tensors, dtype=torch.float32, tokenizer=words, origin=Origin("f"))
    # As Hugging Face has it: no hash of it is taken while it is read.
    convert(folder / "m.nemo", folder / "hf", format="hf", origin=Origin("f"))
    return folder / "hf"


@pytest.fixture
def no_garbage():
    """What is over is over because somebody ended it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("stream", "sha256"))]


@pytest.mark.parametrize("fault", [FULL, KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("format", [name for name, known in FORMATS.items() if known.write is not None])
def test_a_stream_ends_with_the_writer_that_fails_though_its_exception_is_kept(
    format, fault, model, tmp_path, monkeypatch, no_garbage
):
    calls, write, before = count(), HashingFile.write, threads()

    def failing(self, data):
        if next(calls) == 7:
            raise fault
        return write(self, data)

    monkeypatch.setattr(HashingFile, "write", failing)
    kept = None
    try:
        convert(model, tmp_path / "x", format=format, origin=Origin("f"))
    except BaseException as error:
        kept = error
    assert kept is not None
    assert threads() == before
    assert buffers._streams == 0
    assert list(tmp_path.iterdir()) == []


def test_what_notes_a_stream_ends_it(model, no_garbage):
    before = threads()
    noted = Digests().noted(stream(open_checkpoint(model).weights))
    next(noted)
    noted.close()
    assert [name for name in threads() if name.startswith("stream")] == before


def publish(path, text, *, overwrite=True):
    with publishing(path, kind="data", origin=Origin(text, overwrite=overwrite)) as draft:
        (draft.folder / "x").write_text(text)


def test_a_rename_that_is_refused_leaves_what_was_there(tmp_path, monkeypatch):
    publish(tmp_path / "a", "old")
    rename = module.Path.replace

    def refuse(self, target):
        raise FULL

    monkeypatch.setattr(module.Path, "replace", refuse)
    with pytest.raises(Exception, match="No space left"):
        publish(tmp_path / "a", "new")
    monkeypatch.setattr(module.Path, "replace", rename)
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_run_moved_aside_is_back_with_the_next(tmp_path):
    publish(tmp_path / "a", "old")
    (tmp_path / "a").rename(tmp_path / "a.old-0123abcd")
    with pytest.raises(Exception, match="exists already"):
        publish(tmp_path / "a", "new", overwrite=False)
    assert (tmp_path / "a" / "x").read_text() == "old"
    (tmp_path / "a.old-89abcdef").mkdir()  # a run that was killed when the new one was there
    publish(tmp_path / "a", "new")
    assert (tmp_path / "a" / "x").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_folders_of_the_user_are_not_taken_for_what_a_killed_run_left(tmp_path):
    for name in ("a.tmp-mine", "a.old-backup", "a.tmp-0123456"):
        (tmp_path / name).mkdir()
    publish(tmp_path / "a", "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "a.old-backup", "a.tmp-0123456", "a.tmp-mine"]
