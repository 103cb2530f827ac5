"""Where a model is, and reading what Hugging Face stores there: config, tokenizer, weights.

What cannot be attributed exactly is refused here by name, before its weights are read.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from circuit_tracer_qk.base import hub
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import read_file
from circuit_tracer_qk.base.memory import is_full, too_large
from circuit_tracer_qk.model.gguf_tokenizer import read_gemma_tokenizer

ALIBI = "its attention adds ALiBi position biases, which QK attributions do not decompose"
REFUSED = {
    "bloom": ALIBI,
    "mpt": ALIBI,
    "t5": "its attention adds relative position biases and it is an encoder-decoder",
    "mt5": "its attention adds relative position biases and it is an encoder-decoder",
    "gpt_oss": "its attention has sinks, a softmax term that no key carries",
    "olmo2": "it norms only after attention and MLP, with a QK norm over whole vectors",
    "olmo3": "it norms only after attention and MLP, with a QK norm over whole vectors",
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
MODALITIES = ("vision_config", "audio_config")
TEXT_PART = {"gemma3": "gemma3_text"}  # multimodal types whose text part is a model by itself
# where newer files of the whole have its weights; transformers knows the older ones
TEXT_PART_KEYS = {r"^model\.language_model\.": "model."}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    "spiece.model",
)
TOO_LARGE = "give a smaller one (dtype bfloat16 halves the weights), or check its config.json"
JSON_BYTES = 2**28  # how long a JSON file of a model may be: vocabularies and lists of weights are
# what each part is read from, to say which file is broken when it cannot be
FILES = {
    "config.json": ("config.json",),
    "tokenizer": ("tokenizer*.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"),
    "weights": ("*.safetensors", "*.bin", "*.index.json"),
}


@dataclass(frozen=True)
class Source:
    """Where a model is read from.

    Attributes:
        path: what Hugging Face loads: an absolute folder or a hub id.
        title: the name for people: the folder's or file's name or the hub id.
        local: whether ``path`` is a folder.
        revision: the hub revision; None for a folder.
        gguf: the file in the folder that holds all of the model; None for Hugging Face's own files.
    """

    path: str
    title: str
    local: bool
    revision: str | None = None
    gguf: str | None = None

    @classmethod
    def find(cls, name: str) -> Source:
        """Tells a folder from a GGUF file from a hub id from a TransformerLens name."""
        from transformer_lens.loading_from_pretrained import get_official_model_name

        folder = Path(name).expanduser()
        if os.path.isdir(folder):
            folder = folder.resolve()
            file = gguf_file_in(folder)
            if file is not None:
                check_gguf(file)
            return cls(str(folder), folder.name, local=True, gguf=file and file.name)
        if is_gguf(folder) and os.path.lexists(folder):
            check_gguf(folder)
            path = folder.absolute()  # links of a cache lie beside one another
            return cls(str(path.parent), path.stem, local=True, gguf=path.name)
        hub_id, _, revision = name.partition("@")
        if os.path.exists(folder) or not _is_hub_id(hub_id):
            raise UserError(
                f"{name} is not a folder; give an existing Hugging Face folder, a .gguf file, a hub id "
                "org/name[@revision] or a TransformerLens name such as gpt2."
            )
        try:
            hub_id = get_official_model_name(hub_id)
        except ValueError as error:
            if "/" not in hub_id:
                raise UserError(
                    f"{name} is neither a folder nor a name that TransformerLens knows; give an "
                    "existing Hugging Face folder or a hub id org/name[@revision]."
                ) from error
        return cls(hub_id, hub_id, local=False, revision=revision or None)

    def load(self, loader: Callable[..., Any], **options: Any) -> Any:
        """Calls a ``from_pretrained``: from the disk if it can, else from the hub."""
        if self.gguf is not None:
            options["gguf_file"] = self.gguf
        load = functools.partial(loader, self.path, revision=self.revision, **options)
        if self.local:
            return load(local_files_only=True)
        try:
            return load(local_files_only=True)
        except (OSError, ValueError, AttributeError, TypeError):
            # the last two: transformers opens the path None of weights or vocabularies not cached
            return load()

    def failure(self, what: str, error: Exception) -> UserError:
        """The user's message for a hub request that failed, or for a file that is broken."""
        from huggingface_hub import errors

        if is_full(error):
            return too_large(f"the model {self.title}", TOO_LARGE, error)
        if self.gguf is not None:
            return UserError(
                f"{Path(self.path, self.gguf)} cannot be read ({first_line(error)}): give a whole "
                f"GGUF file of an architecture that transformers reads, or a Hugging Face folder."
            )
        causes = (error, error.__cause__, error.__context__)
        broken = _broken_file(self, FILES[what])
        if broken is not None:
            file, problem = broken
            # the hub's client would link the same broken content again
            way_out = "copy" if self.local else f"delete {file.resolve()}"
            joint = "or" if self.local else "and"
            return UserError(f"{file} {problem}; {way_out} {joint} download it again.")
        if self.local:
            return UserError(f"The {what} of {self.path} cannot be read: {first_line(error)}.")
        if any(isinstance(c, errors.RevisionNotFoundError) for c in causes):
            return UserError(f"{self.title} has no revision {self.revision} on the hub.")
        if any(isinstance(c, errors.GatedRepoError) for c in causes):
            return UserError(
                f"{self.title} is gated on the hub; accept its terms there and run "
                "`huggingface-cli login`, or give a local folder."
            )
        if any(isinstance(c, errors.RepositoryNotFoundError) for c in causes):
            return UserError(
                f"{self.title} is not on the hub (or is private); check the name, run "
                "`huggingface-cli login`, or give a local folder."
            )
        missing = hub.missing_revision(self.path, self.revision)
        if missing is not None:
            return UserError(missing)
        if any(isinstance(c, errors.LocalEntryNotFoundError) for c in causes):
            return UserError(
                f"The {what} of {self.title} is not in the local cache and the Hugging Face hub "
                "cannot be reached; check the name and the network, or give a local folder."
            )
        if _partly_cached(self, what):
            return UserError(
                f"The local cache lacks files for the {what} of {self.title} and the Hugging Face "
                "hub does not give them; check the network and that the hub has them, or give a "
                "local folder."
            )
        return UserError(f"The {what} of {self.title} cannot be loaded: {first_line(error)}.")


