"""What licences of teachers ask of a model made from one: a notice, words to show, and how its name must begin.

Facts, not advice: the text of the licence decides. The sources are sections 1.b of the Llama licences, 3 of NVIDIA's, 3
and 5 of Qwen's (4 of its research licence), as quoted by who distributes such models. Which model has which licence is
what its page on the hub says.
"""

from dataclasses import dataclass

from minitron_nemo.artefacts.upstream import Upstream

META = "Copyright \u00a9 Meta Platforms, Inc. All Rights Reserved."


@dataclass(frozen=True)
class Licence:
    """One licence by its name on the hub.

    `notice` is the sentence that it wants in a file called NOTICE, `shown` what the page of a derived model must show,
    `prefix` how its name must begin (a space may stand for the dash), `limits` what else a reader must know at once.
    `is_other`: the hub lists it as `other`, with its name beside it.
    """

    title: str
    link: str
    notice: str | None = None
    shown: str | None = None
    prefix: str | None = None
    limits: str | None = None
    is_other: bool = False


def _llama(version: str) -> Licence:
    place = "llama" + version.replace(".", "_")
    return Licence(
        f"Llama {version} Community License",
        f"https://github.com/meta-llama/llama-models/blob/main/models/{place}/LICENSE",
        notice=f"Llama {version} is licensed under the Llama {version} Community License, {META}",
        shown="Built with Llama",
        prefix="Llama",
    )


LICENCES = {
    "apache-2.0": Licence("Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    "llama2": Licence(
        "Llama 2 Community License",
        "https://ai.meta.com/llama/license/",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
        "Reserved.",
    ),
    "llama3": Licence(
        "Meta Llama 3 Community License",
        "https://llama.meta.com/llama3/license/",
        notice=f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {META}",
        shown="Built with Meta Llama 3",
        prefix="Llama-3",
    ),
    "llama3.1": _llama("3.1"),
    "llama3.2": _llama("3.2"),
    "llama3.3": _llama("3.3"),
    "nvidia-open-model-license": Licence(
        "NVIDIA Open Model License",
        "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
        notice="Licensed by NVIDIA Corporation under the NVIDIA Open Model License",
        is_other=True,
    ),
    "qwen": Licence(
        "Qwen License Agreement",
        "https://huggingface.co/Qwen/Qwen2.5-72B/blob/main/LICENSE",
        notice="Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved.",
        shown="Built with Qwen",
        is_other=True,
    ),
    "qwen-research": Licence(
        "Qwen Research License Agreement",
        "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
        notice="Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights "
        "Reserved.",
        shown="Built with Qwen",
        limits="For research and evaluation, not for commercial use.",
        is_other=True,
    ),
}

# Where the page of a model was not read: names on the hub begin with these, the first that fits.
OF_NAMES = (
    ("meta-llama/Llama-2-", "llama2"),
    ("meta-llama/Meta-Llama-3-", "llama3"),
    ("meta-llama/Llama-3.1-", "llama3.1"),
    ("meta-llama/Meta-Llama-3.1-", "llama3.1"),
    ("meta-llama/Llama-3.2-", "llama3.2"),
    ("mistralai/Mistral-7B-", "apache-2.0"),
    ("mistralai/Mistral-Nemo-", "apache-2.0"),
    ("nvidia/Minitron-", "nvidia-open-model-license"),
    ("nvidia/Nemotron-4-", "nvidia-open-model-license"),
    ("Qwen/Qwen2.5-3B", "qwen-research"),
    ("Qwen/Qwen2.5-72B", "qwen"),
    ("Qwen/Qwen2.5-", "apache-2.0"),
    ("Qwen/Qwen3-", "apache-2.0"),
)


def licence_of(upstream: Upstream) -> str | None:
    """The name of a model's licence: what its page said, else what is known of models of such a name; None: unknown."""
    if upstream.licence is not None or upstream.name is None:
        return upstream.licence
    return next((licence for start, licence in OF_NAMES if upstream.name.startswith(start)), None)
