"""Hugging Face folders: headers and places of safetensors, indices, tokenizers, and files that are none."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.case import CANARY, Case, edit_json
from hostile.pickles import Canary

INDEX = "model.safetensors.index.json"


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: Any, body: bytes, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


def edited(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Callable[[Path], None]:
    """The first shard with a changed header; `change` is given the header and the entry of its first tensor."""

    def poison(folder: Path) -> None:
        header, body = header_of(shard(folder))
        first = next(entry for name, entry in header.items() if name != "__metadata__")
        change(header, first)
        write(shard(folder), header, body)

    return poison


def raw(make: Callable[[bytes, bytes], bytes]) -> Callable[[Path], None]:
    """The first shard as `make` has it of its header and its body."""

    def poison(folder: Path) -> None:
        header, body = header_of(shard(folder))
        shard(folder).write_bytes(make(json.dumps(header).encode(), body))

    return poison


def _framed(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


def _huge(folder: Path) -> None:
    """A header of 101 MB in a sparse file."""
    with shard(folder).open("wb") as file:
        file.write((101 * 10**6).to_bytes(8, "little"))
        file.truncate(102 * 10**6)


def _twice(text: bytes, body: bytes) -> bytes:
    """The first tensor is there twice under one name."""
    return _framed(text[:-1] + b"," + text[1:], body)


NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
SAFETENSORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "is empty": (lambda f: shard(f).write_bytes(b""), "not a readable safetensors"),
    "is a pickle": (lambda f: shard(f).write_bytes(pickle.dumps(Canary(Path(CANARY)))), "not a readable safetensors"),
    "has a header longer than the file": (raw(lambda text, body: b"\xff" * 8 + text), "header would have"),
    "has a header of 101 MB": (_huge, "header would have"),
    "has a header that is a list": (raw(lambda text, body: _framed(b"[]")), "no JSON object"),
    "has a header without end": (raw(lambda text, body: _framed(b'{"a":' * 100_000)), "nested"),
    "has a header that is no JSON": (raw(lambda text, body: _framed(b"{", body)), "safetensors"),
    "has a name twice": (raw(_twice), "comes twice"),
    "has bytes left": (raw(lambda text, body: _framed(text, body + b"x")), "tensors have"),
    "is cut short": (raw(lambda text, body: _framed(text, body[:-1])), "tensors have"),
    "begins later": (raw(lambda text, body: _framed(_shifted(text), b"1234" + body)), "begins at byte 4"),
    "has an unknown dtype": (edited(lambda h, e: e.update(dtype="os.system")), "dtype"),
    "has a dtype that is a list": (edited(lambda h, e: e.update(dtype=["F32"])), "dtype"),
    "has a negative shape": (edited(lambda h, e: e.update(shape=[-1, -1])), "no whole numbers"),
    "has a shape of 2^62": (edited(lambda h, e: e.update(shape=[2**62, 2**62])), "what its dtype and shape need"),
    "has a shape of text": (edited(lambda h, e: e.update(shape="131")), "no whole numbers"),
    "has a shape of truths": (edited(lambda h, e: e.update(shape=[True, True])), "no whole numbers"),
    "has 1,000 dims": (edited(lambda h, e: e.update(shape=[1] * 1000)), "no whole numbers"),
    "has offsets that go back": (edited(lambda h, e: e.update(data_offsets=e["data_offsets"][::-1])), "bytes, which"),
    "has offsets of 2^70": (edited(lambda h, e: e.update(data_offsets=[0, 2**70])), "no whole numbers"),
    "has three offsets": (edited(lambda h, e: e["data_offsets"].append(9)), "no whole numbers"),
    "has fractions for offsets": (edited(lambda h, e: e.update(data_offsets=[0.0, 64.0])), "no whole numbers"),
    "has tensors on top of each other": (edited(lambda h, e: h.update(other=dict(e))), "overlap or leave a gap"),
    "leaves a hole": (raw(lambda text, body: _framed(_shifted(text, after=1), body + b"1234")), "leave a gap"),
    "has a dtype of half bytes": (edited(lambda h, e: e.update(dtype="F4")), "dtype"),
    "has metadata that is a tensor": (edited(lambda h, e: h.update(__metadata__=dict(e))), "texts to texts"),
    "has metadata that is a list": (edited(lambda h, e: h.update(__metadata__=[1])), "texts to texts"),
    "has a tensor that no index says": (edited(lambda h, e: h.update(evil=NOTHING)), "index.json does not say"),
    "has a tensor of nothing with 2^40 rows": (
        edited(lambda h, e: h.update(evil={**NOTHING, "shape": [2**40, 0]})), "index.json does not say",
    ),
    "has 120,000 tensors of nothing": (
        edited(lambda h, e: h.update({f"{i}": NOTHING for i in range(120_000)})), "at most 100000",
    ),
    "has a header of 17 MB": (raw(lambda text, body: _framed(text + b" " * 17 * 10**6, body)), "header would have"),
    "has another dtype than the other files": (lambda f: _as_half(shard(f)), "wholly as one of"),
    "has another field": (edited(lambda h, e: e.update(_target_="os.system")), "and nothing else"),
    "has an entry that is a list": (edited(lambda h, e: h.update(other=[1])), "and nothing else"),
    "has a tensor nobody asks for": (edited(lambda h, e: h.update(evil=h.pop(_first(h)))), "no tensor"),
    "is a folder": (lambda f: (path := shard(f)).unlink() or path.mkdir(), "not a regular file"),
    "is a pipe": (lambda f: (path := shard(f)).unlink() or os.mkfifo(path), "not a regular file"),
    "is a link to a device": (
        lambda f: (path := shard(f)).unlink() or path.symlink_to("/dev/zero"), "not a regular file",
    ),
    "is a link out of the folder": (lambda f: _linked_out(shard(f)), "link out of its folder"),
}  # fmt: skip


def _first(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


def _as_half(path: Path) -> None:
    """The file as one of float16: the first half of every tensor's bytes."""
    header, body = header_of(path)
    place, kept = 0, b""
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            size = (end - begin) // 2
            kept += body[begin : begin + size]
            entry.update(dtype="F16", data_offsets=[place, place + size])
            place += size
    write(path, header, kept)


