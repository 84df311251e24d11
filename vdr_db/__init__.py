"""Learned sparse retrieval, from model to production index.

```python
from vdr_db import SparseEncoder
from vdr_db.connectors import VDRQdrant
```

Names are imported on first use, so `import vdr_db` costs next to nothing and needs NumPy only when
a name that uses it is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vdr_db.version import __version__

if TYPE_CHECKING:
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.encoders.token_queries import TokenQueries
    from vdr_db.errors import VdrError
    from vdr_db.sparse import SparseRows
    from vdr_db.stamp import EncoderStamp
    from vdr_db.text.vocabulary import Vocabulary

__all__ = [
    "CrossModalEncoder",
    "EncoderStamp",
    "ImageEncoder",
    "SparseEncoder",
    "SparseRows",
    "TokenQueries",
    "VdrError",
    "Vocabulary",
    "__version__",
]

_HOME = {
    "CrossModalEncoder": "vdr_db.encoders.cross_modal",
    "EncoderStamp": "vdr_db.stamp",
    "ImageEncoder": "vdr_db.encoders.image",
    "SparseEncoder": "vdr_db.encoders.text",
    "SparseRows": "vdr_db.sparse",
    "TokenQueries": "vdr_db.encoders.token_queries",
    "VdrError": "vdr_db.errors",
    "Vocabulary": "vdr_db.text.vocabulary",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name in _HOME:
        from importlib import import_module

        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, imported or not yet."""
    return sorted(__all__)
