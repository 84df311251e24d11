"""One way to open a collection in any store: by its address."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.address import MEMORY, Access, Address, parse_address
from vdr_db.connectors.collections.encoding import AnyEncoder
from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant
from vdr_db.connectors.qdrant.edge_folder import CollectionFolder
from vdr_db.errors import ConfigError

if TYPE_CHECKING:
    from vdr_db.connectors.collections.elasticsearch import VDRElasticsearch

__all__ = ["held_name", "open_collection"]


def open_collection(
    address: str | os.PathLike[str],
    name: str | None = None,
    encoder: AnyEncoder | None = None,
    *,
    access: Access | None = None,
    **options: Any,
) -> VDRQdrant | VDRElasticsearch:
    """Opens a collection in the store at an address, whichever that is.

    ```python
    articles = open_collection("articles.qdrant")
    articles = open_collection("https://search.example:6333", "articles")
    articles = open_collection("opensearch+https://search.example:9200", "articles")
    ```

    Args:
        address: A folder, `:memory:`, `http(s)://` or `qdrant://HOST:PORT`,
            `elasticsearch+http(s)://HOST:PORT` or `opensearch+http(s)://HOST:PORT`.
        name: Name of the collection or index; may be left out where a folder holds one.
        encoder: As in `Collection`; by default the model of `$VDR_DB_MODEL`, else the shipped one.
        access: How to be let in; what the environment says, see `vdr_db.connectors.address`,
            without.
        options: More options of `VDRQdrant`, or of `VDRElasticsearch`.

    Raises:
        ConfigError: The address is of an unknown kind, a name is needed, or options do not fit.
        StoreMismatch: Another product answers there, or the collection is of another encoder.
        StoreUnavailable: Nothing answers, or another process has the folder open.
        StoreError: The server does not let us in.
    """
    where = parse_address(address)
    name = held_name(where) if name is None else name
    if name is None:
        raise ConfigError(f"{where.place} holds several collections or none; pass the `name`.")
    if where.is_embedded:
        return VDRQdrant(name, encoder, path=where.place, **options)
    assert where.product is not None
    # Only a server needs these: TLS, and the other store.
    from vdr_db.connectors.asking import ask
    from vdr_db.connectors.collections.elasticsearch import VDRElasticsearch

    access = access or Access.from_environment(where.product)
    server = ask(where.place, where.product, access, grpc=options.get("prefer_grpc"))
    if server.product == "qdrant":
        return VDRQdrant(name, encoder, url=where.place, access=access, server=server, **options)
    return VDRElasticsearch(name, encoder, url=where.place, access=access, server=server, **options)


def held_name(where: Address) -> str | None:
    """Name of the one collection that a place holds, `None` where that cannot be told.

    Raises:
        StoreMismatch: The folder holds something else.
    """
    if not where.is_embedded or where.place == MEMORY:
        return None
    folder = CollectionFolder(Path(where.place), f"the collection in {where.place}")
    manifest = folder.read_manifest() if folder.holds_shard() else None
    name = manifest.get("collection") if isinstance(manifest, dict) else None
    return name if isinstance(name, str) else None
