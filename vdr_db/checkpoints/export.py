"""What sentence-transformers needs to read a folder of ours: modules, pooling, router, prompts.

Vectors are equal there. Where its own `SpladePooling` makes them, it needs nothing else; for other
heads a small module of ours is copied into the folder, and sentence-transformers asks for
`trust_remote_code=True` before it runs that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vdr_db.checkpoints.plan import MOST_TOKENS
from vdr_db.version import __version__

if TYPE_CHECKING:
    from vdr_db.checkpoints.text import TextParts

__all__ = ["Card", "front_matter", "opens_elsewhere", "part_folders", "write_json", "write_modules"]

_MODULE = Path(__file__).parents[1] / "data" / "vdr_pooling.py"
_POOLINGS = {"log1p_relu": "relu", "double_log1p_relu": "log1p_relu"}
_THEIRS = "sentence_transformers."
_TRANSFORMER = f"{_THEIRS}base.modules.transformer.Transformer"
_SPLADE = f"{_THEIRS}sparse_encoder.modules.splade_pooling.SpladePooling"
_STATIC = f"{_THEIRS}sparse_encoder.modules.sparse_static_embedding.SparseStaticEmbedding"
_ROUTER = f"{_THEIRS}base.modules.router.Router"
_OURS = "vdr_pooling.VdrPooling"


@dataclass(frozen=True)
class Card:
    """What a model card says that no file of the model does.

    Attributes:
        license: Its short name on the hub, such as `"apache-2.0"`.
        base_model: Id of the model that this one was trained from.
        language: Codes of the languages it was made for.
        datasets: Ids of the collections it was trained on.
        metrics: Names of the figures the card gives.
        text: Markdown below the title.
    """

    license: str | None = None
    base_model: str | None = None
    language: Sequence[str] = ()
    datasets: Sequence[str] = ()
    metrics: Sequence[str] = ()
    text: str = ""


def write_json(file: Path, content: Any) -> None:
    """A JSON file as all files of ours are written."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def part_folders(parts: TextParts) -> dict[str, str]:
    """Side -> folder of its weights below the model's; `""` where both share one tower."""
    if parts.document_tower is parts.query_tower:
        return {"document": ""}
    kind = "SparseStaticEmbedding" if parts.query_tower.head_name == "static" else "Transformer"
    return {"document": "document_0_Transformer", "query": f"query_0_{kind}"}


@dataclass
class _Folder:
    """A folder that is being written, and the modules of each side so far."""

    root: Path
    types: dict[str, str] = field(default_factory=dict)

    def module(self, id: str, kind: str, settings: Mapping[str, Any] | None = None) -> str:
        """Notes a module, and writes its config.json if there is one."""
        self.types[id] = kind
        if settings is not None:
            (self.root / id).mkdir(exist_ok=True)
            write_json(self.root / id / "config.json", dict(settings))
        return id


def write_modules(root: Path, parts: TextParts, card: Card | None = None) -> None:
    """Writes all but weights and tokenizers, which lie in `part_folders` already.

    Args:
        root: Of the model.
        parts: The encoder.
        card: What its README.md says; None for what is known.
    """
    if not opens_elsewhere(parts):
        (root / "README.md").write_text(_card(parts, card or Card(), None), "utf-8")
        return
    folder = _Folder(root)
    places = part_folders(parts)
    is_plain = _is_plain(parts)
    sides = {side: _side(folder, parts, side, places, is_plain) for side in places}
    if len(places) == 1:
        listed = [("", _TRANSFORMER), *((id, folder.types[id]) for id in sides["document"][1:])]
        write_json(root / "modules.json", _modules(listed))
    else:
        write_json(root / "modules.json", _modules([("", _ROUTER)]))
        router = {
            "types": folder.types,
            "structure": sides,
            "parameters": {"default_route": "document", "allow_empty_key": True},
        }
        write_json(root / "router_config.json", router)
    outer: dict[str, Any] = {"model_type": "SparseEncoder", "similarity_fn_name": "dot"}
    prompts = {"document": parts.document_entry.prompt, "query": parts.query_entry.prompt}
    if any(prompts.values()):
        outer["prompts"] = prompts
    if is_plain and parts.document_entry.k is not None:
        outer["max_active_dims"] = parts.document_entry.k
    write_json(root / "config_sentence_transformers.json", outer)
    if _OURS in folder.types.values():
        shutil.copyfile(_MODULE, root / "vdr_pooling.py")
    needs_trust = _OURS in folder.types.values()
    (root / "README.md").write_text(_card(parts, card or Card(), needs_trust), "utf-8")


def _modules(listed: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(listed)
    ]


def opens_elsewhere(parts: TextParts) -> bool:
    """Whether sentence-transformers has, or is given, modules that make the same vectors."""
    return parts.own_weights is None and parts.document_tower.head_name != "mean"


def _is_plain(parts: TextParts) -> bool:
    """Whether `SpladePooling` and one `max_active_dims` make the same vectors."""
    activations = {parts.activation}
    if parts.query_tower.head_name != "static":
        activations.add(parts.query_activation or parts.activation)
    return (
        parts.document_tower.head_name == "mlm"
        and activations <= _POOLINGS.keys()
        and parts.vocabulary.kind == "all"
        and not (parts.norm or parts.lexical)
        and parts.document_entry.k == parts.query_entry.k
    )


