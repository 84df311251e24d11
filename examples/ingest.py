"""Ingests files into any store: python ingest.py ADDRESS COLLECTION FILE... ; run again to go on.

The same as `vdr-db ingest`. ADDRESS is a folder, http://HOST:6333 (Qdrant),
elasticsearch+https://HOST:9200 or opensearch+https://HOST:9200; the key comes from VDR_DB_API_KEY.
"""

import sys

from vdr_db.connectors import open_collection
from vdr_db.ingest import Stop, ingest, stop_on_signals

address, name, *files = sys.argv[1:]
with open_collection(address, name) as collection, stop_on_signals(Stop()) as stop:
    report = ingest(files, collection, ledger=f"{name}.ledger", progress="auto", stop=stop)
print(f"{report.totals.acknowledged} written, {report.totals.refused} refused: {report.quarantine}")
sys.exit(0 if report.is_complete and report.verification.is_passed else 1)
