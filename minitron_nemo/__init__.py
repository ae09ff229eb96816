"""Structured pruning and logit distillation of language models (Minitron) on Megatron-Core."""

import logging
import warnings

__version__ = "0.1.0"

# Notices of kernels that are absent here (the engine says it in one line) and of names that torch and Megatron are
# about to change between themselves: nothing in them is for the user of a recipe. They come at import, so they are
# silenced before anything of Megatron's can be imported.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
# A CUDA build of torch on a machine without a GPU (a login node, say) is no news either.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
