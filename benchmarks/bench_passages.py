"""What passages are worth: long documents with the answer in their last tenth.

    python benchmarks/bench_passages.py FOLDER... --out benchmarks/results/passages.csv

Each of 200 long documents is a relevant text behind others that answer none of the queries, so many
that it is the last tenth at most; no text comes twice. Recall@10 of the long texts as the model
reads them (`cut`), in passages, and of the same texts each as a document of its own (`texts`),
which is what passages could reach if they were cut where one text ends; `answers` are the relevant
texts without the others. Quality does not vary from run to run: median, p20 and p80 are one number.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import rows_of, write_csv

from vdr_db.checkpoints.assets import DEFAULT_MODEL
from vdr_db.connectors import Passages, VDRQdrant
from vdr_db.encoders.text import SparseEncoder
from vdr_db.evaluation.quality import TestCollection

DOCUMENTS = 200
PARTS = 10
LEAST = 200
"""Letters of a text that takes part."""
CUTS = ("64/16", "128/16", "128/32", "256/32", "510/64")


@dataclass(frozen=True)
class LongDocuments:
    """Documents made of others.

    Attributes:
        name: Of the collection.
        ids: Of the relevant texts, which the long ones take over.
        texts: Long ones.
        parts: What each is made of; the last is the relevant text.
        queries: Query id -> text.
        relevant: Query id -> ids.
    """

    name: str
    ids: Sequence[str]
    texts: Sequence[str]
    parts: Sequence[Sequence[str]]
    queries: dict[str, str]
    relevant: dict[str, set[str]]


def long_documents(
    collections: Sequence[TestCollection], count: int = DOCUMENTS, *, seed: int = 0
) -> LongDocuments:
    """Long documents of some collections, `count` at most; no text stands in two of them."""
    chance = random.Random(seed)
    texts: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, set[str]] = {}
    for collection in collections:
        prefix = f"{collection.name}/"
        texts |= {f"{prefix}{one.id}": one.text for one in collection.documents}
        for query in collection.queries:
            graded = collection.judgements[str(query.id)].items()
            queries[f"{prefix}{query.id}"] = query.text
            relevant[f"{prefix}{query.id}"] = {f"{prefix}{id}" for id, grade in graded if grade > 0}
    texts = {id: text for id, text in texts.items() if len(text) >= LEAST}
    every = sorted(set().union(*relevant.values()) & set(texts))
    chosen = chance.sample(every, min(count, len(every)))
    rest = sorted(set(texts).difference(every))
    chance.shuffle(rest)
    parts = []
    for id in chosen:
        before: list[str] = []
        while sum(map(len, before)) < (PARTS - 1) * len(texts[id]):
            before.append(texts[rest.pop()].strip())
        parts.append([*before, texts[id]])
    inside = {query: found for query, ids in relevant.items() if (found := ids & set(chosen))}
    return LongDocuments(
        "+".join(collection.name for collection in collections),
        chosen,
        ["\n\n".join(some) for some in parts],
        parts,
        {query: queries[query] for query in inside},
        inside,
    )


def recall_10(
    made: LongDocuments,
    encoder: SparseEncoder,
    texts: Sequence[str],
    ids: Sequence[str],
    passages: Passages | None = None,
) -> tuple[float, int]:
    """Mean recall@10 (of the 10 that can be), and rows in the store."""
    with VDRQdrant("long", encoder, path=":memory:") as collection:
        collection.add_texts(texts, ids, passages=passages)
        found = collection.search_batch(list(made.queries.values()), 10)
        recall = [
            len(made.relevant[query] & {str(hit.id) for hit in hits})
            / min(10, len(made.relevant[query]))
            for query, hits in zip(made.queries, found, strict=True)
        ]
        return float(np.mean(recall)), collection.store.count()


def kinds_of(
    made: LongDocuments,
) -> dict[str, tuple[Sequence[str], Sequence[str], Passages | None]]:
    """Texts and ids of what passages are compared with."""
    every = [part for parts in made.parts for part in parts]
    names = [
        id if part is parts[-1] else f"{id}#{i}"
        for id, parts in zip(made.ids, made.parts, strict=True)
        for i, part in enumerate(parts)
    ]
    answers = [parts[-1] for parts in made.parts]
    return {
        "cut": (made.texts, made.ids, None),
        "answers": (answers, made.ids, None),
        "texts": (every, names, None),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--cuts", nargs="+", default=CUTS, metavar="TOKENS/OVERLAP")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="cut, answers, texts, passages …")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--append", action="store_true")
    arguments = parser.parse_args()
    encoder = SparseEncoder.from_pretrained(arguments.model)
    warnings.filterwarnings("ignore", message=".*longer than")
    rows = []
    made = long_documents([TestCollection.load(folder) for folder in arguments.folders])
    length = int(np.mean([len(encoder.token_ids(text)) for text in made.texts]))
    shape = f"{made.name} N={len(made.ids)} Q={len(made.queries)} L={length}"
    kinds = kinds_of(made)
    for cut in arguments.cuts:
        tokens, _, overlap = cut.partition("/")
        kinds[f"passages {cut}"] = (made.texts, made.ids, Passages(int(tokens), int(overlap)))
    for name in arguments.only or kinds:
        recall, count = recall_10(made, encoder, *kinds[name])
        print(f"{shape}: {name} recall@10 {recall:.3f}, {count} rows", flush=True)
        measured = {"recall_10": [recall], "rows": [count]}
        rows += rows_of("passages", f"{arguments.model} {name}", shape, "float32", measured)
    if arguments.out:
        write_csv(arguments.out, rows, append=arguments.append)


if __name__ == "__main__":
    main()
