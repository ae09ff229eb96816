"""A file hashed while it is streamed: right bytes in any order, read once from front to back, and all of it proven."""

import errno
import hashlib
import os
import random
import shutil

import pytest
import torch

from minitron_nemo.artefacts.manifest import read_manifest
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.checkpoint import hashed_files
from minitron_nemo.checkpoint.formats.hf import export_hf
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.hashed_files import HashingFile, VerifiedFile
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.checkpoint.torch_dist_weights import TorchDistWeights
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.pruning.plan import identity as whole_plan
from minitron_nemo.shape.axes import shrink
from minitron_nemo.steps.prune import prune
from minitron_nemo.testing import LLAMA, random_nemo

SIZE = 1000


@pytest.fixture
def content(tmp_path, monkeypatch):
    """The bytes of a file `x`, which is read in blocks far smaller than it."""
    monkeypatch.setattr(hashed_files, "_BLOCK", 7)
    monkeypatch.setattr(hashed_files, "_SCRATCH", 30)
    data = random.Random(0).randbytes(SIZE)
    (tmp_path / "x").write_bytes(data)
    return data


@pytest.fixture
def bytes_read(monkeypatch):
    counts, original = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: counts.append(original(*args)) or counts[-1])
    return counts


def part_of(file, start, end):
    target = bytearray(end - start)
    file.fill(memoryview(target), start)
    return bytes(target)


def spans(seed):
    draw = random.Random(seed)
    return [sorted(draw.sample(range(SIZE + 1), 2)) for _ in range(6)]


@pytest.mark.parametrize("seed", range(20))
def test_parts_in_any_order_are_those_of_the_file_and_prove_it_whole(seed, content, tmp_path):
    file = VerifiedFile(Stretch.whole(tmp_path / "x"), hashlib.sha256(content).hexdigest())
    for start, end in spans(seed):
        assert part_of(file, start, end) == content[start:end]
    file.verify()
    file.verify()


@pytest.mark.parametrize("read", ["nothing", "parts", "all"])
def test_a_flipped_byte_anywhere_is_refused_whatever_was_read(read, content, tmp_path):
    sha256 = hashlib.sha256(content).hexdigest()
    for at in range(0, SIZE, 37):
        (tmp_path / "x").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        file = VerifiedFile(Stretch.whole(tmp_path / "x"), sha256)
        for start, end in {"nothing": [], "parts": spans(at), "all": [(0, SIZE)]}[read]:
            part_of(file, start, end)
        with pytest.raises(UserError, match=r"x: damaged: its SHA-256 is not that of manifest.json$"):
            file.verify()


def test_from_front_to_back_each_byte_is_read_once(content, tmp_path, bytes_read):
    file = VerifiedFile(Stretch.whole(tmp_path / "x"), hashlib.sha256(content).hexdigest())
    for start in range(0, SIZE, 100):
        part_of(file, start + 20, start + 90)
    file.verify()
    assert sum(bytes_read) == SIZE


def test_a_file_that_ends_early_or_late_is_refused(content, tmp_path):
    for damage in (content[:-1], content + b"x", b""):
        (tmp_path / "x").write_bytes(damage)
        file = VerifiedFile(Stretch.whole(tmp_path / "x"), hashlib.sha256(content).hexdigest())
        with pytest.raises(UserError, match="x: damaged"):
            file.verify()
    with pytest.raises(EOFError):
        part_of(file, 0, SIZE)


@pytest.mark.parametrize("knows_the_flag", [True, False])
def test_what_is_written_is_there_and_hashed_on_any_kernel(knows_the_flag, tmp_path, monkeypatch):
    """Of no bytes, few, more than a block; where the kernel cannot pass by its page cache, through it."""
    pieces = [b"", b"small", torch.arange(2**20).numpy(), b"end"]
    refused = []

    def of_an_old_kernel(call):
        def refusing(descriptor, buffers, position, flags=0):
            if flags:
                refused.append(flags)
                raise OSError(errno.EOPNOTSUPP, "unknown flag")
            return call(descriptor, buffers, position)

        return refusing

    if not knows_the_flag:
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, of_an_old_kernel(getattr(os, name)))
    file = HashingFile(tmp_path / "x")
    assert sum(file.write(piece) for piece in pieces) == file.position == 8 * 2**20 + 8
    file.close(sync=True)
    data = (tmp_path / "x").read_bytes()
    assert data == b"small" + pieces[2].tobytes() + b"end"
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    verified = VerifiedFile(Stretch.whole(tmp_path / "x"), file.sha256)
    assert part_of(verified, 3, 10) == data[3:10]
    verified.verify()
    assert not (refused and knows_the_flag)
    assert refused or knows_the_flag


