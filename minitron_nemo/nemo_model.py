"""NeMo's model class over the engine: what NeMo code can restore, hold, call and save. The one door to `nemo`.

Importing this module takes seconds, because NeMo brings Lightning, transformers and more along; so it is imported where
it is used, and the recipes never do.

Shapes: B samples, S tokens of each, V the vocabulary.
"""

import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nemo.core.classes import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils.app_state import AppState
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents, contents_of, has, read_small
from minitron_nemo.artefacts.disk import writing
from minitron_nemo.artefacts.lineage import ancestors
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, manifest_sha256
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.paths import contained_file
from minitron_nemo.artefacts.publishing import fsync
from minitron_nemo.checkpoint.formats.known import open_checkpoint
from minitron_nemo.checkpoint.formats.nemo import KIND, config_values, write_nemo
from minitron_nemo.checkpoint.formats.nemo_state_dict import TOKENIZER_KEYS, shape_of_config
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import ended, stream
from minitron_nemo.data.tokenizer import Tokenizer, load_tokenizer
from minitron_nemo.distributed.ranks import is_main_process
from minitron_nemo.engine.alone import groups_alone, logical_names, logits, next_logits
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.errors import UserError
from minitron_nemo.evaluation.generation import check_generation, continued
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import logical_tensors

MODEL = "model."  # what the names of a state dict begin with: the attribute that holds the module
ARTIFACT = "nemo:"  # what NeMo puts before the name of a file that came with a .nemo
EXTRA_STATE = "_extra_state"  # what Transformer Engine keeps beside weights, of FP8; never saved here


