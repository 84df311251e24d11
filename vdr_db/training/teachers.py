"""In-batch teachers: scores that the student imitates, for every query and document of a batch.

    teacher[i, j] = sum over teachers of weight * q_i . d_j

A teacher turns texts into rows, sparse or dense, so several ranks exchange rows, not `[B, V]`.

BM25 as sparse rows over word pieces, with N, df and the mean length of the training documents:

    q[v] = how often v stands in the query
    d[v] = idf(v) tf (k1 + 1) / (tf + k1 (1 - b + b length / mean length))
    idf(v) = ln(1 + (N - df + 1/2) / (df + 1/2))

An encoder teacher may have BM25's rows added to its own, which makes one vector of both:

    q = scale q_e + a q_BM25
    d = (d_e + b d_BM25) / (|d_e + b d_BM25| / norm)^power

Source: Robertson and Zaragoza 2009, with Lucene's idf; k1 = 1.2, b = 0.75.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.sparse import SparseRows
from vdr_db.text.tokenization import TextTokenizer, TokenizedTexts
from vdr_db.training.models import start_folder
from vdr_db.training.objective import Rows
from vdr_db.training.settings import TeacherConfig
from vdr_db.training.sparse_ops import GatedRows

__all__ = ["Bm25Teacher", "DenseTeacher", "EncoderTeacher", "Teacher", "make_teachers"]

K1, B = 1.2, 0.75
DENSE_BATCH = 32
"""Texts a dense teacher encodes at once."""


class Teacher(ABC):
    """Texts to the rows whose products are its scores.

    Attributes:
        weight: Of its scores in the sum of all teachers.
        device: Where rows are wanted.
    """

    weight: float
    device: torch.device

    @abstractmethod
    def queries(self, texts: Sequence[str]) -> Rows:
        """Rows of queries."""

    @abstractmethod
    def documents(self, texts: Sequence[str]) -> Rows:
        """Rows of documents."""

    def _as_tensors(self, rows: SparseRows) -> GatedRows:
        return GatedRows(
            torch.tensor(rows.indptr, device=self.device),
            torch.tensor(rows.indices, dtype=torch.int64, device=self.device),
            torch.tensor(rows.values, device=self.device),
            rows.width,
        )


class EncoderTeacher(Teacher):
    """A frozen sparse encoder, perhaps with other weights than it was made with.

    Attributes:
        encoder: Of documents.
        query_encoder: Of queries; the same network.
        lexical: Whose rows are added, or None.
    """

    def __init__(
        self, encoder: SparseEncoder, settings: TeacherConfig, lexical: Bm25Teacher | None = None
    ) -> None:
        """Takes the encoder over; it is run in evaluation mode.

        Args:
            encoder: Makes the documents' vectors.
            settings: Weights, the queries' activation, and how long documents are damped.
            lexical: Whose rows are added, by the settings' factors.
        """
        self.encoder, self.weight, self.device = encoder, settings.weight, encoder.device
        encoder.truncated = 1  # texts are cut on purpose here; an encoder warns at its first cut
        self.query_encoder = copy.copy(encoder)
        if settings.query_activation is not None:
            self.query_encoder.activation = settings.query_activation
        self.scale = settings.query_scale
        self.power, self.norm = settings.length_power, settings.length_norm
        self.lexical = lexical
        self.lexical_query = settings.lexical_query
        self.lexical_document = settings.lexical_document

    def queries(self, texts: Sequence[str]) -> GatedRows:
        """Its query vectors."""
        rows = self._as_tensors(self.query_encoder.encode_queries(texts))
        rows = replace(rows, weights=rows.weights * self.scale)
        if self.lexical is None or not self.lexical_query:
            return rows
        return _sum(rows, self.lexical.queries(texts), self.lexical_query)

    def documents(self, texts: Sequence[str]) -> GatedRows:
        """Its document vectors."""
        rows = self._as_tensors(self.encoder.encode_documents(texts))
        if self.lexical is not None and self.lexical_document:
            rows = _sum(rows, self.lexical.documents(texts), self.lexical_document)
        if not self.power:
            return rows
        squares = rows.weights.new_zeros(len(rows)).index_add(0, rows.rows, rows.weights.square())
        damping = (squares.sqrt() / self.norm) ** -self.power
        return replace(rows, weights=rows.weights * damping[rows.rows])

    @staticmethod
    def over_columns(rows: GatedRows, student: SparseEncoder) -> GatedRows:
        """Rows over token ids as rows over the student's columns; what it lacks is left out."""
        places = torch.from_numpy(student.vocabulary.id_to_column.astype(np.int64))
        columns = places.to(rows.columns.device)[rows.columns]
        kept = columns >= 0
        counts = torch.bincount(rows.rows[kept], minlength=len(rows))
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return GatedRows(indptr, columns[kept], rows.weights[kept], student.vocabulary.columns)


class DenseTeacher(Teacher):
    """A frozen sentence encoder: the mean of the last hidden states, with L2 norm 1."""

    def __init__(self, folder: str, weight: float, device: torch.device, max_length: int) -> None:
        """Loads it with transformers.

        Args:
            folder: Folder or hub id.
            weight: Of its scores.
            device: Where it runs.
            max_length: Most tokens of a text, special tokens included.

        Raises:
            ConfigError: It cannot be loaded.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = AutoModel.from_pretrained(folder).eval().to(device)
        except Exception as error:  # whatever transformers raises, the folder is what is wrong
            raise ConfigError(
                f"the dense teacher {folder!r} cannot be loaded: {error}; pass the folder of a "
                "sentence-transformers model with mean pooling."
            ) from error
        self.weight, self.device, self.max_length = weight, device, max_length

    def queries(self, texts: Sequence[str]) -> Tensor:
        """`[N, H]`."""
        return self.documents(texts)

    @torch.inference_mode()
    def documents(self, texts: Sequence[str]) -> Tensor:
        """`[M, H]`, texts of similar length together."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: list[Tensor] = []
        for start in range(0, len(order), DENSE_BATCH):
            chosen = {"input_ids": [ids[i] for i in order[start : start + DENSE_BATCH]]}
            batch = self.tokenizer.pad(chosen, return_tensors="pt").to(self.device)
            mask = batch["attention_mask"][..., None]
            hidden = self.model(**batch).last_hidden_state
            rows.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1)).float())
        place = torch.empty(len(order), dtype=torch.int64)
        place[torch.tensor(order)] = torch.arange(len(order))
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)[place.to(self.device)]


