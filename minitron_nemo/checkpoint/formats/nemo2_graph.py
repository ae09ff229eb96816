"""`context/io.json` of NeMo 2: the calls that build a model, in the JSON of the library Fiddle. Written, never read.

Source: files that NeMo 2.7.3 wrote, with Fiddle's serialization of version 0.0.1.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """A class or function, by its full name, and the arguments that it is called with; without them it is itself."""

    target: str
    arguments: Mapping[str, Any] | None = None


def graph_of(root: Call) -> dict[str, Any]:
    """The JSON object of a call whose arguments are plain values and calls."""
    graph = _Graph()
    reference = graph.add(root, "<root>")
    references = dict(sorted(graph.references.items()))
    return {"root": reference, "objects": graph.objects, "refcounts": references, "version": "0.0.1"}


def _named(target: str) -> dict[str, Any]:
    module, _, name = target.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}


def _container(kind: str, items: list[Any]) -> dict[str, Any]:
    numbered = [[f"Index(index={index})", item] for index, item in enumerate(items)]
    return {"type": _named(f"builtins.{kind}"), "items": numbered, "metadata": None}


@dataclass
class _Graph:
    """Objects by key; every one that others refer to is counted."""

    objects: dict[str, Any] = field(default_factory=dict)
    references: Counter[str] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)

    def add(self, value: Any, path: str) -> Any:
        """What stands for a value at a place of the graph."""
        if not isinstance(value, Call):
            return {"type": "leaf", "value": value, "paths": [path]}
        if value.arguments is None:
            return {**_named(value.target), "paths": [path]}
        items = [[f"Attr(name='{name}')", self.add(each, f"{path}.{name}")] for name, each in value.arguments.items()]
        history = {**_container("dict", []), "metadata": _container("tuple", [])}
        described = {
            "fn_or_cls": _named(value.target),
            "argument_names": self._put("tuple", _container("tuple", list(value.arguments))),
            "argument_tags": self._put("dict", history),
            "argument_history": self._put("dict", history),
        }
        metadata = {
            "type": _named("fiddle._src.config.BuildableTraverserMetadata"),
            "items": [[f"Attr(name='{name}')", each] for name, each in described.items()],
            "metadata": _named("fiddle._src.config.BuildableTraverserMetadata"),
        }
        config = {
            "type": _named("fiddle._src.config.Config"),
            "items": items,
            "metadata": self._put("buildable_traverser_metadata", metadata),
            "paths": [path],
        }
        name = value.target.rpartition(".")[2]
        return self._put(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower(), config)

    def _put(self, kind: str, described: dict[str, Any]) -> dict[str, Any]:
        self.numbers[kind] += 1
        key = f"{kind}_{self.numbers[kind]}"
        self.objects[key] = described
        self.references[key] += 1
        return {"type": "ref", "key": key}
