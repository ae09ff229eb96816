"""The one door to Megatron-Core: model, pipeline schedule and optimizer, on GPUs over NCCL and on CPU over gloo."""

import warnings

# Notices of kernels that are absent here (engine_choice() says it in one line) and of names that torch and Megatron
# are about to change between themselves; nothing of them is for the user of a recipe.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