class Bm25Teacher(Teacher):
    """BM25 over word pieces.

    Attributes:
        idf: `[V]` float64.
        mean_length: Tokens of a document.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        width: int,
        texts: Iterable[str],
        weight: float,
        max_length: int,
        device: torch.device,
    ) -> None:
        """Counts document frequencies.

        Args:
            tokenizer: Splits texts.
            width: Number of token ids.
            texts: Documents to count in.
            weight: Of its scores.
            max_length: Tokens of a document that count, so that teacher and student see one text.
            device: Where rows are wanted.

        Raises:
            ConfigError: There is no document.
        """
        self.tokenizer, self.width, self.weight = tokenizer, width, weight
        self.device = device
        self.max_length = max_length
        rows = self._counts(list(texts))
        if not len(rows):
            raise ConfigError("a BM25 teacher needs documents to count words in, got none.")
        frequency = np.bincount(rows.indices, minlength=width)
        self.idf = np.log(1 + (len(rows) - frequency + 0.5) / (frequency + 0.5))
        self.mean_length = float(rows.values.sum()) / len(rows)

    def queries(self, texts: Sequence[str]) -> GatedRows:
        """Token counts."""
        return self._as_tensors(self._counts(texts))

    def documents(self, texts: Sequence[str]) -> GatedRows:
        """Token weights."""
        rows = self._counts(texts)
        owner = np.repeat(np.arange(len(rows)), rows.counts)
        lengths = np.bincount(owner, weights=rows.values, minlength=len(rows))[owner]
        counts = rows.values.astype(np.float64)
        damped = counts + K1 * (1 - B + B * lengths / self.mean_length)
        weights = self.idf[rows.indices] * counts * (K1 + 1) / damped
        weighted = SparseRows(rows.indptr, rows.indices, weights.astype(np.float32), self.width)
        return self._as_tensors(weighted)

    def _counts(self, texts: Sequence[str]) -> SparseRows:
        tokens: TokenizedTexts = self.tokenizer.encode(texts)
        lengths = tokens.lengths
        owner = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(owner)) - tokens.cu_seqlens[owner]
        kept = place < self.max_length
        special = np.isin(tokens.input_ids, self.tokenizer.all_special_ids)
        kept &= ~special
        keys: npt.NDArray[np.int64] = owner[kept] * np.int64(self.width) + tokens.input_ids[kept]
        unique, counts = np.unique(keys, return_counts=True)
        indptr = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(np.bincount(unique // self.width, minlength=len(lengths)), out=indptr[1:])
        ids = (unique % self.width).astype(np.int32)
        return SparseRows(indptr, ids, counts.astype(np.float32), self.width)


def _sum(left: GatedRows, right: GatedRows, factor: float) -> GatedRows:
    """`left + factor * right`, row by row."""
    width = left.width
    keys = torch.cat([rows.rows * width + rows.columns for rows in (left, right)])
    unique, place = torch.unique(keys, return_inverse=True)
    weights = left.weights.new_zeros(len(unique))
    weights = weights.index_add(0, place, torch.cat([left.weights, factor * right.weights]))
    counts = torch.bincount(unique // width, minlength=len(left))
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return GatedRows(indptr, unique % width, weights, width)


def make_teachers(
    settings: Sequence[TeacherConfig],
    student: SparseEncoder,
    documents: Iterable[str],
    *,
    max_length: int,
    query_max_length: int,
) -> list[Teacher]:
    """Teachers as configured.

    Args:
        settings: One for each.
        student: Whose tokenizer BM25 uses.
        documents: Training documents, read if there is a BM25 teacher.
        max_length: Of documents, special tokens included.
        query_max_length: Of queries.
    """
    teachers: list[Teacher] = []
    counted: list[Bm25Teacher] = []

    def bm25(item: TeacherConfig) -> Bm25Teacher:
        """One pass over the documents serves all that need their frequencies."""
        if not counted:
            own = max_length - student.tokenizer.extra_length
            width = student.vocabulary.size
            counted.append(
                Bm25Teacher(student.tokenizer, width, documents, item.weight, own, student.device)
            )
        teacher = copy.copy(counted[0])
        teacher.weight = item.weight
        teacher.mean_length = item.mean_length or teacher.mean_length
        return teacher

    for item in settings:
        if item.kind == "bm25":
            teachers.append(bm25(item))
            continue
        if item.kind == "dense":
            folder = start_folder(item.path)
            teachers.append(DenseTeacher(folder, item.weight, student.device, max_length))
            continue
        encoder = SparseEncoder.from_pretrained(
            start_folder(item.path),
            max_length=max_length,
            query_max_length=query_max_length,
            k=item.k,
            query_k=item.query_k,
            device=student.device,
            activation=item.activation,
        )
        is_lexical = bool(item.lexical_query or item.lexical_document)
        teachers.append(EncoderTeacher(encoder, item, bm25(item) if is_lexical else None))
    return teachers
