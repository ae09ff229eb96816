"""Faults in families of models, and in what an export lays beside the weights."""

from mutants.fault import Fault

ARCH = "minitron_nemo/shape/arch.py"
TENSORS = "minitron_nemo/shape/tensors.py"
FAMILIES = "minitron_nemo/checkpoint/formats/hf_families.py"
HF_CONFIG = "minitron_nemo/checkpoint/formats/hf_config.py"
HF = "minitron_nemo/checkpoint/formats/hf.py"
UPSTREAM = "minitron_nemo/artefacts/upstream.py"
CARD = "minitron_nemo/reporting/model_card.py"
TEST_CONFIG = "tests/unit/test_hf_config.py -x"
TEST_CARD = "tests/unit/test_model_card.py -x"

FAULTS = [
    Fault(
        ARCH,
        "shapes from before a field existed get another fingerprint",
        find="if value or name not in LATER}",
        replace="}",
        tests="tests/unit/test_arch_counts.py -k before_there_were -x",
    ),
    Fault(
        ARCH,
        "biases are no parameters",
        find="self.qkv_size * self.add_qkv_bias + ",
        replace="",
        tests="tests/unit/test_arch_counts.py -k 'once_each and qwen2' -x",
    ),
    Fault(
        TENSORS,
        "every tensor-parallel rank loads the first rank's biases",
        find="TensorRow(QKV_BIAS, (QKV,), per_layer=True, split=0)",
        replace="TensorRow(QKV_BIAS, (QKV,), per_layer=True)",
        tests="tests/distributed/test_megatron_opens.py -k tp2 -x",
    ),
    Fault(
        "minitron_nemo/engine/model.py",
        "queries and keys go to the attention without their norms",
        find="attention.q_layernorm = attention.k_layernorm = Norm",
        replace="attention.q_layernorm = Norm",
        tests="tests/distributed/test_logits.py -k 'unchanged and alone' -x",
    ),
    Fault(
        "minitron_nemo/engine/model.py",
        "norms of queries and keys are left out where tensor parallelism splits the heads",
        find="qk_layernorm=arch.qk_layernorm,",
        replace="qk_layernorm=arch.qk_layernorm and options.groups.layout.tp == 1,",
        tests="tests/distributed/test_training_layouts.py -k 'gradient and tp2' -x",
    ),
    Fault(
        "minitron_nemo/engine/model.py",
        "Transformer Engine's layers have no norms of queries and keys",
        find="(qk_layernorm=config.qk_layernorm)",
        replace="()",
        tests="tests/unit/test_accelerations.py -k engine_have -x",
    ),
    Fault(
        "minitron_nemo/pruning/plain_forward.py",
        "the proof forgets the biases of queries, keys and values",
        find='self._product(z_BSH, f"{name}.linear_qkv.weight", bias=arch.add_qkv_bias)',
        replace='self._product(z_BSH, f"{name}.linear_qkv.weight")',
        tests="tests/unit/test_export_is_used.py -k 'likes_best and qwen2' -x",
    ),
    Fault(
        "minitron_nemo/pruning/repairs/head_residual.py",
        "queries are merged and their biases are not",
        find=', "self_attention.linear_qkv.bias")',
        replace=",)",
        tests="tests/unit/test_repairs.py -k 'no_others and qwen2' -x",
    ),
    Fault(
        "minitron_nemo/steps/traffic.py",
        "norms of queries and keys are thought whole on every rank",
        find="(student.layout.sequence_parallel or row.key in HEAD_NORMS)",
        replace="student.layout.sequence_parallel",
        tests="tests/distributed/test_traffic.py -k norms -x",
    ),
    Fault(
        FAMILIES,
        "an absent head_dim of Qwen3 is divided from the hidden size",
        find="        head_dim=128,\n",
        replace="",
        tests=TEST_CONFIG,
    ),
    Fault(
        HF_CONFIG,
        "a window of Qwen2 that is switched off is taken for one",
        find="if family.window_needs is not None and not config.get(family.window_needs):",
        replace="if False:",
        tests=TEST_CONFIG,
    ),
    Fault(
        FAMILIES,
        "a shape is written as a family that cannot have it",
        find="if (found := getattr(arch, name)) != value:",
        replace="if (found := getattr(arch, name)) is None:",
        tests=TEST_CONFIG,
    ),
    Fault(
        HF,
        "a generation config of the source is written over",
        find="if ids and not (draft.folder / GENERATION_FILE).exists():",
        replace="if ids:",
        tests=TEST_CARD,
    ),
    Fault(
        UPSTREAM,
        "what an import wrote down is taken in any form",
        find="if value is not None and not (isinstance(value, str) and re.fullmatch(form, value)):",
        replace="if value is not None and not (isinstance(value, str) and re.match(form, value)):",
        tests=TEST_CARD,
    ),
    Fault(
        CARD,
        "foreign words are markup",
        find='_text(ancestor.name) or "?"',
        replace='str(ancestor.name) or "?"',
        tests=TEST_CARD,
    ),
    Fault(
        CARD,
        "scores of another model are shown",
        find='if isinstance(parents, dict) and parents.get("model") == manifest_sha256(path):',
        replace="if isinstance(parents, dict):",
        tests=TEST_CARD,
    ),
]
