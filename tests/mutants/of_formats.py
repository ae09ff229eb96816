"""Faults in the formats of others: NeMo 1, NeMo 2, Megatron-LM, Megatron-Bridge."""

from mutants.fault import Fault

FORMATS = "minitron_nemo/checkpoint/formats"
CONFIG = f"{FORMATS}/megatron_config.py"
MEGATRON = f"{FORMATS}/megatron.py"
BRIDGE = f"{FORMATS}/bridge_config.py"
NEMO1 = f"{FORMATS}/nemo1.py"
RANKS = f"{FORMATS}/nemo1_ranks.py"
WEIGHTS = "minitron_nemo/checkpoint/torch_dist_weights.py"
ZARR = "minitron_nemo/checkpoint/zarr_folder.py"
STATE_DICT = "minitron_nemo/checkpoint/state_dict_file.py"
COMMON = "minitron_nemo/checkpoint/common_state.py"
TEST = "tests/unit/test_foreign_formats.py"
TEST_BRIDGE = "tests/unit/test_bridge_config.py"

FAULTS = [
    Fault(
        WEIGHTS,
        "the layers of a stage lie in the files of the first one",
        find="return self.stages[logical.layer]",
        replace="return 0",
        tests=f"{TEST} -k file_of_a_rank",
    ),
    Fault(
        WEIGHTS,
        "the parts of all tensor-parallel ranks lie in the file of the first",
        find="yield first + rank, Box(tuple(offset), tuple(size))",
        replace="yield first, Box(tuple(offset), tuple(size))",
        tests=f"{TEST} -k file_of_a_rank",
    ),
    Fault(
        WEIGHTS,
        "the optimizer of a run is taken for weights",
        find="stored -= {key for key in stored if NO_WEIGHTS.fullmatch(key)}",
        replace="pass",
        tests=f"{TEST} -k 'runs_of_megatron and llama and 19'",
    ),
    Fault(
        CONFIG,
        "what is not supported passes",
        find="if (value := fields.values.get(name)) is not None and value not in allowed:",
        replace="if False:",
        tests=f"{TEST} -k own_names",
    ),
    Fault(
        CONFIG,
        "a window shorter than the model is passed over",
        find="0 <= reach < seq_length",
        replace="0 <= reach < 0",
        tests=f"{TEST} -k own_names",
    ),
    Fault(
        CONFIG,
        "a rotary scaling that a format cannot say is written without a word",
        find="if rest != LLAMA31:",
        replace="if False:",
        tests=f"{TEST} -k cannot_say",
    ),
    Fault(
        CONFIG,
        "the padding of the vocabulary is taken for words",
        find='    return said, () if said == rows else (f"{rows - said} rows of padding in the vocabulary",)',
        replace="    return rows, ()",
        tests=f"{TEST} -k 'folders_of_nemo_2 and llama'",
    ),
    Fault(
        MEGATRON,
        "every head has a key of its own",
        find='if not args.get("group_query_attention"):',
        replace="if True:",
        tests=f"{TEST} -k 'runs_of_megatron and llama and 16'",
    ),
    Fault(
        MEGATRON,
        "the tied table is read as two",
        find='not args.get("untie_embeddings_and_output_weights")',
        replace="False",
        tests=f"{TEST} -k 'runs_of_megatron and tied and 16'",
    ),
    Fault(
        CONFIG,
        "biases of queries, keys and values are left to the class",
        find='        "add_qkv_bias": arch.add_qkv_bias,\n',
        replace="",
        tests=f"{TEST_BRIDGE} -k every_field",
    ),
    Fault(
        BRIDGE,
        "the Bridge is not told of scaled rotary frequencies",
        find='"rope_scaling": factor is not None,',
        replace='"rope_scaling": False,',
        tests=f"{TEST_BRIDGE} -k every_field",
    ),
    Fault(
        BRIDGE,
        "the family is lost on the way to the Bridge and back",
        find='{FAMILY: arch.family, "model"',
        replace='{"model"',
        tests=f"{TEST_BRIDGE} -k every_field",
    ),
    Fault(
        BRIDGE,
        "the Bridge calls the activation, with nothing",
        find='{"_target_": name, "_call_": False}',
        replace='{"_target_": name}',
        tests=f"{TEST_BRIDGE} -k classes_of_its_own",
    ),
    Fault(
        BRIDGE,
        "the Bridge makes a table of more words on one rank",
        find='"make_vocab_size_divisible_by": 1,',
        replace='"make_vocab_size_divisible_by": 128,',
        tests=f"{TEST_BRIDGE} -k not_padded",
    ),
    Fault(
        BRIDGE,
        "the Bridge loads bf16 into a model of float32",
        find='"bf16": dtype == torch.bfloat16,',
        replace='"bf16": False,',
        tests=f"{TEST_BRIDGE} -k goes_on",
    ),
    Fault(
        BRIDGE,
        "the layers of a builder are not found",
        find="return {**(inner if isinstance(inner, dict) else {}), **model}",
        replace="return dict(model)",
        tests=f"{TEST_BRIDGE} -k builder",
    ),
    Fault(
        MEGATRON,
        "a folder for the Bridge does not say its layout",
        find="    if args is not None:\n        notes",
        replace="    if args is not None and not has(contents, RUN_CONFIG_FILE):\n        notes",
        tests=f"{TEST_BRIDGE} -k layouts_are_noted",
    ),
    Fault(
        NEMO1,
        "weights of megatron_amp_O2 are not found",
        find='PREFIXES = (PREFIX, "model.module.", "")',
        replace='PREFIXES = (PREFIX, "")',
        tests=f"{TEST} -k 'archives_of_nemo_1 and llama'",
    ),
    Fault(
        f"{FORMATS}/nemo2.py",
        "a tokenizer is looked for under one name only",
        find="names = [name for name in (said, TOKENIZER)",
        replace="names = [name for name in (TOKENIZER,)",
        tests=f"{TEST} -k 'folders_of_nemo_2 and llama'",
    ),
    Fault(
        f"{FORMATS}/nemo2_graph.py",
        "the graph names no arguments",
        find='self._put("tuple", _container("tuple", list(value.arguments)))',
        replace='self._put("tuple", _container("tuple", []))',
        tests=f"{TEST} -k graph_that_nemo_2",
    ),
    Fault(
        f"{FORMATS}/nemo1_config.py",
        "any size of a tokenizer is believed",
        find="return words if rows in",
        replace="return words if True or rows in",
        tests=f"{TEST} -k vocabulary_is_that",
    ),
    Fault(
        RANKS,
        "the layers of every stage begin with 0",
        find="first_layer += self._add_chunk(stage, number // self.pp, first_layer)",
        replace="self._add_chunk(stage, number // self.pp, first_layer)",
        tests=f"{TEST} -k 'files_of_ranks and llama and tp2_pp2'",
    ),
    Fault(
        RANKS,
        "the chunks of an interleaved pipeline follow stage by stage",
        find="stage = stages[number % self.pp]",
        replace="stage, number = stages[number // self.vpp], number % self.vpp * self.pp",
        tests=f"{TEST} -k 'files_of_ranks and llama and vpp'",
    ),
    Fault(
        RANKS,
        "the parts of a rank lie one after the other, gate or not",
        find="tensor_parallel_pieces(part.shape[dim], rank=rank, tp=self.files.tp)",
        replace="tensor_parallel_pieces(part.shape[dim], rank=0, tp=1)",
        tests=f"{TEST} -k 'files_of_ranks and llama and tp2'",
    ),
    Fault(
        RANKS,
        "ranks may have other copies of a norm",
        find="if not torch.equal(tensor, part.file.read(part.name)):",
        replace="if False:",
        tests=f"{TEST} -k 'bad_files_of_ranks and norms'",
    ),
    Fault(
        RANKS,
        "the head of a tied model may be another table",
        find="if copies is not None and not torch.equal(tensor, self._merged(self.tensors[name], copies)):",
        replace="if False:",
        tests=f"{TEST} -k copy_of_the_tied",
    ),
    Fault(
        ZARR,
        "a chunk that was not saved is not missed",
        find="                self._find_chunk(key, index)",
        replace="                pass",
        tests=f"{TEST} -k 'bad_zarr and missing'",
    ),
    Fault(
        ZARR,
        "compressed chunks are read as they are",
        find='if values.get("compressor") is not None or values.get("filters"):',
        replace="if False:",
        tests=f"{TEST} -k 'bad_zarr and (compressed or filtered)'",
    ),
    Fault(
        STATE_DICT,
        "a tensor begins where its storage does, plus its first element in bytes",
        find="+ view.first * dtype.itemsize",
        replace="+ view.first",
        tests=f"{TEST} -k views_of_one_storage",
    ),
    Fault(
        COMMON,
        "any name in a common state is answered",
        find="return Record if is_storage or is_megatron or (module, name) in _RECORDS else None",
        replace="return Record",
        tests=f"{TEST} -k 'bad and names'",
    ),
]
