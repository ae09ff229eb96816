"""Settings of a conversion from one checkpoint format to another."""

from dataclasses import dataclass
from enum import Enum

from minitron_nemo.config.setting import count, path, setting


class CheckpointFormat(Enum):
    """The formats that are written; docs/formats.md has what each is."""

    nemo = "nemo"
    nemo_tar = "nemo_tar"
    hf = "hf"
    nemo1 = "nemo1"
    nemo1_tar = "nemo1_tar"
    nemo2 = "nemo2"
    megatron = "megatron"
    megatron_019 = "megatron_019"


@dataclass
class ConvertConfig:
    """A checkpoint in another format, or in the files of another layout; its tensors stay as they are, bit for bit."""

    source: str | None = path("the checkpoint, of any format in docs/formats.md; has no default")
    output: str | None = path("where it goes; has no default")
    format: CheckpointFormat = setting(CheckpointFormat.nemo, "of the output; docs/formats.md has the layouts of each")
    tensor_model_parallel_size: int = count(
        1, "whose files the weights are split into; any layout reads them all the same", at_most=1024, unit="ranks"
    )
    pipeline_model_parallel_size: int = count(1, "the same along the layers", at_most=1024, unit="stages")
