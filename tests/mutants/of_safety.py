"""Faults in what reads files of others: strict parsers, limits, archives, signatures."""

from mutants.fault import Fault

JSON = "minitron_nemo/artefacts/strict_json.py"
YAML = "minitron_nemo/artefacts/strict_yaml.py"
MACHINE = "minitron_nemo/checkpoint/pickle_machine.py"
METADATA = "minitron_nemo/checkpoint/restricted_metadata.py"
PAYLOAD = "minitron_nemo/checkpoint/payload.py"
TORCH_DIST = "minitron_nemo/checkpoint/torch_dist.py"
HEADER = "minitron_nemo/checkpoint/safetensors_header.py"
CONTENTS = "minitron_nemo/artefacts/contents.py"
TOKENIZER = "minitron_nemo/data/tokenizer_limits.py"
SIGNATURE = "minitron_nemo/artefacts/signature.py"
CORPUS = "tests/hostile/test_hostile_corpus.py"
DAMAGE = "tests/hostile/test_damage.py"
SIGN = "tests/unit/test_sign.py"

FAULTS = [
    Fault(
        JSON,
        "of a key that comes twice the last one counts",
        find="    if len(values) < len(pairs):",
        replace="    if False:",
        tests=f"{CORPUS} -k 'something_twice or (config.json and twice)'",
    ),
    Fault(
        JSON,
        "nesting is not counted",
        find="    _check_depth(value)\n    if _SURROGATE",
        replace="    if _SURROGATE",
        tests=f"{CORPUS} -k '65_deep or (65 and deep)'",
    ),
    Fault(
        YAML,
        "aliases unfold",
        find="            if isinstance(event, yaml.AliasEvent) or getattr(",
        replace="            if False and getattr(",
        tests=f"{CORPUS} -k 'unfolds and yaml'",
    ),
    Fault(
        YAML,
        "tags are passed over",
        find='            if getattr(event, "tag", None) is not None:',
        replace="            if False:",
        tests=f"{CORPUS} -k 'yaml and (function or object or tag)'",
    ),
    Fault(
        YAML,
        "a key may come twice",
        find="            if value in holder:",
        replace="            if False:",
        tests=f"{CORPUS} -k 'yaml and twice'",
    ),
    Fault(
        MACHINE,
        "opcodes are counted without end",
        find="        for _ in range(OPCODES_LIMIT):",
        replace="        for _ in range(1000 * OPCODES_LIMIT):",
        tests=f"{CORPUS} -k 'dicts and later'",
    ),
    Fault(
        METADATA,
        "chunks may share bytes of a file",
        find="        if file == after and start + length > begin:",
        replace="        if False:",
        tests=f"{CORPUS} -k 'share and bytes'",
    ),
    Fault(
        METADATA,
        "a chunk may have fewer bytes than its shape needs",
        find="        if math.prod(size) * dtype.itemsize > length:",
        replace="        if False:",
        tests=f"{CORPUS} -k '50 and elements'",
    ),
    Fault(
        PAYLOAD,
        "elements may lie on top of each other",
        find=" or count > found.reach):",
        replace="):",
        tests=f"{CORPUS} tests/unit/test_payload.py -k 'many_times or (many and times) or any_other_form'",
    ),
    Fault(
        TORCH_DIST,
        "what a checkpoint promises is believed until it is read",
        find="        self._check_places()\n",
        replace="",
        tests="tests/unit/test_payload.py -k on_opening",
    ),
    Fault(
        HEADER,
        "tensors of a file may overlap",
        find="        if end != begin:",
        replace="        if end < begin:",
        tests=f"{CORPUS} -k 'safetensors and top'",
    ),
    Fault(
        HEADER,
        "bytes behind the last tensor are passed over",
        find="    if (end := spans[-1][1] if spans else 0) != size - 8 - length:",
        replace="    if (end := spans[-1][1] if spans else 0) > size - 8 - length:",
        tests=f"{CORPUS} -k 'safetensors and left'",
    ),
    Fault(
        "minitron_nemo/shape/limits.py",
        "a shape may be of any size",
        find="1 <= value <= LARGEST[name]",
        replace="1 <= value",
        tests=f"{CORPUS} -k 'config and 40'",
    ),
    Fault(
        TOKENIZER,
        "expressions that nobody knows are not tried",
        find="    if not all(_is_known(part) for part in found) or",
        replace="    if",
        tests=f"{CORPUS} -k 'never and ends'",
    ),
    Fault(
        TOKENIZER,
        "texts that are doubled are not tried",
        find=" or math.prod(map(_growth, found)) > GROWTH_LIMIT:",
        replace=":",
        tests=f"{CORPUS} -k 'doubles and 40'",
    ),
    Fault(
        CONTENTS,
        "of two entries of one name the last one counts",
        find="            if name in members:",
        replace="            if False:",
        tests=f"{CORPUS} -k 'entry and twice'",
    ),
    Fault(
        CONTENTS,
        "names that climb out of an archive are looked up",
        find="            if not _is_contained(name) or not _is_sane(name):",
        replace="            if not _is_sane(name):",
        tests=f"{CORPUS} -k 'entry and climbs'",
    ),
    Fault(
        "minitron_nemo/artefacts/lock.py",
        "on a full disk the lock stays with nobody",
        find="            self.release()\n            raise",
        replace="            raise",
        tests=f"{DAMAGE} -k 'disk and folder'",
    ),
    Fault(
        SIGNATURE,
        "a key asks for nothing",
        find="    if (key := _trusted.get()) is not None:",
        replace="    if False and (key := _trusted.get()):",
        tests=f"{SIGN} -k asks",
    ),
    Fault(
        SIGNATURE,
        "any signature verifies",
        find="    except (binascii.Error, ValueError, InvalidSignature):",
        replace="    except InvalidSignature:\n        return\n    except (binascii.Error, ValueError):",
        tests=f"{SIGN} -k 'asks or changed'",
    ),
]
