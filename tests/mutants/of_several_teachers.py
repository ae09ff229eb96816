"""Faults in distillation from several teachers: shares, who runs where, and the sums of each."""

from mutants.fault import Fault

HEAD = "minitron_nemo/losses/lm_head.py"
SOFTMAXES = "minitron_nemo/losses/softmaxes.py"
BY_SOURCE = "minitron_nemo/distillation/teachers_by_source.py"
OBJECTIVE = "minitron_nemo/training/several_teachers.py"
CONFIG = "minitron_nemo/config/teachers.py"
TEST_HEAD = "tests/unit/test_head_of_several.py"
TEST_CONFIG = "tests/unit/test_teachers_config.py"
TEST_STEP = "tests/distributed/test_several_teachers.py -k 'pytorch and alone'"
TEST_INTERLEAVED = "tests/distributed/test_several_teachers.py -k 'pytorch and vpp2'"
RIGHT_MODELS = "tests/recipes/test_right_models.py -k several_teachers"

FAULTS = [
    Fault(
        SOFTMAXES,
        "the gradient of the divergence ignores a teacher's share",
        find="weight_N = weight_N * share_N",
        replace="pass",
        tests=TEST_HEAD,
    ),
    Fault(
        HEAD,
        "the gradient of other divergences ignores a teacher's share",
        find="mask_N if turn.share is None else mask_N * turn.share",
        replace="mask_N",
        tests=TEST_HEAD,
    ),
    Fault(
        HEAD,
        "the value of the divergence ignores a teacher's share",
        find="values_PN[_OF_STUDENT:] *= turn.share.double()",
        replace="pass",
        tests=TEST_HEAD,
    ),
    Fault(
        HEAD,
        "cross-entropy has a gradient for each teacher",
        find="return spec.cross_entropy_weight if self.number == 0 else 0.0",
        replace="return spec.cross_entropy_weight",
        tests=TEST_HEAD,
    ),
    Fault(
        HEAD,
        "tokens and cross-entropy count once for each teacher",
        find="values_PN[:_OF_STUDENT] = 0.0",
        replace="pass",
        tests=TEST_HEAD,
    ),
    Fault(
        HEAD,
        "the gradient of the last teacher is that of all",
        find="beta=int(turn.number > 0)",
        replace="beta=0",
        tests=TEST_HEAD,
    ),
    Fault(
        HEAD,
        "a teacher's own tokens are not counted by its share",
        find="values_PN[0] if turn.share is None else values_PN[0] * turn.share.double()",
        replace="values_PN[0]",
        tests=TEST_HEAD,
    ),
    Fault(
        BY_SOURCE,
        "shares are those of the samples in another order",
        find='sources_N = batch["sources"].T.reshape(-1)',
        replace='sources_N = batch["sources"].reshape(-1)',
        tests=TEST_STEP,
    ),
    Fault(
        BY_SOURCE,
        "a teacher runs through micro-batches that it has no share in",
        find="if any(self.shares[name][source] for source in row)]",
        replace="]",
        tests=TEST_STEP,
    ),
    Fault(
        BY_SOURCE,
        "the first sample decides for its micro-batch",
        find="for source in row)]",
        replace="for source in row[:1])]",
        tests=TEST_STEP,
    ),
    Fault(
        BY_SOURCE,
        "an interleaved pipeline is given half a group",
        find="-len(batches) % self.layout.pp if self.layout.vpp > 1 else 0",
        replace="0",
        tests=TEST_INTERLEAVED,
    ),
    Fault(
        OBJECTIVE,
        "every teacher's head is the first one's",
        find="self.beside.teachers[name].head_weight()",
        replace="next(iter(self.beside.teachers.values())).head_weight()",
        tests=TEST_STEP,
    ),
    Fault(
        CONFIG,
        "weights are not divided by their sum",
        find="weight / sums[source]",
        replace="weight",
        tests=f"{TEST_CONFIG} -k shares",
    ),
    Fault(
        CONFIG,
        "a teacher is thought to run as though a micro-batch had one sample",
        find="min(1.0, micro_batch_size * share)",
        replace="share",
        tests=f"{TEST_CONFIG} -k 'runs or counts'",
    ),
    Fault(
        "minitron_nemo/steps/distillation.py",
        "shares go to sources in the order of the config, not in that of the data",
        find="own[name].get(source, 0.0) for source in blend.sources",
        replace="own[name].get(source, 0.0) for source in reversed(blend.sources)",
        tests=RIGHT_MODELS,
    ),
]
