"""What a step that runs a model on data goes by: the data it reads, the precision, and all that shapes its result."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_nemo.config.schema import Config, Precision, identity
from minitron_nemo.distributed.ranks import is_main_process, uses_gpu

if TYPE_CHECKING:
    from minitron_nemo.checkpoint.formats.nemo import NemoFolder
    from minitron_nemo.data.blend import Blend


def precision_of(config: Config) -> Precision:
    """What `trainer.precision` means here: `auto` is bf16 on GPU and fp32 on CPU."""
    if config.trainer.precision is not Precision.auto:
        return config.trainer.precision
    return Precision.bf16 if uses_gpu(config.trainer.accelerator.value) else Precision.fp32


def blend_for(
    config: Config, model: "NemoFolder", *, weights: dict[str, float] | None = None, purpose: str = ""
) -> "Blend":
    """What a step reads with this model: `weights`, the blend of its own section, or `data.blend`.

    `purpose` names the recipe where it trains: its samples come in an order of its own.
    """
    from minitron_nemo.data.blend import Blend
    from minitron_nemo.data.tokenizer import load_tokenizer

    return Blend(
        weights=weights or config.data.blend,
        prepared=Path(str(config.prepare_data.output)),
        cache=Path(config.run_dir) / "data_index",
        seq_length=config.data.seq_length,
        split=config.data.split,
        seed=config.seed,
        tokenizer=load_tokenizer(model.tokenizer),
        vocab_size=model.arch.vocab_size,
        verify=is_main_process(),
        purpose=purpose,
        reset_attention_mask=config.data.reset_attention_mask,
    )


def settings_of(section: Any, config: Config, blend: "Blend") -> dict[str, Any]:
    """What shapes the result of a step that runs a model on data: its section, the precision, and what it reads."""
    return {
        **identity(section),
        "precision": precision_of(config).value,
        "data": {**identity(config.data), **blend.identity()},
    }
