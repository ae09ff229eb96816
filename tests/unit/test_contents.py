"""A checkpoint is the same in a folder and inside of one tar, and a tar that no checkpoint has is refused unread."""

import io
import os
import subprocess
import tarfile

import pytest
import torch

from minitron_nemo.artefacts.contents import contents_of, has, read_small, tar_members
from minitron_nemo.artefacts.manifest import manifest_sha256, read_manifest, verify_files
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.packed import PackedTar
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.data.tokenizer import load_tokenizer, train_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.shape.tensors import EMBEDDING
from minitron_nemo.testing import LLAMA, random_nemo


def packed(model, path, **settings):
    origin = Origin("f", **settings)
    write_nemo(
        path,
        model.arch,
        stream(model.weights),
        dtype=model.dtype,
        tokenizer=model.tokenizer,
        origin=origin,
        packed=True,
    )
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = random_nemo(folder / "folder.nemo", LLAMA)
    return model, open_nemo(packed(model, folder / "packed.nemo"), verify=True)


def test_a_packed_model_is_the_one_in_the_folder(both):
    folder, tar = both
    assert (tar.arch, tar.dtype) == (folder.arch, folder.dtype)
    for name in folder.weights.names():
        assert torch.equal(tar.weights.read(name), folder.weights.read(name))
    box = Box((3, 1), (5, 4))
    assert torch.equal(tar.weights.read(EMBEDDING, box), folder.weights.read(EMBEDDING)[3:8, 1:5])
    assert tar.contents.names() == folder.contents.names()
    assert [entry.name for entry in tar.path.parent.iterdir() if ".tmp-" in entry.name] == []


def test_hashes_of_a_packed_model_are_taken_while_it_is_streamed(both, tmp_path):
    _, tar = both
    assert sum(1 for _ in stream(open_nemo(tar.path, verify_while_read=True).weights)) == len(tar.weights.names())
    assert tar.sha256 == manifest_sha256(tar.path)
    place = tar_members(tar.path)["model_weights/__0_0.distcp"]
    data = bytearray(tar.path.read_bytes())
    data[place.start + place.length // 2] ^= 1
    (tmp_path / "flipped.nemo").write_bytes(data)
    flipped = open_nemo(tmp_path / "flipped.nemo", verify_while_read=True)
    with pytest.raises(UserError, match=r"flipped\.nemo/model_weights/__0_0\.distcp: damaged"):
        list(stream(flipped.weights))
    with pytest.raises(UserError, match=r"__0_0\.distcp: damaged"):
        open_nemo(tmp_path / "flipped.nemo", verify=True)


def test_gnu_tar_and_the_library_of_python_read_it(both, tmp_path):
    _, tar = both
    subprocess.run(["tar", "-xf", tar.path, "-C", tmp_path], check=True)
    verify_files(tmp_path, read_manifest(tmp_path, kind="model"))
    with tarfile.open(tar.path) as archive:
        assert sorted(entry.name.removeprefix("./") for entry in archive) == tar.contents.names()


def test_what_gnu_tar_and_the_library_of_python_pack_is_read(both, tmp_path):
    folder, _ = both
    subprocess.run(["tar", "-cf", tmp_path / "gnu.nemo", "-C", folder.path, "."], check=True)
    with tarfile.open(tmp_path / "pax.nemo", "w:") as archive:
        archive.add(folder.path, arcname=".")
    for name in ("gnu.nemo", "pax.nemo"):
        assert open_nemo(tmp_path / name, verify=True).contents.names() == folder.contents.names()


def test_one_file_takes_the_place_of_a_folder_and_back(both, tmp_path):
    folder, _ = both
    path = tmp_path / "m.nemo"
    random_nemo(path, LLAMA)
    with pytest.raises(UserError, match="set overwrite=true"):
        packed(folder, path)
    packed(folder, path, overwrite=True)
    assert path.is_file()
    write_nemo(
        path, LLAMA, stream(folder.weights), dtype=folder.dtype, tokenizer=None, origin=Origin("g", overwrite=True)
    )
    assert path.is_dir()
    (tmp_path / "notes.nemo").write_text("mine")
    with pytest.raises(UserError, match="not an artefact of these recipes"):
        packed(folder, tmp_path / "notes.nemo", overwrite=True)
    assert (tmp_path / "notes.nemo").read_text() == "mine"


def test_an_entry_beyond_eight_gibibytes_has_a_size_that_others_read(tmp_path):
    tar = PackedTar(tmp_path / "large.tar")
    start = tar.reserve("model_weights/__0_0.distcp")
    size = 9 * 2**30 + 3
    with (tmp_path / "large.tar").open("r+b") as file:  # a hole: nothing of it is on the disk
        file.seek(start + size - 1)
        file.write(b"x")
    tar.complete(size)
    tar.add("manifest.json", b"{}")
    tar.close()
    found = contents_of(tmp_path / "large.tar")
    assert found.find("model_weights/__0_0.distcp").length == size
    assert read_small(found, "manifest.json") == b"{}"
    with tarfile.open(tmp_path / "large.tar") as archive:
        assert [entry.size for entry in archive] == [size, 2]


def archive(path, *entries, **settings):
    with tarfile.open(path, "w:", **settings) as tar:
        for name, content, changes in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for field, value in changes.items():
                setattr(entry, field, value)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (("../out", b"", {}), "leaves the archive"),
        (("/etc/passwd", b"", {}), "leaves the archive"),
        (("a/../../b", b"", {}), "leaves the archive"),
        (("a\\b", b"", {}), "leaves the archive"),
        (("a\nb", b"", {}), "leaves the archive"),
        (("/".join("abcdefghij"), b"", {}), "leaves the archive"),
        (("a", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), "a link"),
        (("a", b"", {"type": tarfile.LNKTYPE, "linkname": "first"}), "a link"),
        (("a", b"", {"type": tarfile.FIFOTYPE}), "a link, a device"),
        (("a", b"", {"type": tarfile.CHRTYPE}), "a link, a device"),
        (("./first", b"", {}), "comes twice"),
        (("first/a", b"", {}), "is a file and the folder"),
    ],
)
def test_an_entry_that_no_checkpoint_has_refuses_the_archive(tmp_path, entry, reason):
    path = archive(tmp_path / "x.nemo", ("first", b"1", {}), entry)
    with pytest.raises(UserError, match=reason):
        tar_members(path)