def is_gguf(path: Path) -> bool:
    """Whether a path is named as GGUF files are."""
    return path.suffix.lower() == ".gguf"


def gguf_file_in(folder: Path) -> Path | None:
    """The GGUF file that holds a folder's model; None where Hugging Face's own files are there.

    Raises:
        UserError: there are several.
    """
    if (folder / "config.json").exists():
        return None
    files = sorted(file for file in folder.iterdir() if is_gguf(file))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise UserError(f"{folder} holds several GGUF files ({names}): give the path of one.")
    return files[0] if files else None


def check_gguf(file: Path) -> None:
    """Refuse what is no whole GGUF file, and what reading one needs.

    Raises:
        UserError: it is another kind of file, one part of several, or `gguf` is not installed.
    """
    if not file.is_file():
        raise UserError(f"{file} is no regular file: give a GGUF file.")
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error
    if magic != b"GGUF":
        raise UserError(f"{file} is no GGUF file, or damaged: it does not begin with GGUF.")
    if re.search(r"-[0-9]{5}-of-[0-9]{5}$", file.stem):
        raise UserError(
            f"{file} is one part of several, which transformers does not read: join them "
            "(llama-gguf-split --merge), or give a Hugging Face folder."
        )
    if find_spec("gguf") is None:
        raise UserError(
            "GGUF files are read with the package gguf, which is not installed: pip install "
            "'circuit-tracer-qk[gguf]' (or gguf itself)."
        )


