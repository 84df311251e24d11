"""Towers that are graphs beside their weights: one item a run, no torch.

One item a run needs no padding, and makes a vector independent of its batch by construction. The
graph ends with the states; products with the vocabulary matrix are `vdr_db.kernels.cpu.products`.
ONNX Runtime runs a graph, or OpenVINO where that is asked for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError, MissingExtraError
from vdr_db.forks import leak, renew_after_fork
from vdr_db.kernels.cpu.products import exact_levels, largest
from vdr_db.kernels.cpu.scan import Codes, encoded
from vdr_db.kernels.cpu.sessions import opened
from vdr_db.towers.families import BodyConfig
from vdr_db.towers.interface import (
    LIBRARIES,
    FloatArray,
    GraphRuntime,
    ImageSizes,
    Precision,
)
from vdr_db.towers.onnx_int8 import LEVELS, weight_files, with_integers
from vdr_db.towers.packing import TextItem
from vdr_db.towers.stored import SharedMatrix, StoredTensor

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from vdr_db.towers.openvino import OpenvinoSession

__all__ = ["OnnxImageTower", "OnnxTextTower", "OnnxTower"]

Config = TypeVar("Config")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Device:
    """The CPU, as `torch.device("cpu")` tells it."""

    type: str = "cpu"
    index: int | None = None

    def __str__(self) -> str:
        return self.type


class OnnxTower(Generic[Config, Item]):
    """A body and its head as a graph; the session is opened when it is first needed.

    Attributes:
        config: Sizes and constants of the body.
        head_name: Name of the head in stamps and files.
        weights: By the names of the torch modules, as they lie in their file.
        columns: Number V of columns.
        threads: Of a run; None for one a core.
        precision: Of the linear layers of the body.
        runtime: What computes the body.
        constants: What the body has beside weights and `config`, as JSON types.
    """

    constants: Mapping[str, Any] = {}

    device = Device()
    dtype = "torch.float32"
    packs_exactly = True

    def __init__(
        self,
        graph: Path,
        weights: Mapping[str, StoredTensor | SharedMatrix],
        config: Config,
        *,
        head_name: str,
        matrix: str,
        column_to_row: npt.NDArray[np.int64],
        threads: int | None = None,
        precision: Precision = "float32",
        runtime: GraphRuntime = "onnx",
    ) -> None:
        """Takes the parts over; nothing is loaded yet.

        Args:
            graph: File that `vdr_db.towers.onnx_graphs` wrote.
            weights: Of the tower, in the file that the graph points to.
            config: Sizes and constants of the body.
            head_name: Name of the head.
            matrix: Name of the vocabulary matrix among the weights.
            column_to_row: `[V]` row of each column in that matrix.
            threads: Of the session; None for one a core.
            precision: `"float32"`, `"int8"` of ONNX Runtime, or `"bfloat16"` of OpenVINO.
            runtime: What computes the body.

        Raises:
            ConfigError: The matrix has fewer rows than columns need.
        """
        self.config = config
        self.head_name = head_name
        self.weights = weights
        self.columns = int(column_to_row.size)
        there, wanted = weights[matrix].shape[0], int(column_to_row.max(initial=-1)) + 1
        if wanted > there:
            raise ConfigError(
                f"the vocabulary matrix of {graph.parent} must have a row for each of {wanted} "
                f"token ids, got {there} rows; tokenizer and model do not belong together."
            )
        self._graph = graph
        self._matrix = matrix
        self._rows = column_to_row
        self.threads = threads
        self.precision = precision
        self.runtime = runtime
        self._session: InferenceSession | OpenvinoSession | None = None
        self._lock = threading.Lock()
        renew_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        # A session and a lock are of one process.
        kept = {name: part for name, part in self.__dict__.items() if name != "matrix"}
        return {**kept, "_session": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Leaves the session alone for good, whose threads stayed with the parent."""
        leak(self._session)
        self._session, self._lock = None, threading.Lock()

    def named_parameters(self) -> Iterable[tuple[str, StoredTensor | SharedMatrix]]:
        """Its weights by the names of the torch modules."""
        return self.weights.items()

    def states(self, item: Item) -> FloatArray:
        """States of an item's positions after the head's transform, `[P, H]` float32."""
        session = self._opened()
        try:
            found: FloatArray = session.run(["states"], self.inputs(item))[0]
        except Exception as error:  # the library raises many kinds, some of them plain RuntimeError
            raise _unusable(self._graph, self.runtime, str(error)) from error
        wanted = "x", self.weights[self._matrix].shape[1]
        if found.dtype != np.float32 or ("x", *found.shape[1:]) != wanted:
            wrong = f"its states are {found.dtype} {list(found.shape)}"
            raise _unusable(self._graph, self.runtime, wrong)
        return found

    def pooled(self, item: Item) -> FloatArray:
        """Largest score of each column over the positions of an item, `[V]` float32."""
        return self.scores(self.states(item))

    def scores(
        self, states: FloatArray, columns: npt.NDArray[np.int64] | None = None
    ) -> FloatArray:
        """Largest score over the positions of an item, of all columns or of some.

        A column's score has the same bits whatever columns are asked for beside it.

        Args:
            states: `[P, H]` float32 of the item.
            columns: `[S]`; None for all.

        Returns:
            `[S]` or `[V]` float32.
        """
        chosen = self.matrix if columns is None else self.matrix[columns]
        found = largest(chosen, states, self.threads)
        if self._scale is not None:
            found *= self._scale if columns is None else self._scale[columns]
        if self._bias is not None:
            found += self._bias if columns is None else self._bias[columns]
        return found

    @cached_property
    def matrix(self) -> FloatArray:
        """The vocabulary matrix without scales, `[V, H]`: the file itself where that is float32."""
        rows, stored = self._rows, self.weights[self._matrix]
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 != rows.size:
            return stored.read(rows)
        neighbours = slice(first, last + 1)
        return stored.mapped()[neighbours] if stored.dtype == "F32" else stored.read(neighbours)

    def encoded(self) -> Codes:
        """Rows with their scales in 8 bit integers, for scans; made anew in each call."""

        def read(rows: slice) -> FloatArray:
            part = self.matrix[rows]
            return part if self._scale is None else part * self._scale[rows, None]

        return encoded(read, self.columns, self._bias, self.threads)

    def rows(self, columns: npt.NDArray[np.int64]) -> FloatArray:
        """Rows of the vocabulary matrix, `[D, H]` float32."""
        rows = self.plain_rows(columns)
        if self._scale is not None:
            rows *= self._scale[columns, None]
        return rows

    def plain_rows(self, columns: npt.NDArray[np.int64]) -> FloatArray:
        """The same rows without a head's scales."""
        return self.weights[self._matrix].read(self._rows[columns])

    def bias(self, columns: npt.NDArray[np.int64]) -> FloatArray | None:
        """What is added to the scores of some columns, `[D]` float32, or None."""
        return None if self._bias is None else self._bias[columns]

    @cached_property
    def _bias(self) -> FloatArray | None:
        bias = self.weights.get("head.bias")
        return None if bias is None else bias.read(self._rows)

    @cached_property
    def _scale(self) -> FloatArray | None:
        """What largest products are multiplied with, or None; never below 0."""
        scale = self.weights.get("head.scale")
        return None if scale is None else np.maximum(scale.read(self._rows), 0)

    def inputs(self, item: Item) -> dict[str, npt.NDArray[Any]]:
        """Inputs of the graph for one item."""
        raise NotImplementedError

    def _opened(self) -> InferenceSession | OpenvinoSession:
        with self._lock:
            if self._session is None:
                self._session = open_session(
                    self._graph, self.threads, self.precision, self.runtime
                )
            return self._session


