"""A client for OpenSearch, made as this library needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vdr_db.connectors.address import Access
from vdr_db.errors import require

__all__ = ["opensearch_client"]

_REQUEST_S = 60


def opensearch_client(urls: Sequence[str], access: Access) -> Any:
    """An `opensearchpy.OpenSearch` without retries of its own, which know no deadline.

    Raises:
        MissingExtraError: opensearch-py is not installed.
    """
    opensearchpy = require("opensearchpy", "opensearch")
    options: dict[str, Any] = {}
    if access.api_key is not None:
        options["headers"] = {"authorization": f"ApiKey {access.api_key}"}
    elif access.basic_auth is not None:
        options["http_auth"] = access.basic_auth
    if urls[0].startswith("https:"):
        options.update(use_ssl=True, verify_certs=access.verify_certs, ssl_show_warn=False)
        if access.ca_certs is not None:
            options["ca_certs"] = access.ca_certs
    return opensearchpy.OpenSearch(
        hosts=list(urls), max_retries=0, retry_on_timeout=False, timeout=_REQUEST_S, **options
    )
