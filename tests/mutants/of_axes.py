"""Faults in budgets, axes and what a dry run of a cut shows."""

from mutants.fault import Fault

BUDGET = "minitron_nemo/shape/budget.py"
FIGURES = "minitron_nemo/shape/figures.py"
VOCABULARY = "minitron_nemo/data/vocabulary.py"
PRUNE_TOKENIZER = "minitron_nemo/data/prune_tokenizer.py"
COUNTS = "minitron_nemo/data/token_counts.py"
TEST_BUDGET = "tests/unit/test_budget.py"
TEST_COUNTS = "tests/unit/test_arch_counts.py"
TEST_BEFORE = "tests/unit/test_before_and_after.py"
TEST_VOCABULARY = "tests/unit/test_vocabulary.py -x"
TEST_ROUNDS = "tests/recipes/test_two_rounds.py -x"
TEST_WORDS = "tests/recipes/test_prune_vocabulary.py -k frequencies"

FAULTS = [
    Fault(
        BUDGET,
        "the first factor that fits is the smallest",
        find="Fraction(1)}, reverse=True)",
        replace="Fraction(1)})",
        tests=TEST_BUDGET,
    ),
    Fault(
        BUDGET,
        "sizes are rounded up",
        find="int(factor * whole) // lot",
        replace="-(-int(factor * whole) // lot)",
        tests=TEST_BUDGET,
    ),
    Fault(
        BUDGET,
        "a budget forgets the tensor-parallel ranks",
        find="math.lcm(lots[axis], tp) for",
        replace="lots[axis] for",
        tests=TEST_BUDGET,
    ),
    Fault(
        BUDGET,
        "only the first limit counts",
        find="return [name for name, most in self.limits.items() if",
        replace="return [name for name, most in list(self.limits.items())[:1] if",
        tests=TEST_BUDGET,
    ),
    Fault(
        BUDGET,
        "query groups leave their heads behind",
        find='size_of("num_attention_heads", groups, source.heads_per_group * groups)',
        replace='size_of("num_attention_heads", groups, source.num_attention_heads)',
        tests=TEST_BUDGET,
    ),
    Fault(
        BUDGET,
        "a Llama's channels are no multiple of its heads",
        find="whole_heads = source.family in WHOLE_HEADS",
        replace="whole_heads = False",
        tests=TEST_BUDGET,
    ),
    Fault(
        FIGURES,
        "memory leaves the cache out",
        find=" + arch.kv_cache_bytes_per_token(BF16) * work.cached_tokens",
        replace="",
        tests=TEST_BUDGET,
    ),
    Fault(
        "minitron_nemo/shape/arch.py",
        "the cache has keys and no values",
        find="return 2 * self.num_layers * self.num_query_groups",
        replace="return self.num_layers * self.num_query_groups",
        tests=TEST_COUNTS,
    ),
    Fault(
        "minitron_nemo/shape/arch.py",
        "of untied tables one is counted",
        find="return tables * self.vocab_size * self.hidden_size",
        replace="return self.vocab_size * self.hidden_size",
        tests=TEST_COUNTS,
    ),
    Fault(
        "minitron_nemo/steps/describe.py",
        "before and after are the same model",
        find="pair = (model.cut, model.student)",
        replace="pair = (model.student, model.student)",
        tests=TEST_BEFORE,
    ),
    Fault(
        "minitron_nemo/steps/planning.py",
        "a target off the grid is cut",
        find='.check(target, name="pruned model")',
        replace="",
        tests=TEST_BEFORE,
    ),
    Fault(
        "minitron_nemo/config/schema.py",
        "a new setting makes every finished cut another configuration's",
        find="said.later and value == default_of(known)",
        replace="False",
        tests="tests/unit/test_config.py -k identity",
    ),
    Fault(
        VOCABULARY,
        "a word stays without what it is merged from",
        find="            for part in self.parts[ident]:\n                value[part] = max(value[part], value[ident])",
        replace="            pass",
        tests=TEST_VOCABULARY,
    ),
    Fault(
        VOCABULARY,
        "a word comes before its parts",
        find="ready = [(-value[ident], ident) for ident in self.words if ident not in waits]",
        replace="ready = [(-value[ident], ident) for ident in self.words]",
        tests=TEST_VOCABULARY,
    ),
    Fault(
        VOCABULARY,
        "of several splits the first listed is taken",
        find="pairs[0] if len(pairs) == 1 else _last_merge(word, ranks)",
        replace="pairs[0]",
        tests=TEST_VOCABULARY,
    ),
    Fault(
        VOCABULARY,
        "bytes may go",
        find="for word in _spelling(content, model, ids, source=str(path))}",
        replace="for word in list(_spelling(content, model, ids, source=str(path)))[:0]}",
        tests=TEST_VOCABULARY,
    ),
    Fault(
        VOCABULARY,
        "special tokens may go",
        find='    needed |= dict.fromkeys(added, "a special or added token")\n',
        replace="",
        tests=TEST_VOCABULARY,
    ),
    Fault(
        PRUNE_TOKENIZER,
        "every merge whose parts stay stays",
        find='{*(pair := _parts(merge)), "".join(pair)} <= vocab.keys()',
        replace="{*_parts(merge)} <= vocab.keys()",
        tests=TEST_VOCABULARY,
    ),
    Fault(
        PRUNE_TOKENIZER,
        "the post-processor puts the old id first",
        find='"ids": [ids[old] for old in token["ids"]]',
        replace='"ids": token["ids"]',
        tests=TEST_VOCABULARY,
    ),
    Fault(
        PRUNE_TOKENIZER,
        "configurations keep the old ids",
        find="renamed(value) if is_id_key(key) else value",
        replace="value",
        tests=TEST_VOCABULARY,
    ),
    Fault(
        COUNTS,
        "corpora count by their size",
        find="blend.weights[name] / total * counts / max(int(counts.sum()), 1)",
        replace="counts",
        tests=TEST_WORDS,
    ),
    Fault(
        COUNTS,
        "held-out documents choose the words",
        find="documents = round(shares[0] / sum(shares) * len(index.lengths))",
        replace="documents = len(index.lengths)",
        tests=TEST_WORDS,
    ),
    Fault(
        "minitron_nemo/steps/prune.py",
        "the pruned model carries the tokenizer of the whole one",
        find="renamed = plan.target.vocab_size < plan.source.vocab_size and",
        replace="renamed = False and",
        tests="tests/recipes/test_prune_vocabulary.py -k own_tokenizer",
    ),
    Fault(
        "minitron_nemo/artefacts/lineage.py",
        "ancestors end with the grandparents",
        find='lineage = manifest.extra.get("lineage")',
        replace="lineage = None",
        tests=TEST_ROUNDS,
    ),
    Fault(
        "minitron_nemo/artefacts/lineage.py",
        "every ancestor is a parent",
        find='"generation": entry["generation"] + 1',
        replace='"generation": entry["generation"]',
        tests=TEST_ROUNDS + " -k older_than_lineages",
    ),
    Fault(
        "minitron_nemo/artefacts/manifest.py",
        "a manifest leaves its lineage out",
        find='**({"lineage": list(map(dict, origin.lineage))} if origin.lineage else {})',
        replace="",
        tests=TEST_ROUNDS,
    ),
    Fault(
        "minitron_nemo/steps/inputs.py",
        "a teacher with more words is cut to its first ones",
        find="of_words(reference.arch, kept)",
        replace="of_words(reference.arch, tuple(range(len(kept))))",
        tests="tests/recipes/test_prune_vocabulary.py -k 'stay_the_whole_model and 1'",
    ),
    Fault(
        PRUNE_TOKENIZER,
        "a student's merges may be other ones than its teacher's",
        find='if made != {"added_tokens": [], **read_json_in(contents_of(fewer), "tokenizer.json")}:',
        replace="if False:",
        tests="tests/recipes/test_prune_vocabulary.py -k remerged",
    ),
    Fault(
        PRUNE_TOKENIZER,
        "words that the teacher does not know are taken for its last one",
        find="if min(kept) < 0 or kept != sorted(set(kept)):",
        replace="if False:",
        tests="tests/recipes/test_prune_vocabulary.py -k foreign",
    ),
]
