"""Pickles where a torch_dist checkpoint has some, and the bombs and absurd numbers that its metadata can hold."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hostile.case import CANARY, Case, put, vouch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties

METADATA = "model_weights/.metadata"
NEEDS = "which no checkpoint needs"
NAMES = [
    "os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.setattr",
    "builtins.__import__", "torch.load", "torch.hub.load", "torch.ctypes.CDLL", "torch.os.system", "pickle.loads",
    "marshal.loads", "types.FunctionType", "functools.partial", "operator.attrgetter", "operator.methodcaller",
    "runpy._run_code", "pydoc.locate", "importlib.import_module", "copyreg._reconstructor", "shutil.rmtree",
    "hydra.utils.instantiate", "numpy.core.multiarray._reconstruct", "torch._utils._rebuild_tensor_v2", "codecs.encode",
]  # fmt: skip
# Opcodes that make or call something and that no pickler writes for plain records.
OPCODES = {
    "inst": b"(S'mkdir canary'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'mkdir canary'\no.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"Pcanary\n.",
    "binpersid": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "newobj_ex": b"\x80\x04cos\nsystem\n)}\x92.",
    "reduce_of_a_text": b"\x80\x04\x8c\x01a)R.",
    "build_of_a_list": b"\x80\x04]}b.",
    "build_of_a_class": b"\x80\x04ctorch\nSize\n}b.",
    "newobj_of_a_dtype": b"\x80\x04ctorch\nfloat32\n)\x81.",
    "endless_number": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "memo_of_gigabytes": b"\x80\x04Nr\xff\xff\xff\x7f.",
    # An attribute of a record is a record too, and no call.
    "call_of_an_attribute": b"\x80\x04cbuiltins\ngetattr\n(ctorch\nSize\nX\x08\x00\x00\x00__init__tR)R.",
    "pop": b"\x80\x04N0.",
    "recall_of_nothing": b"\x80\x04h\x07.",
    "bytearray": b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00.",
}


class Canary:
    """Unpickled by an unguarded reader, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def edited(change: Callable[[Any, Path], object], *, protocol: int = 4) -> Callable[[Path], None]:
    """The sound metadata after `change`, pickled anew."""

    def poison(folder: Path) -> None:
        metadata = pickle.loads((folder / METADATA).read_bytes())
        made = change(metadata, folder)
        metadata = metadata if made is None else made
        (folder / METADATA).write_bytes(pickle.dumps(metadata, protocol=protocol))
        vouch(folder, METADATA)

    return poison


def canary(folder: Path) -> Canary:
    return Canary(folder.parent / CANARY)


def _table(metadata: Any) -> Any:
    return metadata.state_dict_metadata["embedding.word_embeddings.weight"]


def _info(metadata: Any) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn.startswith("embedding"))


def _index(metadata: Any) -> Any:
    return next(index for index in metadata.storage_data if index.fqn.startswith("embedding"))


def _set(record: Any, name: str, value: Any) -> None:
    object.__setattr__(record, name, value)


def _all_at_zero(metadata: Any) -> None:
    for index, info in metadata.storage_data.items():
        if index.offset is not None:
            _set(info, "offset", 0)


def tower(height: int = 60) -> tuple[Any, ...]:
    """A tuple of two, each of them the same tuple of two, and so on: quick to write down, endless to hash or print."""
    value: tuple[Any, ...] = ()
    for _ in range(height):
        value = (value, value)
    return value


def cases() -> Iterator[Case]:
    for name in NAMES:
        module, _, attribute = name.rpartition(".")
        yield Case(f"metadata names {name}", "nemo", put(METADATA, f"c{module}\n{attribute}\n(U\x01a."), NEEDS)
        stacked = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, attribute)) + b"\x93."
        yield Case(f"metadata names {name} from the stack", "nemo", put(METADATA, stacked), NEEDS)
    for name, code in OPCODES.items():
        yield Case(f"metadata with {name}", "nemo", put(METADATA, code), "not the metadata of a checkpoint")
    for protocol in range(6):
        poison = edited(lambda _, folder: canary(folder), protocol=protocol)
        yield Case(f"metadata runs code in protocol {protocol}", "nemo", poison, "not the metadata of a checkpoint")
    for place, change in PLACES.items():
        yield Case(f"metadata runs code as {place}", "nemo", edited(change), "mkdir, " + NEEDS)
    for name, (change, says) in ABSURD.items():
        yield Case(f"metadata with {name}", "nemo", edited(change), says)
    for name, (data, says) in FLOODS.items():
        yield Case(f"metadata of {name}", "nemo", lambda folder, data=data: put(METADATA, data())(folder), says)
    for name, (data, says) in PAYLOADS.items():
        yield Case(f"chunk that {name}", "nemo", lambda folder, data=data: _replace_chunk(folder, data(folder)), says)


