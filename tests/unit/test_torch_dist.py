"""The torch_dist stream: what is written comes back, by us and by Megatron-Core, and nothing hostile gets in."""

import enum
import hashlib
import io
import math
import os
import pickle
import signal
from pathlib import Path

import foreign_layouts as foreign
import pytest
import torch
import torch.distributed as dist
from in_memory import InMemory
from torch.overrides import TorchFunctionMode

from minitron_nemo.artefacts.contents import contents_of
from minitron_nemo.checkpoint.common_state import read_common_state
from minitron_nemo.checkpoint.formats.megatron import open_checkpoint
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, with_own_storage, write_metadata
from minitron_nemo.errors import UserError
from minitron_nemo.testing import TINY


def numbered(*shape, dtype=torch.float32):
    """Every element differs, so that a wrong box cannot look right."""
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape).to(dtype)


def write(folder, chunks, *, rank=0):
    """Write {key: (full tensor, [(offset, size), ...])}; returns the chunk records."""
    writer = TorchDistWriter(folder, rank=rank)
    for key, (full, boxes) in chunks.items():
        for offset, size in boxes:
            box = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
            writer.write(key, full[box], global_shape=full.shape, offset=offset)
    return writer.close()


@pytest.fixture
def folder(tmp_path):
    """`stack` in one chunk per layer, `rows` in uneven row blocks, `grid` in a two-dimensional split."""
    full = {"stack": numbered(3, 4, 5), "rows": numbered(7, 3), "grid": numbered(4, 6, dtype=torch.bfloat16)}
    chunks = {
        "stack": (full["stack"], [((layer, 0, 0), (1, 4, 5)) for layer in (2, 0, 1)]),
        "rows": (full["rows"], [((0, 0), (5, 3)), ((5, 0), (2, 3))]),
        "grid": (full["grid"], [((r, c), (2, 3)) for r in (0, 2) for c in (0, 3)]),
    }
    write_metadata(tmp_path, write(tmp_path, chunks))
    return tmp_path, full


def test_every_box_of_every_layout_is_the_box_of_the_whole_tensor(folder):
    path, full = folder
    reader = TorchDistReader(path)
    assert reader.keys() == list(full)
    for key, tensor in full.items():
        assert reader.shape(key) == tuple(tensor.shape)
        assert reader.dtype(key) == tensor.dtype
        assert torch.equal(reader.read(key), tensor)
        for first in range(tensor.shape[0]):
            for second in range(tensor.shape[1]):
                size = (tensor.shape[0] - first, 1, *tensor.shape[2:])
                offset = (first, second, *(0 for _ in tensor.shape[2:]))
                box = reader.read(key, Box(offset, size))
                assert torch.equal(box, tensor[first:, second : second + 1])


def test_a_box_outside_the_tensor_is_an_index_error(folder):
    with pytest.raises(IndexError, match="leaves the shape"):
        TorchDistReader(folder[0]).read("rows", Box((6, 0), (2, 3)))


def test_only_the_chunks_that_overlap_are_read(tmp_path):
    full = numbered(2, 3)
    records = write(tmp_path, {"x": (full[:1].repeat(2, 1), [((0, 0), (1, 3))])}, rank=0)
    records += write(tmp_path, {"x": (full, [((1, 0), (1, 3))])}, rank=1)
    write_metadata(tmp_path, records)
    reader = TorchDistReader(tmp_path)
    (tmp_path / "__1_0.distcp").write_bytes(b"")
    assert torch.equal(reader.read("x", Box((0, 0), (1, 3))), full[:1])
    with pytest.raises(UserError, match="__1_0.distcp.*cut short"):
        reader.read("x", Box((1, 0), (1, 3)))


def test_the_writer_hashes_what_it_wrote_and_saves_views_without_their_storage(tmp_path):
    writer = TorchDistWriter(tmp_path, rank=3)
    writer.write("x", numbered(1000, 64)[::500], global_shape=(2, 64), offset=(0, 0))
    (record,) = writer.close()
    data = (tmp_path / "__3_0.distcp").read_bytes()
    assert writer.sha256 == hashlib.sha256(data).hexdigest()
    assert record["length"] == len(data) < 4000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_contiguous_tensors_are_not_copied_to_be_written_and_views_leave_their_storage_behind(dtype):
    full = numbered(10, 64).to(dtype)
    for tensor in (full, full[3:5], full[7], torch.tensor(1.0).to(dtype)):
        own = with_own_storage(tensor)
        assert own.data_ptr() == tensor.data_ptr()
        assert torch.equal(own, tensor)
        assert own.untyped_storage().nbytes() == tensor.nbytes
    for tensor in (full.T, full[:, 3], full[::2], full[:0]):
        own = with_own_storage(tensor)
        assert torch.equal(own, tensor)
        assert own.untyped_storage().nbytes() == tensor.nbytes
        assert own.is_contiguous()


