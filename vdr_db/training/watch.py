"""What a run tells: a JSONL log, TensorBoard, and quality on a held-out BEIR folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vdr_db.encoders.batching import plan_batches
from vdr_db.encoders.text import SparseEncoder
from vdr_db.evaluation.metrics import mean, mean_nonzeros, ndcg, recall
from vdr_db.readers import BeirFolder
from vdr_db.training.settings import EvaluationConfig
from vdr_db.training.vectors import Side

__all__ = ["LOG_FILE", "HeldOut", "RunLog", "read_log"]

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
DEPTH = 100


class RunLog:
    """Numbers of a run by step, as `log.jsonl` and, where installed, for TensorBoard.

    A resumed run goes on where its checkpoint stands: later lines of the interrupted run are
    dropped, so that no step comes twice.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        """Opens the log of a run's folder, after `step` steps."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_FILE
        kept = [row for row in read_log(self.path) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        self.path.write_text(text, "utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _open_board(folder, step)

    def write(self, step: int, **numbers: Any) -> None:
        """Adds the numbers of a step."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def __enter__(self) -> RunLog:
        """The log itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _open_board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard is not installed; the run is logged to %s only.", LOG_FILE)
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


class HeldOut:
    """A BEIR folder, or a part of it, that a run is measured on.

    Attributes:
        judgements: Query id -> document id -> grade.
        query_ids: Judged queries.
        queries: Their texts.
        document_ids: Of the documents searched.
        documents: Their texts.
    """

    def __init__(self, settings: EvaluationConfig) -> None:
        """Reads the folder.

        Raises:
            InputError: A file is missing or wrong.
        """
        reader = BeirFolder(settings.folder)
        graded = reader.judgements()
        right = {
            query: {document for document, grade in grades.items() if grade > 0}
            for query, grades in graded.items()
        }
        queries = [record for record in reader.queries() if right.get(str(record.id))]
        queries = queries[: settings.queries or None]
        self.query_ids = [str(record.id) for record in queries]
        self.queries = [record.text for record in queries]
        self.judgements = {query: graded[query] for query in self.query_ids}
        relevant = set[str]().union(*(right[query] for query in self.query_ids))
        room = (settings.documents or np.inf) - len(relevant)
        self.document_ids: list[str] = []
        self.documents: list[str] = []
        for record in reader.documents():
            is_judged = str(record.id) in relevant
            if is_judged or room > 0:
                room -= not is_judged
                self.document_ids.append(str(record.id))
                self.documents.append(record.text)

    def measure(self, encoder: SparseEncoder) -> dict[str, float]:
        """nDCG@10, recall@100 and the vectors' sizes of a sparse encoder."""
        queries = encoder.encode_queries(self.queries)
        documents = encoder.encode_documents(self.documents)
        mass = np.bincount(documents.indices, weights=documents.values, minlength=documents.width)
        top = np.sort(mass)[::-1][:100].sum() / max(mass.sum(), 1e-12)
        return {
            **self._quality(queries.dot(documents)),
            "query_nonzeros": mean_nonzeros(queries),
            "document_nonzeros": mean_nonzeros(documents),
            "share_of_top_100_columns": float(top),
        }

    def measure_dense(self, query: Side, document: Side) -> dict[str, float]:
        """nDCG@10 and recall@100 of CLS states."""
        return self._quality(
            (_cls(query, self.queries) @ _cls(document, self.documents).T).astype(np.float64)
        )

    def _quality(self, scores: npt.NDArray[np.float64]) -> dict[str, float]:
        run = {}
        for query, row in zip(self.query_ids, scores, strict=True):
            best = np.argsort(-row, kind="stable")[:DEPTH]
            # A text that shares no dimension with the query is not found by any store.
            run[query] = [(self.document_ids[i], float(row[i])) for i in best if row[i] != 0]
        return {
            "ndcg@10": mean(ndcg(run, self.judgements, cutoff=10)),
            "recall@100": mean(recall(run, self.judgements, cutoff=DEPTH)),
        }


@torch.no_grad()
def _cls(side: Side, texts: list[str]) -> npt.NDArray[np.float32]:
    tokens = side.encoder.tokenizer.encode(texts)
    states = np.empty((len(texts), side.tower.body.config.hidden_size), np.float32)
    for chosen in plan_batches(tokens.lengths, tokens=4096, rows=256):
        cls = side.encode(tokens, chosen, {"cls"}).cls
        assert cls is not None
        states[chosen] = cls.cpu().numpy()
    return states
