"""Folders of sentence-transformers: modules.json, and routers with a way for each side.

A folder lists modules that a text goes through. What they add up to is one of these, for each side:

| modules                                            | side                                       |
|----------------------------------------------------|--------------------------------------------|
| Transformer, SpladePooling                         | a tower with the `mlm` head                |
| Transformer, SpladePooling, SparseStaticEmbedding  | the same, for a query's own tokens only    |
| SparseStaticEmbedding                              | static weights                             |
| Transformer, Pooling beside `sparse_linear.pt`     | weights of a text's own tokens (bge-m3)    |
| Router                                             | what its route of the side lists           |
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from vdr_db.checkpoints import keys
from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.plan import Entry, Plan, StaticPlan, TowerPlan, model_max_length
from vdr_db.checkpoints.tower_plans import SPARSE_LINEAR, static_weights, tower_plan
from vdr_db.errors import ConfigError

__all__ = ["read_sentence_transformers", "with_idf"]

_TRANSFORMERS = ("MLMTransformer", "Transformer")
_STATIC = ("SparseStaticEmbedding", "IDF")
_ROUTERS = ("Router", "Asym")
_CONFIGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Its pooling always takes log1p after the named activation.
_ACTIVATIONS = {"relu": "log1p_relu", "log1p_relu": "double_log1p_relu"}
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_OTHER_MODALITIES = ("image", "audio", "video", "chat_template")


@dataclass(frozen=True)
class _Module:
    """A module by the last part of its class and its folder."""

    name: str
    folder: Path


@dataclass(frozen=True)
class _Way:
    """What the modules of one side add up to."""

    part: TowerPlan | StaticPlan
    head: str
    activation: str
    tokenizer: Path
    max_length: int | None
    lower_case: bool = False
    gate: StaticPlan | None = None


def read_sentence_transformers(folder: Path) -> Plan:
    """The plan of a folder with modules.json.

    Raises:
        ConfigError: A file is missing or damaged, or describes something else than the above.
    """
    routes = _routes(folder, _listed(folder))
    query, document = (_way(folder, routes[side], side) for side in ("query", "document"))
    if isinstance(document.part, StaticPlan) or document.gate is not None:
        raise ConfigError(
            f"{folder / 'modules.json'} must give documents a model, got static weights; only "
            "queries may go without."
        )
    if isinstance(query.part, TowerPlan) and query.head != document.head:
        raise ConfigError(
            f"{folder / 'modules.json'} must give both sides one kind of head, got {query.head} "
            f"and {document.head}."
        )
    is_shared = query.part == document.part
    outer_file = folder / "config_sentence_transformers.json"
    outer = settings_of(outer_file) if outer_file.is_file() else {}
    keys.SENTENCE_TRANSFORMERS.check(outer_file, outer)
    if document.head == "mlm" and outer.get("model_type", "SparseEncoder") != "SparseEncoder":
        raise ConfigError(
            f"`model_type` in {outer_file} must be 'SparseEncoder', got {outer['model_type']!r}; "
            "sentence-transformers would put another head on this model."
        )
    k = outer.get("max_active_dims")
    own = None if query.tokenizer == document.tokenizer else query.tokenizer
    plan = Plan(
        folder=document.part.folder or folder,
        layout="sentence-transformers",
        head=document.head,
        activation=document.activation,
        vocabulary="all",
        document=document.part,
        query=None if is_shared else query.part,
        document_entry=Entry(document.max_length, k, _prompt(outer_file, outer, "document")),
        query_entry=Entry(query.max_length, k, _prompt(outer_file, outer, "query")),
        query_activation=None if query.activation == document.activation else query.activation,
        query_gate=query.gate,
        tokenizer=document.tokenizer,
        query_tokenizer=own,
        lower_case=document.lower_case,
        query_lower_case=query.lower_case,
    )
    if is_shared and query.lower_case != document.lower_case:
        raise ConfigError(f"both sides of {folder} must lower-case alike, as they share a model.")
    return with_idf(folder, plan) if is_shared else plan


def with_idf(folder: Path, plan: Plan) -> Plan:
    """The same with static query weights, where an `idf.json` lies beside the model."""
    file = folder / "idf.json"
    if not file.is_file() or plan.query is not None:
        return plan
    entry = replace(plan.query_entry, max_length=model_max_length(plan.tokenizer or plan.folder))
    static = static_weights(plan.tokenizer or plan.folder, file)
    return replace(plan, query=static, query_entry=entry, query_activation="none")


def _listed(folder: Path) -> list[_Module]:
    """Modules of modules.json."""
    file = folder / "modules.json"
    try:
        found = json.loads(file.read_text("utf-8"))
        modules = [_module(folder, file, entry["type"], entry["path"]) for entry in found]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{file} must list modules with `type` and `path`: {error!r}; fetch it again."
        ) from error
    for entry in found:
        keys.MODULE.check(file, entry)
    return modules


def _module(folder: Path, file: Path, kind: Any, path: Any) -> _Module:
    if not isinstance(kind, str) or not isinstance(path, str):
        raise ConfigError(f"{file} must name modules and paths as texts, got {kind!r} at {path!r}.")
    place = PureWindowsPath(path)
    if place.anchor or ".." in place.parts or "\0" in path:
        raise ConfigError(f"paths in {file} must stay in their folder, got {path!r}.")
    is_theirs = kind.startswith("sentence_transformers.")
    return _Module(kind.rsplit(".", 1)[-1] if is_theirs else kind, folder / path)


def _routes(folder: Path, modules: Sequence[_Module]) -> dict[str, list[_Module]]:
    """Side -> its modules, with those of a router in its place."""
    routes: dict[str, list[_Module]] = {"query": [], "document": []}
    for module in modules:
        inner = _router(module.folder) if module.name in _ROUTERS else None
        for side, own in routes.items():
            own += [module] if inner is None else inner[side]
    return routes


def _router(folder: Path) -> dict[str, list[_Module]]:
    file = folder / "router_config.json"
    file = file if file.is_file() else folder / "config.json"
    found = settings_of(file)
    try:
        types, structure = dict(found["types"]), dict(found["structure"])
        parameters = dict(found["parameters"])
        modules = {id: _module(folder, file, kind, id) for id, kind in types.items()}
        ways = {name: [modules[id] for id in ids] for name, ids in structure.items()}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{file} must hold `types`, `structure` and `parameters` of a router: {error!r}; "
            "fetch it again."
        ) from error
    keys.ROUTER.check(file, parameters)
    return {side: ways[_route(file, side, ways, parameters)] for side in ("query", "document")}


def _route(file: Path, side: str, ways: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Name of the way that texts of a side take, in the order of sentence-transformers."""
    mappings = {}
    for key, way in (parameters.get("route_mappings") or {}).items():
        try:
            task, modality = ast.literal_eval(key)
            mappings[task, modality] = way
        except (ValueError, SyntaxError, TypeError) as error:
            raise ConfigError(f"`route_mappings` in {file} must be pairs, got {key!r}.") from error
    for pair in ((side, "text"), (side, None), (None, "text"), (None, None)):
        if pair in mappings:
            name = mappings[pair]
            break
    else:
        name = next((name for name in (side, "text") if name in ways), None)
    if name not in ways:
        raise ConfigError(f"{file} must have a route for a {side}, got {sorted(ways)}.")
    return str(name)


