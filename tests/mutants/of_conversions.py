"""Faults in packed models, conversions and audits."""

from mutants.fault import Fault

PACKED = "minitron_nemo/artefacts/packed.py"
PUBLISHING = "minitron_nemo/artefacts/publishing.py"
CONTENTS = "minitron_nemo/artefacts/contents.py"
AUDIT = "minitron_nemo/checkpoint/audit.py"
CONVERT = "minitron_nemo/steps/convert.py"
TEST_CONTENTS = "tests/unit/test_contents.py"
TEST_CONVERT = "tests/recipes/test_convert.py"

FAULTS = [
    Fault(
        PACKED,
        "an entry begins where the last one's padding should be",
        find="self._place += BLOCK + -(-size // BLOCK) * BLOCK",
        replace="self._place += BLOCK + size",
        tests=f"{TEST_CONTENTS} -k packed_model_is_the_one",
    ),
    Fault(
        PACKED,
        "a tar has no end",
        find="(self._place + 2 * BLOCK)",
        replace="self._place",
        tests=f"{TEST_CONTENTS} -k fill_its_records",
    ),
    Fault(
        PACKED,
        "sizes of entries above 8 GiB are cut",
        find="entry.size, entry.mode = size, 0o644",
        replace="entry.size, entry.mode = size % 2**33, 0o644",
        tests=f"{TEST_CONTENTS} -k eight_gibibytes",
    ),
    Fault(
        PUBLISHING,
        "a packed model leaves its folder behind",
        find="            shutil.rmtree(self._temp)\n",
        replace="            pass\n",
        tests=f"{TEST_CONTENTS} -k packed_model_is_the_one",
    ),
    Fault(
        CONTENTS,
        "an entry that comes twice is taken as it came last",
        find="if name in members:",
        replace="if False:",
        tests=f"{TEST_CONTENTS} -k no_checkpoint_has",
    ),
    Fault(
        CONTENTS,
        "an archive may end anywhere",
        find="if rest[: tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE:",
        replace="if False:",
        tests=f"{TEST_CONTENTS} -k cut_short",
    ),
    Fault(
        "minitron_nemo/checkpoint/hashed_files.py",
        "what is hashed is the beginning of the tar",
        find="fill_from(file, block, self.stretch.start + self._hashed, uncached=True)",
        replace="fill_from(file, block, self._hashed, uncached=True)",
        tests=f"{TEST_CONTENTS} -k while_it_is_streamed",
    ),
    Fault(
        AUDIT,
        "an audit looks at no hash",
        find="            verify_files(contents, manifest)\n",
        replace="            pass\n",
        tests=f"{TEST_CONVERT} -k first_fault",
    ),
    Fault(
        AUDIT,
        "an audit finds every value finite",
        find="            _check_values(checkpoint)\n",
        replace="            pass\n",
        tests=f"{TEST_CONVERT} -k no_number",
    ),
    Fault(
        CONVERT,
        "a layout is taken for a format whose files follow none",
        find="if layout.model_ranks > 1 and not format.splits:",
        replace="if False:",
        tests=f"{TEST_CONVERT} -k refused_in_one_line",
    ),
    Fault(
        CONVERT,
        "a foreign checkpoint is known by the size of its small files alone",
        find="facts[name] = large if found.length > SMALL else file_sha256(found)",
        replace="facts[name] = found.length",
        tests=f"{TEST_CONVERT} -k foreign",
    ),
    Fault(
        CONVERT,
        "a conversion to Hugging Face has no card",
        find="page=page or {}",
        replace="page={}",
        tests=f"{TEST_CONVERT} -k has_its_page",
    ),
    Fault(
        "minitron_nemo/checkpoint/formats/nemo1.py",
        "a NeMo 1 tar is a folder",
        find="needed=needed, packed=packed)",
        replace="needed=needed)",
        tests=f"{TEST_CONVERT} -k 'bit_for_bit and nemo1_tar'",
    ),
    Fault(
        "minitron_nemo/reporting/model_card.py",
        "the card of a foreign checkpoint forgets the source's licence",
        find="Wishes(None, known.name, known.licence), foreign=arch)",
        replace="Wishes(), foreign=arch)",
        tests=f"{TEST_CONVERT} -k has_its_page",
    ),
]
