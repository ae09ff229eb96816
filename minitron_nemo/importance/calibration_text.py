"""A little of the text that layers or units were scored on, kept beside the scores: the proof of a cut runs on it.

`calibration_text.safetensors` has `tokens`, int64 [samples, tokens]: the beginnings of the first samples.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_nemo.errors import UserError

FILE = "calibration_text.safetensors"
TOKENS = "tokens"
SAMPLES, SEQ_LENGTH = 2, 64


def write_text(folder: Path | str, tokens_BS: Tensor) -> None:
    """Write the beginnings of the first of these samples into an existing folder."""
    save_file({TOKENS: tokens_BS[:SAMPLES, :SEQ_LENGTH].contiguous()}, Path(folder) / FILE)


def read_text(folder: Path | str, *, vocab_size: int) -> Tensor | None:
    """The tokens in a folder of scores, [samples, tokens]; None in one that was made without them.

    Raises UserError naming the file when it is damaged or not of a model of this vocabulary.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({reason}); score again") from None
    tokens = tensors.get(TOKENS)
    if tokens is None or tokens.dtype is not torch.int64 or tokens.dim() != 2 or not tokens.numel():
        raise UserError(f"{path}: holds no samples of tokens; score again")
    if not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        raise UserError(f"{path}: holds ids that the model does not have, 0..{vocab_size - 1}; score this "
                        "model")  # fmt: skip
    return tokens