def _shifted(text: bytes, *, after: int = 0) -> bytes:
    """The header with all but the first `after` tensors four bytes later."""
    header = json.loads(text)
    for name, entry in [item for item in header.items() if item[0] != "__metadata__"][after:]:
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    return json.dumps(header).encode()


def _linked_out(path: Path) -> None:
    outside = path.parent.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return edit_json(INDEX, change)


def _all_in(name: Any) -> Callable[[Path], None]:
    return _index(lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], name)))


def _moved(files: dict[str, str]) -> None:
    """The first tensor is said to be in a file that it is not in."""
    first = next(iter(files))
    files[first] = next(file for file in files.values() if file != files[first])


ONLY = "only \\*.safetensors beside it"
INDICES: dict[str, tuple[Callable[[Path], object], str]] = {
    "names a file above": (_all_in("../outside.safetensors"), ONLY),
    "names an absolute file": (_all_in("/etc/passwd"), ONLY),
    "names a file in a folder": (_all_in("sub/x.safetensors"), ONLY),
    "names a file with a backslash": (_all_in("..\\x.safetensors"), ONLY),
    "names a file with a NUL": (_all_in("x\0.safetensors"), ONLY),
    "names a pickle": (_all_in("pytorch_model.bin"), ONLY),
    "names nothing": (_all_in(""), ONLY),
    "names a number": (_all_in(7), "must map"),
    "names a mapping": (_all_in({"_target_": "os.system"}), "must map"),
    "names what is not there": (_all_in("gone.safetensors"), "no such file"),
    "names a file of 300 letters": (_all_in("x" * 300 + ".safetensors"), "no such file|too long|cannot"),
    "has no map": (_index(lambda index: index.pop("weight_map")), "must map"),
    "has a list for a map": (_index(lambda index: index.update(weight_map=[1])), "must map"),
    "has another total": (_index(lambda index: index["metadata"].update(total_size=2**60)), "total_size"),
    "has a text for a total": (_index(lambda index: index["metadata"].update(total_size="many")), "total_size"),
    "has a tensor in another file": (_index(lambda index: _moved(index["weight_map"])), "no tensor"),
    "has a true total": (_index(lambda index: index["metadata"].update(total_size=True)), "total_size"),
    "has a million tensors": (
        _index(lambda index: index["weight_map"].update({f"x{i}": "a.safetensors" for i in range(200_000)})),
        "no such file|belongs to no",
    ),
}  # fmt: skip


def _only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(folder.parent / CANARY)))


def _tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return edit_json("tokenizer.json", change)


def _added(ident: Any) -> Callable[[Path], None]:
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    return _tokenizer(lambda t: t["added_tokens"].append({"id": ident, "content": "<x>", **flags}))


def _split(pattern: str) -> Callable[[Path], None]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _tokenizer(lambda t: t.update(pre_tokenizer=part))


def _doubled(times: int, **pattern: str) -> Callable[[Path], None]:
    part = {"type": "Replace", "pattern": pattern, "content": "aa"}
    return _tokenizer(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [part] * times}))


def _setting(file: str, **values: Any) -> Callable[[Path], None]:
    return edit_json(file, lambda settings: settings.update(values))


