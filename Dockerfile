# NVIDIA's public PyTorch image brings torch, Transformer Engine and Apex, built together for the GPU; they stay.
# Only what is missing is added. The repository itself is mounted by launch/*.sh, so an edit needs no new image.
FROM nvcr.io/nvidia/pytorch:25.11-py3

# A pipe fails with its first command, not only with its last: an empty list of what to keep would lose the image's torch.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace
COPY constraints.txt /tmp/constraints.txt

# NGC pins its own packages through PIP_CONSTRAINT; of those only the compiled ones must not move: torch is a pre-release
# there, which pip replaces unless it is told not to. transformers and pytest are for the tests.
RUN pip list --format=freeze | grep -iE '^(torch|torchvision|triton|transformer[-_]engine|apex|numpy|flash[-_]attn)==' \
        > /tmp/keep.txt \
    && grep -q '^torch==' /tmp/keep.txt \
    && grep -E '^(hydra-core|omegaconf|nemo-toolkit|transformers|tokenizers|safetensors|huggingface_hub|psutil|rich|tensorboard|matplotlib|PyYAML|pyarrow|pytest)==' \
        /tmp/constraints.txt | sed 's/^nemo-toolkit==/nemo-toolkit[common]==/' > /tmp/requirements.txt \
    && PIP_CONSTRAINT=/tmp/keep.txt pip install --no-cache-dir -r /tmp/requirements.txt \
    && PIP_CONSTRAINT= pip install --no-cache-dir --no-deps \
        "$(sed -n 's/^\(megatron-core==[^;]*\); python_version >=.*/\1/p' /tmp/constraints.txt)" \
    && rm /tmp/keep.txt /tmp/requirements.txt /tmp/constraints.txt

# Metadata only: importing Transformer Engine needs a driver, which a build has not.
RUN python -c "from importlib.metadata import version as v; print({p: v(p) for p in ('torch', 'transformer-engine', 'megatron-core')})"

ENV HYDRA_FULL_ERROR=0 TOKENIZERS_PARALLELISM=false CUDA_DEVICE_MAX_CONNECTIONS=1