class OnnxTextTower(OnnxTower[BodyConfig, TextItem]):
    """A tower of texts."""

    def inputs(self, item: TextItem) -> dict[str, npt.NDArray[Any]]:
        """Token ids and positions of one text."""
        return {"input_ids": item.input_ids, "position_ids": item.position_ids}


class OnnxImageTower(OnnxTower[ImageSizes, FloatArray]):
    """A tower of images."""

    def inputs(self, item: FloatArray) -> dict[str, npt.NDArray[Any]]:
        """Pixels of one image."""
        return {"pixels": item[None]}


def open_session(
    graph: Path,
    threads: int | None,
    precision: Precision = "float32",
    runtime: GraphRuntime = "onnx",
) -> InferenceSession | OpenvinoSession:
    """A session on the CPU.

    Args:
        graph: File of the graph; its weights lie beside it.
        threads: For one run; None for one a core.
        precision: Of the linear layers, as in `OnnxTower`.
        runtime: Whose session.

    Raises:
        ConfigError: The file is damaged, belongs to other weights, or this processor lacks the
            precision.
        MissingExtraError: The package of the runtime is not installed.
    """
    try:
        if runtime == "openvino":
            from vdr_db.towers.openvino import OpenvinoSession

            with _together(graph) as place:
                return OpenvinoSession(place, threads, precision)
        if precision != "int8":
            return opened(graph, threads)
        is_signed = exact_levels(threads) == LEVELS
        told = graph.read_bytes()
        beside, moved = _followed(graph.parent, weight_files(told))
        rounded = with_integers(told, is_signed=is_signed, moved=moved)
        return opened(rounded, threads, beside=beside)
    except (ConfigError, MissingExtraError):
        raise
    except Exception as error:  # the library raises many kinds, some of them plain RuntimeError
        raise _unusable(graph, runtime, str(error)) from error


@contextmanager
def _together(graph: Path) -> Iterator[Path]:
    """The graph, or one for a moment where no link leads its weights elsewhere, as OpenVINO asks.

    Weights are linked there, or copied where the place is on another disk.
    """
    home, names = graph.resolve().parent, weight_files(graph.read_bytes())
    beside, moved = _followed(graph.parent, names)
    if all(beside / moved[name] == home / name for name in names):
        yield graph.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="vdr-db-", ignore_cleanup_errors=True) as folder:
        for name, file in moved.items():
            place = Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(beside / file, place)
            except OSError:
                shutil.copyfile(beside / file, place)
        yield Path(shutil.copyfile(graph, Path(folder) / graph.name))


def _followed(folder: Path, names: Iterable[str]) -> tuple[Path, dict[str, str]]:
    """The folder that files of weights truly lie below, and what each is called from there.

    Files may be links into other folders, as in caches of the hub, and a graph in memory may only
    point to what lies below one folder. A name that leads out of `folder` by itself is refused.
    """
    files = {}
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"its weights must lie beside it, got {name!r}")
        files[name] = (folder / name).resolve()
    beside = Path(os.path.commonpath([file.parent for file in files.values()] or [folder]))
    return beside, {name: file.relative_to(beside).as_posix() for name, file in files.items()}


def _unusable(graph: Path, runtime: GraphRuntime, why: str) -> ConfigError:
    return ConfigError(
        f"{graph} cannot be used by {LIBRARIES[runtime]}: {' '.join(why.split())[:300]}; write the "
        "graphs anew with `vdr-db export`, or load the model with runtime='torch'."
    )
