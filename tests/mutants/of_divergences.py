"""Faults in the divergences, their exchange over ranks, the kernels and the gradient of the head's weight."""

from mutants.fault import Fault

LOSSES = "minitron_nemo/losses/"
FORMULA = "tests/unit/test_divergences.py -k 'those_of_the_formula and {}'"
WEIGHT = "tests/unit/test_weight_gradient.py"
RANKS = "tests/distributed/test_head_vocab_parallel.py -k 'exact and 2'"

FAULTS = [
    Fault(
        LOSSES + "divergences/reverse_kl.py",
        "its gradient leaves the divergence itself out",
        find="pair.whole.lse_s - merged)",
        replace="pair.whole.lse_s)",
        tests=FORMULA.format("ReverseKL"),
    ),
    Fault(
        LOSSES + "divergences/jensen_shannon.py",
        "both models change places in the mixture",
        find="return self.beta * teacher_N + (1 - self.beta) * student_N, student_N",
        replace="return (1 - self.beta) * teacher_N + self.beta * student_N, student_N",
        tests=FORMULA.format("JensenShannon"),
    ),
    Fault(
        LOSSES + "divergences/jensen_shannon.py",
        "the logarithm of the mixture overflows",
        find="torch.where(ratio_NV <= 20.0, near_NV, far_NV)",
        replace="near_NV",
        tests=FORMULA.format("JensenShannon"),
    ),
    Fault(
        LOSSES + "divergences/logit_mse.py",
        "ranks are added up as if their means were the same",
        find="squares + count * (mean - mean_N).square()",
        replace="squares",
        tests=RANKS,
    ),
    Fault(
        LOSSES + "divergences/logit_mse.py",
        "logits are not centred",
        find="sub_(merged.float()[:, None])",
        replace="sub_(0 * merged.float()[:, None])",
        tests="tests/unit/test_divergences.py -k 'does_not_see and MSE'",
    ),
    Fault(
        LOSSES + "divergences/logit_cosine.py",
        "its gradient is not orthogonal to the student's logits",
        find="cosine / norm_s.square()",
        replace="cosine / length",
        tests=FORMULA.format("LogitCosine"),
    ),
    Fault(
        LOSSES + "divergences/top_k_kl.py",
        "the mass of all other tokens is lost",
        find="return among + rest, _Merged",
        replace="return among, _Merged",
        tests=FORMULA.format("TopKKL"),
    ),
    Fault(
        LOSSES + "divergences/top_k_kl.py",
        "of equal logits the higher id counts",
        find="mul_(2**31).sub_(rows_V)",
        replace="mul_(2**31).add_(rows_V)",
        tests=FORMULA.format("TopKKL"),
    ),
    Fault(
        LOSSES + "divergences/top_k_kl.py",
        "each rank has its own likeliest tokens",
        find="taken_NC = (place_C < self.top_k)",
        replace="taken_NC = (place_C < 2 * self.top_k)",
        tests=RANKS,
    ),
    Fault(
        LOSSES + "divergences/divergence.py",
        "large logits leave too little of the normalizers' difference",
        find="sub_((y_N - coarse_N.double()).float()[:, None])",
        replace="sub_(0.0)",
        tests="tests/unit/test_divergences.py -k those_of_the_formula",
    ),
    Fault(
        LOSSES + "exchange.py",
        "a chunk that asks twice has a collective to itself",
        find="begun = None if group is None and waiting else",
        replace="begun = None if waiting else",
        tests=RANKS,
    ),
    Fault(
        LOSSES + "weight_gradient.py",
        "chunks add up in bf16",
        find="sum_VH.addmm_(grad_NV.float().T, hidden_NH.float())",
        replace="sum_VH += grad_NV.to(hidden_NH.dtype).T @ hidden_NH; sum_VH.copy_(sum_VH.bfloat16())",
        tests=WEIGHT,
    ),
    Fault(
        LOSSES + "weight_gradient.py",
        "the data-parallel hook adds what has the shape alone",
        find="weight.grad_added_to_main_grad = True",
        replace="pass",
        tests=f"{WEIGHT} -k buffer",
    ),
    Fault(
        LOSSES + "weight_gradient.py",
        "a tied embedding's gradient gets whatever memory held",
        find="return torch.zeros_like(weight) if",
        replace="return torch.ones_like(weight) if",
        tests=f"{WEIGHT} -k embedding",
    ),
    Fault(
        LOSSES + "kernels/triton_kernel.py",
        "sums are not rescaled where a later block has the maximum",
        find="sum_1 = sum_1 * tl.exp(max_s - higher) +",
        replace="sum_1 = sum_1 +",
        tests="tests/unit/test_kernels.py -k computes",
    ),
    Fault(
        LOSSES + "kernels/triton_kernel.py",
        "the padding of the vocabulary has a gradient",
        find="tl.store(s_V, tl.where(here, grad, 0.0)",
        replace="tl.store(s_V, tl.where(here, grad, 1.0)",
        tests="tests/unit/test_kernels.py -k computes",
    ),
    Fault(
        "minitron_nemo/training/checkpoints.py",
        "a run that minimizes something else starts again without a word",
        find="if before and before != self.objective:",
        replace="if False:",
        tests="tests/unit/test_training_checkpoints.py -k minimizes",
    ),
]
