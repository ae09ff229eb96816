"""Faults in what NeMo code holds: restoring, saving, names, generation, and the .nemo that NeMo's connector writes."""

from mutants.fault import Fault

MODEL = "minitron_nemo/nemo_model.py"
ALONE = "minitron_nemo/engine/alone.py"
GENERATION = "minitron_nemo/evaluation/generation.py"
STATE_DICT = "minitron_nemo/checkpoint/formats/nemo_state_dict.py"
TEST = "tests/unit/test_nemo_model.py"
TEST_GENERATION = "tests/unit/test_generation.py"
TEST_STATE_DICT = "tests/unit/test_nemo_state_dict.py"

FAULTS = [
    Fault(
        ALONE,
        "every token is at the first position",
        find="torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS), None)",
        replace="torch.zeros_like(tokens_BS), torch.ones(1, 1, 1, 1, dtype=torch.bool))",
        tests=f"{TEST} -k 'logits or greedy'",
    ),
    Fault(
        ALONE,
        "the token after the first is predicted over and over",
        find="hidden_states(model, tokens_BS)[-1]",
        replace="hidden_states(model, tokens_BS)[0]",
        tests=f"{TEST} -k greedy",
    ),
    Fault(
        ALONE,
        "groups of the program around are taken down",
        find="if not parallel_state.model_parallel_is_initialized():",
        replace="if True:",
        tests=f"{TEST} -k formed_once",
    ),
    Fault(
        MODEL,
        "a damaged file is restored",
        find="        opened.weights.verify()\n",
        replace="",
        tests=f"{TEST} -k damage",
    ),
    Fault(
        MODEL,
        "the weights of a restored model are those that memory held",
        find="        load_weights(instance.model, opened.weights, groups_alone())\n",
        replace="",
        tests=f"{TEST} -k 'logits or saved'",
    ),
    Fault(
        MODEL,
        "what is saved is always one tar",
        find="packed=self.pack_nemo_file",
        replace="packed=True",
        tests=f"{TEST} -k what_is_saved",
    ),
    Fault(
        MODEL,
        "saving replaces what is there",
        find="overwrite=self.overwrite",
        replace="overwrite=True",
        tests=f"{TEST} -k what_is_saved",
    ),
    Fault(
        MODEL,
        "a saved model does not say what it comes from",
        find="instance.parents, instance.lineage = {KIND: manifest_sha256(contents)}, ancestors({KIND: contents.path})",
        replace="pass",
        tests=f"{TEST} -k what_is_saved",
    ),
    Fault(
        MODEL,
        "the config names a class, which NeMo's connector refuses",
        find='self._cfg.pop("target", None)',
        replace="pass",
        tests=f"{TEST} -k nemos_connector_writes",
    ),
    Fault(
        MODEL,
        "NeMo goes on believing that a model is being restored",
        find="            ModelPT._set_model_restore_state(is_being_restored=False)",
        replace="            pass",
        tests=f"{TEST} -k 'nemos_connector_writes or bad_input'",
    ),
    Fault(
        MODEL,
        "a state dict has the names of the layers that run here",
        find="        self.register_state_dict_post_hook(_to_logical_names)\n",
        replace="",
        tests=f"{TEST} -k state_dict",
    ),
    Fault(
        MODEL,
        "an overriding config of another shape is taken",
        find="if asked != arch:",
        replace="if False:",
        tests=f"{TEST} -k precision",
    ),
    Fault(
        GENERATION,
        "the temperature multiplies",
        find="logits_BV / temperature",
        replace="logits_BV * temperature",
        tests=f"{TEST_GENERATION} -k softmax",
    ),
    Fault(
        GENERATION,
        "a sample that ended goes on",
        find="next_B1.masked_fill(has_ended_B1, end)",
        replace="next_B1",
        tests=f"{TEST_GENERATION} -k ended",
    ),
    Fault(
        STATE_DICT,
        "weights of another precision than the config's are taken",
        find="if weights.dtype() != dtype:",
        replace="if False:",
        tests=f"{TEST_STATE_DICT} -k refused",
    ),
    Fault(
        STATE_DICT,
        "a model of NeMo 1 is taken for one of ours",
        find=' and "seq_length" in read_config(contents)',
        replace="",
        tests=f"{TEST_STATE_DICT} -k told_from",
    ),
    Fault(
        STATE_DICT,
        "what NeMo adds to a config is refused",
        find='("tokenizer", "target", "nemo_version")',
        replace='("tokenizer",)',
        tests=f"{TEST_STATE_DICT} -k come_back",
    ),
]
