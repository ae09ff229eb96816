"""Memory of streamed tensors is used again, and never while somebody holds it."""

import pytest
import torch

from minitron_nemo.checkpoint import buffers
from minitron_nemo.checkpoint.buffers import memory_used_again, new_tensor
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.testing import LLAMA, random_nemo

BYTES = 4096


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Sizes of memory that was taken from the system; from the first byte on it is worth keeping."""
    sizes, original = [], buffers._fresh
    monkeypatch.setattr(buffers, "WORTH_KEEPING", 1)
    monkeypatch.setattr(buffers, "_fresh", lambda size: sizes.append(size) or original(size))
    return sizes


def tensor(size=BYTES):
    return new_tensor((size,), torch.uint8)


def test_memory_of_a_tensor_that_is_gone_is_used_again(fresh):
    with memory_used_again():
        for _ in range(5):
            tensor().fill_(1)
        assert fresh == [BYTES]


@pytest.mark.parametrize("hold", [lambda t: t[5:], lambda t: t.numpy(), lambda t: t.view(torch.int32)])
def test_memory_that_a_view_holds_is_not_used_again(hold, fresh):
    with memory_used_again():
        first = tensor().fill_(1)
        held = hold(first)
        before = held.copy() if not isinstance(held, torch.Tensor) else held.clone()
        del first
        tensor().fill_(2)
        assert (held == before).all()
        assert len(fresh) == 2


def test_memory_much_larger_than_needed_is_left_for_a_tensor_that_needs_it(fresh):
    with memory_used_again():
        tensor(4 * BYTES)
        tensor(BYTES)
        assert fresh == [4 * BYTES, BYTES]
        tensor(3 * BYTES)
        assert fresh == [4 * BYTES, BYTES]


def test_few_are_kept_and_none_after_the_last_stream():
    with memory_used_again():
        with memory_used_again():
            tensors = [tensor() for _ in range(10)]
            tensors.clear()
        assert len(buffers._spare) == 4
    assert not buffers._spare
    tensor()
    assert not buffers._spare


def test_a_stream_of_many_layers_takes_the_memory_of_a_few_tensors(tmp_path, fresh):
    model = random_nemo(tmp_path / "x.nemo", LLAMA)
    names = model.weights.names()
    fresh.clear()
    for _ in stream(model.weights):
        pass
    kinds = len({model.weights.shape(name) for name in names})
    assert len(fresh) <= kinds + 2 < len(names)
