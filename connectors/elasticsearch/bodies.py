"""What we say to Elasticsearch: ids, documents, queries and mappings, as pure functions.

A document is

    {"order": "1doc-7", "facts": [...], "payload": {...}, "vdr": {"1012": 1.25, ...}}

`order` is the caller's id, written so that it sorts; `facts` is what filters ask of the payload;
the payload itself is kept and not looked into. Feature names are token ids in decimal, never token
text: Elasticsearch refuses a document whose feature name holds a dot. A query is one `rank_feature`
clause per token id with `linear` named, because the default function of that query, `saturation`,
is no dot product. The engine then scores

    sum over common ids of query weight (float32) * truncate_weights(document weight).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.base import Id, Payload
from vdr_db.connectors.elasticsearch.filters import FACTS, payload_facts
from vdr_db.connectors.ids import MAX_ID_BYTES, id_of, sort_key
from vdr_db.connectors.validation import DOCUMENT_FIELD
from vdr_db.errors import ConfigError, InputError, require

if TYPE_CHECKING:
    from vdr_db.sparse import SparseRows

__all__ = [
    "FieldKind",
    "bulk_lines",
    "delete_lines",
    "document_id",
    "feature_objects",
    "highlighting",
    "id_of",
    "index_mapping",
    "index_settings",
    "query_scale",
    "read_features",
    "read_sort_key",
    "row_query",
    "search_body",
    "sort_key",
    "text_query",
    "truncate_weights",
]

FieldKind = Literal["rank_features", "sparse_vector"]
WeightArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int32]

# Lucene caps the weight of its linear feature query here; a boost above it is at least unusual.
LARGEST_QUERY_WEIGHT = 64.0
# Lucene refuses a term above 32,766 bytes, and with it the document; a letter has at most four.
LONGEST_KEYWORD = 8191
GROUP = "passage_of"
"""Field of a passage with the name of its document, by which hits are collapsed."""

RESERVED = frozenset({"order", FACTS, GROUP, "payload"})

_TEXT_PREFIX = "text:"
_DIGEST_PREFIX = "sha256:"
_AMBIGUOUS = re.compile(r"(0|[1-9][0-9]*)\Z|text:|sha256:", re.ASCII)


def truncate_weights(weights: npt.ArrayLike) -> WeightArray:
    """Weights as the engine keeps them: 9 significant bits, cut off and never rounded up.

    Args:
        weights: Positive normal float32 numbers of any shape.

    Returns:
        float32 of the same shape, smaller than `weights` by less than 1/256 of each.

    Source: the encoding of Lucene's `FeatureField`, checked against Lucene 8.7.
    """
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    truncated: WeightArray = (bits & np.uint32(0xFFFF8000)).view(np.float32)
    return truncated


# Ids


def document_id(id: Id) -> str:
    """The `_id` of a checked id; the integer 1 and the text "1" get different ones.

    Integers become decimals, texts stay as they are. A text that could be taken for something else
    (decimals, our own prefixes) gets a prefix, and one that is then too long becomes its digest.
    """
    if not isinstance(id, str):
        return str(id)
    if not _AMBIGUOUS.match(id):
        return id
    name = _TEXT_PREFIX + id
    encoded = name.encode()
    if len(encoded) <= MAX_ID_BYTES:
        return name
    return _DIGEST_PREFIX + hashlib.sha256(encoded).hexdigest()


def read_sort_key(text: str) -> str:
    """What `sort_key` wrote, as it came from outside; anything else is a `ValueError`."""
    if not re.fullmatch(r"0\d{20}|1.*", text, re.DOTALL):
        raise ValueError("no sort key")
    return text


# Documents


def feature_objects(rows: SparseRows) -> list[bytes]:
    """Each row as a JSON object of token id to weight, in the shortest digits of float32."""
    orjson = require("orjson", "elasticsearch")
    names, numbers = (
        orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
        for array in (rows.indices, rows.values)
    )
    objects = []
    for start, stop in pairwise(rows.indptr.tolist()):
        # Laid out by slices and joined once: formatting each entry by itself takes twice as long.
        count = stop - start
        parts = [',"', "", '":', ""] * count
        parts[:1] = ['{"'] if count else ["{"]
        parts[1::4] = names[start:stop]
        parts[3::4] = numbers[start:stop]
        parts.append("}")
        objects.append("".join(parts).encode())
    return objects


def bulk_lines(
    rows: SparseRows,
    ids: Sequence[Id],
    payloads: Sequence[Payload],
    *,
    action: Literal["index", "create"],
    field: str,
) -> list[bytes]:
    """The two lines of a bulk request for each checked row, ending in a newline.

    `action` `"index"` replaces a document, `"create"` leaves the one that is there.
    """
    orjson = require("orjson", "elasticsearch")
    lines: list[bytes] = []
    vector_key = b',"' + field.encode() + b'":'
    texts = feature_objects(rows)
    for id, payload, features in zip(ids, payloads, texts, strict=True):
        document: dict[str, Any] = {"order": sort_key(id)}
        if payload:
            if DOCUMENT_FIELD in payload:
                document[GROUP] = payload[DOCUMENT_FIELD]
            document[FACTS] = payload_facts(payload)
            document["payload"] = payload
        head = orjson.dumps({action: {"_id": document_id(id)}})
        body = orjson.dumps(document)
        # An empty object is no use to the engine, and a missing field reads as an empty row.
        tail = b"}\n" if features == b"{}" else vector_key + features + b"}\n"
        lines.append(head + b"\n" + body[:-1] + tail)
    return lines


def delete_lines(ids: Sequence[Id]) -> list[bytes]:
    """The line of a bulk request that removes each document."""
    orjson = require("orjson", "elasticsearch")
    return [orjson.dumps({"delete": {"_id": document_id(id)}}) + b"\n" for id in ids]


# Queries


def query_scale(weights: WeightArray) -> float:
    """The power of two that brings the largest query weight to at most 64; 1 nearly always.

    Scores come back multiplied by it and are divided again; a power of two makes both exact.
    """
    largest = float(weights.max(initial=0.0))
    if largest <= LARGEST_QUERY_WEIGHT:
        return 1.0
    return math.ldexp(1.0, -math.ceil(math.log2(largest / LARGEST_QUERY_WEIGHT)))


def row_query(
    ids: IdArray, weights: WeightArray, *, field: str, kind: FieldKind, scale: float = 1.0
) -> dict[str, Any]:
    """A query whose score is the dot product with the (truncated) vectors of the documents.

    Args:
        ids: `[nnz]` int32 token ids, at least one.
        weights: `[nnz]` float32, greater than 0.
        field: Name of the vector field.
        kind: Type of that field.
        scale: Factor on every weight, from `query_scale`.
    """
    orjson = require("orjson", "elasticsearch")
    scaled = (weights * np.float32(scale)).astype(np.float32)
    # Through the shortest digits, so that the request does not carry 17 digits of a float32.
    boosts = orjson.loads(orjson.dumps(scaled, option=orjson.OPT_SERIALIZE_NUMPY))
    names = [str(id) for id in ids.tolist()]
    if kind == "sparse_vector":
        # Indices made by current versions drop query tokens unless told not to.
        vector = dict(zip(names, boosts, strict=True))
        return {"sparse_vector": {"field": field, "query_vector": vector, "prune": False}}
    clauses = [
        {"rank_feature": {"field": f"{field}.{name}", "boost": boost, "linear": {}}}
        for name, boost in zip(names, boosts, strict=True)
    ]
    return {"bool": {"should": clauses, "minimum_should_match": 1}}


def search_body(
    query: Mapping[str, Any],
    *,
    limit: int,
    offset: int = 0,
    filter: Mapping[str, Any] | None = None,
    is_grouped: bool = False,
) -> dict[str, Any]:
    """A search whose hits come best first, equal scores by ascending id.

    The filter must be true besides, without a say in the score. With `is_grouped` each hit is the
    best passage of another document.
    """
    if filter is not None:
        query = {"bool": {"must": [dict(query)], "filter": [dict(filter)]}}
    body: dict[str, Any] = {
        "query": dict(query),
        "from": offset,
        "size": limit,
        "sort": [{"_score": "desc"}, {"order": "asc"}],
        "_source": ["payload"],
        "track_total_hits": False,
    }
    if is_grouped:
        body["collapse"] = {"field": GROUP}
    return body


def text_query(text: str, field: str, *, boost: float = 1.0) -> dict[str, Any]:
    """BM25 of a text against a payload field."""
    return {"match": {f"payload.{field}": {"query": text, "boost": boost}}}


def highlighting(query: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The part of a search that marks what a text query finds in a payload field of each hit.

    Texts come back safe for a page: `&`, `<` and `>` of theirs are escaped, the marks are not.
    """
    fields: dict[str, Any] = {f"payload.{field}": {}}
    return {"highlight": {"highlight_query": dict(query), "fields": fields, "encoder": "html"}}