def _way(folder: Path, modules: Sequence[_Module], side: str) -> _Way:
    names = [module.name for module in modules]
    match names:
        case [transformer, "SpladePooling", *gates] if (
            transformer in _TRANSFORMERS and len(gates) <= 1 and set(gates) <= {*_STATIC}
        ):
            way = _masked_lm(modules[0].folder, modules[1].folder, side)
            gate = _static(modules[2].folder).part if gates else None
            assert gate is None or isinstance(gate, StaticPlan)
            return _Way(**{**vars(way), "gate": gate})
        case [static] if static in _STATIC:
            return _static(modules[0].folder)
        case [transformer, "Pooling", *rest] if (
            transformer in _TRANSFORMERS
            and rest in ([], ["Normalize"])
            and (modules[0].folder / SPARSE_LINEAR).is_file()
        ):
            return _token_weights(modules[0].folder)
    kind = "other kinds of sentence-transformers models are not supported"
    if "SparseAutoEncoder" in names:
        kind = "a CSR head (SparseAutoEncoder) has dimensions that are no tokens"
    raise ConfigError(
        f"{folder / 'modules.json'} must name a masked language model and SpladePooling, or "
        f"static weights, got {names}; {kind}: encode it with sentence-transformers."
    )


def _static(folder: Path) -> _Way:
    file = folder / "config.json"
    settings = settings_of(file) if file.is_file() else {}
    keys.STATIC.check(file, settings)
    path = settings.get("path")
    source = None
    if isinstance(path, str):
        source = _module(folder, file, "", path).folder
        if not source.is_file():
            raise ConfigError(
                f"`path` in {file} must name a file beside it, got {path!r}; copy it there."
            )
    part = static_weights(folder, source)
    return _Way(part, "static", "none", folder, model_max_length(folder))


