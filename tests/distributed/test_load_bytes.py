"""A rank that loads its part of a model reads the bytes of that part."""

import dataclasses

import pytest

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.testing import LLAMA, random_nemo, run_layout

# Wide enough for the bytes of the weights to outweigh the thousand that say where a tensor lies.
WIDE = dataclasses.replace(
    LLAMA, num_layers=2, hidden_size=2048, ffn_hidden_size=3072, num_attention_heads=32, num_query_groups=8,
    kv_channels=64, vocab_size=1024,
)  # fmt: skip


def bytes_this_process_read() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar:"))


def read_and_held(groups: Groups, path) -> list[tuple[int, int]]:
    """For every rank (bytes read while loading, bytes of its parameters)."""
    source = open_nemo(path)
    model = build_model(source.arch, BuildOptions(groups=groups))
    load_weights(model, source.weights, groups)  # whatever Python imports on the way is read by now
    before = bytes_this_process_read()
    load_weights(model, source.weights, groups)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return groups.share_json((bytes_this_process_read() - before, held))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=["alone", "tp2", "pp2"])
def test_every_rank_reads_what_it_holds(layout, tmp_path):
    path = random_nemo(tmp_path / "wide.nemo", WIDE).path
    for read, held in run_layout(read_and_held, layout, path):
        assert held <= read <= 1.01 * held
