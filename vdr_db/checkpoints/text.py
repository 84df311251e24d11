"""Loading and saving encoders: folders and hub models of every layout in `layouts`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vdr_db.checkpoints.assets import fetch, is_known
from vdr_db.checkpoints.layouts import OWN_FILE, OWN_FORMAT, read_plan
from vdr_db.checkpoints.plan import Entry, Plan, TowerPlan
from vdr_db.checkpoints.weights import (
    SAFETENSORS,
    Checkpoint,
    assign,
    refuse_unexpected,
    save_weights,
)
from vdr_db.encoders.text import FromCheckpoint, PoolPadding, SparseEncoder
from vdr_db.errors import ConfigError, require
from vdr_db.kernels import Activation, Backend
from vdr_db.text.tokenization import TOKENIZER_FILES, TextTokenizer
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import FAMILIES, WeightNames
from vdr_db.towers.text import Tower
from vdr_db.towers.text_body import Body
from vdr_db.towers.text_head import make_head

__all__ = [
    "LoadOptions",
    "checked_device",
    "checked_dtype",
    "find_tokenizer",
    "load_encoder",
    "locate_model",
    "save_encoder",
    "written_folder",
]

# Everything any layout reads, and nothing else: no code, no ONNX copies, no TensorFlow weights.
_HUB_FILES = ("*.json", "*.txt", "*.safetensors")
_HUB_BIN = "pytorch_model*.bin"
_TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")

VDR_K = 768
"""Dimensions a new VDR encoder keeps, as the published ones do."""


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of `SparseEncoder.from_pretrained`, which tells what they mean."""

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    k: int | FromCheckpoint | None = "checkpoint"
    query_k: int | FromCheckpoint | None = "checkpoint"
    max_length: int | None = None
    query_max_length: int | None = None
    lexical: bool | None = None
    activation: Activation | None = None
    head: str | None = None
    vocabulary: str | None = None
    pool_padding: PoolPadding = False
    padding_batch_size: int = 128
    backend: Backend = "auto"
    tokenizer: Any = None
    revision: str | None = None


def load_encoder(name_or_folder: str | os.PathLike[str], options: LoadOptions) -> SparseEncoder:
    """An encoder out of a model folder or from the hub, see `SparseEncoder.from_pretrained`.

    Raises:
        ConfigError: The folder, a file in it, or an option is impossible.
        MissingExtraError: A hub id needs `huggingface_hub`.
    """
    with torch.inference_mode(False):  # inference tensors could neither be trained nor stamped
        return _load(name_or_folder, options)


def _load(name_or_folder: str | os.PathLike[str], options: LoadOptions) -> SparseEncoder:
    folder, revision = locate_model(name_or_folder, options.revision)
    plan = _with_options(read_plan(folder), options)
    dtype = checked_dtype(options.dtype)
    device = checked_device(options.device)
    tokenizer = find_tokenizer(
        (plan.folder, folder),
        options.tokenizer,
        hub_id=plan.tokenizer_id,
        lower_case=plan.lower_case,
    )
    vocabulary = Vocabulary.from_tokenizer(tokenizer, plan.vocabulary)
    checkpoint = Checkpoint(plan.folder)
    used: set[str] = set()
    document = _build_tower(plan, plan.document, vocabulary, checkpoint, used)
    query = document
    if plan.query is not None:
        query = _build_tower(plan, plan.query, vocabulary, checkpoint, used)
    refuse_unexpected(checkpoint, used, plan.ignored)
    query_k = options.k if options.query_k == "checkpoint" else options.query_k
    query_length = options.query_max_length
    if query_length is None:
        query_length = options.max_length
    encoder = SparseEncoder(
        document_tower=document,
        query_tower=query,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        activation=plan.activation,  # type: ignore[arg-type] # checked by the constructor
        document_entry=_entry(plan.document_entry, document, options.k, options.max_length),
        query_entry=_entry(plan.query_entry, query, query_k, query_length),
        norm=plan.norm,
        lexical=plan.lexical,
        pool_padding=options.pool_padding,
        padding_batch_size=options.padding_batch_size,
        backend=options.backend,
        model=os.fspath(name_or_folder),
        revision=revision,
    )
    if dtype != torch.float32:
        encoder.remember_weights()  # before rounding, so that all dtypes of a model are one model
    for tower in {id(document): document, id(query): query}.values():
        tower.to(device=device, dtype=dtype)
    return encoder


def save_encoder(encoder: SparseEncoder, folder: str | os.PathLike[str]) -> None:
    """Writes an encoder as a folder that `load_encoder` reads back, all of it or nothing.

    The folder is written beside its place and then renamed. An encoder saved there before is
    replaced; anything else is left alone. Weights keep their usual names, so a shared `mlm` encoder
    also opens with `transformers.AutoModelForMaskedLM`.

    Args:
        encoder: What to save; compatibility modes are not part of it.
        folder: Where to.

    Raises:
        ConfigError: The place holds something else, or cannot be written.
    """
    with written_folder(folder, OWN_FILE) as fresh:
        _write(encoder, fresh)


