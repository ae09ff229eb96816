"""Faults in tokenizing, the prepared files, the samples and the calibration set."""

from mutants.fault import Fault

DATASETS = "minitron_nemo/data/datasets.py"
PREPARE = "minitron_nemo/data/prepare.py"
BLEND = "tests/unit/test_blend.py"
TEST_PREPARE = "tests/unit/test_prepare_data.py"

FAULTS = [
    Fault(
        "minitron_nemo/data/shards.py",
        "documents end with token 0 whatever the tokenizer's end token is",
        find="tokenizer.eod]",
        replace="0]",
        tests="tests/unit/test_document_end.py",
    ),
    Fault(
        "minitron_nemo/data/text_files.py",
        "the line that begins where a piece of a file begins is lost",
        find="file.seek(span.start - 1)",
        replace="file.seek(span.start)",
        tests=f"{TEST_PREPARE} -k 'span or bytes_do_not'",
    ),
    Fault(
        PREPARE,
        "documents stay in the order of the files",
        find="return order[first]",
        replace="return np.sort(order[first])",
        tests=f"{TEST_PREPARE} -k 'order or position or bytes_do_not'",
    ),
    Fault(
        PREPARE,
        "duplicates stay",
        find="return order[first]",
        replace="return order",
        tests=f"{TEST_PREPARE} -k comes_out_once",
    ),
    Fault(
        DATASETS,
        "held-out samples are drawn from training documents",
        find="config.split_matrix[split.value]",
        replace="config.split_matrix[0]",
        tests=f"{BLEND} -k share_no_document",
    ),
    Fault(
        DATASETS,
        "the order of samples ignores the seed",
        find="random_seed=seed",
        replace="random_seed=1234",
        tests=f"{BLEND} -k seed",
    ),
    Fault(
        DATASETS,
        "corpora count alike whatever their weights",
        find="weights /= weights.sum()",
        replace="weights = np.ones_like(weights) / len(weights)",
        tests=f"{BLEND} -k weights",
    ),
    Fault(
        DATASETS,
        "a corpus prepared again is read through the old indices",
        find="content_fingerprint(prefix), str(prefix),",
        replace="str(prefix),",
        tests=f"{BLEND} -k prepared_again",
    ),
    Fault(
        DATASETS,
        "a micro-batch of two samples is one sample twice",
        find="range(first, first + count)",
        replace="[first] * count",
        tests="tests/distributed/test_cover.py -k 'every_global_batch and not pp2'",
    ),
    Fault(
        "minitron_nemo/data/corpus_files.py",
        "a corpus of another tokenizer is read",
        find="if facts.tokenizer != tokenizer.fingerprint:",
        replace="if False:",
        tests=f"{BLEND} -k another_tokenizer",
    ),
    Fault(
        "minitron_nemo/data/corpus_files.py",
        "a foreign corpus may hold any token id",
        find="(part >= vocab_size)",
        replace="(part >= 2**62)",
        tests=f"{BLEND} -k ids_the_model",
    ),
    Fault(
        "minitron_nemo/data/tokenizer.py",
        "the truncation a tokenizer came with cuts documents",
        find="backend.no_truncation()",
        replace="pass",
        tests="tests/unit/test_tokenizer.py -k truncation",
    ),
    Fault(
        "minitron_nemo/data/blend.py",
        "correction and distillation draw the same samples in the same order",
        find="if not self.purpose:",
        replace="if True:",
        tests="tests/unit/test_blend.py -k purpose",
    ),
    Fault(
        "minitron_nemo/data/datasets.py",
        "held-out samples differ from purpose to purpose",
        find="build(Split.valid, num_valid, blend.seed)",
        replace="build(Split.valid, num_valid, blend.training_seed)",
        tests="tests/unit/test_blend.py -k purpose",
    ),
    Fault(
        "minitron_nemo/data/calibration.py",
        "calibration samples are the first training samples again",
        find='purpose="calibration"',
        replace='purpose=""',
        tests="tests/unit/test_calibration.py",
    ),
    Fault(
        "minitron_nemo/data/calibration.py",
        "the fingerprint of the calibration set ignores its tokens",
        find="digest.update(tokens",
        replace="hash(tokens",
        tests="tests/unit/test_calibration.py",
    ),
    Fault(
        "minitron_nemo/data/datasets.py",
        "ids that the model does not have are trained on",
        find="    _check_ids(values, samples, dataset=dataset, indices=indices)",
        replace="    pass",
        tests="tests/unit/test_corpus_damage.py",
    ),
    Fault(
        "minitron_nemo/data/datasets.py",
        "ids up to the vocabulary's size are taken, its size included",
        find="if low >= 0 and high < vocab_size:",
        replace="if low >= 0 and high <= vocab_size:",
        tests="tests/unit/test_corpus_damage.py",
    ),
    Fault(
        "minitron_nemo/data/datasets.py",
        "an end token belongs to the document after it",
        find="is_end_BS.cumsum(dim=1) - is_end_BS",
        replace="is_end_BS.cumsum(dim=1)",
        tests="tests/unit/test_calibration.py -k documents",
    ),
    *(
        Fault(
            "minitron_nemo/engine/attention.py", what, find=find, replace=replace, tests="tests/unit/test_attention.py"
        )
        for what, find, replace in (
            (
                "documents that a mask keeps apart see those before them",
                "| is_other_BTS)[:, None]",
                "| (is_other_BTS & False))[:, None]",
            ),
            (
                "documents that a mask keeps apart see what comes later",
                "(later(positions_T, documents_BS.shape[1]) | is_other_BTS)",
                "is_other_BTS",
            ),
            (
                "the first document of a sample goes on from the last of the sample before",
                "begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)",
                "begins_BS = torch.zeros_like(documents_BS, dtype=torch.bool); begins_BS[0, 0] = True",
            ),
            (
                "documents are told by their numbers rising, place by place of all samples",
                "[x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]",
                "[x.flatten(0, 1) for x in (query, key, value)]",
            ),
            (
                "the kernel for lengths sees what comes later",
                "window_size=(-1, 0)",
                "window_size=(-1, -1)",
            ),
        )
    ),
    *(
        Fault(
            f"minitron_nemo/steps/{step}.py",
            f"documents are not kept apart in {what}",
            find=f"({device}, {split}, documents=blend.reset_attention_mask)",
            replace=f"({device}, {split}, documents=False)",
            tests="tests/distributed/test_documents_apart.py",
        )
        for step, what, device, split in (
            ("train", "training", "groups.device", "train_data"),
            ("evaluate", "evaluation", "groups.device", "held_out"),
        )
    ),
    Fault(
        "minitron_nemo/data/calibration.py",
        "documents are not kept apart in importance",
        find='"documents": self.documents,',
        replace="",
        tests="tests/unit/test_calibration.py -k documents",
    ),
]
