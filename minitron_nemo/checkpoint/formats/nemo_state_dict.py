"""What NeMo's own connector writes of a `MinitronGPT`: our config, and all weights in one file of torch.save.

Opened without NeMo: no class that the config names is built, and the weights are read where they lie.
"""

from collections.abc import Mapping
from typing import Any

import torch

from minitron_nemo.artefacts.contents import Contents, has
from minitron_nemo.artefacts.manifest import MANIFEST_FILE
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.nemo import CONFIG_FILE, TOKENIZER_FILES, read_config, shape_and_dtype
from minitron_nemo.checkpoint.formats.nemo1 import tokenizer_artefacts
from minitron_nemo.checkpoint.formats.nemo1_ranks import RankFiles, RankWeights
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

NAME = "nemo_state_dict"
WEIGHTS_FILE = "model_weights.ckpt"
# Keys under `tokenizer` of the config -> the name that the file has in a tokenizer folder.
TOKENIZER_KEYS = {name.replace(".", "_"): name for name in TOKENIZER_FILES}
# What NeMo adds to a config besides the shape. `target` names a class to build; nobody asks it here.
BESIDE_THE_SHAPE = ("tokenizer", "target", "nemo_version")


def recognise(contents: Contents) -> bool:
    """Whether these are the files of such a model. A model of NeMo 1 has them too; its config names another length."""
    is_known = has(contents, WEIGHTS_FILE) and has(contents, CONFIG_FILE) and not has(contents, MANIFEST_FILE)
    return is_known and "seq_length" in read_config(contents)


def shape_of_config(values: Mapping[str, Any], *, source: str) -> tuple[ModelArch, torch.dtype]:
    """Shape and precision that the config of a `MinitronGPT` describes, what NeMo adds to it left aside."""
    shape = {name: value for name, value in values.items() if name not in BESIDE_THE_SHAPE}
    return shape_and_dtype(shape, source=source)


def open_checkpoint(contents: Contents) -> Checkpoint:
    """The checkpoint, its names, shapes and dtype checked; UserError in one line for anything else."""
    config, source = read_config(contents), str(contents.path / CONFIG_FILE)
    arch, dtype = shape_of_config(config, source=source)
    weights = RankWeights(RankFiles(contents), arch, source=CONFIG_FILE)
    if weights.dtype() != dtype:
        raise UserError(f"{contents.path / WEIGHTS_FILE}: tensors are {weights.dtype()}; {CONFIG_FILE} says {dtype}")
    version = config.get("nemo_version")
    notes = (f"NeMo {version}",) if isinstance(version, str) and version.isprintable() else ()
    return Checkpoint(contents.path, NAME, arch, dtype, weights, tokenizer_artefacts(contents, config), notes)
