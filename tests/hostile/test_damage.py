"""Damage of any file is refused by its name before anything is made of it, and a full disk leaves what was there."""

import errno
import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from hf_models import save_tiny_tokenizer
from hostile.case import ARCH, open_hf_folder, open_model, write_sound

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.errors import UserError

UNREAD = ("special_tokens_map.json", "generation_config.json")  # of a Hugging Face folder nothing is read of these
FLIPS = 12  # bits of each file, at places that a seed gives


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_sound(tmp_path_factory.mktemp("sound"), save_tiny_tokenizer)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]


def damages(data: bytes, seed: str, flips: int = FLIPS) -> dict[str, bytes]:
    """The content of a file after each kind of damage that keeps it where it is."""
    size, rng = len(data), random.Random(seed)
    cuts = {f"cut to {n}": data[:n] for n in {0, 1, size // 2, size - 1}}
    bits = {f"bit of byte {at} flipped": flipped(data, at) for at in rng.sample(range(size), min(flips, size))}
    return {**cuts, **bits, "longer": data + b"\0", "zeros": bytes(size)}


def open_streamed(path):
    """As prune and export open a model: its weights are hashed while they are read."""
    for _ in stream(open_nemo(path, verify_while_read=True).weights):
        pass


def refusal_of(opened, path):
    try:
        opened(path)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("opened", [open_model, open_streamed], ids=["verified", "streamed"])
def test_every_damage_of_every_file_of_a_model_is_refused_by_its_name(opened, sound, tmp_path):
    path = tmp_path / "model.nemo"
    shutil.copytree(sound["nemo"], path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) > 6
    for file in files:
        content, name = file.read_bytes(), file.relative_to(path).as_posix()
        for kind, data in damages(content, name).items():
            file.write_bytes(data)
            refusal = refusal_of(opened, path)
            if refusal is None:
                # No hash vouches for the manifest itself: a flipped bit of its prose says something else, and its last
                # byte is a line break. A signature does (`test_sign.py`).
                assert name == "manifest.json", f"{name}, {kind}: opened"
                assert "flipped" in kind or kind == f"cut to {len(content) - 1}"
            else:
                assert file.name in refusal, f"{name}, {kind}: {refusal}"
        file.unlink()
        with pytest.raises(UserError, match=file.name):
            opened(path)
        file.write_bytes(content)
    opened(path)


def test_a_file_in_the_place_of_another_of_the_same_size_is_refused(sound, tmp_path):
    path = tmp_path / "model.nemo"
    write_nemo(
        path,
        ARCH,
        stream(RandomWeights(ARCH, seed=2)),
        dtype=torch.float32,
        tokenizer=sound["nemo"],
        origin=Origin("g"),
    )
    weights = "model_weights/__0_0.distcp"
    assert (path / weights).stat().st_size == (sound["nemo"] / weights).stat().st_size
    shutil.copyfile(sound["nemo"] / weights, path / weights)
    for opened in (open_model, open_streamed):
        with pytest.raises(UserError, match="__0_0.distcp: damaged"):
            opened(path)


def test_every_damage_of_a_packed_model_is_refused(sound, tmp_path):
    path, content = tmp_path / "model.nemo", sound["tar"].read_bytes()
    for kind, data in damages(content, "tar", flips=60).items():
        path.write_bytes(data)
        refusal = refusal_of(open_model, path)
        if refusal is not None:
            assert str(path) in refusal, kind
        else:
            # The rest of a block behind a file, times and owners of entries, and the zeros at the end hold nothing.
            at = int(kind.split()[3]) if "flipped" in kind else len(content)
            assert is_idle(content, at), f"{kind}: opened"


def is_idle(content: bytes, at: int) -> bool:
    """Whether no file of a tar has a byte at `at`, or it lies in the manifest, for which nothing vouches."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            if member.offset_data <= at < member.offset_data + member.size:
                return member.name.endswith("manifest.json")
            if member.offset <= at < member.offset_data:
                return False
    return True


def test_every_damage_of_a_hugging_face_folder_that_changes_its_shape_is_refused_by_its_name(sound, tmp_path):
    """Its maker wrote no hashes: what changes numbers alone cannot be seen, all that changes sizes or names can."""
    path = tmp_path / "hf"
    shutil.copytree(sound["hf"], path)
    for file in sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors")):
        if file.name in UNREAD:
            continue
        content = file.read_bytes()
        for data in (
            b"",
            content[:1],
            content[: len(content) // 2],
            content[:-2],
            content + b"\1",
            bytes(len(content)),
        ):
            file.write_bytes(data)
            with pytest.raises(UserError, match=file.name):
                open_hf_folder(path)
        file.unlink()
        if file.name != "tokenizer_config.json":  # its end is in config.json too
            with pytest.raises(UserError):
                open_hf_folder(path)
        file.write_bytes(content)
    open_hf_folder(path)


def test_a_manifest_whose_list_is_not_that_of_the_folder_is_refused(sound, tmp_path):
    path = tmp_path / "model.nemo"
    shutil.copytree(sound["nemo"], path)
    whole = json.loads((path / "manifest.json").read_text())
    for name in whole["files"]:
        less = {**whole, "files": {other: entry for other, entry in whole["files"].items() if other != name}}
        (path / "manifest.json").write_text(json.dumps(less))
        with pytest.raises(UserError, match="does not list|not listed"):
            open_model(path)
    more = {**whole, "files": {**whole["files"], "more.bin": {"size": 0, "sha256": "00"}}}
    (path / "manifest.json").write_text(json.dumps(more))
    with pytest.raises(UserError, match="more.bin: listed"):
        open_model(path)


class FullDisk:
    """Writes go through until the `allowed`-th one; it and all after it find the disk full."""

    def __init__(self, monkeypatch, allowed: int) -> None:
        self.left = allowed
        for name in ("write", "pwrite", "pwritev", "fsync", "ftruncate"):
            monkeypatch.setattr(os, name, self.limited(getattr(os, name)))
        for name in ("write_text", "write_bytes"):
            monkeypatch.setattr(Path, name, self.limited(getattr(Path, name), half=True))

    def limited(self, call, *, half=False):
        def limited(*args, **keywords):
            self.left -= 1
            if self.left < 0:
                if half:
                    call(args[0], args[1][: len(args[1]) // 2], **keywords)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **keywords)

        return limited


def write_on(path, disk_allows, *, seed, sound, **options):
    """Write a model over what is at `path` on a disk that takes so many writes: how many were tried, the refusal."""
    origin = Origin(f"seed {seed}", overwrite=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = FullDisk(monkeypatch, disk_allows)
        try:
            tensors = stream(RandomWeights(ARCH, seed=seed))
            write_nemo(path, ARCH, tensors, dtype=torch.float32, tokenizer=sound["nemo"], origin=origin, **options)
        except UserError as error:
            return disk_allows - disk.left, str(error)
    return disk_allows - disk.left, None


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "packed"])
def test_a_disk_that_fills_up_at_any_write_leaves_the_artefact_that_was_there(packed, sound, tmp_path):
    path = tmp_path / "model.nemo"
    writes, refusal = write_on(path, 10**9, seed=1, sound=sound, packed=packed)
    assert refusal is None
    assert writes > 20
    at_the_end = writes - 1  # when the folder that holds it is asked to remember the rename
    for allowed in sorted({*range(8), *range(8, at_the_end, writes // 16), *range(writes - 6, at_the_end)}):
        _, refusal = write_on(path, allowed, seed=2, sound=sound, packed=packed)
        assert refusal is not None
        assert "No space left" in refusal
        # An empty lock is nobody's: the next run takes it.
        assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == [path.name]
        found = read_manifest(path, kind="model")
        assert found.fingerprint == "seed 1", allowed
        verify_files(path, found)
    assert write_on(path, 10**9, seed=2, sound=sound, packed=packed)[1] is None
    assert read_manifest(path, kind="model").fingerprint == "seed 2"
