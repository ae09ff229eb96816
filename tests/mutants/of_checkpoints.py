"""Faults in reading and writing weights: boxes, torch_dist, Hugging Face's folders, random weights."""

from mutants.fault import Fault

GEOMETRY = "minitron_nemo/checkpoint/geometry.py"
WEIGHTS = "minitron_nemo/checkpoint/torch_dist_weights.py"
HF_CONFIG = "minitron_nemo/checkpoint/formats/hf_config.py"
HASHED = "minitron_nemo/checkpoint/hashed_files.py"
TEST_HASHED = "tests/unit/test_hashed_files.py"
TEST_BUFFERS = "tests/unit/test_buffers.py"
TEST_TORCH_DIST = "tests/unit/test_torch_dist.py"
TEST_HF = "tests/unit/test_hf_tensors.py"
TEST_HF_CONFIG = "tests/unit/test_hf_config.py"
TEST_NEMO = "tests/unit/test_nemo_folder.py"

FAULTS = [
    Fault(
        GEOMETRY,
        "chunks may overlap",
        find="if one.shared_with(other) is not None:",
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
        HASHED,
        "the hash of a written file is that of nothing",
        find="hashing = self._sha256.add(data)",
        replace="hashing = self._sha256.add(data[:0])",
        tests=f"{TEST_TORCH_DIST} {TEST_HASHED} -k hashe",
    ),
    Fault(
        HASHED,
        "a file that was read and is damaged passes",
        find="if self._digest.hexdigest() != self.sha256:",
        replace="if False:",
        tests=f"{TEST_HASHED} -k flipped",
    ),
    Fault(
        HASHED,
        "bytes that nobody asked for are not hashed",
        find="        while self._hashed < position:",
        replace="        while False:",
        tests=f"{TEST_HASHED} -k any_order",
    ),
    Fault(
        HASHED,
        "bytes that were read once are hashed again",
        find="known = min(max(self._hashed - position, 0), len(target))",
        replace="known = 0",
        tests=f"{TEST_HASHED} -k any_order",
    ),
    Fault(
        HASHED,
        "the end of a file is not looked at",
        find="self._pass(file, self.stretch.length)",
        replace="pass",
        tests=f"{TEST_HASHED} -k any_order",
    ),
    Fault(
        HASHED,
        "a kernel that cannot pass by its page cache ends the step",
        find="if not uncached or error.errno != errno.EOPNOTSUPP:",
        replace="if True:",
        tests=f"{TEST_HASHED} -k kernel",
    ),
    Fault(
        "minitron_nemo/checkpoint/source.py",
        "a stream ends well whoever wrote its weights",
        find="        raise\n    source.verify()",
        replace="        raise",
        tests=f"{TEST_HASHED} -k flipped_byte_of_the_weights",
    ),
    Fault(
        "minitron_nemo/checkpoint/source.py",
        "what damage led to hides the damage",
        find="source.verify()  # that a file is damaged says more than what it was refused for",
        replace="pass",
        tests=f"{TEST_HASHED} -k flipped_byte_of_the_weights",
    ),
    Fault(
        "minitron_nemo/pruning/cut.py",
        "nobody vouches for what is cut",
        find="super().__init__(plan.target, made_of=source)",
        replace="super().__init__(plan.target)",
        tests=f"{TEST_HASHED} -k flipped_byte_of_the_weights",
    ),
    Fault(
        "minitron_nemo/pruning/repairs/sources.py",
        "nobody vouches for what is repaired",
        find="super().__init__(plan.target, made_of=inner)",
        replace="super().__init__(plan.target)",
        tests="tests/unit/test_repairs.py -k vouches",
    ),
    Fault(
        "minitron_nemo/checkpoint/formats/nemo.py",
        "of what is hashed while it is read all other files go unhashed",
        find="verify_files(contents, manifest, leave=weights_files if verify_while_read else ())",
        replace="verify_files(contents, manifest, leave=manifest.files)",
        tests=f"{TEST_HASHED} -k any_other_file",
    ),
    Fault(
        "minitron_nemo/steps/inputs.py",
        "a step that streams its model does not verify it",
        find="return open_nemo(str(path), verify_while_read=True)",
        replace="return open_nemo(str(path))",
        tests="tests/recipes/test_command_line.py -k 'bad_input and flipped'",
    ),
    Fault(
        "minitron_nemo/checkpoint/buffers.py",
        "memory of a tensor that lives is given to another",
        find="weakref.finalize(lent, _give_back, memory)",
        replace="_give_back(memory)",
        tests=f"{TEST_BUFFERS} -k holds",
    ),
    Fault(
        "minitron_nemo/checkpoint/buffers.py",
        "memory is kept after the last stream",
        find="            _spare.clear()",
        replace="            pass",
        tests=f"{TEST_BUFFERS} -k none_after",
    ),
    Fault(
        "minitron_nemo/checkpoint/torch_dist.py",
        "a chunk may be another tensor than the metadata promises",
        find="if (found.dtype, found.shape) == promised:",
        replace="if True:",
        tests="tests/unit/test_chunk_shapes.py",
    ),
    Fault(
        "minitron_nemo/checkpoint/pickle_machine.py",
        "metadata may name any class",
        find="if (found := self.named(module, name)) is None:",
        replace="if (found := self.named(module, name) or getattr(__import__(module), name)) is None:",
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
        find="if not name.endswith(ROTARY_TABLE):",
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
        find="!= family.hidden_act:",
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
        find="if verify or verify_while_read:",
        replace="if verify_while_read:",
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
    *(
        Fault(
            "minitron_nemo/checkpoint/torch_dist_weights.py",
            what,
            find=find,
            replace=replace,
            tests="tests/distributed/test_megatron_opens.py -k alone",
        )
        for what, find, replace in (
            (
                "what Megatron's layers ask for beside weights is not there",
                'return [f"{module}._extra_state/{shard}" for module in modules for shard in shards]',
                "return []",
            ),
            (
                "extra states count layers from 1",
                "shard_{layer}_{arch.num_layers}",
                "shard_{layer + 1}_{arch.num_layers}",
            ),
        )
    ),
]
