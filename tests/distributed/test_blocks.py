"""Blocks of layers scored in every layout, against transformers models whose layers were taken out by hand."""

import json
from dataclasses import replace

import pytest
import torch
from hf_models import save_tiny_hf
from layouts import load_model, whole_logits
from torch.nn import functional

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.hf import import_hf, open_hf
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.source import ShapedSource, stream
from minitron_nemo.data.calibration import CalibrationSet
from minitron_nemo.data.tasks import TaskRun, read_task
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.removal import RemovalRuns
from minitron_nemo.engine.schedule import forward_hidden
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.evaluation.removal import TextSums, log_likelihoods
from minitron_nemo.importance.blocks import blocks_of, layer_evaluations
from minitron_nemo.importance.hooks import listening
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.kept_sums import KeptSums
from minitron_nemo.steps.score_blocks import score_blocks
from minitron_nemo.testing import ALONE, LAYOUTS, run_layout

LAYERS, LENGTHS, SAMPLES = 4, [1, 2], 8
CHECKED = {"alone": ALONE, **LAYOUTS}


def samples():
    ids = torch.randint(3, 131, (SAMPLES, 17), generator=torch.Generator().manual_seed(3))
    mask = (torch.rand(SAMPLES, 16, generator=torch.Generator().manual_seed(4)) > 0.2).float()
    return CalibrationSet(ids[:, :-1].contiguous(), "x", labels=ids[:, 1:].contiguous(), loss_mask=mask)


def task_runs(path, folder):
    source = open_nemo(path)
    tokenizer = load_tokenizer(source.tokenizer)
    runs = {}
    for form in ("winogrande", "arc", "hellaswag"):
        task = read_task(folder / f"{form}.jsonl", form, num_fewshot=1, fewshot=folder / f"{form}.jsonl")
        metric = "acc" if form == "winogrande" else "acc_norm"
        runs[form] = TaskRun(task, task.requests(tokenizer, seq_length=source.arch.seq_length), metric)
    return runs


def score_here(groups, path, folder):
    scores = score_blocks(
        open_nemo(path).weights, samples(), options=BuildOptions(groups=groups), lengths=LENGTHS,
        tasks=task_runs(path, folder), micro_batch_size=4, chunk_tokens=9,
    )  # fmt: skip
    return scores, probe(groups, path, folder)


def probe(groups, path, folder):
    """Layers evaluated by all stages for one micro-batch, and the log-likelihoods of some requests."""
    model = load_model(path, groups)
    runs, blocks = RemovalRuns(model), blocks_of(LAYERS, LENGTHS)
    before = list(model[0].decoder.layers)
    requests = task_runs(path, folder)["arc"].requests[:3]
    head = HeadLoss(vocab_size=131, chunk_tokens=4, group=groups.tp)
    found = log_likelihoods(runs, requests, blocks=blocks, head=head, groups=groups)
    assert list(model[0].decoder.layers) == before
    return groups.share_json([groups.is_last_stage, runs.evaluations, found.tolist()])


