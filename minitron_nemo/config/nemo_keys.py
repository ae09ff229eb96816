"""Keys that a user of NeMo will type and that are called something else here, or mean something else."""

import re

# (pattern of the dotted key, text that the refusal must hold, what to write instead)
NEMO_KEYS = (
    (r"(.*\.)?save_top_k", "", "NeMo's keeps the best; set keep_latest_k: how many of the newest checkpoints stay"),
    (
        r"exp_manager(\..*)?",
        "",
        "set run_dir for the place of outputs, and save_every_n_steps and keep_latest_k of <section>.training",
    ),
    (r"trainer\.max_steps", "", "set <section>.training.max_steps, such as distill.training.max_steps"),
    (r"trainer\.max_epochs", "", "training is counted in steps: set <section>.training.max_steps"),
    (r"trainer\.val_check_interval", "", "set <section>.training.val_check_interval"),
    (r"trainer\.limit_val_batches", "", "set <section>.training.limit_val_batches"),
    (r"trainer\.gradient_clip_val", "", "set <section>.training.optim.gradient_clip_val"),
    (r"trainer\.accumulate_grad_batches", "", "set <section>.training.global_batch_size"),
    (r"trainer\.precision", "bf16", "the values are auto, bf16 and fp32; NeMo's bf16-mixed is bf16 here"),
    (r"trainer\.devices", "auto", "give a number: the ranks on each node"),
    (r"model\.(tensor|pipeline)_model_parallel_size", "", "set it in `parallel`"),
    (r"trainer\.limit_train_batches", "", "set <section>.training.max_steps"),
    (r"trainer\.(strategy|plugins)(\..*)?", "", "set the degrees in `parallel`; the engine is always Megatron-Core's"),
    (
        r"trainer\.(logger|enable_checkpointing|callbacks)(\..*)?",
        "",
        "logs go to run_dir/logs; set <section>.training.save_every_n_steps for training checkpoints, 0 for none",
    ),
    (
        r"(.*\.)?(restore_from_path|resume_from_checkpoint|resume_if_exists)",
        "",
        "set <section>.checkpoint for the model to start from; a run that was stopped goes on by itself",
    ),
    (r"model\.(micro|global)_batch_size", "", "set it in <section>.training"),
    (r"model\.(sequence_parallel|context_parallel_size)", "", "set it in `parallel`"),
    (r"model\.activations_checkpoint_\w+", "", "set parallel.recompute_granularity"),
    (
        r"model\.(encoder_seq_length|max_position_embeddings)",
        "",
        "set model.seq_length for the longest position, and data.seq_length for a sample",
    ),
    (
        r"(.*\.)?reset_position_ids",
        "",
        "set data.reset_attention_mask: rotary positions are relative, so documents kept apart need no others",
    ),
    (r"model\.data(\..*)?", "", "set `data` and `prepare_data`"),
    (r"model\.tokenizer(\..*)?", "", "set prepare_data.tokenizer; a .nemo folder carries its own"),
    (r"model\.(precision|seed)", "", "set trainer.precision, and seed at the top"),
    (r"model\.optim(\..*)?", "", "set <section>.training.optim"),
)


def advice(key: str, refusal: str) -> str | None:
    """What to write instead of a key of NeMo's that was refused; None for any other key."""
    for pattern, text, instead in NEMO_KEYS:
        if re.fullmatch(pattern, key) and text in refusal:
            return instead
    return None
