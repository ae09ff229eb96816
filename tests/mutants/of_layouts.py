"""Faults in what interleaved pipelines and context parallelism add to every part."""

from mutants.fault import Fault

LAYOUT = "minitron_nemo/distributed/layout.py"
MODEL = "minitron_nemo/engine/model.py"
ATTENTION = "minitron_nemo/engine/attention.py"
WIDER = "tests/distributed/test_interleaved_and_context.py"
GRADIENTS_OF_PARTS = "tests/distributed/test_against_torch.py -k 'gradients and cp2'"
ACCELERATIONS = "tests/unit/test_accelerations.py"
KERNELS = "tests/unit/test_kernels.py"
INTERLEAVED = f"{WIDER} -k 'pp2_vpp2 and not tp2'"

FAULTS = [
    Fault(
        LAYOUT,
        "the interleaved pipeline is given any number of micro-batches",
        find="if self.vpp > 1 and num_microbatches % self.pp:",
        replace="if False:",
        tests="tests/unit/test_layout.py -k interleaved",
    ),
    Fault(
        LAYOUT,
        "a stage's chunks are neighbours",
        find="list(range(stage, self.pp * self.vpp, self.pp))",
        replace="list(range(stage * self.vpp, (stage + 1) * self.vpp))",
        tests="tests/unit/test_layout.py -k chunks",
    ),
    Fault(
        MODEL,
        "every chunk of the last stage ends in the head",
        find="groups.is_last_stage and number == groups.layout.vpp - 1",
        replace="groups.is_last_stage",
        tests=INTERLEAVED,
    ),
    Fault(
        "minitron_nemo/engine/weights.py",
        "the layers of every chunk are numbered like those of the first",
        find="_logical_name(name, _first_layer(chunk))",
        replace="_logical_name(name, _first_layer(model.gpts()[0]))",
        tests=INTERLEAVED,
    ),
    Fault(
        "minitron_nemo/training/state.py",
        "gradients of later chunks are kept from the step before",
        find="for chunk in self.model:",
        replace="for chunk in self.model[:1]:",
        tests=INTERLEAVED,
    ),
    Fault(
        "minitron_nemo/engine/optimizer.py",
        "later chunks are saved as they were before the last step",
        find="    for chunk in model:\n        if isinstance(chunk",
        replace="    for chunk in model[:1]:\n        if isinstance(chunk",
        tests=f"{WIDER} -k tp2_pp2_vpp2_cp2",
    ),
    Fault(
        "minitron_nemo/steps/stages.py",
        "the dry run takes an interleaved pipeline for a plain one",
        find="(1, pp - stage - 1) if vpp == 1 else",
        replace="(1, pp - stage - 1) if True else",
        tests=INTERLEAVED,
    ),
    Fault(
        "minitron_nemo/steps/estimate.py",
        "an interleaved pipeline is asked for any samples between two saves",
        find="(size := len(layout.share_of(stretch, rank))) % step",
        replace="(size := len(layout.share_of(stretch, rank))) % 1",
        tests=f"{WIDER} -k between_two_saves",
    ),
    Fault(
        LAYOUT,
        "context ranks have neighbouring chunks, which are not those of the rotary embedding",
        find="return rank, 2 * size - 1 - rank",
        replace="return 2 * rank, 2 * rank + 1",
        tests=GRADIENTS_OF_PARTS,
    ),
    Fault(
        ATTENTION,
        "keys of context ranks are in the order of the ranks",
        find="chunks[ctx.gathered.index(chunk)] for chunk",
        replace="chunks[chunk] for chunk",
        tests=GRADIENTS_OF_PARTS,
    ),
    Fault(
        ATTENTION,
        "a rank keeps its own gradient of its keys and forgets that of the others",
        find="distributed.reduce_scatter_tensor(grad_TBGD, by_rank, group=ctx.group)",
        replace="grad_TBGD.copy_(by_rank.chunk(ctx.group.size())[ctx.group.rank()])",
        tests=GRADIENTS_OF_PARTS,
    ),
    Fault(
        ATTENTION,
        "a rank's later chunk does not see its own tokens",
        find="seen = (chunk + 1) * len(query_QBHD)",
        replace="seen = max(chunk, 1) * len(query_QBHD)",
        tests=GRADIENTS_OF_PARTS,
    ),
    Fault(
        ATTENTION,
        "documents are told apart by the places that a sequence of this rank alone would have",
        find="mask_apart(documents_BS, own_positions(documents_BS.shape[1], context)",
        replace="mask_apart(documents_BS, torch.arange(len(own_positions(documents_BS.shape[1], context)))",
        tests=f"{WIDER} -k cp2_dp2",
    ),
    Fault(
        "minitron_nemo/importance/accumulators.py",
        "parts of a sequence are squared before they are added",
        find="Spread.PARTIAL, self.groups.cp)",
        replace="Spread.REPLICATED, self.groups.cp)",
        tests=f"{WIDER} -k cp2_dp2",
    ),
    Fault(
        "minitron_nemo/distributed/groups.py",
        "the loss that is logged is that of one context rank",
        find="if self.batch is not None:",
        replace="if self.dp is not None:",
        tests="tests/distributed/test_against_torch.py -k 'steps and cp2'",
    ),
    Fault(
        "minitron_nemo/config/rules.py",
        "positions that begin anew are promised where documents see each other",
        find="if config.data.reset_position_ids and not config.data.reset_attention_mask:",
        replace="if False:",
        tests="tests/unit/test_config.py -k begin_anew",
    ),
    Fault(
        "minitron_nemo/config/parallel.py",
        "layers that are recomputed together run past the end of a chunk",
        find='if self.method == "uniform" and any(',
        replace='if self.method == "never" and any(',
        tests="tests/unit/test_config.py -k fill_every_chunk",
    ),
    Fault(
        MODEL,
        "the parts of a layer that are recomputed are always the attention",
        find="recompute_modules=list(recompute.modules) or None",
        replace="recompute_modules=None",
        tests="tests/distributed/test_recompute.py -x",
    ),
    Fault(
        "minitron_nemo/engine/offload.py",
        "weights go to the host with the activations",
        find=" or x.untyped_storage().data_ptr() in weights",
        replace="",
        tests="tests/distributed/test_recompute.py",
    ),
    Fault(
        MODEL,
        "no layer's activations are offloaded",
        find="model.decoder.layers[: options.cpu_offloading_num_layers]",
        replace="model.decoder.layers[:0]",
        tests="tests/distributed/test_recompute.py",
    ),
    Fault(
        MODEL,
        "a model that is not trained overlaps in the buffers of the one that is",
        find="cpu_offloading_num_layers=0, tp_comm_overlap=False,",
        replace="cpu_offloading_num_layers=0,",
        tests=f"{ACCELERATIONS} -k words",
    ),
    Fault(
        "minitron_nemo/steps/options.py",
        "eight bits are asked for where nothing can compute them",
        find="if any(engine.values()) and",
        replace="if False and",
        tests=f"{ACCELERATIONS} -k without",
    ),
    Fault(
        "minitron_nemo/steps/settings.py",
        "a model made in eight bits passes for one that was not",
        find='"precision": precision_in_words(config)',
        replace='"precision": precision_of(config).value',
        tests=f"{ACCELERATIONS} -k eight",
    ),
    Fault(
        "minitron_nemo/steps/estimate.py",
        "sums heard in eight bits add up to others",
        find="precision=precision_in_words(config),",
        replace='precision="bf16",',
        tests=f"{ACCELERATIONS} -k eight",
    ),
    Fault(
        "minitron_nemo/engine/accelerations.py",
        "buffers have the shape of a whole sequence where ranks share it",
        find="seq_length // groups.layout.cp * micro_batch_size",
        replace="seq_length * micro_batch_size",
        tests=f"{ACCELERATIONS} -k buffers",
    ),
    *(
        Fault("minitron_nemo/engine/rope_kernel.py", what, find=find, replace=replace, tests=f"{KERNELS} -k turns")
        for what, find, replace in (
            ("the gradient of a rotation is turned further", "if BACK:", "if not BACK:"),
            (
                "channels that are not turned are left unwritten",
                "(rest >= 2 * half)[None, :] &",
                "(rest < 0)[None, :] &",
            ),
            ("heads lie one after the other", "head * stride_h", "head * channels"),
            ("the second half is turned by the angles of the first", "place * 2 * half + half + one", "low"),
        )
    ),
]