def _side(
    folder: _Folder, parts: TextParts, side: str, places: Mapping[str, str], is_plain: bool
) -> list[str]:
    """Ids of the modules of a side; writes what belongs to them beside its weights."""
    is_query = side == "query"
    tower = parts.query_tower if is_query else parts.document_tower
    entry = parts.query_entry if is_query else parts.document_entry
    activation = (parts.query_activation if is_query else None) or parts.activation
    place = places[side]
    if tower.head_name == "static":
        return [folder.module(place, _STATIC, {"frozen": True})]
    inner: dict[str, Any] = {"max_seq_length": entry.max_length, "do_lower_case": False}
    if len(places) == 1:
        inner["query_length"] = parts.query_entry.max_length
        inner["document_length"] = parts.document_entry.max_length
    is_decoder = getattr(tower, "is_decoder", False)
    inner["transformer_task"] = (
        "feature-extraction"
        if tower.head_name != "mlm"
        else "text-generation"
        if is_decoder
        else "fill-mask"
    )
    if is_decoder:
        text = {"method": "forward", "method_output_name": "logits"}
        inner |= {"modality_config": {"text": text}, "module_output_name": "token_embeddings"}
        inner["processing_kwargs"] = {"text": {"logits_to_keep": 0}}
    write_json(folder.root / place / "sentence_bert_config.json", inner)
    ids = [place]
    if place:
        folder.module(place, _TRANSFORMER)
    prefix = f"{side}_1_" if place else "1_"
    if is_plain:
        settings: dict[str, Any] = {
            "pooling_strategy": "max",
            "activation_function": _POOLINGS[activation],
        }
        ids.append(folder.module(f"{prefix}SpladePooling", _SPLADE, settings))
    else:
        ids.append(folder.module(f"{prefix}VdrPooling", _OURS, _pooling(parts, tower, activation)))
        _save_head(folder.root / ids[-1], tower)
    if is_query and parts.query_gate is not None:
        ids.append(folder.module("query_2_SparseStaticEmbedding", _STATIC, {"frozen": True}))
    return ids


def _pooling(parts: TextParts, tower: Any, activation: str) -> dict[str, Any]:
    vocabulary = parts.vocabulary
    skipped = np.flatnonzero(vocabulary.id_to_column < 0).tolist()
    if tower.head_name == "token_weights":
        skipped = np.flatnonzero(tower.head.columns.cpu().numpy() < 0).tolist()
    return {
        "size": vocabulary.size,
        "hidden_size": tower.config.hidden_size,
        "head": tower.head_name,
        "activation": activation,
        "k": {"document": parts.document_entry.k, "query": parts.query_entry.k},
        "norm": parts.norm,
        "lexical": parts.lexical,
        "skipped": skipped,
        "special": sorted(vocabulary.special_ids),
    }


def _save_head(folder: Path, tower: Any) -> None:
    from vdr_db.checkpoints.weights import SAFETENSORS, save_weights

    part = {"vdr": ("norm", "scale"), "token_weights": ("linear", "linear")}.get(tower.head_name)
    tensors = {}
    if part is not None:
        own, theirs = part
        module = getattr(tower.head, own)
        tensors = {f"{theirs}.{name}": tensor for name, tensor in module.named_parameters()}
    save_weights(tensors, folder / SAFETENSORS)


def front_matter(card: Card, *, library: str = "vdr-db", tags: Sequence[str] = ()) -> list[str]:
    """The lines of YAML at the top of a model card, as the hub reads them; `library` opens it."""
    found: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "feature-extraction",
        "tags": ["sparse-encoder", "sparse", "vdr-db", *tags],
        "license": card.license,
        "base_model": card.base_model,
        "language": list(card.language),
        "datasets": list(card.datasets),
        "metrics": list(card.metrics),
    }
    lines = ["---"]
    for key, value in found.items():
        if isinstance(value, list) and value:
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        elif isinstance(value, str):
            lines.append(f"{key}: {json.dumps(value)}")
    return [*lines, "---", ""]


def _card(parts: TextParts, card: Card, needs_trust: bool | None) -> str:
    entry = parts.document_entry
    head = parts.document_tower.head_name
    trust = ", trust_remote_code=True" if needs_trust else ""
    library = "vdr-db" if needs_trust is None else "sentence-transformers"
    length = "any" if (entry.max_length or 0) >= MOST_TOKENS - 1 else entry.max_length
    lines = [
        *front_matter(card, library=library, tags=["splade" if head == "mlm" else head]),
        f"# {Path(parts.model).name or 'Sparse encoder'}",
        "",
        *([card.text, ""] if card.text else []),
        f"A sparse encoder over {parts.vocabulary.size:,} tokens: head `{head}`, activation "
        f"`{parts.activation}`, {entry.k or 'all'} dimensions of a document and "
        f"{parts.query_entry.k or 'all'} of a query, texts of up to {length} tokens. Saved by "
        f"vdr-db {__version__}.",
        "",
        "```python",
        "from vdr_db import SparseEncoder  # pip install 'vdr-db[torch]'",
        "",
        'encoder = SparseEncoder.from_pretrained("PATH_OR_ID")',
        'rows = encoder.encode_documents(["a text"])',
        "```",
        "",
    ]
    if needs_trust is not None:
        lines += [
            "```python",
            "from sentence_transformers import SparseEncoder",
            "",
            f'model = SparseEncoder("PATH_OR_ID"{trust})',
            'vectors = model.encode_document(["a text"])',
            "```",
            "",
        ]
    return "\n".join(lines)