PLACES: dict[str, Callable[[Any, Path], object]] = {
    "a name of a tensor": lambda m, f: m.state_dict_metadata.update({_Key(canary(f)): 1}),
    "a dtype": lambda m, f: _set(_table(m), "properties", _Properties(canary(f))),
    "a shape": lambda m, f: _set(_table(m), "size", canary(f)),
    "a chunk": lambda m, f: _table(m).chunks.append(canary(f)),
    "an offset": lambda m, f: _set(_table(m).chunks[0], "offsets", canary(f)),
    "a place": lambda m, f: m.storage_data.update({_index(m): canary(f)}),
    "a file name": lambda m, f: _set(_info(m), "relative_path", canary(f)),
    "planner data": lambda m, f: _set(m, "planner_data", [{"a": (canary(f),)}]),
    "storage meta": lambda m, f: _set(m, "storage_meta", canary(f)),
    "a version": lambda m, f: _set(m, "version", canary(f)),
}


class _Key:
    """A key of a dict that pickles as something else."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return self.value.__reduce__()


class _Properties(TensorProperties):
    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return (self.value, 1, 2, 3, 4)

    def __reduce__(self) -> Any:
        return TensorProperties, (), self.__getstate__()


NOT = "not the metadata of a checkpoint"
ABSURD: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "a tower for a name": (lambda m, f: _set(_index(m), "fqn", tower()), "expected a name, got tuple"),
    "a tower for an offset": (lambda m, f: _set(_table(m).chunks[0], "offsets", _Size(tower())), "got tuple"),
    "a tower for a start": (lambda m, f: _set(_info(m), "offset", tower()), "got tuple"),
    "a tower for a file": (lambda m, f: _set(_info(m), "relative_path", tower()), "expected a name, got tuple"),
    "a start of 2^62": (lambda m, f: _set(_info(m), "offset", 2**62), "cut short"),
    "a start of 2^70": (lambda m, f: _set(_info(m), "offset", 2**70), NOT),
    "a length of 2^50": (lambda m, f: _set(_info(m), "length", 2**50), "share bytes|cut short"),
    "a negative start": (lambda m, f: _set(_info(m), "offset", -1), NOT),
    "a true start": (lambda m, f: _set(_info(m), "offset", True), "got bool"),
    "a start of 1.5": (lambda m, f: _set(_info(m), "offset", 1.5), "got float"),
    "a chunk of 2^50 elements": (lambda m, f: _set(_table(m).chunks[0], "sizes", _Size((2**25, 2**25))), "too few"),
    "a shape of 2^40 words": (lambda m, f: _set(_table(m), "size", torch.Size((2**40, 16))), "incomplete|fits|is "),
    "a shape of 3,000 dims": (lambda m, f: _set(_table(m), "size", torch.Size((1,) * 3000)), "3000 dimensions"),
    "chunks that share bytes": (lambda m, f: _all_at_zero(m), "share bytes"),
    "a chunk twice": (lambda m, f: _table(m).chunks.append(_table(m).chunks[0]), "overlap|share bytes"),
    "no dtype": (lambda m, f: _set(_table(m), "properties", _Properties("float32")), "has no dtype"),
    "a chunk of other dims": (
        lambda m, f: _table(m).chunks.append(ChunkStorageMetadata(torch.Size((0,)), torch.Size((1,)))),
        "another number of dimensions",
    ),
    "a file above": (lambda m, f: _set(_info(m), "relative_path", "../../x.distcp"), "only names inside"),
    "an absolute file": (lambda m, f: _set(_info(m), "relative_path", "/etc/passwd"), "only names inside"),
    "a file that is not there": (lambda m, f: _set(_info(m), "relative_path", "x.distcp"), "not a regular file"),
    "a file with a NUL": (lambda m, f: _set(_info(m), "relative_path", "a\0b"), "only names inside"),
    "a list": (lambda m, f: [m], "does not hold a Metadata record"),
    "nothing stored": (lambda m, f: m.storage_data.clear(), "stored nowhere"),
}


class _Size:
    """Numbers as torch.Size pickles them, whatever they are."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values

    def __reduce__(self) -> Any:
        return torch.Size, (self.values,)