def _by_id(ident: Any) -> Callable[[Path], None]:
    """The end of a document is given by `eos_token_id` alone."""

    def poison(folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text("{}")
        _setting("config.json", eos_token_id=ident)(folder)

    return poison


TIME = "time and memory"
EOS = "eos_token"
TOKENIZERS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "an expression that never ends": (_split("(a+)+$"), TIME),
    "alternatives that never end": (_split("(a|aa)+$"), TIME),
    "a normalizer that doubles a text 40 times": (_doubled(40, String="a"), TIME),
    "a normalizer that doubles every letter 30 times": (_doubled(30, Regex="."), TIME),
    "a normalizer that puts much before": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Prepend", "prepend": "x" * 100_000})), TIME,
    ),
    "a thousand parts": (_doubled(1000, String="b"), "at most 64"),
    "megabytes of parts": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Prepend", "prepend": "x" * 2**21})), "bytes; at most",
    ),
    "an unknown part": (_tokenizer(lambda t: t.update(normalizer={"type": "os.system"})), "cannot open it"),
    "a part that is a text": (_tokenizer(lambda t: t.update(pre_tokenizer="os.system")), "cannot open it"),
    "an expression that is none": (_split("(("), "cannot open it"),
    "an unknown model": (_tokenizer(lambda t: t["model"].update(type="pickle")), "cannot open it|vocabulary"),
    "ids of 2^40": (_tokenizer(lambda t: t["model"]["vocab"].update(evil=2**40)), "cannot open it"),
    "negative ids": (_tokenizer(lambda t: t["model"]["vocab"].update(evil=-1)), "cannot open it"),
    "ids of 2^32 - 1": (_tokenizer(lambda t: t["model"]["vocab"].update(evil=2**32 - 1)), "vocabulary of"),
    "an unknown word of a megabyte": (_tokenizer(lambda t: t["model"].update(unk_token="x" * 2**20)), "at most 1000"),
    "megabytes of added tokens": (
        _tokenizer(lambda t: t["added_tokens"].extend({"id": i, "content": "x" * 2**18} for i in range(8))),
        "added tokens have more",
    ),
    "50,000 added tokens": (
        _tokenizer(lambda t: t["added_tokens"].extend({"id": 131 + i, "content": f"{i}"} for i in range(50_000))),
        "added tokens; at most",
    ),
    "50,000 added tokens of one id": (
        _tokenizer(lambda t: t["added_tokens"].extend({"id": 131, "content": f"{i}"} for i in range(50_000))),
        "added tokens; at most",
    ),
    "an added token of the id -1": (_added(-1), "cannot open"),
    "an added token of the id 2^32": (_added(2**32), "cannot open"),
    "an added token of a true id": (_added(True), "cannot open"),
    "ids that are drawn": (_tokenizer(lambda t: t["model"].update(dropout=0.5)), "would be drawn"),
    "200 MB of nothing": (lambda f: os.truncate(f / "tokenizer.json", 2 * 10**8), "no such file needs more"),
    "a list for a file": (lambda f: (f / "tokenizer.json").write_text("[]"), "expected a JSON object"),
    "a pickle for a file": (
        lambda f: (f / "tokenizer.json").write_bytes(pickle.dumps(Canary(f.parent / CANARY))), "not JSON",
    ),
    "only a pickled model": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "has only tokenizer.model",
    ),
    "a million letters for its end": (_setting("tokenizer_config.json", eos_token="x" * 10**6), EOS),
    "a number for its end": (_setting("tokenizer_config.json", eos_token=7), EOS),
    "a list for its end": (_setting("tokenizer_config.json", eos_token=["</s>"]), EOS),
    "a mapping for its end": (_setting("tokenizer_config.json", eos_token={"content": ["</s>"]}), EOS),
    "the id 10^6 for its end": (_by_id(10**6), "eos_token_id"),
    "the id -1 for its end": (_by_id(-1), "eos_token_id"),
    "the id 10^30 for its end": (_by_id(10**30), "eos_token_id"),
    "a true id for its end": (_by_id(True), "eos_token_id"),
    "a text for the id of its end": (_by_id("2"), "eos_token_id"),
    "an empty list for the ids of its end": (_by_id([]), "eos_token_id"),
    "its own code, which nobody runs": (
        _setting("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="os.system"),
        None,
    ),
    "a template, which nobody runs": (
        _setting("tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"), None,
    ),
}  # fmt: skip


def _code_beside(folder: Path) -> None:
    code = f"import os\nos.mkdir({str(folder.parent / CANARY)!r})\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "sitecustomize.py"):
        (folder / name).write_text(code)


def cases() -> Iterator[Case]:
    for name, (poison, says) in SAFETENSORS.items():
        yield Case(f"safetensors that {name}", "hf", poison, says)
    for name, (poison, says) in INDICES.items():
        yield Case(f"index that {name}", "hf", poison, says)
    for name, (change, wanted) in TOKENIZERS.items():
        yield Case(f"tokenizer with {name}", "hf", change, wanted)
    yield Case("folder with pickled weights alone", "hf", _only_pickles, "only safetensors weights are read")
    yield Case("folder with code, which nobody runs", "hf", _code_beside, None)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", INDEX):
        yield Case(f"folder whose {name} is a pipe", "hf", lambda f, n=name: _pipe(f / n), "not a regular file")
        yield Case(f"folder whose {name} is endless", "hf", lambda f, n=name: _endless(f / n), "not a regular file")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")
