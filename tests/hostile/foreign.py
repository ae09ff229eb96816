"""Checkpoints of Megatron and of NeMo 1: files of ranks, common states and arrays of zarr that mean harm."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hostile.case import CANARY, Case
from hostile.pickles import Canary, tower_as_key


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
    for name, (changes, says) in ARRAYS.items():
        yield Case(f"zarr array with {name}", "zarr", _array(changes), says)
