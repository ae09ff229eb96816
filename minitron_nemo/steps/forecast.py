"""How long a step takes and what it leaves on the disk, before it starts; every line says what it assumes."""

from pathlib import Path

from minitron_nemo.artefacts.disk import free_bytes
from minitron_nemo.config.schema import Accelerator, Config, TrainingConfig
from minitron_nemo.shape.arch import ModelArch, billions
from minitron_nemo.steps.memory import weight_bytes

# Dense bf16 FLOP/s of an H100 SXM (vendor's data sheet), and the share of it that is assumed, not measured.
PEAK_FLOPS, PEAK_SHARE = 989e12, 0.40
OPTIMIZER_BYTES = 12  # of a parameter: float32 weight and Adam's two moments
TEXT_BYTES = 4  # of a token, of English with a vocabulary of 100 K


def training_forecast(
    config: Config, training: TrainingConfig, *, trained: ModelArch, flops_per_token: float
) -> list[str]:
    """Time and disk of a training step."""
    tokens = training.max_steps * training.global_batch_size * config.data.seq_length
    size = token_bytes(trained.vocab_size)
    return [
        *time_lines(config, tokens * flops_per_token),
        *disk_lines(config, {**checkpoint_sizes(config, training, trained), "model": model_size(config, trained)}),
        f"  tokens    {in_bytes(tokens * size)} to read: {billions(tokens)} x {size} bytes, when none is read twice",
    ]


def time_lines(config: Config, flops: float) -> list[str]:
    """Hours for so many FLOP on all ranks; none for a CPU, of which nothing is known."""
    if config.trainer.accelerator is Accelerator.cpu:
        return []
    ranks = config.layout.world_size
    hours = flops / (ranks * PEAK_SHARE * PEAK_FLOPS) / 3600
    return [
        f"  time      {_number(hours)} hours on {ranks} GPUs ({_number(hours * ranks)} GPU hours), assuming "
        f"{PEAK_SHARE:.0%} of the {PEAK_FLOPS / 1e12:.0f} TFLOP/s of an H100, without validation and saving"
    ]


def checkpoint_sizes(config: Config, training: TrainingConfig, trained: ModelArch) -> dict[str, float]:
    """Bytes of the training checkpoints that a run keeps and of the one it is writing, by name; none without saving."""
    if not training.save_every_n_steps:
        return {}
    copies = (
        1 if config.parallel.use_distributed_optimizer else config.layout.batch_ranks
    )  # else every rank writes them whole
    one = model_size(config, trained) + OPTIMIZER_BYTES * trained.num_params() * copies
    made = min(training.keep_latest_k + 1, (training.max_steps - 1) // training.save_every_n_steps)
    return {f"{made} x training checkpoint of {in_bytes(one)}:": made * one}


def model_size(config: Config, arch: ModelArch) -> float:
    """Bytes of a `.nemo` folder of this shape that ranks write: bf16, but where the config says or means fp32."""
    return weight_bytes(config) * arch.num_params()


def token_bytes(vocab_size: int) -> int:
    """Bytes of a token in a `.bin` file: Megatron's choice (`DType.optimal_dtype`)."""
    return 2 if vocab_size < 65500 else 4


def corpora_lines(config: Config, vocab_size: int) -> list[str]:
    """Disk of `prepare_data`, from the size of the text that is there."""
    from minitron_nemo.data.corpora import list_files

    text = 0
    for name, corpus in config.prepare_data.corpora.items():
        if corpus.input != "stdlib" and not Path(corpus.input).exists():
            return []
        text += sum(path.stat().st_size for path in list_files(corpus, name=name))
    tokens, size = text / TEXT_BYTES, token_bytes(vocab_size)
    return [
        f"  text      {in_bytes(text)}, about {billions(tokens)} tokens at {TEXT_BYTES} bytes of text each",
        *disk_lines(
            config, {f"tokens of {size} bytes": size * tokens, "the same in shards while it runs": size * tokens}
        ),
    ]


def disk_lines(config: Config, sizes: dict[str, float]) -> list[str]:
    """What is written under `run_dir`, its sum, and what is free there."""
    needed, free = sum(sizes.values()), free_bytes(config.run_dir)
    parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in sizes.items())
    verdict = ": too little" if needed > free else ""
    return [f"  disk      {in_bytes(needed)} ({parts}); {in_bytes(free)} are free{verdict}"]


def in_bytes(size: float) -> str:
    """`63 GB`, `4.5 MB`: powers of ten, as disks are sold."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{_number(size / limit)} {unit}"
    return f"{size:.0f} bytes"


def _number(value: float) -> str:
    """Two digits and whole numbers above ten: an estimate has no more."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
