"""In-batch teachers: scores that the student imitates, for every query and document of a batch.

    teacher[i, j] = sum over teachers of weight * q_i . d_j

A teacher turns texts into rows, sparse or dense, so several ranks exchange rows, not `[B, V]`.

BM25 as sparse rows over word pieces, with N, df and the mean length of the training documents:

    q[v] = how often v stands in the query
    d[v] = idf(v) tf (k1 + 1) / (tf + k1 (1 - b + b length / mean length))
    idf(v) = ln(1 + (N - df + 1/2) / (df + 1/2))

Source: Robertson and Zaragoza 2009, with Lucene's idf; k1 = 1.2, b = 0.75.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.kernels import Activation
from vdr_db.sparse import SparseRows
from vdr_db.training.models import start_folder
from vdr_db.training.objective import Rows
from vdr_db.training.settings import ModelConfig, TrainConfig
from vdr_db.training.sparse_ops import GatedRows

__all__ = [
    "Bm25Teacher",
    "DenseTeacher",
    "EncoderTeacher",
    "Teacher",
    "load_teacher",
    "make_teachers",
]

K1, B = 1.2, 0.75
TEACHER_K, TEACHER_QUERY_K = 256, 128
"""Columns an encoder's documents and queries keep."""
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
    """A frozen sparse encoder."""

    def __init__(self, encoder: SparseEncoder, weight: float) -> None:
        """Takes the encoder over; it is run in evaluation mode."""
        self.encoder, self.weight, self.device = encoder, weight, encoder.device
        encoder.truncated = 1  # texts are cut on purpose here; an encoder warns at its first cut

    def queries(self, texts: Sequence[str]) -> GatedRows:
        """Its query vectors."""
        return self._as_tensors(self.encoder.encode_queries(texts))

    def documents(self, texts: Sequence[str]) -> GatedRows:
        """Its document vectors."""
        return self._as_tensors(self.encoder.encode_documents(texts))

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
        """Loads a folder or hub id with transformers; special tokens count in `max_length`.

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
        place = torch.tensor(order, device=self.device).argsort()
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)[place]


class Bm25Teacher(Teacher):
    """BM25 over word pieces.

    Attributes:
        idf: `[V]` float64.
        mean_length: Tokens of a document.
    """

    def __init__(
        self, student: SparseEncoder, texts: Iterable[str], weight: float, max_length: int
    ) -> None:
        """Counts in how many texts each of the student's tokens is, for rows on its device.

        Of a document `max_length` tokens count, so that teacher and student see one text.

        Raises:
            ConfigError: There is no document.
        """
        self.tokenizer, self.width = student.tokenizer, student.vocabulary.size
        self.weight, self.device = weight, student.device
        self.max_length = max_length
        rows = self._counts(list(texts))
        if not len(rows):
            raise ConfigError("a BM25 teacher needs documents to count words in, got none.")
        frequency = np.bincount(rows.indices, minlength=self.width)
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
        tokens = self.tokenizer.encode(texts)
        lengths = tokens.lengths
        owner = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(owner)) - tokens.cu_seqlens[owner]
        is_special = np.isin(tokens.input_ids, self.tokenizer.all_special_ids)
        kept = (place < self.max_length) & ~is_special
        keys: npt.NDArray[np.int64] = owner[kept] * np.int64(self.width) + tokens.input_ids[kept]
        unique, counts = np.unique(keys, return_counts=True)
        indptr = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(np.bincount(unique // self.width, minlength=len(lengths)), out=indptr[1:])
        ids = (unique % self.width).astype(np.int32)
        return SparseRows(indptr, ids, counts.astype(np.float32), self.width)


def load_teacher(
    path: str, activation: Activation | None, config: ModelConfig, device: torch.device
) -> SparseEncoder:
    """The encoder of a teacher, whose vectors keep `TEACHER_K` and `TEACHER_QUERY_K` columns.

    Its texts are cut like those of the student of `config`.
    """
    return SparseEncoder.from_pretrained(
        start_folder(path),
        max_length=config.max_length,
        query_max_length=config.query_max_length,
        k=TEACHER_K,
        query_k=TEACHER_QUERY_K,
        device=device,
        activation=activation,
        runtime="torch",
    )


def make_teachers(
    config: TrainConfig, student: SparseEncoder, documents: Callable[[], Iterable[str]]
) -> list[Teacher]:
    """Teachers as configured; BM25 takes the student's tokenizer and the training documents."""
    model, device = config.model, student.device
    teachers: list[Teacher] = []
    for item in config.teachers:
        if item.kind == "bm25":
            length = model.max_length - student.tokenizer.extra_length
            teachers.append(Bm25Teacher(student, documents(), item.weight, length))
        elif item.kind == "dense":
            folder = start_folder(item.path)
            teachers.append(DenseTeacher(folder, item.weight, device, model.max_length))
        else:
            encoder = load_teacher(item.path, item.activation, model, device)
            teachers.append(EncoderTeacher(encoder, item.weight))
    return teachers
