"""Two teachers by source of data, and sums by place and source: against transformers' models, in every layout.

Of the micro-batches some hold samples of both sources and some of one, which one teacher alone is asked about.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from anchor_world import SEQ_LENGTH, WithHoles, as_hf, own_cache
from hf_models import save_tiny_hf
from layouts import ORIGIN, load_model
from torch import Tensor
from torch.nn import functional

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.hf import import_hf, open_hf
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.config.schema import CorpusConfig, OptimConfig
from minitron_nemo.config.teachers import TeacherConfig, running
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.datasets import batches_on, build_datasets
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distillation.teachers_by_source import TeachersBySource
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.losses.tallies import Tallies
from minitron_nemo.testing import ALONE, run_layout
from minitron_nemo.training.checkpoints import save_model
from minitron_nemo.training.objectives import batch_sums, means
from minitron_nemo.training.several_teachers import SeveralTeachersObjective
from minitron_nemo.training.start_checks import _probe
from minitron_nemo.training.state import TrainState

GLOBAL_BATCH, MICRO, WINDOW, VOCAB = 16, 2, 4, 131
KL_WEIGHT, CE_WEIGHT, TAU = 0.8, 0.3, 2.0
SOURCES = ("code", "prose")
SHARES = {"expert": [0.75, 0.0], "general": [0.25, 1.0]}
SHAPES = {
    "student": {"num_hidden_layers": 4},
    "expert": {"num_hidden_layers": 5, "hidden_size": 48},
    "general": {"num_hidden_layers": 4, "hidden_size": 40},
}
STAGES = {"expert": {2: [2, 3], 4: [2, 1, 1, 1]}}  # the others' layers are split evenly
LAYOUTS = {
    "alone": ALONE,
    "tp2_pp2": Layout(tp=2, pp=2, sequence_parallel=True),
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "cp2_dp2": Layout(cp=2, dp=2),
}


@dataclass(frozen=True)
class World:
    hf: dict[str, Path]
    nemo: dict[str, Path]
    blend: Blend


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    hf, nemo = {}, {}
    for seed, (role, shape) in enumerate(SHAPES.items()):
        hf[role] = save_tiny_hf(folder / f"{role}_hf", "llama", seed=seed, **shape)
        nemo[role] = folder / f"{role}.nemo"
        source = open_hf(hf[role])
        import_hf(source, nemo[role], tensors=stream(source.weights), origin=Origin(role))
    tokenizer = load_tokenizer(nemo["student"])
    drawn = random.Random(3)
    for name in SOURCES:
        texts = [" ".join(f"w{drawn.randrange(128)}" for _ in range(drawn.randint(20, 50))) for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        corpus = CorpusConfig(input=str(folder / f"{name}.jsonl"))
        prepare_corpus(name, corpus, tokenizer=tokenizer, output=folder / "data", show_progress=False)
    blend = Blend(
        {"prose": 0.65, "code": 0.35}, prepared=folder / "data", cache=folder / "index", seq_length=SEQ_LENGTH,
        split="80,20,0", seed=5, tokenizer=tokenizer, vocab_size=VOCAB,
    )  # fmt: skip
    return World(hf, nemo, blend)


class Counted(Teacher):
    """Notes how many micro-batches it runs through."""

    ran = 0

    def outputs(self, batches, routes=()):
        self.ran += len(batches)
        return super().outputs(batches, routes)


def objective_of(groups, world: World) -> SeveralTeachersObjective:
    head = HeadLoss(
        vocab_size=VOCAB, kl_weight=KL_WEIGHT, cross_entropy_weight=CE_WEIGHT, temperature=TAU, chunk_tokens=7,
        group=groups.tp, tallies=Tallies(SEQ_LENGTH, SOURCES),
    )  # fmt: skip
    chunks = groups.layout.pp * groups.layout.vpp
    teachers = {
        name: Counted(
            open_nemo(world.nemo[name]).weights,
            BuildOptions(groups=groups, stage_layers=STAGES.get(name, {}).get(chunks)),
        )
        for name in SHARES
    }
    beside = TeachersBySource(teachers, SHARES, sources=SOURCES)
    return SeveralTeachersObjective(head, beside, running={"expert": 0.5, "general": 1.0}, window=WINDOW)


def step_on_ranks(groups, world: World, folder: Path) -> dict:
    """The means of a training step and of a validation, what the teachers were asked, and the start's probes."""
    train, _ = build_datasets(own_cache(world.blend, folder / "index"), num_train=GLOBAL_BATCH, num_valid=0)
    get = batches_on(groups.device, WithHoles(train), documents=False)
    share = groups.layout.share(GLOBAL_BATCH, MICRO)
    batches = [get(first, MICRO) for first in share.first_samples(groups.dp_rank)]
    objective = objective_of(groups, world)
    source = open_nemo(world.nemo["student"])
    options = BuildOptions(groups=groups, distributed_optimizer=False)
    state = TrainState.start(load_model(world.nemo["student"], groups), OptimConfig(), max_steps=3, options=options)
    state.zero_gradients()
    found = {"train": batch_sums(state.model, batches, objective, groups=groups, train=True)}
    ran = {name: teacher.ran for name, teacher in objective.teachers().items()}
    with torch.no_grad():
        found["valid"] = batch_sums(state.model, batches, objective, groups=groups, train=False)
        for parameter in state.model.parameters():
            parameter.copy_(parameter.main_grad)
    save_model(folder / "gradient.nemo", state.model, source.arch, groups, tokenizer=source.tokenizer, tokens=0,
               origin=ORIGIN)  # fmt: skip
    probes = {name: _probe(teacher, get, MICRO) for name, teacher in objective.teachers().items()}
    asked = {name: sum(any(SHARES[name][n] for n in batch["sources"][:, 0].tolist()) for batch in batches)
             for name in SHARES}  # fmt: skip
    everybody = groups.share_json([ran, asked])
    return {"means": {name: means(sums) for name, sums in found.items()}, "ran": everybody, "probes": probes,
            "in_words": objective.in_words}  # fmt: skip