def _token_weights(folder: Path) -> _Way:
    inner, _ = _inner(folder)
    length = inner.get("max_seq_length") or model_max_length(folder)
    part = tower_plan(folder, head="token_weights")
    return _Way(part, "token_weights", "none", folder, length)


def _masked_lm(folder: Path, pooling_folder: Path, side: str) -> _Way:
    inner, file = _inner(folder)
    pooling_file = pooling_folder / "config.json"
    pooling = settings_of(pooling_file)
    keys.POOLING.check(pooling_file, pooling)
    strategy = pooling.get("pooling_strategy", "max")
    if strategy != "max":
        raise ConfigError(
            f"`pooling_strategy` in {pooling_file} must be 'max', got {strategy!r}; "
            "vectors summed over tokens are not supported: encode with sentence-transformers."
        )
    named = pooling.get("activation_function", "relu")
    if named not in _ACTIVATIONS:
        raise ConfigError(
            f"`activation_function` in {pooling_file} must be one of "
            f"{sorted(_ACTIVATIONS)}, got {named!r}."
        )
    task = inner.get("transformer_task", "fill-mask")
    processing = _processing(file, inner)
    if task not in ("fill-mask", "text-generation"):
        raise ConfigError(
            f"the transformer in {folder} must be for 'fill-mask', got {task!r}; a model that "
            "makes dense vectors has no sparse ones."
        )
    if task == "text-generation" and (
        processing.get("logits_to_keep") != 0
        or inner.get("module_output_name") != "token_embeddings"
    ):
        raise ConfigError(
            f"a decoder in {file} must keep the logits of all tokens (`logits_to_keep` 0) as "
            "'token_embeddings' for SpladePooling, got another setting."
        )
    length = processing.get("max_length") or inner.get(f"{side}_length")
    length = length or inner.get("max_seq_length") or model_max_length(folder)
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise ConfigError(f"lengths in {file} must be integers, got {length!r}.")
    return _Way(
        part=tower_plan(folder, head="mlm", task=task),
        head="mlm",
        activation=_ACTIVATIONS[named],
        tokenizer=folder,
        max_length=length,
        lower_case=bool(inner.get("do_lower_case", False)),
    )


def _inner(folder: Path) -> tuple[dict[str, Any], Path]:
    """Settings of a transformer and their file."""
    file = next((folder / n for n in _CONFIGS if (folder / n).is_file()), folder / _CONFIGS[0])
    inner = settings_of(file) if file.is_file() else {}
    keys.TRANSFORMER.check(file, inner)
    return inner, file


def _processing(file: Path, inner: Mapping[str, Any]) -> dict[str, Any]:
    """What `processing_kwargs` say about texts."""
    said = inner.get("processing_kwargs") or {}
    if not isinstance(said, Mapping) or not all(isinstance(v, Mapping) for v in said.values()):
        raise ConfigError(f"`processing_kwargs` in {file} must hold objects, got {said!r}.")
    for part, values in said.items():
        if part in ("text", "common"):
            keys.PROCESSING.check(file, values)
        elif part not in _OTHER_MODALITIES:
            raise ConfigError(f"`processing_kwargs` in {file} must be of texts, got {part!r}.")
    common = said.get("common", {})
    if keys.PROCESSING.taken & common.keys():
        raise ConfigError(
            f"`processing_kwargs` in {file} must give lengths under 'text', got them under "
            "'common'."
        )
    return dict(said.get("text", {}))


def _prompt(file: Path, outer: Mapping[str, Any], side: str) -> str:
    """The prompt that sentence-transformers puts before texts of a side."""
    prompts = outer.get("prompts") or {}
    default = outer.get("default_prompt_name")
    if not isinstance(prompts, Mapping) or not all(
        text is None or isinstance(text, str) for text in prompts.values()
    ):
        raise ConfigError(f"`prompts` in {file} must be texts by name, got {prompts!r}.")
    if default is not None and default not in prompts:
        raise ConfigError(
            f"`default_prompt_name` in {file} must be one of {sorted(prompts)}, got {default!r}."
        )
    names = ("query",) if side == "query" else _DOCUMENT_PROMPTS
    name = next((name for name in names if name in prompts), default)
    return prompts.get(name) or ""