def test_no_checksum_is_computed_beside_the_hash_and_the_setting_of_torch_comes_back(tmp_path, monkeypatch):
    seen, save = [], torch.save
    options = torch.serialization.get_crc32_options
    monkeypatch.setattr(torch, "save", lambda *args: (seen.append(options()), save(*args)))
    for before in (True, False):
        torch.serialization.set_crc32_options(before)
        writer = TorchDistWriter(tmp_path, rank=int(before))
        writer.write("x", numbered(4), global_shape=(4,), offset=(0,))
        writer.close()
        assert options() is before
    torch.serialization.set_crc32_options(True)
    assert seen == [False, False]


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    hashes = []
    for name in "ab":
        (tmp_path / name).mkdir()
        write_metadata(tmp_path / name, write(tmp_path / name, {"x": (numbered(4, 4), [((0, 0), (4, 4))])}))
        hashes.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / name).iterdir()})
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ([((0, 0), (3, 2))], "6 of 8 elements"),
        ([((0, 0), (3, 2)), ((2, 0), (2, 2))], "overlap"),
        ([((0, 0), (4, 2)), ((0, 0), (4, 2))], "overlap"),
    ],
)
def test_chunks_with_a_gap_or_an_overlap_are_never_completed(tmp_path, boxes, fault):
    records = write(tmp_path, {"x": (numbered(4, 2), boxes)})
    with pytest.raises(AssertionError, match=fault):
        write_metadata(tmp_path, records)
    assert not (tmp_path / ".metadata").exists()


def test_a_stored_gap_is_refused_when_its_tensor_is_read(tmp_path):
    records = write(tmp_path, {"x": (numbered(4, 2), [((0, 0), (4, 2))])})
    write_metadata(tmp_path, records)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["x"].size = torch.Size((5, 2))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="tensor x is incomplete: its chunks hold 8 of 10"):
        TorchDistReader(tmp_path).read("x")


class Canary:
    """Unpickled by an unguarded reader, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def metadata_with(value):
    from torch.distributed.checkpoint.metadata import Metadata

    return Metadata({}, planner_data=value, storage_data={})


def test_a_metadata_file_that_runs_code_is_refused_and_nothing_runs(tmp_path):
    canary = tmp_path / "canary"
    for payload in (Canary(canary), metadata_with(Canary(canary)), metadata_with([{"a": Canary(canary)}])):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(payload))
        with pytest.raises(UserError, match="mkdir, which no checkpoint needs"):
            TorchDistReader(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["torch.load", "torch.hub.load", "builtins.eval", "builtins.setattr", "os.system"])
def test_a_name_outside_the_closed_table_is_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UserError, match=f"names {name}, which no checkpoint needs"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"not a pickle",
        pickle.dumps({}),
        pickle.dumps(metadata_with(1))[:60],
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # asks for a memo of two billion entries
    ],
)
def test_a_damaged_metadata_file_is_refused_in_one_line(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(UserError) as caught:
        TorchDistReader(tmp_path)
    assert ".metadata" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_and_every_flipped_byte_of_metadata_is_refused_or_harmless(folder):
    path, full = folder
    good = (path / ".metadata").read_bytes()
    damaged = [good[:cut] for cut in range(0, len(good), 40)]
    damaged += [good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :] for at in range(0, len(good), 7)]
    refused = 0
    for data in damaged:
        (path / ".metadata").write_bytes(data)
        try:
            reader = TorchDistReader(path)
            for key in full:
                if key in reader.keys():  # noqa: SIM118
                    reader.read(key)
        except UserError:
            refused += 1
    assert refused > len(damaged) // 2


@pytest.mark.parametrize(
    "name", ["../outside.distcp", "/etc/hostname", "sub/x.distcp", "..", "link.distcp", "gone.distcp"]
)
def test_chunk_files_outside_the_folder_are_refused(folder, name):
    path, _ = folder
    (path.parent / "outside.distcp").write_bytes(b"x")
    (path / "sub").mkdir()
    (path / "sub" / "x.distcp").write_bytes(b"x")
    (path / "link.distcp").symlink_to(path / "__0_0.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="only names inside the folder|not a regular file"):
        TorchDistReader(path)


def test_a_payload_that_is_not_the_promised_tensor_is_refused(tmp_path):
    records = write(tmp_path, {"x": (numbered(4, 2), [((0, 0), (4, 2))])})
    records[0]["dtype"] = "bfloat16"
    write_metadata(tmp_path, records)
    with pytest.raises(UserError, match="promises torch.bfloat16"):
        TorchDistReader(tmp_path).read("x")


def test_a_payload_that_runs_code_is_refused_and_nothing_runs(tmp_path):
    records = write(tmp_path, {"x": (numbered(4, 2), [((0, 0), (4, 2))])})
    torch.save(Canary(tmp_path / "canary"), tmp_path / "__0_0.distcp")
    records[0]["length"] = (tmp_path / "__0_0.distcp").stat().st_size
    write_metadata(tmp_path, records)
    with pytest.raises(UserError, match="chunk of x cannot be read"):
        TorchDistReader(tmp_path).read("x")
    assert not (tmp_path / "canary").exists()


class CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")) or isinstance(kwargs.get("device"), int):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture
def megatron(tmp_path_factory, monkeypatch):
    """Megatron's dist_checkpointing, alone on a CPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    from megatron.core import dist_checkpointing

    with CudaMeansCpu():
        yield dist_checkpointing
    dist.destroy_process_group()


