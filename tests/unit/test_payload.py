"""Part of a stored tensor: the right elements, no byte more than they need, and nothing believed that does not hold."""

import io
import itertools
import math
import os
import zipfile

import pytest
import torch

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.payload import find_tensor
from minitron_nemo.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, write_metadata
from minitron_nemo.errors import UserError

HEADER = 2000  # bytes of zip directory and description, at most


def numbered(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def store(folder, tensor, payloads=None):
    """A torch_dist folder of one tensor in one chunk; `payloads` replaces the bytes of its file."""
    writer = TorchDistWriter(folder)
    writer.write("x", tensor, global_shape=tensor.shape, offset=[0] * tensor.dim())
    records = writer.close()
    if payloads is not None:
        (folder / writer.name).write_bytes(payloads)
        records[0]["length"] = len(payloads)
    write_metadata(folder, records)
    return TorchDistReader(folder)


@pytest.fixture
def bytes_read(monkeypatch):
    """What the calls to the system gave, one entry each."""
    counts, original = [], os.preadv

    def counting(*args):
        counts.append(original(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counts


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def found_in(data, tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        return find_tensor(file, 0, len(data))


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5), (2, 3, 2, 3)])
def test_every_box_of_a_small_tensor_is_its_slice(tmp_path, shape):
    full = numbered(*shape)
    reader = store(tmp_path, full)
    spans = [[(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    boxes = list(itertools.product(*spans))
    for spans in boxes[:: max(1, len(boxes) // 300)]:
        box = Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
        assert torch.equal(reader.read("x", box), full[box.slices()]), box


@pytest.mark.parametrize(
    "box",
    [
        Box((1, 40, 0), (1, 30, 2048)),  # rows of one layer
        Box((1, 40, 256), (1, 30, 1536)),  # part of each row: runs of 6 KiB
        Box((0, 0, 0), (2, 100, 1024)),
        Box((0, 99, 2047), (2, 1, 1)),
    ],
)
def test_large_boxes_are_right_and_read_nothing_else(tmp_path, box, bytes_read):
    full = numbered(2, 100, 2048)
    reader = store(tmp_path, full)
    assert torch.equal(reader.read("x", box), full[box.slices()])
    least = 4 * math.prod(box.size)
    assert least <= sum(bytes_read) <= max(least, 2 * 4 * 2048) + HEADER


def test_short_runs_are_read_with_their_rows_in_few_calls(tmp_path, bytes_read):
    full = numbered(1, 300, 64)
    reader = store(tmp_path, full)
    assert torch.equal(reader.read("x", Box((0, 100, 5), (1, 200, 3))), full[:, 100:, 5:8])
    assert 200 * 64 * 4 <= sum(bytes_read) <= 200 * 64 * 4 + HEADER
    assert len(bytes_read) < 20


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_what_torch_saves_is_found_where_it_lies(tmp_path, dtype):
    tensor = numbered(3, 5).to(dtype)
    data = saved(tensor)
    plain = found_in(data, tmp_path)
    assert (plain.dtype, plain.shape) == (dtype, (3, 5))
    assert data[plain.start :][: 15 * dtype.itemsize] == tensor.view(torch.uint8).numpy().tobytes()


def test_a_view_is_found_in_its_storage(tmp_path):
    plain = found_in(saved(numbered(10, 4)[3:5]), tmp_path)
    assert plain.shape == (2, 4)
    whole = found_in(saved(numbered(10, 4)), tmp_path)
    assert plain.start == whole.start + 3 * 4 * 4


@pytest.mark.parametrize(
    "value",
    [torch.nn.Parameter(numbered(2)), {"x": numbered(2)}, [numbered(2)], numbered(2, 2).to_sparse(),
     torch.zeros(2, dtype=torch.float8_e5m2), "text", 3, numbered(1).expand(2**40)],
)  # fmt: skip
def test_any_other_form_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="^it") as caught:
        found_in(saved(value), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_transposed_chunk_is_read_all_the_same(tmp_path):
    reader = store(tmp_path, numbered(6, 4), payloads=saved(numbered(4, 6).T))
    assert torch.equal(reader.read("x", Box((1, 0), (2, 3))), numbered(4, 6).T[1:3, :3])


def test_compressed_payloads_are_refused_before_they_unfold(tmp_path):
    stream = io.BytesIO()
    source = io.BytesIO(saved(numbered(4, 2)))
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    reader = store(tmp_path, numbered(4, 2), payloads=stream.getvalue())
    with pytest.raises(UserError, match="compressed, which torch.save never does"):
        reader.read("x")


def test_a_chunk_that_promises_more_than_the_file_has_is_refused_without_room_for_it(tmp_path):
    writer = TorchDistWriter(tmp_path)
    writer.write("x", numbered(4, 2), global_shape=(4, 2), offset=(0, 0))
    records = writer.close()
    records[0]["length"] = 2**50
    write_metadata(tmp_path, records)
    with pytest.raises(UserError, match="cut short"):
        TorchDistReader(tmp_path).read("x")


def test_every_flipped_byte_of_a_payload_is_refused_or_gives_a_tensor_of_the_promised_kind(tmp_path):
    full = numbered(4, 2)
    store(tmp_path, full)
    path = tmp_path / "__0_0.distcp"
    good = path.read_bytes()
    refused = 0
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x21]) + good[at + 1 :])
        try:
            tensor = TorchDistReader(tmp_path).read("x")
            assert (tensor.dtype, tensor.shape) == (full.dtype, full.shape)
        except UserError:
            refused += 1
    assert refused > 50


def test_a_directory_without_end_is_not_walked(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for number in range(30_000):
            packed.writestr(f"a/{number:050}", b"")
    with pytest.raises(ValueError, match="larger than that of any tensor"):
        found_in(stream.getvalue(), tmp_path)


def test_a_checkpoint_that_promises_more_than_its_files_have_is_refused_on_opening(tmp_path):
    store(tmp_path, numbered(4, 2))
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="__0_0.distcp: ends before the chunk of x"):
        TorchDistReader(tmp_path)
