"""Texts into an embedded store, found by meaning, with the words that matched: python quickstart.py

Needs nothing but `pip install vdr-db`.
"""

from vdr_db.connectors import VDRQdrant

NOTES = {
    "clinic": "The doctor gave him pills against the pain.",
    "concert": "She plays the violin in an orchestra.",
    "garden": "Roses need water in the morning and sun all day.",
}

with VDRQdrant("notes", path="notes.qdrant") as notes:
    years = [{"year": 2023}, {"year": 2024}, {"year": 2025}]
    notes.add_texts(NOTES.values(), ids=NOTES.keys(), payloads=years)
    for query in ("medicine", "classical music", "watering flowers"):
        best = notes.search(query, limit=1)[0]
        reasons = notes.explain(query, best.id)[:3]
        words = ", ".join(f"{term.token} {term.product:.1f}" for term in reasons)
        print(f"{query}: {best.id} ({best.score:.1f}), because of {words}")
    late = notes.search("music", filter={"year": {"gte": 2025}})
    print(f"of 2025 and later: {[hit.id for hit in late]}")