def sharded(megatron, key, tensors):
    """One ShardedTensor per layer of a stack, as a Megatron transformer block declares them."""
    make = megatron.ShardedTensor.from_rank_offsets
    return {
        f"{key}{i}": make(key, tensor, (0, i, len(tensors)), prepend_axis_num=1) for i, tensor in enumerate(tensors)
    }


def test_what_megatron_saves_we_read(tmp_path, megatron):
    stack = numbered(3, 4, 6, dtype=torch.bfloat16)
    state = sharded(megatron, "layers.weight", [layer.clone() for layer in stack])
    state["table"] = megatron.ShardedTensor.from_rank_offsets("table", numbered(5, 6))
    state["extra"] = megatron.mapping.ShardedObject("layers._extra_state", {"a": 1}, (1,), (0,))
    megatron.save({**state, "iteration": 7}, str(tmp_path))
    reader = TorchDistReader(tmp_path)
    assert sorted(reader.keys()) == ["layers.weight", "table"]
    assert torch.equal(reader.read("layers.weight"), stack)
    assert torch.equal(reader.read("table"), numbered(5, 6))


def test_a_run_that_megatron_saves_we_read(tmp_path, megatron):
    """With its arguments, in `common.pt` or among the tensors, as the release of Megatron-Core does it."""
    source = InMemory(TINY["mistral"], torch.bfloat16)
    make, state = megatron.ShardedTensor.from_rank_offsets, {}
    for key, tensor in foreign.stacked(source, vocabulary=8).items():
        is_layers = key.startswith(foreign.LAYER)
        state |= sharded(megatron, key, list(tensor.clone())) if is_layers else {key: make(key, tensor.clone())}
    common = {"args": foreign.megatron_args(source.arch), "iteration": 3, "checkpoint_version": 3.0}
    (tmp_path / "iter_0000003").mkdir()
    with foreign.common_classes():
        megatron.save({"model": state, **common}, str(tmp_path / "iter_0000003"))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    found = open_checkpoint(contents_of(tmp_path))
    assert (found.arch.vocab_size, found.dtype, found.notes[-1]) == (131, torch.bfloat16, "iteration 3")
    for name, tensor in stream(found.weights):
        assert torch.equal(tensor, source.read(name)), name


def test_what_we_write_megatron_loads_in_another_layout(folder, megatron):
    path, full = folder
    state = sharded(megatron, "stack", [torch.zeros(4, 5) for _ in range(3)])
    state["rows"] = megatron.ShardedTensor.from_rank_offsets("rows", torch.zeros(7, 3))
    grid = [torch.zeros(4, 2, dtype=torch.bfloat16) for _ in range(3)]
    for i, part in enumerate(grid):
        state[f"grid{i}"] = megatron.ShardedTensor.from_rank_offsets("grid", part, (1, i, 3))
    loaded = megatron.load(state, str(path))
    assert torch.equal(torch.stack([loaded[f"stack{i}"] for i in range(3)]), full["stack"])
    assert torch.equal(loaded["rows"], full["rows"])
    assert torch.equal(torch.cat([loaded[f"grid{i}"] for i in range(3)], dim=1), full["grid"])


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="is not a torch_dist checkpoint: no .metadata"):
        TorchDistReader(Path(tmp_path))


def test_enumerations_pickled_by_name_are_read_and_nothing_is_looked_up(tmp_path, monkeypatch):
    """As Python 3.11.0 to 3.11.3 write them, that of Debian 12 among them."""
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    with monkeypatch.context() as python_3_11_2:
        python_3_11_2.setattr(enum.Enum, "__reduce_ex__", by_name)
        write_metadata(tmp_path, write(tmp_path, {"a": (numbered(2, 3), [((0, 0), (2, 3))])}))
        common = io.BytesIO()
        torch.save({"stopped_by": signal.SIGTERM, "iteration": 7}, common)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    assert torch.equal(TorchDistReader(tmp_path).read("a"), numbered(2, 3))
    assert b"getattr" in common.getvalue()
    assert read_common_state(common.getvalue(), source="common.pt")["iteration"] == 7
    for of in (b"X\x01\x00\x00\x00a", b"ctorch\nfloat32\n"):
        (tmp_path / ".metadata").write_bytes(b"cbuiltins\ngetattr\n(" + of + b"X\x07\x00\x00\x00__doc__tR.")
        with pytest.raises(UserError, match="an attribute of what is no enumeration"):
            TorchDistReader(tmp_path)
