"""Structured pruning and logit distillation of language models (Minitron) on Megatron-Core.

The names below are the package's public face; docs/api.md shows them at work. Each is imported when it is first used,
so that `import minitron_nemo` costs nothing.
"""

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from minitron_nemo.checkpoint.audit import audit
    from minitron_nemo.checkpoint.formats.hf import export_hf, import_hf, open_hf
    from minitron_nemo.checkpoint.formats.known import open_checkpoint
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.config.compose import compose
    from minitron_nemo.errors import UserError
    from minitron_nemo.importance.hooks import listening
    from minitron_nemo.importance.scores import read_scores
    from minitron_nemo.losses.lm_head import HeadLoss
    from minitron_nemo.nemo_model import MinitronGPT
    from minitron_nemo.pruning.make_plan import make_plan
    from minitron_nemo.pruning.plain_forward import plain_logits
    from minitron_nemo.pruning.plan import read_plan
    from minitron_nemo.shape.arch import ModelArch
    from minitron_nemo.shape.axes import shrink
    from minitron_nemo.steps.convert import convert
    from minitron_nemo.steps.prune import prune

_PUBLIC = {
    "HeadLoss": "losses.lm_head",
    "MinitronGPT": "nemo_model",
    "ModelArch": "shape.arch",
    "UserError": "errors",
    "audit": "checkpoint.audit",
    "compose": "config.compose",
    "convert": "steps.convert",
    "export_hf": "checkpoint.formats.hf",
    "import_hf": "checkpoint.formats.hf",
    "listening": "importance.hooks",
    "make_plan": "pruning.make_plan",
    "open_checkpoint": "checkpoint.formats.known",
    "open_hf": "checkpoint.formats.hf",
    "open_nemo": "checkpoint.formats.nemo",
    "plain_logits": "pruning.plain_forward",
    "prune": "steps.prune",
    "read_plan": "pruning.plan",
    "read_scores": "importance.scores",
    "shrink": "shape.axes",
}
__all__ = [
    "HeadLoss", "MinitronGPT", "ModelArch", "UserError", "audit", "compose", "convert", "export_hf", "import_hf",
    "listening", "make_plan", "open_checkpoint", "open_hf", "open_nemo", "plain_logits", "prune", "read_plan",
    "read_scores", "shrink",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


# Notices of kernels that are absent here (the engine says it in one line) and of names that torch and Megatron are
# about to change between themselves: nothing in them is for the user of a recipe. They come at import, so they are
# silenced before anything of Megatron's can be imported.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
# A CUDA build of torch on a machine without a GPU (a login node, say) is no news either.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
