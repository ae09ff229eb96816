"""Faults in the loop, the optimizer, its schedule, checkpoints and resume, the training recipes, and evaluation."""

from mutants.fault import Fault

LOOP = "minitron_nemo/training/loop.py"
OPTIMIZER = "minitron_nemo/engine/optimizer.py"
STATE = "minitron_nemo/training/state.py"
CHECKPOINTS = "minitron_nemo/training/checkpoints.py"
OPTIMIZER_STATE = "minitron_nemo/training/optimizer_state.py"
STEPS = "tests/distributed/test_against_torch.py -k 'steps and alone'"
COVER = "tests/distributed/test_cover.py"
RESUME = "tests/distributed/test_resume.py -k 'uninterrupted and alone'"
RESUME_BF16 = "tests/distributed/test_resume_bf16.py"
RIGHT_MODELS = "tests/recipes/test_right_models.py"
TEST_CHECKPOINTS = "tests/unit/test_training_checkpoints.py"
TRAFFIC = "minitron_nemo/steps/traffic.py"
TEST_TRAFFIC = "tests/distributed/test_traffic.py"

FAULTS = [
    Fault(
        LOOP,
        "every step takes the first samples again",
        find="ahead.take(position.consumed_samples,",
        replace="ahead.take(0,",
        tests=f"{COVER} -k 'every_global_batch and not pp2'",
    ),
    Fault(
        LOOP,
        "all data-parallel ranks train on the same samples",
        find="share.first_samples(run.groups.dp_rank, start=start)",
        replace="share.first_samples(0, start=start)",
        tests=f"{COVER} -k 'every_global_batch and not pp2'",
    ),
    Fault(
        LOOP,
        "a validation reads its first global batch again and again",
        find="index * run.config.global_batch_size",
        replace="0 * run.config.global_batch_size",
        tests=STEPS,
    ),
    Fault(
        LOOP,
        "a validation is one global batch, whatever limit_val_batches says",
        find="range(run.config.limit_val_batches)",
        replace="range(1)",
        tests=STEPS,
    ),
    Fault(
        LOOP,
        "validation only after the last step",
        find="(is_last or _is_due(position.step, config.val_check_interval))",
        replace="is_last",
        tests=STEPS,
    ),
    Fault(
        LOOP,
        "masked tokens count as trained on",
        find="tokens=int(sums[TOKENS])",
        replace="tokens=run.config.global_batch_size * run.seq_length",
        tests=STEPS,
    ),
    Fault(
        LOOP,
        "a loss that is not a number is stepped with",
        find="    if is_finite:\n        position.advance("
        "samples=run.config.global_batch_size, tokens=int(sums[TOKENS]))",
        replace="    if True:\n        position.advance(samples=run.config.global_batch_size, tokens=0)",
        tests="tests/distributed/test_against_torch.py -k not_finite",
    ),
    Fault(
        "minitron_nemo/steps/train.py",
        "validation reads training samples",
        find="valid_batch = batches_on(groups.device, valid_data,",
        replace="valid_batch = batches_on(groups.device, train_data,",
        tests=STEPS,
    ),
    Fault(
        "minitron_nemo/steps/train.py",
        "a trained model says it was trained on nothing",
        find="tokens = state.position.consumed_tokens",
        replace="tokens = 0",
        tests=STEPS,
    ),
    Fault(OPTIMIZER, "no clipping", find="clip_grad=optim.gradient_clip_val", replace="clip_grad=0.0", tests=STEPS),
    Fault(
        OPTIMIZER,
        "a constant learning rate after the warm-up",
        find='lr_decay_style="cosine"',
        replace='lr_decay_style="constant"',
        tests=STEPS,
    ),
    Fault(OPTIMIZER, "no warm-up", find="lr_warmup_steps=", replace="lr_warmup_steps=0 * ", tests=STEPS),
    Fault(
        OPTIMIZER,
        "the cosine ends at nothing instead of min_lr",
        # Megatron's schedule takes that of the parameter groups, which the optimizer's configuration sets.
        find="min_lr=optim.min_lr,\n        weight_decay",
        replace="min_lr=0.0,\n        weight_decay",
        tests=STEPS,
    ),
    Fault(
        OPTIMIZER,
        "no weight decay",
        find="start_wd=optim.weight_decay,\n        end_wd=optim.weight_decay,",
        replace="start_wd=0.0,\n        end_wd=0.0,",
        tests=STEPS,
    ),
    Fault(OPTIMIZER, "another beta1", find="adam_beta1=optim.betas[0]", replace="adam_beta1=0.9", tests=STEPS),
    Fault(OPTIMIZER, "another beta2", find="adam_beta2=optim.betas[1]", replace="adam_beta2=0.999", tests=STEPS),
    Fault(OPTIMIZER, "another epsilon", find="adam_eps=optim.eps", replace="adam_eps=1e-8", tests=STEPS),
    Fault(
        OPTIMIZER,
        "the first step has the learning rate of no step",
        find="schedule.step(increment=1)  #",
        replace="schedule.step(increment=0)  #",
        tests=STEPS,
    ),
    Fault(
        STATE,
        "the schedule stands still",
        find="self.schedule.step(increment=1)\n        return",
        replace="self.schedule.step(increment=0)\n        return",
        tests=STEPS,
    ),
    Fault(
        STATE,
        "gradients of the step before are kept",
        find="chunk.zero_grad_buffer()",
        replace="pass",
        tests=STEPS,
    ),
    Fault(
        OPTIMIZER_STATE,
        "resume ignores the float32 main weights",
        find="parameter.data.copy_(value)",
        replace="pass",
        tests=RESUME_BF16,
    ),
    Fault(
        OPTIMIZER_STATE,
        "main weights go through bf16 into the checkpoint",
        find='tensors[f"{index}.{number}.weight"] = parameter.data',
        replace='tensors[f"{index}.{number}.weight"] = parameter.data.bfloat16().float()',
        tests=RESUME_BF16,
    ),
    Fault(
        OPTIMIZER_STATE,
        "resume forgets Adam's moments",
        find="inner.state[parameter][name] = value if",
        replace="_ = value if",
        tests=RESUME,
    ),
    Fault(
        OPTIMIZER_STATE,
        "resume starts the learning-rate schedule again",
        find='state.schedule.load_state_dict(scalars["schedule"])',
        replace="pass",
        tests=RESUME,
    ),
    Fault(
        CHECKPOINTS,
        "resume starts the samples again",
        find='state.position = Position(**manifest.extra["position"])',
        replace='state.position = Position(step=manifest.extra["position"]["step"])',
        tests=RESUME,
    ),
    Fault(
        CHECKPOINTS,
        "a damaged training checkpoint is resumed from",
        find="            verify_files(folder, manifest, part",
        replace="            check_sizes(folder, manifest) if True else verify_files(folder, manifest, part",
        tests=RESUME,
    ),
    Fault(
        CHECKPOINTS,
        "only the damage that rank 0 finds counts",
        find="if not found:",
        replace="if not found or self._damage(self.path / name) is None:",
        tests=f"{TEST_CHECKPOINTS} -k another_rank",
    ),
    Fault(
        "minitron_nemo/training/read_ahead.py",
        "what was read ahead is given whatever is asked for",
        find="waiting is not None and waiting[0] == start",
        replace="waiting is not None",
        tests="tests/unit/test_read_ahead.py",
    ),
    Fault(
        CHECKPOINTS,
        "a checkpoint is resumed under another layout",
        find="!= self.layout",
        replace="is None",
        tests="tests/distributed/test_resume.py -k another_layout",
    ),
    Fault(
        CHECKPOINTS,
        "checkpoints of another configuration are resumed and removed",
        find="if _fingerprint(folder) == self.fingerprint",
        replace="if _fingerprint(folder)",
        tests=TEST_CHECKPOINTS,
    ),
    Fault(
        CHECKPOINTS,
        "old training checkpoints stay",
        find="[: -self.keep]",
        replace="[:0]",
        tests=RESUME_BF16,
    ),
    Fault(
        "minitron_nemo/training/metrics.py",
        "a resumed run loses the record of its checkpoint's step",
        find='["step"] <= resumed_step',
        replace='["step"] < resumed_step',
        tests=TEST_CHECKPOINTS,
    ),
    Fault(
        "minitron_nemo/evaluation/perplexity.py",
        "in an evaluation every data-parallel rank does share 0",
        find="share.first_samples(groups.dp_rank)",
        replace="share.first_samples(0)",
        tests=f"{COVER} -k evaluation",
    ),
    Fault(
        "minitron_nemo/evaluation/perplexity.py",
        "perplexity is of bits",
        find="math.exp(min(",
        replace="2 ** (min(",
        tests=f"{RIGHT_MODELS} -k last_validation",
    ),
    Fault(
        "minitron_nemo/steps/distillation.py",
        "the student's start is its own teacher",
        find="{role: open_nemo(path) for role",
        replace="{role: open_nemo(section.checkpoint) for role",
        tests=f"{RIGHT_MODELS} -k first_step",
    ),
    Fault(
        "recipes/distill.py",
        "the teacher is trained in the student's place",
        find="student = open_nemo(section.checkpoint)",
        replace="student = open_nemo(section.teacher)",
        tests=f"{RIGHT_MODELS} -k first_step",
    ),
    Fault(
        "recipes/evaluate.py",
        "the model is compared with itself",
        find="open_nemo(section.reference)",
        replace="open_nemo(section.checkpoint)",
        tests=f"{RIGHT_MODELS} -k last_validation",
    ),
    Fault(
        "recipes/correct_teacher.py",
        "correction corrects the model that distillation starts from",
        find="teacher = open_nemo(section.checkpoint)",
        replace="teacher = open_nemo(config.distill.checkpoint)",
        tests=f"{RIGHT_MODELS} -k correction",
    ),
    Fault(
        "minitron_nemo/steps/inputs.py",
        "input models are not hashed",
        find="verify=is_main_process()",
        replace="verify=False",
        tests=f"{RIGHT_MODELS} -k flipped",
    ),
    Fault(
        "minitron_nemo/engine/model.py",
        "the head is read before what other ranks updated of it is there",
        find="return self.output_layer()",
        replace="return self._shared_or_own_weight()",
        tests="tests/distributed/test_against_torch.py -k 'steps and dp2'",
    ),
    Fault(
        OPTIMIZER,
        "what other ranks updated last is saved as it was before",
        find="chunk.start_param_sync(force_sync=True)",
        replace="pass",
        tests="tests/distributed/test_resume.py -k whole_where",
    ),
    Fault(
        "minitron_nemo/config/rules.py",
        "parameters are gathered late without the distributed optimizer",
        find="getattr(parallel, name) is False:",
        replace="False:",
        tests="tests/unit/test_config.py -k overlap",
    ),
    Fault(
        TRAFFIC,
        "what is recomputed is sent once",
        find='(2 if again.method == "uniform" else 1)',
        replace="1",
        tests=f"{TEST_TRAFFIC} -k recomputed",
    ),
    Fault(
        TRAFFIC,
        "the inputs of a backward pass need no gathering",
        find='_add(found, layout, "tp", ALL_GATHER, hidden * 2 * layers)',
        replace="pass",
        tests=f"{TEST_TRAFFIC} -k recomputed",
    ),
    Fault(
        TRAFFIC,
        "gradients are reduced in the precision of the weights",
        find="REDUCE_SCATTER, 4 * parameters",
        replace="REDUCE_SCATTER, 2 * parameters",
        tests=f"{TEST_TRAFFIC} -k dp2",
    ),
]