# Indices


def index_settings(
    *,
    shards: int | None,
    replicas: int | None,
    kind: FieldKind,
    version: tuple[int, int],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Settings of a new index, as flat names; those in `extra` win, `None` leaves one out."""
    numbers = {"index.number_of_shards": shards, "index.number_of_replicas": replicas}
    settings: dict[str, Any] = {n: number for n, number in numbers.items() if number is not None}
    if kind == "sparse_vector" and version >= (9, 2):
        # From 9.2 on vectors of this type are left out of `_source` unless the index says so.
        settings["index.mapping.exclude_source_vectors"] = False
    for name, value in (extra or {}).items():
        settings[name if name.startswith("index.") else f"index.{name}"] = value
    return settings


def index_mapping(
    meta: Mapping[str, Any],
    *,
    field: str,
    kind: FieldKind,
    version: tuple[int, int],
    store_vectors: bool = True,
    text_fields: Mapping[str, str | None] | None = None,
    payload_types: Mapping[str, Mapping[str, Any] | str] | None = None,
    is_grouped: bool = False,
) -> dict[str, Any]:
    """The mapping of an index of ours, which remembers `meta` under `_meta`.

    Filters go through `facts`. Payload fields are indexed by themselves only when they are named:
    for text search, or with a type of your own for other programs that read the index. A document
    whose value does not fit the type is refused. With `is_grouped` documents are passages.

    Raises:
        ConfigError: The field name or a payload type is impossible, or the server is too old.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", field) or field in RESERVED:
        raise ConfigError(
            f"`vector_field` must be a plain name other than {sorted(RESERVED)}, got {field!r}."
        )
    vector: dict[str, Any] = {"type": kind}
    if kind == "sparse_vector":
        if version < (8, 15):
            raise ConfigError(
                "field type 'sparse_vector' needs Elasticsearch 8.15 or newer, the server is "
                f"{version[0]}.{version[1]}; use the default, 'rank_features'."
            )
        # Documented from 8.19 and 9.1 on; older servers refuse the parameter and prune nothing.
        if version >= (8, 19) and version != (9, 0):
            vector["index_options"] = {"prune": False}
    properties: dict[str, Any] = {}
    keyword = {"type": "keyword", "ignore_above": LONGEST_KEYWORD}
    for name, analyser in (text_fields or {}).items():
        own = {} if analyser is None else {"analyzer": analyser}
        _nest(properties, name, {"type": "text", **own, "fields": {"keyword": keyword}})
    for name, type in (payload_types or {}).items():
        _nest(properties, name, {"type": type} if isinstance(type, str) else dict(type))
    payload: dict[str, Any] = {"type": "object", "enabled": False}
    if properties:
        payload = {"type": "object", "dynamic": False, "properties": properties}
    mapping: dict[str, Any] = {
        "_meta": dict(meta),
        "dynamic": "strict",
        "properties": {
            "order": {"type": "keyword", "index": False},
            FACTS: {"type": "keyword", "doc_values": False},
            "payload": payload,
            field: vector,
        },
    }
    if is_grouped:
        mapping["properties"][GROUP] = {"type": "keyword", "index": False}
    if not store_vectors:
        mapping["_source"] = {"excludes": [field]}
    return mapping


def _nest(properties: dict[str, Any], name: str, type: dict[str, Any]) -> None:
    *parents, leaf = name.split(".")
    if not all([*parents, leaf]):
        raise ConfigError(f"payload field names must not have empty parts, got {name!r}.")
    for parent in parents:
        properties = properties.setdefault(parent, {"properties": {}}).setdefault("properties", {})
    if leaf in properties:
        raise ConfigError(
            f"payload field {name!r} has two types; name it in `text_fields` or `payload_types`, "
            "not in both."
        )
    properties[leaf] = type


def read_features(source: Mapping[str, Any], field: str, id: Id) -> dict[int, float]:
    """The stored vector of a document as `{token id: weight}`; `{}` when it has none."""
    features = source.get(field) or {}
    try:
        return {int(name): float(weight) for name, weight in features.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"document {id!r} holds no vector of ours in field {field!r}; "
            "something else wrote it: index it again."
        ) from error