# Steps that stream a model


def half_depth():
    target = shrink(LLAMA, num_layers=2)
    return PruningPlan(LLAMA, target, whole_plan(target).keep | {"num_layers": ((0, 1),)})


def do_prune(model, output):
    prune(model, half_depth(), output, proof=False)


def do_export(model, output):
    export_hf(model, output, origin=Origin("export"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_nemo(tmp_path_factory.mktemp("teacher") / "teacher.nemo", LLAMA).path


@pytest.fixture
def damaged(teacher, tmp_path):
    """A function that flips a byte at a place, from 0 to 1, of a copy of the teacher's weights, and opens it."""
    folder = tmp_path / "damaged.nemo"
    shutil.copytree(teacher, folder)
    file = folder / "model_weights" / "__0_0.distcp"
    content = file.read_bytes()

    def flip(at):
        at = int(at * (len(content) - 1))
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        return open_nemo(folder, verify_while_read=True)

    return flip


@pytest.mark.parametrize("step", [do_prune, do_export])
def test_a_flipped_byte_of_the_weights_is_refused_and_nothing_is_published(step, damaged, tmp_path):
    """Also one of a layer that the cut leaves out, and one that says where a tensor lies."""
    for at in (0.0, 0.02, 0.3, 0.7, 0.97, 1.0):
        with pytest.raises(UserError, match=r"__0_0.distcp: damaged: its SHA-256 is not that of manifest.json$"):
            step(damaged(at), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["damaged.nemo"]


def test_a_flipped_byte_of_any_other_file_is_refused_before_weights_are_read(teacher, tmp_path):
    names = [name for name in read_manifest(teacher, kind="model").files if not name.endswith(".distcp")]
    assert "model_config.yaml" in names
    assert "model_weights/.metadata" in names
    shutil.copytree(teacher, tmp_path / "x.nemo")
    for name in names:
        content = (teacher / name).read_bytes()
        (tmp_path / "x.nemo" / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(UserError, match="damaged"):
            open_nemo(tmp_path / "x.nemo", verify_while_read=True)
        (tmp_path / "x.nemo" / name).write_bytes(content)


@pytest.mark.parametrize("step", [do_prune, do_export])
def test_a_model_whose_hashes_hold_is_streamed_to_the_same_bytes(step, teacher, tmp_path):
    step(open_nemo(teacher, verify_while_read=True), tmp_path / "while_read")
    step(open_nemo(teacher, verify=True), tmp_path / "before")
    first, second = (read_manifest(tmp_path / name, kind=None).files for name in ("while_read", "before"))
    assert first == second


def test_the_proof_of_a_cut_runs_on_what_was_verified(teacher, tmp_path, monkeypatch):
    order, verify = [], TorchDistWeights.verify
    monkeypatch.setattr(TorchDistWeights, "verify", lambda self: order.append("verified") or verify(self))
    monkeypatch.setattr("minitron_nemo.steps.prune.prove_cut", lambda *args, **kwargs: order.append("proven") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(open_nemo(teacher, verify_while_read=True), half_depth(), tmp_path / "x.nemo")
    assert order == ["verified", "proven"]


def test_a_stream_of_what_was_never_read_to_its_end_publishes_nothing(teacher, tmp_path):
    tensors = list(stream(open_nemo(teacher, verify_while_read=True).weights))[:-1]
    with pytest.raises(AssertionError, match="did not come"):
        write_nemo(tmp_path / "x", LLAMA, tensors, dtype=torch.float32, tokenizer=None, origin=Origin("short"))
    assert not list(tmp_path.iterdir())
