"""Faults in reading and writing weights: boxes, torch_dist, Hugging Face's folders, random weights."""

from mutants.fault import Fault

GEOMETRY = "minitron_nemo/checkpoint/geometry.py"
WEIGHTS = "minitron_nemo/checkpoint/torch_dist_weights.py"
HF_CONFIG = "minitron_nemo/checkpoint/formats/hf_config.py"
TEST_TORCH_DIST = "tests/unit/test_torch_dist.py"
TEST_HF = "tests/unit/test_hf_tensors.py"
TEST_HF_CONFIG = "tests/unit/test_hf_config.py"
TEST_NEMO = "tests/unit/test_nemo_folder.py"

FAULTS = [
    Fault(
        GEOMETRY,
        "chunks may overlap",
        find="if chunk.shared_with(other) is not None:",
        replace="if False:",
        tests=f"{TEST_TORCH_DIST} tests/unit/test_geometry.py -k 'overlap or cover'",
    ),
    Fault(
        GEOMETRY,
        "what two boxes share begins where the first begins",
        find="begin = tuple(map(max, self.offset, other.offset))",
        replace="begin = tuple(self.offset)",
        tests=f"{TEST_TORCH_DIST} -k every_box",
    ),
    Fault(
        GEOMETRY,
        "a tensor may lack elements",
        find="return None if covered == full else",
        replace="return None if True else",
        tests=f"{TEST_TORCH_DIST} tests/unit/test_geometry.py -k 'gap or cover'",
    ),
    Fault(
        "minitron_nemo/checkpoint/torch_dist.py",
        "the hash of a written file is that of nothing",
        find="self.sha256.update(data)",
        replace="pass",
        tests=f"{TEST_TORCH_DIST} -k hashes",
    ),
    Fault(
        "minitron_nemo/checkpoint/torch_dist.py",
        "a chunk may be another tensor than the metadata promises",
        find="(tensor.dtype, tuple(tensor.shape)) != promised",
        replace="False",
        tests="tests/unit/test_chunk_shapes.py",
    ),
    Fault(
        "minitron_nemo/checkpoint/restricted_metadata.py",
        "metadata may name any class",
        find="return ALLOWED_GLOBALS[module, name]",
        replace="return ALLOWED_GLOBALS.get((module, name)) or super().find_class(module, name)",
        tests=f"{TEST_TORCH_DIST} -k 'runs_code or closed_table'",
    ),
    Fault(
        WEIGHTS,
        "a vocabulary with too few rows is accepted",
        find="found[0] >= expected[0]",
        replace="found[0] > 0",
        tests=f"{TEST_NEMO} -k does_not_fit",
    ),
    Fault(
        WEIGHTS,
        "every layer is read as the first",
        find="Box((logical.layer, *box.offset)",
        replace="Box((0 * logical.layer, *box.offset)",
        tests=f"{TEST_NEMO} -k bit_for_bit",
    ),
    Fault(
        WEIGHTS,
        "tensors of the model that never came are not missed",
        find="assert not missing,",
        replace="assert True,",
        tests=f"{TEST_NEMO} -k too_few",
    ),
    Fault(
        "minitron_nemo/checkpoint/formats/hf.py",
        "a tensor that no model has is passed over",
        find='if not name.endswith("rotary_emb.inv_freq"):',
        replace="if False:",
        tests=f"{TEST_HF} -k do_not_fit",
    ),
    Fault(
        "minitron_nemo/checkpoint/formats/hf_names.py",
        "up before gate",
        find='("mlp.gate_proj", "mlp.up_proj")',
        replace='("mlp.up_proj", "mlp.gate_proj")',
        tests=f"{TEST_HF} -k gate",
    ),
    Fault(
        "minitron_nemo/checkpoint/formats/hf_names.py",
        "the two norms of a layer change places",
        find='"model.layers.{layer}.input_layernorm."',
        replace='"model.layers.{layer}.post_attention_layernorm."',
        tests=f"{TEST_HF} -k 'norm or exactly_one'",
    ),
    Fault(
        HF_CONFIG,
        "an absent rotary base means 500000",
        find='"rope_theta", source, default=10000.0',
        replace='"rope_theta", source, default=500000.0',
        tests=f"{TEST_HF_CONFIG} -k ten_thousand",
    ),
    Fault(
        HF_CONFIG,
        "another activation is taken for the family's",
        find="!= HIDDEN_ACT[family]:",
        replace="is None:",
        tests=f"{TEST_HF_CONFIG} -k not_supported",
    ),
    Fault(
        HF_CONFIG,
        "biases are ignored instead of refused",
        find="if config.get(name):",
        replace="if False:",
        tests=f"{TEST_HF_CONFIG} -k not_supported",
    ),
    Fault(
        "minitron_nemo/checkpoint/formats/nemo.py",
        "damaged weights pass verification",
        find="(verify_files if verify else check_sizes)",
        replace="check_sizes",
        tests=f"{TEST_NEMO} -k flipped",
    ),
    Fault(
        "minitron_nemo/checkpoint/random_init.py",
        "matrices that write into the residual stream are as large as the others",
        find="if key.endswith(RESIDUAL_WRITERS) else init_std",
        replace="if False else init_std",
        tests="tests/unit/test_random_init.py",
    ),
    Fault(
        "minitron_nemo/checkpoint/random_init.py",
        "all layers start with the same numbers",
        find='f"{seed}/{key}/{logical.layer}"',
        replace='f"{seed}/{key}"',
        tests="tests/unit/test_random_init.py",
    ),
]
