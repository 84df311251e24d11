"""Vectors and BM25 in one search of Elasticsearch or OpenSearch: python hybrid_search.py ADDRESS

ADDRESS is elasticsearch+http(s)://HOST:9200 or opensearch+http(s)://HOST:9200; the key comes from
VDR_DB_API_KEY. Needs `pip install 'vdr-db[elasticsearch]'` or `'vdr-db[opensearch]'`.
"""

import sys

from vdr_db.connectors import VDRElasticsearch, open_collection

PARTS = {
    "ax-770": "Brake pads AX-770 for the front axle.",
    "ax-771": "Brake pads AX-771 for the rear axle.",
    "bulb": "Replacement bulb for the headlight.",
    "fluid": "Fluid for the hydraulics that stop the wheels.",
}

with open_collection(sys.argv[1], "parts", text_fields=["text"]) as parts:
    assert isinstance(parts, VDRElasticsearch)
    parts.add_texts(PARTS.values(), ids=PARTS.keys())
    for query in ("AX-771", "something to stop the car", "lamp"):
        by_meaning = [hit.id for hit in parts.search(query, limit=2)]
        both = [hit.id for hit in parts.search_with_text(query, limit=2, fusion="rrf")]
        print(f"{query}: by meaning {by_meaning}, with BM25 {both}")
