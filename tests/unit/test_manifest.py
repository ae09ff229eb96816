"""An artefact is whole or absent, names its origin, and is never a folder of somebody else's."""

import json
import logging
from concurrent.futures import CancelledError
from threading import Event, Timer

import pytest

from minitron_nemo.artefacts import manifest as m
from minitron_nemo.artefacts import publishing as p
from minitron_nemo.artefacts.origin import Origin, fingerprint_of
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.errors import UserError


def publish(path, *, content=b"one", fingerprint="f1", overwrite=False, **fields):
    origin = Origin(fingerprint, config={"a": 1}, parents={"teacher": "00"}, overwrite=overwrite)
    with p.publishing(path, kind="data", origin=origin, **fields) as draft:
        (draft.folder / "sub").mkdir()
        (draft.folder / "sub" / "x.bin").write_bytes(content)
        (draft.folder / "y.txt").write_text("y")


def only_artefact(path):
    return [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_published_is_read_back_and_verifies(tmp_path):
    path = tmp_path / "runs" / "data"
    publish(path, tokens=5, extra={"documents": 2})
    manifest = m.read_manifest(path, kind="data")
    assert (manifest.fingerprint, manifest.config, manifest.parents) == ("f1", {"a": 1}, {"teacher": "00"})
    assert (manifest.tokens, manifest.extra) == (5, {"documents": 2})
    assert set(manifest.files) == {"sub/x.bin", "y.txt"}
    assert manifest.versions["torch"]
    m.verify_files(path, manifest)
    assert only_artefact(path)


def test_the_fingerprint_ignores_key_order_and_nothing_else():
    assert fingerprint_of({"a": 1, "b": 2}, [3]) == fingerprint_of({"b": 2, "a": 1}, [3])
    parts = [({"a": 1},), ({"a": 2},), ({"a": "1"},), ({"a": 1}, None), ([{"a": 1}],), ({"a": 1.0},)]
    assert len({fingerprint_of(*part) for part in parts}) == len(parts)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_publication_leaves_nothing(tmp_path, error):
    def fail():
        with p.publishing(tmp_path / "data", kind="data", origin=Origin("f")) as draft:
            (draft.folder / "x").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_artefact(tmp_path):
    path = tmp_path / "data"
    publish(path)
    with (
        pytest.raises(RuntimeError),
        p.publishing(path, kind="data", origin=Origin("f2", overwrite=True)),
    ):
        raise RuntimeError
    m.verify_files(path, m.read_manifest(path, kind="data"))
    assert only_artefact(path)


def test_an_existing_artefact_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "data"
    publish(path)
    with pytest.raises(UserError, match="exists already.*overwrite=true"):
        publish(path, content=b"two", fingerprint="f2")
    assert m.is_current(path, "f1")
    publish(path, content=b"two", fingerprint="f2", overwrite=True)
    assert m.is_current(path, "f2")
    assert (path / "sub" / "x.bin").read_bytes() == b"two"
    assert only_artefact(path)


def test_a_folder_that_is_no_artefact_is_never_overwritten(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="never overwritten"):
        publish(path, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(UserError, match="never overwritten"):
        publish(link, overwrite=True)
    assert (path / "thesis.txt").read_text() == "years of work"


def test_current_means_present_whole_and_of_this_fingerprint(tmp_path):
    path = tmp_path / "data"
    assert not m.is_current(path, "f1")
    publish(path)
    assert m.is_current(path, "f1")
    assert not m.is_current(path, "f2")
    (path / "y.txt").write_text("longer")
    assert not m.is_current(path, "f1")


@pytest.mark.parametrize("damage", ["flip", "shorten", "delete", "link"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "data"
    publish(path)
    file = path / "sub" / "x.bin"
    if damage == "flip":
        file.write_bytes(b"ona")
    elif damage == "shorten":
        file.write_bytes(b"on")
    else:
        file.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(b"one")
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="x.bin"):
        m.verify_files(path, m.read_manifest(path, kind="data"))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_processes_that_share_the_reading_find_each_damage_once(tmp_path, parts):
    path = tmp_path / "data"
    with p.publishing(path, kind="data", origin=Origin("f")) as draft:
        for number in range(4):
            (draft.folder / f"{number}.bin").write_bytes(bytes(number + 1))
    manifest = m.read_manifest(path, kind="data")
    for number in range(4):
        (path / f"{number}.bin").write_bytes(b"x" * (number + 1))
        found = []
        for part in range(parts):
            try:
                m.verify_files(path, manifest, part=part, parts=parts)
            except UserError as error:
                found.append(str(error))
        assert len(found) == 1
        assert f"{number}.bin: damaged" in found[0]
        (path / f"{number}.bin").write_bytes(bytes(number + 1))


def test_the_first_damage_by_name_is_told_whichever_is_found_first(tmp_path):
    path = tmp_path / "data"
    with p.publishing(path, kind="data", origin=Origin("f")) as draft:
        for name, size in (("a", 2**20), ("b", 1), ("c", 1)):
            (draft.folder / name).write_bytes(bytes(size))
    for name, size in (("a", 2**20), ("c", 1)):
        (path / name).write_bytes(b"x" * size)
    with pytest.raises(UserError, match="data/a: damaged"):
        m.verify_files(path, m.read_manifest(path, kind="data"))


def test_hashes_that_nobody_waits_for_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(m, "BLOCK", 1)
    (tmp_path / "x").write_bytes(bytes(100))
    begun, go_on = Event(), Event()

    def advance(size):
        begun.set()
        assert go_on.wait(10)

    with m._hashing(advance, threads=1) as hashing:
        under_way, waiting = (hashing(Stretch.whole(tmp_path / "x")) for _ in range(2))
        assert begun.wait(10)
        Timer(0.1, go_on.set).start()
    assert isinstance(under_way.exception(), CancelledError)
    assert waiting.cancelled()


@pytest.mark.parametrize("name", ["z.txt", "sub/z.bin", "sub/.metadata", "deeper/x"])
def test_a_file_that_is_not_listed_is_refused_by_name(tmp_path, name):
    path = tmp_path / "data"
    publish(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("from elsewhere")
    with pytest.raises(UserError, match=f"{name}: not listed in manifest.json"):
        m.verify_files(path, m.read_manifest(path, kind="data"))


def test_dot_files_at_the_top_are_the_users_own(tmp_path):
    path = tmp_path / "data"
    publish(path)
    (path / ".git").mkdir()
    (path / ".git" / "config").write_text("")
    (path / ".DS_Store").write_text("")
    m.verify_files(path, m.read_manifest(path, kind="data"))


def test_another_kind_and_no_artefact_are_refused(tmp_path):
    publish(tmp_path / "data")
    with pytest.raises(UserError, match="is a data artefact; a model artefact is needed"):
        m.read_manifest(tmp_path / "data", kind="model")
    with pytest.raises(UserError, match="is not a .nemo model folder: no such folder"):
        m.read_manifest(tmp_path / "nowhere", kind="model")
    with pytest.raises(UserError, match="is not a .nemo model folder: no manifest.json"):
        m.read_manifest(tmp_path, kind="model")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{}', '{"kind": "data"}', '{"kind": 1, "fingerprint": "f"}', "[" * 100_000,
     '{"kind": "data", "fingerprint": "f", "surprise": 1}',
     '{"kind": "data", "fingerprint": "f"}', '{"kind": "data", "fingerprint": "f", "files": {}}',
     '{"kind": "data", "fingerprint": "f", "files": {"../../x": {"size": 1, "sha256": ""}}}',
     '{"kind": "data", "fingerprint": "f", "files": {"/etc/x": {"size": 1, "sha256": ""}}}',
     '{"kind": "data", "fingerprint": "f", "files": {"x": {"size": "1", "sha256": ""}}}'],
)  # fmt: skip
def test_an_unreadable_manifest_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json: not a readable manifest") as caught:
        m.read_manifest(tmp_path, kind="data")
    assert "\n" not in str(caught.value)
    assert not m.is_current(tmp_path, "f")


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path):
    p.check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=r"needs 1\.1e\+06 TB, .* [GT]B are free"):
        p.check_free_space(tmp_path / "not" / "yet", 10**18)


def test_ranks_can_share_the_folder_between_begin_and_finish(tmp_path):
    path = tmp_path / "data"
    draft = p.begin(path, kind="data", origin=Origin("f"))
    assert draft.folder.parent == tmp_path
    assert not path.exists()
    (draft.folder / "shard").write_bytes(b"abc")
    draft.hashes["shard"] = m.file_sha256(draft.folder / "shard")
    manifest = draft.finish()
    assert json.loads((path / "manifest.json").read_text())["files"] == manifest.files
    m.verify_files(path, manifest)
    assert len(m.manifest_sha256(path)) == 64


def test_verifying_gigabytes_shows_how_far_it_is(tmp_path, monkeypatch, caplog):
    publish(tmp_path / "data")
    caplog.set_level(logging.INFO, logger="minitron_nemo")
    m.verify_files(tmp_path / "data", m.read_manifest(tmp_path / "data", kind="data"))
    assert not caplog.messages
    monkeypatch.setattr(m, "WORTH_A_LINE", 1)
    m.verify_files(tmp_path / "data", m.read_manifest(tmp_path / "data", kind="data"))
    assert caplog.messages[-1].startswith("verify data 4/4 100%")