@dataclass
class Reference:
    """The same in plain PyTorch: means, gradients, and cross-entropies of the teachers by number of samples."""

    means: dict[str, float]
    gradients: dict[str, Tensor]
    teachers: dict[str, Tensor]
    mask: Tensor
    sources: Tensor


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Reference:
    from transformers import AutoModelForCausalLM

    blend = own_cache(world.blend, tmp_path_factory.mktemp("index"))
    train = WithHoles(build_datasets(blend, num_train=GLOBAL_BATCH, num_valid=0)[0])
    samples = [train[number] for number in range(GLOBAL_BATCH)]
    tokens, labels, mask = (torch.stack([x[name] for x in samples]) for name in ("tokens", "labels", "loss_mask"))
    sources = torch.tensor([int(sample["dataset_id"]) for sample in samples])
    models = {role: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for role, path in world.hf.items()}
    logits = models["student"](tokens).logits

    def cross_entropy(x: Tensor) -> Tensor:
        return functional.cross_entropy(x.transpose(1, 2), labels, reduction="none")

    each, entropies, of_teachers = {}, {}, {}
    for name in SHARES:
        with torch.no_grad():
            wanted = models[name](tokens).logits
            of_teachers[name] = cross_entropy(wanted)
        log_p, log_q = (functional.log_softmax(x.double() / TAU, dim=-1) for x in (wanted, logits))
        each[name] = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        entropies[name] = -(log_p.exp() * log_p).sum(dim=-1)
    shares = {name: torch.tensor(share, dtype=torch.float64)[sources][:, None] for name, share in SHARES.items()}
    kl, ce = sum(shares[name] * each[name] for name in SHARES), cross_entropy(logits)
    loss = ((KL_WEIGHT * TAU**2 * kl + CE_WEIGHT * ce) * mask).sum() / mask.sum()
    loss.backward()
    found = {"loss": loss}

    def mean(values: Tensor, weight: Tensor) -> Tensor:
        return (values * weight).sum() / weight.sum()

    values = {"cross_entropy": ce, "forward_kl": kl,
              "teacher_entropy": sum(shares[name] * entropies[name] for name in SHARES)}  # fmt: skip
    found |= {name: mean(x, mask) for name, x in values.items()}
    found |= {f"forward_kl/teacher_{name}": mean(each[name], mask * shares[name]) for name in SHARES}
    for name in ("cross_entropy", "forward_kl"):
        found |= {f"{name}/source_{source}": mean(values[name], mask * (sources == number)[:, None])
                  for number, source in enumerate(SOURCES)}  # fmt: skip
        for first, last in ((0, 1), (2, 2), (3, 3), (4, 5), (6, 7), (8, 8), (9, 9), (10, 11)):
            inside = ((torch.arange(SEQ_LENGTH) >= first) & (torch.arange(SEQ_LENGTH) <= last)).float()
            found[f"{name}/position_{first}-{last}"] = mean(values[name], mask * inside)
    gradients = {key: p.grad.clone() for key, p in models["student"].named_parameters()}
    return Reference({name: float(x.detach()) for name, x in found.items()}, gradients, of_teachers, mask, sources)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_beside_two_teachers_is_that_of_plain_pytorch(layout, world, reference, tmp_path):
    degrees = LAYOUTS[layout]
    found = run_layout(step_on_ranks, degrees, world, tmp_path)
    for part in found["means"].values():
        assert part.keys() == reference.means.keys() | {"top1_agreement"}
        assert {name: part[name] for name in reference.means} == pytest.approx(reference.means, rel=2e-5)
    gradients = as_hf(tmp_path / "gradient.nemo", tmp_path / "gradient_hf")
    for key, gradient in reference.gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 1e-4, f"{key}: a gradient of nothing would prove nothing"
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=2e-5 * scale, msg=key)
    # As many micro-batches as the count of FLOPs expects.
    expected = running({"expert": TeacherConfig("", {"code": 1.0})}, world.blend.weights, micro_batch_size=MICRO)
    ours = [sum(asked[name] for _, asked in found["ran"]) for name in ("expert", "general")]
    assert ours[0] / ours[1] == pytest.approx(expected["expert"], abs=0.1)
    for ran, asked in found["ran"]:
        assert ran["general"] == asked["general"]
        # An interleaved pipeline takes as many micro-batches as it has stages: what is missing is run through again.
        assert asked["expert"] <= ran["expert"] <= asked["expert"] + (degrees.vpp > 1) * GLOBAL_BATCH // WINDOW
    for name, (cross_entropy, tokens) in found["probes"].items():
        count = MICRO * degrees.pp if degrees.vpp > 1 else MICRO
        some = slice(0, count * degrees.dp)
        assert tokens == int(reference.mask[some].sum())
        wanted = float((reference.teachers[name] * reference.mask)[some].sum()) / tokens
        assert cross_entropy == pytest.approx(wanted, rel=1e-5), name
    assert found["in_words"].endswith("from expert (code 0.75), general (code 0.25, prose 1)")


def test_the_comparison_would_notice_what_it_is_for(reference):
    """Micro-batches that the expert is not asked about, others of both sources, and teachers that are not alike."""
    kinds = {tuple(sorted(set(pair))) for pair in reference.sources.unflatten(0, (-1, MICRO)).tolist()}
    assert kinds == {(1,), (0, 1)}, kinds
    kl = [reference.means[f"forward_kl/teacher_{name}"] for name in SHARES]
    assert abs(kl[0] - kl[1]) > 1e-3, kl