def _is_hub_id(name: str) -> bool:
    """Whether the hub's client would take ``name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # pyright: ignore[reportPrivateImportUsage]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_config(source: Source) -> Any:
    """The Hugging Face configuration of ``source``, or of its text part."""
    from transformers import AutoConfig

    if source.local:
        _refuse_devices(Path(source.path))
        _refuse_adapter(Path(source.path))
    if source.local and not source.gguf and not (Path(source.path) / "config.json").is_file():
        raise UserError(
            f"The folder {source.path} has no config.json; give a folder written by Hugging "
            "Face's save_pretrained, or a hub id org/name."
        )
    try:
        config = source.load(AutoConfig.from_pretrained)
        if config.model_type not in TEXT_PART:
            return config
        text = config.get_text_config()
        if hasattr(config, "quantization_config"):  # whose weights are refused
            text.quantization_config = config.quantization_config
        return text
    except Exception as error:  # whatever a field of the wrong type leads to
        raise source.failure("config.json", error) from error


def _refuse_devices(folder: Path) -> None:
    """Refuse a folder in which a file that is read waits for a writer or never ends."""
    names = {pattern for patterns in FILES.values() for pattern in patterns} | {*TOKENIZER_FILES}
    for file in (file for name in sorted(names) for file in folder.glob(name)):
        if file.exists() and not file.is_file():
            raise UserError(f"{file} is no regular file; give a folder of whole files.")


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter (LoRA) and no weights of the model that it changes."""
    path = folder / "adapter_config.json"
    weights = (file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    if not path.is_file() or any(not file.name.startswith("adapter_") for file in weights):
        return
    try:
        base = json.loads(read_file(path, JSON_BYTES))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    raise UserError(
        f"{folder} is an adapter{f' of {base}' if base else ''} without the weights of its base "
        "model: merge the two (merge_and_unload in peft), save the result and give that folder."
    )


def architecture_of(source: Source, config: Any) -> str:
    """The class that Hugging Face's AutoModelForCausalLM makes of ``config``, if not refused."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or kind
    reason = REFUSED.get(kind)
    experts = (getattr(config, name, None) for name in EXPERTS)
    if reason is None and any(isinstance(n, int) and n > 1 for n in experts):
        reason = "it is a mixture of experts, whose routing has no fixed MLP"
    if reason is None and any(getattr(config, name, None) for name in MODALITIES):
        reason = "it is multimodal; save its language model alone as a text-only folder"
    if reason is None and getattr(config, "use_bidirectional_attention", False):
        reason = "its attention is bidirectional"
    if reason is None and getattr(config, "quantization_config", None):
        reason = "its weights are quantised; use the unquantised model"
    if reason is not None:
        raise UserError(f"{source.title} ({architecture}) is not supported: {reason}.")
    return architecture


def read_tokenizer(source: Source, kind: str) -> Any | None:
    """The tokenizer, with a BOS put in front by default as TransformerLens wants it; else None.

    Args:
        source: the model.
        kind: its ``model_type``.
    """
    from transformers import AutoTokenizer

    files = source.local and not source.gguf
    if files and not any((Path(source.path) / f).exists() for f in TOKENIZER_FILES):
        return None
    try:
        if source.gguf is not None and kind.startswith("gemma"):
            return read_gemma_tokenizer(Path(source.path, source.gguf))
        tokenizer = source.load(AutoTokenizer.from_pretrained)
        # TransformerLens loads the tokenizer a second time by name, without its revision, unless
        # it was made this way.
        if tokenizer.bos_token is not None and not getattr(tokenizer, "add_bos_token", False):
            tokenizer = source.load(AutoTokenizer.from_pretrained, add_bos_token=True)
    except Exception as error:
        raise source.failure("tokenizer", error) from error
    return tokenizer


def read_weights(source: Source, config: Any, dtype: torch.dtype) -> Any:
    """Hugging Face's model on the CPU in ``dtype``, every weight found, of its shape, finite."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = source.load(
            AutoModelForCausalLM.from_pretrained,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            key_mapping=TEXT_PART_KEYS if config.model_type in TEXT_PART.values() else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise source.failure("weights", error) from error
    if info["mismatched_keys"]:
        key = sorted(info["mismatched_keys"])[0]
        stored = _stored_shape(source, key)
        raise UserError(
            f"The weight {key} of {source.title} should have shape "
            f"{list(model.state_dict()[key].shape)} by its config.json, found {stored}; the "
            "configuration and the weights do not belong together."
        )
    if info["missing_keys"]:
        raise UserError(
            f"The weight {sorted(info['missing_keys'])[0]} is missing from {source.title}; copy "
            "or download the model again."
        )
    for key, tensor in model.named_parameters():
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise UserError(
                f"The weight {key} of {source.title} contains NaN or infinity; copy or download "
                "the model again."
            )
    return model.eval().requires_grad_(False)


def _folder(source: Source) -> Path | None:
    """Where the files are: the folder, or the hub's snapshot in the cache."""
    return Path(source.path) if source.local else hub.snapshot(source.path, source.revision)


def _broken_file(source: Source, patterns: tuple[str, ...]) -> tuple[Path, str] | None:
    """The first of a model's files that is not what its name says, and what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    folder = _folder(source)
    if folder is None:
        return None
    # a link whose target is gone from the cache is a missing file, not a broken one
    files = (file for pattern in patterns for file in sorted(folder.glob(pattern)))
    for file in filter(Path.is_file, files):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError:
                return file, "is truncated or not a safetensors file"
        elif file.suffix == ".json":
            try:
                json.loads(read_file(file, JSON_BYTES))
            except (ValueError, RecursionError):
                return file, "is truncated or not JSON"
            except OSError as error:
                return file, f"cannot be read ({error.strerror})"
        else:
            with file.open("rb") as opened:
                start = opened.read(2)
            # PyTorch's files are archives with their index at the end; the oldest are pickles
            if start in (b"", b"PK") and not zipfile.is_zipfile(file):
                return file, "is truncated"
    return None


def _partly_cached(source: Source, what: str) -> bool:
    """Whether the hub's cache lacks files without which ``what`` cannot be read."""
    folder = _folder(source)
    names = {p.name for p in folder.iterdir() if p.is_file()} if folder is not None else set()
    if what == "config.json":
        return what not in names
    if what == "tokenizer":
        return not names & set(TOKENIZER_FILES) - {"tokenizer_config.json"}
    for index in (folder or Path()).glob("*.index.json") if names else ():
        shards = set(json.loads(read_file(index, JSON_BYTES)).get("weight_map", {}).values())
        return not shards <= names
    return not any(name.endswith((".safetensors", ".bin")) for name in names)


def _stored_shape(source: Source, key: str) -> list[int] | str:
    """The shape under which a folder stores the weight ``key`` (a prefix may be absent there)."""
    from safetensors import safe_open

    folder = _folder(source)
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        with safe_open(file, "pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - not a dict
                if key == stored or key.endswith("." + stored):
                    return tensors.get_slice(stored).get_shape()
    return "another"


def first_line(error: Exception) -> str:
    """The first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]:.200}".rstrip(".")
