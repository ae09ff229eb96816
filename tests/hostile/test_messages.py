"""A message is one line of a length that can be read, whatever the names and values are that it shows."""

import json
import os
import random
import re
import time

import pytest
import torch
from hf_models import save_tiny_tokenizer
from hostile.case import ARCH, edit_json

from minitron_nemo.artefacts import contents
from minitron_nemo.artefacts.contents import FolderContents
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.strict_json import _may_be_large, parse_json
from minitron_nemo.checkpoint.audit import audit, in_lines
from minitron_nemo.checkpoint.formats.nemo import write_nemo
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.errors import LONGEST, UserError, printable

HARMFUL = ["a\nb", "a\rb", "a\x1b[2Jb", "a\x07b", "a\u202eb", "a\u2028b", "a\udcffb", "a\u200bb", "a\x9bb", "a\0b"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = save_tiny_tokenizer(folder / "words", vocab_size=131)
    tensors = stream(RandomWeights(ARCH, seed=1))
    write_nemo(folder / "m.nemo", ARCH, tensors, dtype=torch.float32, tokenizer=words, origin=Origin("f"))
    return folder / "m.nemo"


@pytest.mark.parametrize("text", HARMFUL)
def test_a_refusal_is_one_line_of_characters_whatever_it_names(text):
    message = str(UserError(f"{text}: no such file"))
    assert message.isprintable()
    assert message.startswith("a")
    assert message.endswith("b: no such file")
    assert message.encode()  # a terminal takes it


def test_what_can_be_read_stays_as_it_is():
    for text in ("runs/größe/模型.nemo: no such file", "C:\\x", ""):
        assert printable(text) == text
        assert str(UserError(text)) == text


def test_a_refusal_of_a_long_value_keeps_its_beginning_and_its_end():
    message = str(UserError(f"config.json: x={'y' * 10**6}: allowed are 1 and 2"))
    assert len(message) <= LONGEST
    assert message.startswith("config.json: x=yyy")
    assert message.endswith("yyy: allowed are 1 and 2")


def test_an_audit_shows_what_a_manifest_says_in_lines_of_its_own(model):
    said = "python x.py\n  hashes     those of 99 files hold\x1b[2J"
    edit_json("manifest.json", lambda manifest: manifest.update(command=said))(model)
    found = audit(model)
    assert found.is_sound
    lines = in_lines(found).split("\n")
    assert all(line.isprintable() for line in lines)
    assert sum(line.startswith("  hashes") for line in lines) == 1


@pytest.mark.parametrize("seed", range(3))
def test_numbers_that_may_be_too_large_are_found_as_the_expression_finds_them(seed):
    draw, expression = random.Random(seed), re.compile(rb"[0-9]{41}|[eE]\+?[0-9]{3}")
    for _ in range(2000):
        text = bytes(draw.choice(b"0123456789eE+-.") for _ in range(draw.randrange(1, 12)))
        text = text + bytes(draw.choice(b"0123456789") for _ in range(draw.choice([0, 3, 30, 40, 41, 42])))
        assert _may_be_large(text) == (expression.search(text) is not None), text


def test_a_text_of_megabytes_is_parsed_in_the_time_that_it_takes_to_look_at_it():
    text = json.dumps({"a": "x" * (32 << 20)})
    began = time.process_time()
    parse_json(text)
    assert time.process_time() - began < 1.0


def test_a_folder_with_files_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "FILES_LIMIT", 10)
    for number in range(5):
        (tmp_path / f"{number}" / "a").mkdir(parents=True)
    assert FolderContents(tmp_path).names() == []
    for number in range(20):
        (tmp_path / f"file {number}").touch()
    with pytest.raises(UserError, match="more than 10 files"):
        FolderContents(tmp_path).names()


def test_a_folder_is_listed_without_following_its_links(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    (tmp_path / "d").touch()
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "a" / "pipe")
    assert FolderContents(tmp_path).names() == ["a/b/c", "a/pipe", "d", "loop"]
    assert FolderContents(tmp_path / "a").names() == ["b/c", "pipe"]
    assert FolderContents(tmp_path / "d").names() == FolderContents(tmp_path / "none").names() == []


def test_a_folder_of_a_checkpoint_that_lies_elsewhere_is_not_looked_into(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").touch()
    (tmp_path / "root" / "within").mkdir(parents=True)
    (tmp_path / "root" / "within" / "x").touch()
    (tmp_path / "root" / "out").symlink_to("../elsewhere")
    (tmp_path / "root" / "in").symlink_to("within")
    root = FolderContents(tmp_path / "root")
    assert root.inside("in").names() == ["x"]
    assert root.inside("in").find("x") is not None
    for opened in (root.inside("out"), root.inside("out").inside(".."), root.inside("within").inside("../out")):
        with pytest.raises(UserError, match="leaves the folder"):
            opened.find("x")
    assert root.inside("out").names() == []
    # What the user gave may be a link himself.
    assert FolderContents(tmp_path / "root" / "out").names() == ["x"]
