"""One evaluation: a model and the model to compare it with in, the measures out."""

from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.datasets import batches_on, build_datasets
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.evaluation.perplexity import Evaluation, evaluate
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.training.objectives import DistillationObjective, LanguageModelObjective, Objective


def evaluate_model(
    weights: TensorSource,
    reference: TensorSource | None,
    *,
    options: BuildOptions,
    blend: Blend,
    num_samples: int,
    micro_batch_size: int = 1,
    chunk_tokens: int = 1024,
) -> Evaluation:
    """Loss on the held-out part of the blend and, with a reference, the closeness to it; on all ranks."""
    groups = options.groups
    model = build_model(weights.arch, options)
    load_weights(model, weights, groups)
    head = HeadLoss(vocab_size=weights.arch.vocab_size, chunk_tokens=chunk_tokens, group=groups.tp)
    objective: Objective = LanguageModelObjective(head)
    if reference is not None:
        objective = DistillationObjective(head, Teacher(reference, options))
    _, held_out = build_datasets(blend, num_train=0, num_valid=num_samples)
    assert held_out is not None
    return evaluate(
        model.eval(),
        objective,
        batch=batches_on(groups.device, held_out, documents=blend.reset_attention_mask),
        num_samples=num_samples,
        micro_batch_size=micro_batch_size,
        groups=groups,
    )
