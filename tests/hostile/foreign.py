"""Checkpoints of Megatron and of NeMo 1: files of ranks, common states and arrays of zarr that mean harm."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from foreign_layouts import rank_state
from hostile.case import CANARY, Case
from hostile.pickles import Canary, tower_as_key
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex


def packed(description: bytes, extra: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with this description."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", description)
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return stream.getvalue()


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _dict_made_of(folder: Path) -> bytes:
    """A dict that is made by a call, of pairs whose key never ends to be hashed."""
    return packed(b"\x80\x02cbuiltins\ndict\n" + tower_as_key()[2:-1] + b"\x85R.")


def _many_entries(folder: Path) -> bytes:
    one = packed(b"\x80\x02}.")
    at = one.rindex(b"PK\x05\x06")
    begin = one.index(b"PK\x01\x02")
    entries = one[begin:at] * 200_000
    end = one[at:]
    size, count = len(entries).to_bytes(4, "little"), (0xFFFF).to_bytes(2, "little")
    return one[:begin] + entries + end[:8] + count + count + size + end[16:]


FILES: dict[str, Callable[[Path], bytes]] = {
    "runs code": lambda f: packed(pickle.dumps({"weight": Canary(f.parent / CANARY)}, 2)),
    "runs code as a dict": lambda f: packed(pickle.dumps(Canary(f.parent / CANARY), 2)),
    "runs code in the old form": lambda f: pickle.dumps(Canary(f.parent / CANARY), 2),
    "has a tower for a key": lambda f: packed(tower_as_key()),
    "makes a dict of a tower": _dict_made_of,
    "names torch.load": lambda f: packed(b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R."),
    "is compressed": lambda f: packed(bytes(10**8), compression=zipfile.ZIP_DEFLATED),
    "has entries without end": _many_entries,
    "is a list": lambda f: packed(b"\x80\x02]."),
    "is empty": lambda f: b"",
    "is text": lambda f: b"hello" * 100,
    "has no description": lambda f: packed(b"")[:30],
    "is a file of another kind": lambda f: saved([1, 2, 3]),
}
ARRAY = {
    "zarr_format": 2, "shape": [131, 16], "chunks": [131, 16], "dtype": "<f4", "compressor": None, "fill_value": None,
    "order": "C", "filters": None,
}  # fmt: skip
ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "a shape of 2^47": ({"shape": [2**47, 16], "chunks": [2**47, 16]}, "the chunk has"),
    "2^60 chunks": ({"shape": [2**30, 2**30], "chunks": [1, 1]}, "describes"),
    "chunks of nothing": ({"chunks": [0, 0]}, "grid of chunks"),
    "a compressor": ({"compressor": {"id": "pickle"}}, "compressor="),
    "filters": ({"filters": [{"id": "pickle"}]}, "compressor="),
    "objects": ({"dtype": "|O"}, "dtype="),
    "a dtype that is a list": ({"dtype": [["a", "<f4"]]}, "dtype="),
    "a separator that climbs": ({"dimension_separator": "/../"}, "grid of chunks"),
    "a shape of text": ({"shape": "131"}, "grid of chunks"),
}


def _linked_out(name: str) -> Callable[[Path], None]:
    """A folder of the checkpoint becomes a link to the same one outside."""

    def poison(folder: Path) -> None:
        place, outside = next(folder.glob(name)), folder.with_name("outside")
        place.rename(outside)
        place.symlink_to(outside)

    return poison


def _latest(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text(text)


def _flat_table(folder: Path) -> None:
    """The table of words has no dimension, in the metadata of a run."""
    file = next(folder.glob("iter_*")) / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.endswith("word_embeddings.weight"))
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == name:
            del metadata.storage_data[index]
            metadata.storage_data[MetadataIndex(name, torch.Size(()))] = info
    table = metadata.state_dict_metadata[name]
    table.size, table.chunks = torch.Size(()), [ChunkStorageMetadata(torch.Size(()), torch.Size(()))]
    file.write_bytes(pickle.dumps(metadata))


def _in_ranks(name: str, value: torch.Tensor, *, instead: bool = False, ranks: int = 2) -> Callable[[Path], None]:
    """A tensor of another name in the files of the first ranks, or `instead` of those whose names end so."""

    def poison(folder: Path) -> None:
        for file in sorted(folder.rglob("model_weights.ckpt"))[:ranks]:
            state = rank_state(file)
            places = [other for other in state if other.endswith(name)] if instead else [name]
            assert places
            torch.save({**state, **dict.fromkeys(places, value)}, file)

    return poison


ONE, TABLE = torch.zeros(1), "word_embeddings.weight"
RANKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a table without dimensions": (_in_ranks(TABLE, torch.zeros(()), instead=True), "rows and columns"),
    "a table of one dimension": (_in_ranks(TABLE, torch.zeros(131), instead=True), "rows and columns"),
    "tables of other sizes": (_in_ranks(TABLE, torch.zeros(3, 16), instead=True, ranks=1), "tensor-parallel ranks say"),
    "a name with a line break": (_in_ranks("a\nb", ONE), "no name of a tensor"),
    "a name that moves the cursor": (_in_ranks("a\x1b[2Jb", ONE), "no name of a tensor"),
    "no name": (_in_ranks("", ONE), "no name of a tensor"),
    "a chunk of 5,000 digits": (_in_ranks(f"model_{'9' * 5000}.x", ONE), "belongs to no part"),
    "a chunk far behind": (_in_ranks("model_9999.x", ONE), "one is missing"),
    "a layer of 5,000 digits": (_in_ranks(f"model.decoder.layers.{'9' * 5000}.x", ONE), "belongs to no part"),
    "a layer in another script": (_in_ranks("model.decoder.layers.\u0662.x", ONE), "belongs to no part"),
    "a rank in another script": (
        lambda f: (f / "mp_rank_01").rename(f / "mp_rank_\u0660\u0661"),
        "ranks? say|missing|is ",
    ),
}
RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "digits of another script": (_latest("\u0661"), "number of an iteration"),
    "a number with a line in it": (_latest("1_200"), "number of an iteration"),
    "two numbers": (_latest("1200\n1300"), "number of an iteration"),
    "a folder above": (_latest("../1200"), "number of an iteration"),
    "an iteration that lies elsewhere": (_linked_out("iter_*"), "there is no iter_"),
    "a table without dimensions": (_flat_table, "rows and columns|is \\(\\)|too few"),
}


def _put(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def poison(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(folder))

    return poison


def _array(changes: dict[str, Any]) -> Callable[[Path], None]:
    def poison(folder: Path) -> None:
        (folder / "x").mkdir()
        (folder / "x" / "0.0").write_bytes(bytes(131 * 16 * 4))
        (folder / "x" / ".zarray").write_text(json.dumps({**ARRAY, **changes}))

    return poison


def cases() -> Iterator[Case]:
    for name, content in FILES.items():
        yield Case(
            f"file of a rank that {name}", "rank file", _put("model_weights.ckpt", content), "not a readable file"
        )
        yield Case(f"common.pt that {name}", "common state", _put("common.pt", content), "not the common state")
    for name, (poison, says) in RANKS.items():
        yield Case(f"ranks of NeMo 1 with {name}", "nemo1", poison, says)
    for name, (poison, says) in RUNS.items():
        yield Case(f"run of Megatron with {name}", "megatron", poison, says)
    for name in ("context", "weights"):
        yield Case(f"folder of NeMo 2 whose {name} lies elsewhere", "nemo2", _linked_out(name), "no |leaves the folder")
    for name, (changes, says) in ARRAYS.items():
        yield Case(f"zarr array with {name}", "zarr", _array(changes), says)
