"""Structured pruning and logit distillation of language models (Minitron) on Megatron-Core."""

__version__ = "0.1.0"
