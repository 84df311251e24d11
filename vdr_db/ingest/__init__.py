"""Ingest that loses nothing: reader → encoder → bounded queue → concurrent writers → ledger.

```python
from vdr_db.ingest import ingest

report = ingest(["corpus.jsonl"], articles, ledger="articles.ledger")
```

`docs/ingest.md` tells what is promised, how to resume, and how to spread the work over machines.
"""

from vdr_db.connectors.retry import RetryPolicy
from vdr_db.ingest.encode import encode_to_spool
from vdr_db.ingest.images import ImageFolderSource
from vdr_db.ingest.options import IngestOptions
from vdr_db.ingest.pipeline import ingest
from vdr_db.ingest.report import IngestReport, Totals, Verification
from vdr_db.ingest.source import FileSource, RecordSource, Slice
from vdr_db.ingest.spool_source import SpoolSource
from vdr_db.ingest.stop import Stop, stop_on_signals
from vdr_db.ingest.versioned import ingest_versioned

__all__ = [
    "FileSource",
    "ImageFolderSource",
    "IngestOptions",
    "IngestReport",
    "RecordSource",
    "RetryPolicy",
    "Slice",
    "SpoolSource",
    "Stop",
    "Totals",
    "Verification",
    "encode_to_spool",
    "ingest",
    "ingest_versioned",
    "stop_on_signals",
]