class MinitronConnector(SaveRestoreConnector):
    """How NeMo reads and writes a `MinitronGPT`: a .nemo of these recipes, weights in shards, in a folder or one tar.

    It reads a checkpoint of any known format, so also what NeMo's own connector writes. `pack_nemo_file` says, as in
    NeMo, whether one tar is written (the default) or a folder; with `overwrite` it takes the place of an artefact that
    is there.
    """

    def __init__(self, *, overwrite: bool = False) -> None:
        super().__init__()
        self.overwrite = overwrite

    # The order of arguments is NeMo's.
    def restore_from(
        self,
        calling_cls: Any,
        restore_path: str,
        override_config_path: str | DictConfig | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> "MinitronGPT | DictConfig":
        """The model at a path, or its config alone; with `validate_access_integrity` every hash there is is checked.

        An overriding config may ask for another precision of the same shape. Weights are always read strictly.
        Raises UserError in one line for anything that is not such a model.
        """
        contents = contents_of(self.model_extracted_dir or restore_path)
        opened = open_checkpoint(contents, hashes=validate_access_integrity and not return_config)
        dtype = opened.dtype
        if override_config_path is not None:
            dtype = _overriding_dtype(override_config_path, opened.arch)
        config = OmegaConf.create(config_values(opened.arch, dtype))
        if return_config:
            return config
        _check_device(map_location)
        with _restoring(opened.tokenizer) as artifacts:
            if artifacts:
                config.tokenizer = artifacts
            instance = calling_cls(cfg=config, trainer=trainer)
        load_weights(instance.model, opened.weights, groups_alone())
        opened.weights.verify()
        if has(contents, MANIFEST_FILE):
            instance.parents, instance.lineage = {KIND: manifest_sha256(contents)}, ancestors({KIND: contents.path})
        return instance

    def save_to(self, model: Any, save_path: str) -> None:
        """Publish a model as it is in memory; UserError when something is there that must stay."""
        if not isinstance(model, MinitronGPT):
            raise UserError(f"{save_path}: a {type(model).__name__} is no MinitronGPT; NeMo's own connector saves it")
        if not is_main_process():
            return
        state = model.state_dict()
        write_nemo(
            save_path,
            model.arch,
            ((name, state[MODEL + name].cpu()) for name in logical_tensors(model.arch)),
            dtype=state[MODEL + next(iter(logical_tensors(model.arch)))].dtype,
            tokenizer=model.tokenizer_folder,
            origin=Origin.of(
                KIND,
                {"saved_by": type(model).__name__},
                parents=model.parents,
                overwrite=self.overwrite,
                lineage=model.lineage,
            ),
            packed=self.pack_nemo_file,
        )

    def extract_state_dict_from(
        self, restore_path: str, save_dir: str, split_by_module: bool = False
    ) -> dict[str, Tensor]:
        """Write the weights of a .nemo into a folder as `model_weights.ckpt`, and return them by name.

        The only module is `model`; `split_by_module` names the file `model.ckpt` and drops that word from the names.
        """
        prefix, name = ("", f"{MODEL}ckpt") if split_by_module else (MODEL, self.model_weights_ckpt)
        file = Path(save_dir) / name
        if file.exists():
            raise UserError(f"{file} exists already; move it, or give another folder")
        with ended(stream(open_checkpoint(restore_path).weights)) as tensors:
            state = {prefix + name: tensor for name, tensor in tensors}
        with writing(file, needed=sum(tensor.nbytes for tensor in state.values())):
            file.parent.mkdir(parents=True, exist_ok=True)
            temp = file.with_name(f"{name}.tmp-{secrets.token_hex(4)}")
            try:
                torch.save(state, temp)
                fsync(temp)
                temp.rename(file)
            finally:
                temp.unlink(missing_ok=True)
        return state


class MinitronGPT(ModelPT):
    """A GPT of these recipes as a NeMo model, whole in this process, on its GPU where it sees one.

    `model` is the engine's own. The config is a `model_config.yaml`, the fields of `ModelArch` and `precision`, with
    the files of a tokenizer under `tokenizer`. Built and not restored, its weights are random, each time the same.
    The names of the state dict are those of the logical tensors (docs/api.md) after `model.`, whatever layers run here.
    """

    def __init__(self, cfg: DictConfig, trainer: Any = None) -> None:
        values: Any = OmegaConf.to_container(cfg, resolve=False)
        arch, dtype = shape_of_config(values, source="the config of a MinitronGPT")
        super().__init__(cfg, trainer)
        with open_dict(self._cfg):
            # NeMo writes it down, and then refuses to restore a class that is not one of its own.
            self._cfg.pop("target", None)
        self._save_restore_connector = MinitronConnector()
        self.arch = arch
        # What the artefact that it was restored from says of itself, for the one that it is saved as.
        self.parents: dict[str, str] = {}
        self.lineage: list[dict[str, Any]] = []
        groups = groups_alone()
        self.model = build_model(arch, BuildOptions(groups=groups, dtype=dtype))
        if not self._is_model_being_restored():
            load_weights(self.model, RandomWeights(arch, seed=0), groups)
        self._logical = {f"{MODEL}{name}": f"{MODEL}{logical}" for name, logical in logical_names(self.model).items()}
        self.register_state_dict_post_hook(_to_logical_names)
        self.register_load_state_dict_pre_hook(_to_local_names)
        self.register_load_state_dict_post_hook(_without_extra_state)
        self._files = tempfile.TemporaryDirectory(prefix="minitron_nemo_tokenizer_")
        self.tokenizer = self._register_tokenizer()

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer files are as long as the model lives; empty when it has none."""
        return Path(self._files.name)

    def _register_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the config names, its files copied to where they outlive the restoring.

        A config that came with a .nemo names files of that .nemo, never others of this machine.
        """
        for key, source in (self._cfg.get("tokenizer") or {}).items():
            if key not in TOKENIZER_KEYS:
                raise UserError(f"tokenizer.{key}: unknown; a tokenizer has {', '.join(TOKENIZER_KEYS)}")
            folder, name = Path(source).parent, Path(source).name
            if self._is_model_being_restored():
                folder, name = Path(AppState().nemo_file_folder or ""), str(source).removeprefix(ARTIFACT)
            found = contained_file(folder, name)
            if found is None:
                raise UserError(f"tokenizer.{key}={source}: no such file")
            copy = self.tokenizer_folder / TOKENIZER_KEYS[key]
            copy.write_bytes(found.read_bytes())
            self.register_artifact(f"tokenizer.{key}", str(copy))
        return load_tokenizer(self.tokenizer_folder) if (self.tokenizer_folder / "tokenizer.json").exists() else None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take weights by the names of `state_dict`; UserError, before any is taken, for one of another shape.

        When `strict`, none may be missing and none be there that the model has no parameter for.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        for name, shape in shapes.items():
            if name in state_dict and (found := tuple(state_dict[name].shape)) != shape:
                raise UserError(f"{name} is {found}; this model has {shape}")
        missing, extra = sorted(set(shapes) - set(state_dict)), sorted(set(state_dict) - set(shapes))
        if strict and missing:
            raise UserError(f"{missing[0]} is not in the state dict; strict=False leaves what it lacks as it is")
        if strict and extra:
            raise UserError(f"{extra[0][:80]!a} belongs to no parameter of the model; strict=False passes over it")
        return super().load_state_dict(state_dict, strict, assign)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] at every token; differentiable, without dropout."""
        return logits(self.model, self._checked(tokens_BS))

    def generate(self, tokens_BS: Tensor, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """The tokens and up to so many more, [B, S + n]: greedy at temperature 0, else drawn, reproducibly by the seed.

        For a look at a model: there is no cache, each token costs a pass over all before it. It stops when every
        sample has said the tokenizer's end of text; without a tokenizer nothing ends it before.
        """
        tokens_BS = self._checked(tokens_BS)
        check_generation(
            tokens_BS.shape[1],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            seq_length=self.arch.seq_length,
        )
        return continued(
            lambda so_far_BS: next_logits(self.model, so_far_BS),
            tokens_BS,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            end=None if self.tokenizer is None else self.tokenizer.eod,
        )

    def generate_text(self, prompt: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
        """The text that `generate` puts after a prompt, without the prompt and the end of text."""
        if self.tokenizer is None:
            raise UserError("this model came without a tokenizer; generate() takes token ids")
        first = self.tokenizer.bos()
        ids = [*([] if first is None else [first]), *self.tokenizer.encode(prompt)]
        tokens_BS = torch.tensor([ids], dtype=torch.long)
        more = self.generate(tokens_BS, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        said = more[0, len(ids) :].tolist()
        return self.tokenizer.decode(said[:-1] if said[-1] == self.tokenizer.eod else said)

    def _checked(self, tokens_BS: Tensor) -> Tensor:
        """The tokens where the model is; UserError for what it would index memory with that is not there."""
        if tokens_BS.dim() != 2 or tokens_BS.is_floating_point() or not tokens_BS.numel():
            raise UserError(f"tokens are {tokens_BS.dtype} {tuple(tokens_BS.shape)}; give token ids, [samples, tokens]")
        if tokens_BS.shape[1] > self.arch.seq_length:
            raise UserError(f"{tokens_BS.shape[1]} tokens: the model was made for {self.arch.seq_length} positions")
        low, high = int(tokens_BS.min()), int(tokens_BS.max())
        if low < 0 or high >= self.arch.vocab_size:
            raise UserError(f"token ids from {low} to {high}: the model knows 0 to {self.arch.vocab_size - 1}")
        return tokens_BS.to(self.model.head_weight().device)

    @classmethod
    def restore_from(
        cls,
        restore_path: str,
        override_config_path: str | DictConfig | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        save_restore_connector: SaveRestoreConnector | None = None,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> "MinitronGPT | DictConfig":
        """The model in a .nemo, a folder or a packed one, in the order of arguments that NeMo has.

        `save_restore_connector` is a `MinitronConnector` unless another is given. UserError for a path with no model.
        """
        connector = save_restore_connector or MinitronConnector()
        _check_there(connector.model_extracted_dir or restore_path)
        return super().restore_from(
            str(restore_path),
            override_config_path,
            map_location,
            strict,
            return_config,
            connector,
            trainer,
            validate_access_integrity,
        )

    @classmethod
    def extract_state_dict_from(
        cls,
        restore_path: str,
        save_dir: str,
        split_by_module: bool = False,
        save_restore_connector: SaveRestoreConnector | None = None,
    ) -> dict[str, Tensor]:
        """The weights of a .nemo by name, also written into a folder; see `MinitronConnector`."""
        connector = save_restore_connector or MinitronConnector()
        _check_there(restore_path)
        return super().extract_state_dict_from(str(restore_path), save_dir, split_by_module, connector)

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """Nobody publishes models of this class."""
        return []

    def setup_training_data(self, train_data_config: Any) -> None:
        """NeMo's hook for its training loop, which is not used here."""
        raise UserError("a MinitronGPT is trained by recipes/distill.py, not by NeMo's loop; leave train_ds out")

    def setup_validation_data(self, val_data_config: Any) -> None:
        """NeMo's hook for its training loop, which is not used here."""
        raise UserError(
            "a MinitronGPT is evaluated by recipes/evaluate.py, not by NeMo's loop; leave validation_ds out"
        )


