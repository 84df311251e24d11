"""Graphs of bodies compiled by OpenVINO: the files of ONNX Runtime, in float32 or bfloat16.

Only the body. Products with the vocabulary stay those of ONNX Runtime, so that scans and selection
are the same whatever computed the states.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from vdr_db.errors import ConfigError, require
from vdr_db.forks import end_children_at_once
from vdr_db.towers.interface import FloatArray, Precision

__all__ = ["OpenvinoSession"]

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenvinoSession:
    """A compiled graph, called as a session of ONNX Runtime; any number of threads may call it."""

    def __init__(self, graph: Path, threads: int | None, precision: Precision) -> None:
        """Compiles the graph.

        Args:
            graph: File of the graph; its weights lie beside it.
            threads: For one run; None for one a core.
            precision: `"float32"` or `"bfloat16"`.

        Raises:
            ConfigError: This processor cannot compute in that precision.
            Exception: Of many kinds: the graph cannot be compiled.
            MissingExtraError: `openvino` is not installed.
        """
        library = require("openvino", "openvino")
        end_children_at_once()
        hint = _HINTS[precision]
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
            "ENABLE_CPU_PINNING": "NO",  # other processes would be bound to the same cores
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        self._compiled = library.Core().compile_model(str(graph), "CPU", settings)
        found = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if found != hint:
            raise ConfigError(
                f"`precision` must be 'float32' for OpenVINO on this processor, got {precision!r}, "
                f"which it would compute in {found}; or pass runtime='torch'."
            )
        self._requests = threading.local()

    def run(self, names: Sequence[str], inputs: Mapping[str, npt.NDArray[Any]]) -> list[FloatArray]:
        """Outputs of those names."""
        request = getattr(self._requests, "one", None)
        if request is None:
            request = self._requests.one = self._compiled.create_infer_request()
        found = request.infer(inputs)
        return [found[name].copy() for name in names]  # the next run writes into the same memory
