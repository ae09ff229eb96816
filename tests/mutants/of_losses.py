"""Faults in the loss, in what is minimized, and in the engine's forward and backward pass."""

from mutants.fault import Fault

HEAD = "minitron_nemo/losses/lm_head.py"
SOFTMAXES = "minitron_nemo/losses/softmaxes.py"
TORCH_KERNEL = "minitron_nemo/losses/kernels/torch_kernel.py"
OBJECTIVES = "minitron_nemo/training/objectives.py"
MODEL = "minitron_nemo/engine/model.py"
SCHEDULE = "minitron_nemo/engine/schedule.py"
TEST_HEAD = "tests/unit/test_head.py"
ALONE = "tests/distributed/test_against_torch.py -k alone"
GRADIENTS = "tests/distributed/test_against_torch.py -k 'gradients and (alone or dp2)'"
LOGITS = "tests/distributed/test_logits.py -k 'equal_transformers and alone'"
EVERY_GRADIENT = "tests/distributed/test_training_layouts.py -k 'every_gradient and tp2_sp'"

FAULTS = [
    Fault(
        HEAD,
        "the divergence is not multiplied by the temperature squared",
        find="(self.temperature**2 if self.divergence.tempered else 1.0)",
        replace="1.0",
        tests=TEST_HEAD,
    ),
    Fault(
        SOFTMAXES,
        "the gradient of the divergence lacks the temperature",
        find="weight_N = kl_weight * tau * mask_N",
        replace="weight_N = kl_weight * mask_N",
        tests=TEST_HEAD,
    ),
    Fault(
        HEAD,
        "masked tokens count in the sums",
        find=" * inputs.mask_N[turn.rows].double()",
        replace="",
        tests=f"{TEST_HEAD} -k masked",
    ),
    Fault(
        HEAD,
        "masked tokens have a gradient",
        find="(spec, turn, whole, mask_N, kl_weight=spec.kl_weight)",
        replace="(spec, turn, whole, torch.ones_like(mask_N), kl_weight=spec.kl_weight)",
        tests=f"{TEST_HEAD} -k masked",
    ),
    Fault(
        TORCH_KERNEL,
        "rows that pad the vocabulary can be chosen",
        find="logits_NV[:, valid:] = NEVER",
        replace="pass",
        tests=f"{TEST_HEAD} -k padding",
    ),
    Fault(
        TORCH_KERNEL,
        "the divergence has the wrong sign",
        find="difference_NV = t_NV - s_NV",
        replace="difference_NV = s_NV - t_NV",
        tests=TEST_HEAD,
    ),
    Fault(
        SOFTMAXES,
        "the label's part of the gradient ignores the weight of the cross-entropy",
        find="weight_1 = cross_entropy_weight * mask_N",
        replace="weight_1 = mask_N",
        tests=TEST_HEAD,
    ),
    Fault(
        TORCH_KERNEL,
        "under tensor parallelism the best token of a part is not counted over the whole vocabulary",
        find="best_s + first_row",
        replace="best_s",
        tests="tests/distributed/test_head_vocab_parallel.py -k most_likely",
    ),
    Fault(
        OBJECTIVES,
        "labels and mask in another order than the hidden states",
        find="batch[name].T.reshape(-1)",
        replace="batch[name].reshape(-1)",
        tests=ALONE,
    ),
    Fault(
        OBJECTIVES,
        "logged means are sums",
        find="found[name] = value / tokens",
        replace="found[name] = value",
        tests=ALONE,
    ),
    Fault(
        "minitron_nemo/distributed/groups.py",
        "sums are those of one data-parallel rank",
        find="dist.all_reduce(total, group=self.batch)",
        replace="pass",
        tests="tests/distributed/test_against_torch.py -k dp2",
    ),
    Fault(
        MODEL,
        "the loss is not divided by the tokens of the global batch",
        find="calculate_per_token_loss=True",
        replace="calculate_per_token_loss=False",
        tests=GRADIENTS,
    ),
    Fault(
        SCHEDULE,
        "micro-batches count as one token each when the gradient is divided",
        find="output.sums[TOKENS].to(torch.int)",
        replace="torch.ones_like(output.sums[TOKENS], dtype=torch.int)",
        tests=GRADIENTS,
    ),
    Fault(
        MODEL,
        "under tensor parallelism the hidden states' gradient is one rank's part",
        find="return tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)",
        replace="return hidden_states",
        tests="tests/distributed/test_against_torch.py -k 'gradients and tp2'",
    ),
    Fault(
        MODEL,
        "under sequence parallelism the hidden states' gradients are not summed",
        find="tensor_parallel_output_grad=True",
        replace="tensor_parallel_output_grad=False",
        tests=EVERY_GRADIENT,
    ),
    Fault(
        "minitron_nemo/engine/norm.py",
        "norms are not marked, so their gradients under sequence parallelism are one rank's part",
        find="parameter.sequence_parallel = config.sequence_parallel",
        replace="parameter.sequence_parallel = False",
        tests=EVERY_GRADIENT,
    ),
    Fault(
        "minitron_nemo/engine/norm.py",
        "LayerNorm1p's weight is taken as stored",
        find="self.weight + 1 if self.zero_centered",
        replace="self.weight if self.zero_centered",
        tests=LOGITS,
    ),
    Fault(
        "minitron_nemo/engine/attention.py",
        "attention sees the future",
        find="is_causal=attention_mask is None",
        replace="is_causal=False",
        tests=LOGITS,
    ),
    Fault(
        "minitron_nemo/shape/rope.py",
        "long wavelengths are not scaled",
        find="(1 - smooth) * inverse / scaling.factor",
        replace="(1 - smooth) * inverse",
        tests=LOGITS,
    ),
    Fault(
        "minitron_nemo/engine/weights.py",
        "later pipeline stages hold the first layers",
        find="layer_number - 1 if len",
        replace="layer_number * 0 if len",
        tests="tests/distributed/test_logits.py -k 'equal_transformers and pp2'",
    ),
    Fault(
        HEAD,
        "gradients are computed though nobody wants any",
        find="wants_gradient = grad_enabled and any(",
        replace="wants_gradient = any(",
        tests=f"{TEST_HEAD} -k no_gradient",
    ),
    Fault(
        TORCH_KERNEL,
        "the student's probabilities at a temperature are those at 1",
        find="s_NV.div_(self.tau).exp_()",
        replace="s_NV.exp_()",
        tests=TEST_HEAD,
    ),
    Fault(
        "minitron_nemo/engine/schedule.py",
        "the windows of the teacher's states overlap",
        find="batches[start : start + size] for start",
        replace="batches[max(0, start - 1) : start + size] for start",
        tests="tests/distributed/test_teacher_window.py",
    ),
]