def _check_there(path: str) -> None:
    if not Path(path).expanduser().exists():
        raise UserError(f"{path} is not a .nemo model: no such file or folder")


def _overriding_dtype(config: str | DictConfig, arch: ModelArch) -> torch.dtype:
    loaded = config if isinstance(config, DictConfig) else OmegaConf.load(config)
    values: Any = OmegaConf.to_container(loaded, resolve=False)
    asked, dtype = shape_of_config(values, source="override_config_path")
    if asked != arch:
        raise UserError(f"override_config_path describes {asked.describe()}; the .nemo has {arch.describe()}")
    return dtype


def _check_device(map_location: Any) -> None:
    """Refuse another device than the one that the engine runs on in this process."""
    if map_location is None:
        return
    here = groups_alone().device
    try:
        asked = torch.device(map_location)
    except (TypeError, RuntimeError):
        raise UserError(f"map_location={map_location!r}: give a device, such as {here.type}") from None
    if asked.type != here.type or asked.index not in (None, here.index):
        raise UserError(
            f"map_location={asked}: this process runs models on {here}; torch.cuda.set_device and CUDA_VISIBLE_DEVICES "
            "(empty: the CPU) choose another, before anything is restored"
        )


@contextmanager
def _restoring(tokenizer: Contents | None) -> Iterator[dict[str, str]]:
    """NeMo's state while it builds a restored model, with the tokenizer files where it looks for artifacts.

    Gives what the config says of them: key -> `nemo:NAME`.
    """
    with tempfile.TemporaryDirectory(prefix="minitron_nemo_restore_") as folder:
        artifacts = {}
        for key, name in TOKENIZER_KEYS.items():
            if tokenizer is not None and has(tokenizer, name):
                (Path(folder) / name).write_bytes(read_small(tokenizer, name))
                artifacts[key] = f"{ARTIFACT}{name}"
        ModelPT._set_model_restore_state(is_being_restored=True, folder=folder)
        try:
            yield artifacts
        finally:
            ModelPT._set_model_restore_state(is_being_restored=False)


# Hooks of torch, with its arguments.


def _to_logical_names(module: Any, state_dict: Any, prefix: str, metadata: Any) -> None:
    for key in list(state_dict):
        name = key.removeprefix(prefix)
        value = state_dict.pop(key)
        if key.startswith(prefix) and name in module._logical:
            state_dict[prefix + module._logical[name]] = value
        elif not name.endswith(EXTRA_STATE):
            state_dict[key] = value


def _to_local_names(module: Any, state_dict: Any, prefix: str, *others: Any) -> None:
    for name, logical in module._logical.items():
        if prefix + logical in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + logical)


def _without_extra_state(module: Any, incompatible_keys: Any) -> None:
    missing = [key for key in incompatible_keys.missing_keys if not key.endswith(EXTRA_STATE)]
    incompatible_keys.missing_keys[:] = [module._logical.get(key, key) for key in missing]