def write_tasks(folder):
    """A few examples of each form; words are ids of the tiny tokenizer."""
    drawn = torch.Generator().manual_seed(5)

    def words(count):
        return " ".join(f"w{number}" for number in torch.randint(0, 128, (count,), generator=drawn).tolist())

    lines = {"winogrande": [], "arc": [], "hellaswag": []}
    for number in range(3):
        lines["winogrande"].append({"sentence": f"{words(4)} _ {words(2 + number % 3)}", "option1": words(1),
                                    "option2": words(2), "answer": str(1 + number % 2)})  # fmt: skip
        texts = [words(1 + (number + choice) % 3) for choice in range(3 + number % 2)]
        labels = ["A", "B", "C", "D"][: len(texts)]
        lines["arc"].append({"question": words(3), "choices": {"text": texts, "label": labels},
                             "answerKey": labels[number % 3]})  # fmt: skip
        lines["hellaswag"].append({"activity_label": words(1), "ctx_a": words(3), "ctx_b": words(2),
                                   "label": number % 4,
                                   "endings": [words(1 + choice) for choice in range(4)]})  # fmt: skip
    for form, records in lines.items():
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(.nemo folder, folder of tasks, the transformers model)."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("blocks")
    source = open_hf(save_tiny_hf(folder / "hf", "llama", num_hidden_layers=LAYERS))
    import_hf(source, folder / "model.nemo", tensors=stream(source.weights), origin=Origin("blocks"))
    write_tasks(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    return folder / "model.nemo", folder, model


def without(model, block):
    """The transformers model with the layers of a block taken out: (final hidden states, logits) of tokens [b, s]."""
    layers = model.model.layers

    @torch.no_grad()
    def run(tokens):
        model.model.layers = torch.nn.ModuleList(layer for n, layer in enumerate(layers) if n not in block)
        try:
            hidden = model.model(tokens, use_cache=False).last_hidden_state
            return hidden, model.lm_head(hidden)
        finally:
            model.model.layers = layers

    return run


@pytest.fixture(scope="module")
def brute_force(world):
    """{measure: {length: values}}, and {form: [a row of log-likelihoods for each variant]}, by transformers."""
    path, folder, model = world
    data, runs = samples(), task_runs(path, folder)
    whole, _ = without(model, ())(data.tokens)
    with torch.no_grad():
        states = list(model.model(data.tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1])
        last = []
        handle = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
        model.model(data.tokens, use_cache=False)
        handle.remove()
    states.append(last[0])
    measures = {"cosine": {}, "lm_loss": {}, "nmse": {}}
    choices = {form: [] for form in runs}
    for block in [(), *blocks_of(LAYERS, LENGTHS)]:
        hidden, logits = without(model, block)(data.tokens)
        losses = functional.cross_entropy(logits.transpose(1, 2), data.labels, reduction="none")
        loss = float((losses * data.loss_mask).sum() / data.loss_mask.sum())
        measures["lm_loss"].setdefault(len(block), []).append(loss)
        measures["nmse"].setdefault(len(block), []).append(
            float((hidden - whole).square().sum() / whole.square().sum())
        )
        for form, run in runs.items():
            choices[form].append(likelihoods(without(model, block), run.requests))
    for length in range(1, LAYERS + 1):
        measures["cosine"][length] = [
            1 - float(functional.cosine_similarity(states[start], states[start + length], dim=-1).mean())
            for start in range(LAYERS - length + 1)
        ]
    return measures, choices


def likelihoods(run, requests):
    """log p(continuation | context) of each, token by token from the softmax over the vocabulary."""
    longest = max(len(request.context + request.continuation) for request in requests)
    ids = torch.tensor([[*request.context, *request.continuation, *[0] * longest][:longest] for request in requests])
    _, logits = run(ids)
    log_p = logits.double().log_softmax(dim=-1)
    return [
        float(sum(log_p[row, place - 1, ids[row, place]] for place in range(start, start + len(request.continuation))))
        for row, request in enumerate(requests)
        for start in [len(request.context)]
    ]


@pytest.mark.parametrize("layout", CHECKED)
def test_every_measure_is_that_of_transformers_with_the_layers_taken_out(layout, world, brute_force):
    path, folder, _ = world
    scores, probed = run_layout(score_here, CHECKED[layout], path, folder)
    measures, choices = brute_force
    for measure, by_length in measures.items():
        for length, values in by_length.items():
            found = [scores.whole.get(measure, 0.0)] if length == 0 else scores.values[measure][length]
            assert found == pytest.approx(values, rel=2e-5, abs=2e-6), f"{measure} of {length}"
    spread = torch.tensor(measures["lm_loss"][1])
    assert spread.max() - spread.min() > 1e-3, "blocks that all score alike would prove nothing"
    assert set(scores.values["lm_loss"]) == set(LENGTHS)
    assert set(scores.values["cosine"]) == set(range(1, LAYERS + 1))
    for form, rows in choices.items():
        task = task_runs(path, folder)[form].task
        wanted = [task.accuracies(row) for row in rows]
        for metric, by_length in scores.tasks[form]["accuracies"].items():
            found = [by_length["whole"], *(value for length in LENGTHS for value in by_length[length])]
            assert found == [each[metric] for each in wanted], f"{form} {metric}"
    assert any(len(set(scores.tasks[form]["scores"][1])) > 1 for form in choices), "as would tasks that see no removal"
    table = [row for is_last, _, table in probed if is_last for row in table][:3]
    assert list(zip(*table, strict=True)) == [pytest.approx(row[:3], rel=1e-5) for row in choices["arc"]]


def laws_here(groups, path):
    """The model of which one block writes nothing into the stream: its scores, block importance, and empty blocks."""
    source, data = open_nemo(path), samples()
    model, options = load_model(path, groups), BuildOptions(groups=groups)
    with listening(model, arch=source.arch, groups=groups) as statistics:
        forward_hidden(model, [{"tokens": data.tokens}])
    importance = statistics.finish()["num_layers"].tolist()
    model_of_silence = build_model(source.arch, options)
    load_weights(model_of_silence, SilentLayers(source.weights), groups)
    # Text that the model itself finds likely: of random text the loss may well fall when a layer goes.
    likely = whole_logits(model_of_silence, data.tokens, vocab_size=131, groups=groups).argmax(dim=-1)
    own = replace(data, labels=likely)
    silent = score_blocks(SilentLayers(source.weights), own, options=options, lengths=[1, 2], micro_batch_size=4)
    plain = score_blocks(source.weights, data, options=options, lengths=[1], micro_batch_size=4, measures=["cosine"])
    empty = [range(n, n) for n in range(LAYERS + 1)]
    sums = TextSums(RemovalRuns(model), empty, head=HeadLoss(vocab_size=131, group=groups.tp), groups=groups)
    sums.add(data.batch(0, SAMPLES, device=groups.device))
    return importance, plain, silent, sums.merged().tolist()


class SilentLayers(ShapedSource):
    """Weights whose second and third layer add nothing to the residual stream."""

    def __init__(self, source):
        super().__init__(source.arch)
        self.source = source

    def dtype(self, name):
        return self.source.dtype(name)

    def read(self, name, box=None):
        silent = self.tensors[name].layer in (1, 2) and name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        return self.source.read(name, box) * (0 if silent else 1)


@pytest.mark.parametrize("layout", ["alone", "pp2"])
def test_laws_of_blocks(layout, world):
    importance, plain, silent, empty = run_layout(laws_here, CHECKED[layout], world[0])
    assert plain.of("cosine", 1) == importance, "the cosine of one layer is its block importance, to the last bit"
    assert set(plain.values) == {"cosine"}
    assert all(row[:2] == empty[0][:2] and row[2] == 0 for row in empty), "taking nothing out changes nothing"
    for measure in ("cosine", "lm_loss", "nmse"):
        assert silent.best_block(measure, 2) == [2, 3], measure
        assert silent.best_layers(measure, 2) == [2, 3], measure
    assert silent.of("nmse", 2)[1] == 0
    assert silent.of("lm_loss", 2)[1] == silent.whole["lm_loss"]
    assert abs(silent.of("cosine", 2)[1]) < 1e-6


RUNS, STOP = SAMPLES + 6, SAMPLES + 2  # and the choices of the task, one by one


def stopped_here(groups, path, folder, kept, *, stop_at):
    """The scores, None where the search was stopped before it runs the model on micro-batch `stop_at`; and the runs."""
    whole_run, ran = RemovalRuns.run, []

    def run(*arguments, **options):
        if len(ran) == stop_at:
            raise InterruptedError
        ran.append(1)
        return whole_run(*arguments, **options)

    RemovalRuns.run = run
    try:
        scores = score_blocks(
            open_nemo(path).weights,
            samples(),
            options=BuildOptions(groups=groups),
            lengths=[2],
            tasks={"wino": task_runs(path, folder)["winogrande"]},
            kept=KeptSums(kept, "f"),
        )
    except InterruptedError:
        scores = None
    finally:
        RemovalRuns.run = whole_run
    groups.barrier()  # a run that goes on begins when the one before has ended on every rank
    return scores, len(ran)


def stops_here(groups, path, folder, kept):
    return [stopped_here(groups, path, folder, kept / place, stop_at=stop_at)
            for place, stop_at in (("a", 99), ("b", 1), ("b", STOP // groups.layout.dp), ("b", 99))]  # fmt: skip


@pytest.mark.parametrize("layout", ["tp2_sp", "dp2"])
def test_a_search_that_was_stopped_goes_on_from_its_sums(layout, world, tmp_path):
    path, folder, _ = world
    (whole, all_runs), first, second, (last, rest) = run_layout(stops_here, CHECKED[layout], path, folder, tmp_path)
    assert first == (None, 1)
    assert all_runs == RUNS // CHECKED[layout].dp
    assert second == (None, STOP // CHECKED[layout].dp), "the samples are done and the task is begun"
    assert rest == all_runs - 1 - STOP // CHECKED[layout].dp
    for measure in ("cosine", "lm_loss", "nmse", "task"):
        assert last.of(measure, 2) == pytest.approx(whole.of(measure, 2), rel=1e-12)
    assert last.whole == pytest.approx(whole.whole, rel=1e-12)


@pytest.mark.parametrize("layout", ["alone", "pp2"])
def test_layers_are_evaluated_as_often_as_the_formula_says(layout, world):
    path, folder, _ = world
    probed = run_layout(probe, CHECKED[layout], path, folder)
    assert sum(evaluations for _, evaluations, _ in probed) == layer_evaluations(LAYERS, LENGTHS)
