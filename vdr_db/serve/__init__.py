"""A small web page and a JSON API over one collection: `vdr-db serve`, or `make_app`.

Importing this package needs the extra `serve`; `docs/seeing.md` tells what it offers and what it
refuses.
"""

from vdr_db.errors import require

for _module in ("fastapi", "uvicorn", "python_multipart", "jinja2", "prometheus_client", "orjson"):
    require(_module, "serve")

from vdr_db.serve.app import make_app  # noqa: E402  (after the packages were asked for)
from vdr_db.serve.run import Address, listen, serve, serve_many  # noqa: E402
from vdr_db.serve.service import ImageSearch, SearchService  # noqa: E402
from vdr_db.serve.uploads import ImageUploads  # noqa: E402

__all__ = [
    "Address",
    "ImageSearch",
    "ImageUploads",
    "SearchService",
    "listen",
    "make_app",
    "serve",
    "serve_many",
]
