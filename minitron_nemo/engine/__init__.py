"""The one door to Megatron-Core: model, pipeline schedule and optimizer, on GPUs over NCCL and on CPU over gloo."""
