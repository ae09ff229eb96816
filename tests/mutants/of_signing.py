"""Faults in what signatures ask for, in how artefacts are published, and in budgets and messages."""

from mutants.fault import Fault

KNOWN = "minitron_nemo/checkpoint/formats/known.py"
FORMATS = "minitron_nemo/checkpoint/formats"
MANIFEST = "minitron_nemo/artefacts/manifest.py"
PUBLISHING = "minitron_nemo/artefacts/publishing.py"
CONTENTS = "minitron_nemo/artefacts/contents.py"
HEADER = "minitron_nemo/checkpoint/safetensors_header.py"
TOKENIZER = "minitron_nemo/data/tokenizer_limits.py"
ERRORS = "minitron_nemo/errors.py"
CORPUS = "tests/hostile/test_hostile_corpus.py"
MESSAGES = "tests/hostile/test_messages.py"
SIGN = "tests/unit/test_sign.py"
STREAMS = "tests/unit/test_streams.py"

FAULTS = [
    Fault(
        KNOWN,
        "a key asks nothing of the formats of others",
        find="        check_signed(contents, kind=found.kind)\n",
        replace="",
        tests=f"{SIGN} -k any_format",
    ),
    Fault(
        KNOWN,
        "a checkpoint goes by the manifest of something else",
        find="read_manifest(contents, kind=found.kind) if",
        replace="read_manifest(contents, kind=None) if",
        tests=f"{SIGN} -k another_kind",
    ),
    Fault(
        MANIFEST,
        "of what was signed no hash is looked at",
        find="        verify_files(artefact, manifest, leave=others)\n",
        replace="",
        tests=f"{SIGN} -k every_file",
    ),
    Fault(
        f"{FORMATS}/nemo.py",
        "a model that nobody signed is opened though a key is given",
        find="    check_signed(contents, kind=KIND, leave=weights_files)\n",
        replace="",
        tests=f"{SIGN} -k 'asks_for_a_signature or nobody_asked'",
    ),
    Fault(
        f"{FORMATS}/hf.py",
        "a folder that nobody signed is imported though a key is given",
        find="    check_signed(folder, kind=KIND)\n",
        replace="",
        tests=f"{SIGN} -k imported",
    ),
    Fault(
        "minitron_nemo/data/tokenizer.py",
        "a key asks nothing of the model that a tokenizer is of",
        find='        check_signed(files, kind="model", under=f"{INSIDE}/")\n',
        replace="",
        tests=f"{SIGN} -k tokenizer_is_taken",
    ),
    Fault(
        "minitron_nemo/steps/on_ranks.py",
        "ranks know of no key",
        find="trusting(config.verify_key)",
        replace="trusting(None)",
        tests=f"{SIGN} -k ranks",
    ),
    Fault(
        "minitron_nemo/checkpoint/audit.py",
        "an audit says that any signature is verified",
        find="            verify(contents, key)\n",
        replace="",
        tests=f"{SIGN} -k audit_tells",
    ),
    Fault(
        PUBLISHING,
        "the signature of a model that was replaced stays",
        find="        beside(target).unlink(missing_ok=True)",
        replace="        pass",
        tests=f"{SIGN} -k replaced",
    ),
    Fault(
        PUBLISHING,
        "what was there is gone when the rename is refused",
        find="            aside.rename(target)",
        replace="            pass",
        tests=f"{STREAMS} -k refused",
    ),
    Fault(
        PUBLISHING,
        "what a killed run moved aside is thrown away",
        find="            left.rename(target)",
        replace="            _remove(left)",
        tests=f"{STREAMS} -k killed_run_moved",
    ),
    Fault(
        PUBLISHING,
        "folders of the user are taken for drafts",
        find='"[0-9a-f]" * 8',
        replace='"*"',
        tests=f"{STREAMS} -k of_the_user",
    ),
    Fault(
        "minitron_nemo/checkpoint/source.py",
        "the stream of a writer that failed goes on",
        find="        if close is not None:",
        replace="        if False:",
        tests=f"{STREAMS} -k ends_with",
    ),
    Fault(
        "minitron_nemo/checkpoint/hashed_files.py",
        "the thread of a hash stays when its file is closed",
        find="            self._sha256.close()",
        replace="            pass",
        tests=f"{STREAMS} -k ends_with",
    ),
    Fault(
        CONTENTS,
        "a folder of a checkpoint may lie anywhere",
        find="(self.root or self.path).resolve())",
        replace="self.path.resolve())",
        tests=f"{CORPUS} {MESSAGES} -k elsewhere",
    ),
    Fault(
        CONTENTS,
        "a tar goes on behind its end",
        find=' or rest.strip(b"\\0"):',
        replace=":",
        tests=f"{CORPUS} -k behind",
    ),
    Fault(
        CONTENTS,
        "digits of every script count bytes",
        find="            if not (size.isascii() and size.isdigit()):",
        replace="            if False:",
        tests=f"{CORPUS} -k 'pax and script'",
    ),
    Fault(
        CONTENTS,
        "a folder is listed without end",
        find="if len(found) + len(folders) > FILES_LIMIT:",
        replace="if False:",
        tests=f"{MESSAGES} -k without_end",
    ),
    Fault(
        ERRORS,
        "names are shown with their line breaks",
        find="text = printable(super().__str__())",
        replace="text = super().__str__()",
        tests=f"{MESSAGES} -k one_line",
    ),
    Fault(
        ERRORS,
        "a message is as long as what it shows",
        find="return text if len(text) <= LONGEST else",
        replace="return text if True else",
        tests=f"{MESSAGES} -k long_value",
    ),
    Fault(
        "minitron_nemo/checkpoint/audit.py",
        "an audit shows what moves the cursor",
        find="map(printable, ",
        replace="map(str, ",
        tests=f"{MESSAGES} -k of_its_own",
    ),
    Fault(
        f"{FORMATS}/hf.py",
        "files hold tensors that no index names",
        find="if self._files.get(name) != file and",
        replace="if False and",
        tests=f"{CORPUS} -k 'index and says'",
    ),
    Fault(
        HEADER,
        "a header may have any number of tensors",
        find='    if text.count(b"{") > TENSORS_LIMIT:',
        replace="    if False:",
        tests=f"{CORPUS} -k 'safetensors and nothing'",
    ),
    Fault(
        TOKENIZER,
        "ids may be drawn",
        find="not in (None, 0):",
        replace="is False:",
        tests=f"{CORPUS} -k drawn",
    ),
    Fault(
        TOKENIZER,
        "added tokens are not counted",
        find="    if len(tokens) > ADDED_COUNT_LIMIT:",
        replace="    if False:",
        tests=f"{CORPUS} -k 'tokenizer and added'",
    ),
    Fault(
        f"{FORMATS}/nemo1_ranks.py",
        "a chunk that nobody reads is passed over",
        find="            if numbers != list(range(len(numbers))):",
        replace="            if False:",
        tests=f"{CORPUS} -k 'ranks and chunk and behind'",
    ),
    Fault(
        f"{FORMATS}/nemo1_ranks.py",
        "names are whatever a file says",
        find="if match is None or not name.isprintable():",
        replace="if match is None:",
        tests=f"{CORPUS} -k 'ranks and cursor'",
    ),
]