def test_an_archive_that_is_cut_short_or_packed_tighter_is_refused(both, tmp_path):
    _, tar = both
    content = tar.path.read_bytes()
    last = len(content.rstrip(b"\0"))  # byte of the last entry; the mark of the end begins with the next block
    for length in (0, 100, 512, 700, len(content) // 2, last, -(-last // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE):
        (tmp_path / "short.nemo").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"short\.nemo"):
            open_nemo(tmp_path / "short.nemo")
    path = archive(tmp_path / "gz.nemo", ("first", b"1", {}))
    subprocess.run(["gzip", path], check=True)
    with pytest.raises(UserError, match="compressed with gzip"):
        tar_members(tmp_path / "gz.nemo.gz")


def test_a_tar_whose_entries_fill_its_records_has_an_end_too(tmp_path):
    tar = PackedTar(tmp_path / "x.nemo")
    tar.add("a", bytes(tarfile.RECORDSIZE - tarfile.BLOCKSIZE))
    tar.close()
    assert (tmp_path / "x.nemo").stat().st_size == 2 * tarfile.RECORDSIZE
    assert list(tar_members(tmp_path / "x.nemo")) == ["a"]


def test_headers_without_end_are_refused_before_they_are_held(tmp_path):
    path = archive(tmp_path / "pax.nemo", ("first", b"1", {"pax_headers": {"comment": "x" * (40 << 20)}}))
    with pytest.raises(UserError, match=r"headers have over|no checkpoint"):
        tar_members(path)


def test_names_stay_inside_of_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("f")
    (tmp_path / "in" / "sub").symlink_to(tmp_path / "outside")
    os.mkfifo(tmp_path / "in" / "pipe")
    contents = contents_of(tmp_path / "in")
    for name in ("../secret", "/etc/passwd", "link", "sub/file", "pipe", "a//b", ""):
        with pytest.raises(UserError):
            contents.find(name)
    assert not has(contents, "nothing")
    assert contents_of(tmp_path / "nowhere").names() == []
    with pytest.raises(UserError, match="neither a folder nor a readable tar"):
        contents_of(tmp_path / "secret").names()


def test_a_tokenizer_is_opened_inside_of_a_tar(both, tmp_path):
    folder, _ = both
    tokenizer = train_tokenizer(["a b c"], vocab_size=257, output=tmp_path / "tokenizer")
    write_nemo(
        tmp_path / "t.nemo",
        LLAMA,
        stream(folder.weights),
        dtype=folder.dtype,
        tokenizer=tokenizer.folder,
        origin=Origin("f"),
        packed=True,
    )
    assert load_tokenizer(tmp_path / "t.nemo").fingerprint == tokenizer.fingerprint