@contextmanager
def written_folder(folder: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when all went well.

    Args:
        folder: Where to; made with its parents if need be.
        marker: A file that only encoders of this kind have: a folder with it may be replaced.

    Raises:
        ConfigError: The place holds something else, or cannot be written.
    """
    target = Path(folder).absolute()
    replaces = (target / marker).is_file()
    if target.exists() and not replaces and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(
            f"{target} must be free, empty or an encoder saved before, got something else; "
            "choose another folder."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replaced(target) as fresh:
            yield fresh
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written: {error}; choose a folder on a disk that can be "
            "written and has room."
        ) from error


def _write(encoder: SparseEncoder, folder: Path) -> None:
    towers = {"document": encoder.document_tower}
    if not encoder.is_shared:
        towers["query"] = encoder.query_tower
    head = encoder.document_tower.head.name
    tensors: dict[str, torch.Tensor] = {}
    prefixes: dict[str, tuple[str, str]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for side, tower in towers.items():
        config = tower.body.config
        family = FAMILIES[config.family]
        outer = "" if encoder.is_shared else f"{side}."
        prefixes[side] = (outer + (family.body_prefix if head == "mlm" else "body."), outer)
        configs[side] = family.to_hf_config(config, masked_lm=head == "mlm")
        configs[side]["tie_word_embeddings"] = "head.decoder.weight" not in tower.state_dict()
        names = _tower_names(family.name, config.layers, head, *prefixes[side])
        for ours, tensor in tower.named_parameters():
            for theirs in names[ours]:  # a bias goes by two names, and versions differ in which
                tensors[theirs] = tensor if theirs == names[ours][0] else tensor.clone()
    settings: dict[str, Any] = {
        "format": OWN_FORMAT,
        "head": head,
        "activation": encoder.activation,
        "vocabulary": encoder.vocabulary.kind,
        "norm": encoder.norm,
        "lexical": encoder.lexical,
        "shared": encoder.is_shared,
    }
    for side, entry in (("document", encoder.document_entry), ("query", encoder.query_entry)):
        body, outer = prefixes.get(side, prefixes["document"])
        settings[side] = {
            "max_length": entry.max_length,
            "k": entry.k,
            "prompt": entry.prompt,
            "body": body,
            "head": outer,
        }
    if not encoder.is_shared:
        settings["query"]["config"] = configs["query"]  # config.json is that of the documents
    save_weights(tensors, folder / SAFETENSORS)
    encoder.tokenizer.save(folder)
    for name, content in (("config.json", configs["document"]), (OWN_FILE, settings)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` when all went well."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        if not target.exists() or not any(target.iterdir()):
            fresh.replace(target)
            return
        old = fresh.with_suffix(".old")
        target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# Finding


def locate_model(name: str | os.PathLike[str], revision: str | None) -> tuple[Path, str]:
    """Folder of a model and its revision, `""` for a folder of the caller's or a known model.

    A folder wins over a name of `assets`, and that over the id of a model on the hub.

    Raises:
        ConfigError: There is no such folder, no model of that name, and none on the hub.
        MissingExtraError: A hub id needs `huggingface_hub`.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path, revision or ""
    if is_known(text):
        return fetch(text), ""
    if path.is_file() or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise ConfigError(
            f"{text!r} must be a model folder or the id of a model on the hub, got "
            f"{'a file' if path.is_file() else 'a path where nothing is'}; check the path."
        )
    folder = _download(text, revision, _HUB_FILES)
    if not any(folder.rglob("*.safetensors")):
        folder = _download(text, revision, (*_HUB_FILES, _HUB_BIN))
    return folder, folder.name


def _download(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    hub = require("huggingface_hub", "encode")
    try:
        found = hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
    except Exception as error:  # no network, no such model, no right to it: many kinds
        raise ConfigError(
            f"{name!r} is no folder here and cannot be had from the hub: {error}; "
            "check the spelling, or fetch the model and pass its folder."
        ) from error
    return Path(found)


def find_tokenizer(
    places: Sequence[Path], given: Any, *, hub_id: str | None = None, lower_case: bool = False
) -> TextTokenizer:
    """The tokenizer of a model.

    Args:
        places: Folders that may hold it, the likeliest first.
        given: What the caller passed instead, or None.
        hub_id: Model on the hub whose tokenizer is meant when no folder holds one.
        lower_case: Lower-case texts first.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    if given is not None:
        return TextTokenizer.of(given, lower_case=lower_case)
    for place in places:
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return TextTokenizer.from_folder(place, lower_case=lower_case)
    if hub_id is None:
        return TextTokenizer.from_folder(places[-1])  # says what is missing
    try:
        place = _download(hub_id, None, _TOKENIZER_PATTERNS)
    except ConfigError as error:
        raise ConfigError(
            f"{places[-1]} holds no tokenizer, and that of {hub_id!r} cannot be had from "
            "the hub; pass `tokenizer=` with a folder that holds its tokenizer.json."
        ) from error
    return TextTokenizer.from_folder(place, lower_case=lower_case)


# Building


def _with_options(plan: Plan, options: LoadOptions) -> Plan:
    if options.head not in (None, plan.head):
        if options.head != "vdr" or plan.layout != "Hugging Face":
            raise ConfigError(
                f"`head` must be {plan.head!r} for this folder, which holds the weights of that "
                f"head, got {options.head!r}; a new 'vdr' head starts from a Hugging Face model."
            )
        plan = replace(
            plan,
            head="vdr",
            fresh=True,
            activation="elu1p",
            vocabulary="from_999" if plan.family.name == "bert" else "all",
            document_entry=replace(plan.document_entry, k=VDR_K),
            query_entry=replace(plan.query_entry, k=VDR_K),
        )
    return replace(
        plan,
        vocabulary=options.vocabulary or plan.vocabulary,
        activation=options.activation or plan.activation,
        lexical=plan.lexical if options.lexical is None else options.lexical,
    )


def _entry(
    entry: Entry, tower: Tower, k: int | FromCheckpoint | None, max_length: int | None
) -> Entry:
    most = tower.body.config.max_length
    length = min(entry.max_length or most, most) if max_length is None else max_length
    return replace(entry, max_length=length, k=entry.k if k == "checkpoint" else k)


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for; CUDA or else the CPU for None.

    Raises:
        ConfigError: This machine or this torch does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"`device` must be one this machine and this torch have, such as 'cpu', got "
            f"{device!r}: {str(error).splitlines()[0]}"
        ) from error
    return found


def checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The float dtype that was asked for; float32 for None.

    Raises:
        ConfigError: It is none.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            f"`dtype` must be a float dtype such as torch.bfloat16 or 'float16', got {dtype!r}."
        )
    return found


def _tower_names(
    family: str, layers: int, head: str, body_prefix: str, head_prefix: str
) -> WeightNames:
    """Parameter of a `Tower` -> its names in a checkpoint."""
    kind = FAMILIES[family]
    names: WeightNames = {}
    for ours, theirs in kind.body_names(layers, prefix=body_prefix).items():
        names[f"body.{ours}"] = theirs
    for ours, theirs in kind.head_names(head).items():
        names[f"head.{ours}"] = tuple(head_prefix + name for name in theirs)
    if head == "mlm":
        names["head.decoder.weight"] = (head_prefix + kind.decoder,)
    return names


def _build_tower(
    plan: Plan,
    where: TowerPlan,
    columns: Vocabulary,
    checkpoint: Checkpoint,
    used: set[str],
) -> Tower:
    """A tower with its weights, float32 on the CPU."""
    config = plan.family.body_config(where.config)
    body_prefix = where.body_prefix
    present = set(checkpoint.names)
    if plan.fresh and not any(name.startswith(body_prefix) for name in present):
        body_prefix = ""  # the body alone, without the prefix of a masked language model
    names = _tower_names(plan.family.name, config.layers, plan.head, body_prefix, where.head_prefix)
    tied = True
    if plan.head == "mlm":
        word, decoder = names["body.embeddings.word.weight"], names["head.decoder.weight"]
        tied = _is_tied(checkpoint, word[0], decoder[0], where.config)
        if tied:
            names["body.embeddings.word.weight"] = (*word, *decoder)
            del names["head.decoder.weight"]
    tower = Tower(Body(config), make_head(plan.head, config, columns, tied=tied))
    if plan.fresh:
        width = config.hidden_size
        fresh = {"head.norm.weight": torch.ones(width), "head.norm.bias": torch.zeros(width)}
        names = {ours: theirs for ours, theirs in names.items() if ours not in fresh}
        used |= assign(tower, checkpoint, names, others=fresh)
        used |= {name for name in present if not name.startswith(body_prefix)}
    else:
        used |= assign(tower, checkpoint, names)
    return tower


def _is_tied(checkpoint: Checkpoint, word: str, decoder: str, config: Mapping[str, Any]) -> bool:
    """Whether the decoder is the word embeddings: what the weights say counts, then the config."""
    present = set(checkpoint.names)
    if not {word, decoder} <= present:
        return bool(config.get("tie_word_embeddings", True))
    if checkpoint.shape(word) != checkpoint.shape(decoder):
        return False
    return torch.equal(checkpoint.tensor(word), checkpoint.tensor(decoder))
