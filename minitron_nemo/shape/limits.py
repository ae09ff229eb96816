"""What the fields of a shape may be, before anything is built of them: a shape may come from anybody's file."""

import dataclasses
from typing import Any

from minitron_nemo.errors import UserError, shown

# Far above every published model, and low enough that lists of layers and products of sizes stay small.
LARGEST = {
    "num_layers": 10_000, "hidden_size": 2**20, "ffn_hidden_size": 2**22, "num_attention_heads": 2**16,
    "num_query_groups": 2**16, "kv_channels": 2**16, "vocab_size": 2**31 - 1, "seq_length": 2**31 - 1,
    "original_max_position_embeddings": 2**31 - 1,
}  # fmt: skip
LARGEST_NUMBER = 1e15  # of epsilons, bases and factors


def check_fields(record: Any) -> None:
    """Refuse, by name, the first field of a dataclass that is not a value of its type and of a sane size.

    Whole numbers are from 1 to `LARGEST`, other numbers above 0, and truths are true or false.
    """
    for field in dataclasses.fields(record):
        name, value = field.name, getattr(record, field.name)
        if field.type is int and not (type(value) is int and 1 <= value <= LARGEST[name]):
            raise UserError(
                f"{name}={shown(value)}: a model shape needs a whole number of at least 1 and at most {LARGEST[name]}"
            )
        if field.type is float and not (type(value) in (int, float) and 0 < value < LARGEST_NUMBER):
            raise UserError(f"{name}={shown(value)}: must be a number above 0 and below {LARGEST_NUMBER:g}")
        if field.type is bool and type(value) is not bool:
            raise UserError(f"{name}={shown(value)}: must be true or false")
