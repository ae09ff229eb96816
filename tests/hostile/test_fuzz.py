"""Mutations of sound files are refused in one line or read: never another exception, never for long."""

import pytest
from hostile.fuzz import fuzz, parsers

COUNT = 200
NAMES = ["metadata", "payload", "common state", "safetensors header", "model_config.yaml", "config.json", "index",
         "manifest", "plan", "tar headers", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return parsers(tmp_path_factory.mktemp("fuzz"))


def test_every_parser_is_tried(known):
    assert list(known) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_mutations_are_refused_in_one_line_or_read(name, known):
    tally = fuzz(known[name], count=COUNT, seed=name)
    assert tally.faults == []
    assert tally.slowest < 6
    assert tally.refused > COUNT // 10
