"""The quickstart's chain on a model so small that every step takes a moment, as a config folder of its own."""

import random
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("teacher", "corrected_teacher", "width_pruned", "width_student", "depth_student")
SENTENCE = "the model forgets what it was never asked to keep and a smaller one learns what remains of it again"

CONFIG = """
defaults:
  - schema
  - _self_
name: tiny
run_dir: {run_dir}
model: {{num_layers: 3, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
         kv_channels: 8, vocab_size: 300, seq_length: 64, family: qwen3, qk_layernorm: true}}
trainer: {{accelerator: cpu, devices: 2, log_every_n_steps: 1}}
parallel: {{tensor_model_parallel_size: 2, sequence_parallel: true}}
train_tokenizer: {{vocab_size: 300}}
prepare_data:
  tokenizer: ${{run_dir}}/tokenizer
  workers: 1
  corpora:
    first: {{input: {text}/first, glob: "*.txt"}}
    second: {{input: {text}/second, glob: "*.jsonl"}}
data: {{seq_length: 32, split: "80,20,0", blend: {{first: 0.3, second: 0.7}}}}
import_hf: {{source: "${{run_dir}}/source_hf"}}
correct_teacher:
  training: &training
    {{max_steps: 4, global_batch_size: 4, micro_batch_size: 2, val_check_interval: 2, limit_val_batches: 1,
     save_every_n_steps: 2, optim: {{lr: 4.0e-3, min_lr: 4.0e-4, warmup_steps: 2}}}}
estimate_importance: {{num_samples: 4, micro_batch_size: 2}}
prune:
  target: {{hidden_size: 24, ffn_hidden_size: 48}}
  output: ${{run_dir}}/width_pruned.nemo
distill:
  checkpoint: ${{run_dir}}/width_pruned.nemo
  output: ${{run_dir}}/width_student.nemo
  chunk_tokens: 24
  training: *training
evaluate: {{num_samples: 4, micro_batch_size: 2, checkpoint: "${{run_dir}}/width_student.nemo"}}
export_hf: {{checkpoint: "${{run_dir}}/width_student.nemo"}}
report: {{models: [{models}]}}
pipeline:
  steps:
    - {{recipe: train_tokenizer}}
    - {{recipe: prepare_data}}
    - {{recipe: random_init}}
    - name: pre-train, data parallel
      recipe: correct_teacher
      overrides:
        - correct_teacher.checkpoint=${{run_dir}}/random_init.nemo
        - correct_teacher.output=${{run_dir}}/pretrained.nemo
        - parallel.tensor_model_parallel_size=1
        - parallel.sequence_parallel=false
    - recipe: export_hf
      overrides: ["export_hf.checkpoint=${{run_dir}}/pretrained.nemo", "export_hf.output=${{run_dir}}/source_hf"]
    - {{recipe: import_hf}}
    - {{recipe: correct_teacher}}
    - recipe: convert
      overrides:
        - convert.source=${{run_dir}}/corrected_teacher.nemo
        - convert.output=${{run_dir}}/packed.nemo
        - convert.format=nemo_tar
    - {{recipe: estimate_importance, overrides: ["estimate_importance.checkpoint=${{run_dir}}/packed.nemo"]}}
    - {{recipe: prune, overrides: ["prune.checkpoint=${{run_dir}}/packed.nemo"]}}
    - recipe: prune
      overrides:
        - prune.checkpoint=${{run_dir}}/packed.nemo
        - "prune.target={{hidden_size: null, ffn_hidden_size: null, num_layers: 2}}"
        - prune.output=${{run_dir}}/depth_pruned.nemo
    - recipe: distill
      overrides:
        - distill.teacher=${{run_dir}}/packed.nemo
        - distill.hidden_states.kinds=[layer_outputs]
        - distill.teacher_parallel.cpu_offloading_weights=true
    - name: distill, pipeline parallel
      recipe: distill
      overrides:
        - distill.checkpoint=${{run_dir}}/depth_pruned.nemo
        - distill.teacher=${{run_dir}}/packed.nemo
        - distill.output=${{run_dir}}/depth_student.nemo
        - distill.hidden_states.kinds=[layer_outputs]
        - distill.teacher_parallel.cpu_offloading_weights=true
        - parallel.tensor_model_parallel_size=1
        - parallel.sequence_parallel=false
        - parallel.pipeline_model_parallel_size=2
    - recipe: evaluate
      models: ${{report.models}}
      overrides: ["evaluate.checkpoint=${{run_dir}}/{{model}}.nemo"]
    - recipe: export_hf
      models: ${{report.models}}
      overrides: ["export_hf.checkpoint=${{run_dir}}/{{model}}.nemo"]
    - {{recipe: report}}
"""
NUM_STEPS = 13 + 2 * len(MODELS) + 1


def write_tiny_run(folder: Path) -> tuple[Path, Path]:
    """(config folder with `tiny.yaml`, run folder, not there yet), and the text it reads."""
    drawn = random.Random(7)
    for corpus, suffix in (("first", "txt"), ("second", "jsonl")):
        (folder / "text" / corpus).mkdir(parents=True)
        for number in range(30):
            words = " ".join(drawn.choices(SENTENCE.split(), k=80)) + f" {number} of {corpus}."
            line = words if suffix == "txt" else f'{{"text": "{words}"}}\n'
            (folder / "text" / corpus / f"{number:02d}.{suffix}").write_text(line)
    (folder / "conf").mkdir()
    text = CONFIG.format(run_dir=folder / "run", text=folder / "text", models=", ".join(MODELS))
    (folder / "conf" / "tiny.yaml").write_text(text)
    return folder / "conf", folder / "run"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