def tower_as_key() -> bytes:
    """A pickled dict with a tower for its key; no such dict can be made to be pickled."""
    return b"\x80\x02}" + pickle.dumps(tower(), 2)[2:-1] + b"K\x01s."


FLOODS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a tower for a key": (tower_as_key, "key that is a tuple"),
    "lists inside of lists": (lambda: b"\x80\x04" + b"]" * 5_000_000, "more than 2000000 opcodes"),
    "lists beside lists": (lambda: b"\x80\x04](" + b"]" * 3_000_000 + b"e.", "more than 2000000 opcodes"),
    "dicts kept for later": (lambda: b"\x80\x04" + b"}\x94" * 1_500_000, "more than 2000000 opcodes"),
    "65 MB": (lambda: bytes(65 * 2**20), "no such file needs more"),
    "nothing": (lambda: b"", NOT),
    "half a record": (lambda: b"\x80\x04\x95\x10", NOT),
    "a name of a megabyte": (lambda: b"c" + b"a" * 2**20 + b"\nb\n.", NEEDS),
    "a name with line breaks": (lambda: b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", NEEDS),
}


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
    return stream.getvalue()


def _legacy(folder: Path) -> bytes:
    stream = io.BytesIO()
    torch.save(canary(folder), stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _replace_chunk(folder: Path, data: bytes) -> None:
    """The chunk of the embedding becomes `data`, at the end of its file."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    info = _info(metadata)
    file = folder / "model_weights" / info.relative_path
    content = file.read_bytes()
    _set(info, "offset", len(content))
    _set(info, "length", max(len(data), 131 * 16 * 4))
    file.write_bytes(content + data.ljust(info.length, b"\0") if len(data) < info.length else content + data)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    vouch(folder, METADATA)
    vouch(folder, f"model_weights/{info.relative_path}")


def _padded(entries: dict[str, bytes]) -> bytes:
    return _zip({"archive/padding": bytes(131 * 16 * 4), **entries})


CANNOT = "cannot be read"
PAYLOADS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "runs code": (lambda f: _padded({"archive/data.pkl": pickle.dumps(canary(f), 2)}), CANNOT),
    "runs code as a saved object": (lambda f: _saved([canary(f), torch.zeros(131, 16)]), CANNOT),
    "runs code in the old form": (_legacy, CANNOT),
    "is no zip": (lambda f: b"x" * 9000, CANNOT),
    "unfolds": (lambda f: _zip({"archive/data.pkl": bytes(3 * 10**8)}, zipfile.ZIP_DEFLATED), "is compressed"),
    "has a tower for a key": (lambda f: _padded({"archive/data.pkl": tower_as_key()}), CANNOT),
    "has a description of a megabyte": (lambda f: _padded({"archive/data.pkl": bytes(2**20)}), CANNOT),
    "has a directory without end": (
        lambda f: _zip({f"a/{number:050}": b"" for number in range(15_000)}), "directory is larger",
    ),
    "is one element many times": (lambda f: _padded_zip(torch.zeros(1).expand(131, 16)), "on top of each other"),
    "is sparse": (lambda f: _padded_zip(torch.zeros(131, 16).to_sparse()), CANNOT),
    "is of another shape": (lambda f: _saved(torch.zeros(16, 131)), "promises"),
    "is of another dtype": (lambda f: _saved(torch.zeros(131, 16, dtype=torch.float64)), "promises"),
    "is a dict": (lambda f: _saved({"a": torch.zeros(131, 16)}), CANNOT),
    "says that its numbers begin with their highest byte": (
        lambda f: _saved(torch.zeros(131, 16)).replace(b"little", b"bigger"), CANNOT,
    ),
    "says it has 2^62 elements": (lambda f: _with_elements(2**62), CANNOT),
}  # fmt: skip


def _padded_zip(value: Any) -> bytes:
    """A saved value among entries that make the chunk as long as the metadata says."""
    with zipfile.ZipFile(io.BytesIO(_saved(value))) as saved:
        return _padded({name: saved.read(name) for name in saved.namelist()})


def _with_elements(count: int) -> bytes:
    """A saved tensor whose storage says that it has `count` elements."""
    with zipfile.ZipFile(io.BytesIO(_saved(torch.zeros(131, 16)))) as saved:
        entries = {name: saved.read(name) for name in saved.namelist()}
    (name,) = (name for name in entries if name.endswith("data.pkl"))
    old = b"M" + struct.pack("<H", 131 * 16)
    assert old in entries[name]
    entries[name] = entries[name].replace(old, b"\x8a\x08" + count.to_bytes(8, "little"))
    return _zip(entries)
