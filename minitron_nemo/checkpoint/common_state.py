"""The common state of a Megatron checkpoint: the arguments it was trained with, read without running code.

Megatron-Core keeps it in `common.pt`, or from 0.19 on as an object among the tensors; both are what `torch.save` makes
of a dict. Whatever class it names is answered by an inert record, whose fields are plain values or such records.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

from minitron_nemo.artefacts.contents import Contents, has, read_small
from minitron_nemo.artefacts.paths import is_plain_name
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.checkpoint.pickle_machine import Record, run
from minitron_nemo.checkpoint.restricted_metadata import DTYPES, ENUM_MEMBERS, StoredObject, one_line
from minitron_nemo.checkpoint.torch_dist import COMMON_FILE, COMMON_OBJECT
from minitron_nemo.errors import UserError

COMMON_LIMIT = 64 * 2**20  # bytes; arguments are some dozen KiB, and optimizers without shards keep little more there
DESCRIPTION_LIMIT = 32 * 2**20
ENTRIES_LIMIT = 100_000

# What Megatron-LM, Megatron-Bridge and NeMo put there besides plain values.
_RECORDS = {
    ("argparse", "Namespace"), ("types", "SimpleNamespace"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
    ("pathlib", "Path"), ("signal", "Signals"), ("_io", "BytesIO"), ("_codecs", "encode"), ("torch", "Size"),
    ("torch", "device"), ("torch", "Generator"), ("torch._C", "Generator"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "Tensor"), ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy.dtypes", "UInt32DType"),
    ("datetime", "timedelta"), ("builtins", "set"),
}  # fmt: skip


def named(module: str, name: str) -> Any:
    """What stands in for a class or function of this name; None when no common state needs it."""
    if (module, name) in (("collections", "OrderedDict"), ("builtins", "dict")):
        return dict
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    if (module, name) in ENUM_MEMBERS:
        return ENUM_MEMBERS[module, name]
    is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
    is_megatron = module.split(".")[0] == "megatron"  # its enumerations and records, by release
    return Record if is_storage or is_megatron or (module, name) in _RECORDS else None


def common_state(contents: Contents, objects: Mapping[str, StoredObject]) -> dict[str, Any] | None:
    """That of a torch_dist folder whose `objects` are known; None where it has none."""
    if has(contents, COMMON_FILE):
        data = read_small(contents, COMMON_FILE, limit=COMMON_LIMIT)
        return read_common_state(data, source=str(contents.path / COMMON_FILE))
    place = objects.get(COMMON_OBJECT)
    if place is None:
        return None
    source = contents.path / place.file
    file = contents.find(place.file) if is_plain_name(place.file) else None
    if file is None or place.start + place.length > file.length or place.length > COMMON_LIMIT:
        raise UserError(f"{source}: .metadata places {COMMON_OBJECT} there, where there is no such stretch of a file")
    data = Stretch(file.path, file.start + place.start, place.length).read()
    return read_common_state(data, source=str(source))


def read_common_state(data: bytes, *, source: str) -> dict[str, Any]:
    """The dict in the bytes of a `torch.save` file; tensors in it are records without elements.

    A list of one dict is that dict: so Megatron-Core keeps objects. Raises UserError, naming `source`.
    """
    if len(data) > COMMON_LIMIT:
        raise UserError(f"{source}: {len(data)} bytes; a common state has at most {COMMON_LIMIT}")
    try:
        state = run(_description(data), named, stored=lambda reference: Record(reference))
        if isinstance(state, list) and len(state) == 1:
            (state,) = state
        if not isinstance(state, dict):
            raise ValueError(f"it holds {type(state).__name__}, not a dict")
    # A damaged zip or pickle raises nearly anything; whatever it is, the file is refused and the cause named.
    except Exception as error:
        raise UserError(f"{source}: not the common state of a checkpoint: {one_line(error)}") from None
    return state


def _description(data: bytes) -> bytes:
    """The pickle in a `torch.save` file."""
    if data.count(b"PK\x01\x02") > ENTRIES_LIMIT:  # each of them takes some hundred bytes to list
        raise ValueError(f"it has more than {ENTRIES_LIMIT} entries")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = next((entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")), None)
        if entry is None:
            raise ValueError("it is no file of torch.save")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > DESCRIPTION_LIMIT:
            raise ValueError(f"its description is compressed or larger than {DESCRIPTION_LIMIT} bytes")
        return archive.read(entry)


def fields_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a Namespace or another record, None for what has none."""
    fields = value.fields if isinstance(value, Record) else None
    return fields if isinstance(fields, dict) and fields else None
