"""Sessions of ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.errors import require
from vdr_db.forks import end_children_at_once

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["opened"]

_WEIGHTS_BESIDE = "session.model_external_initializers_file_folder_path"


def opened(
    model: bytes | Path,
    threads: int | None,
    *,
    beside: Path | None = None,
    keeps_memory: bool = True,
) -> InferenceSession:
    """A session for one graph.

    Args:
        model: The graph, or its file.
        threads: For one run; None for one a core.
        beside: Folder of weights that a graph in memory points to.
        keeps_memory: Whether what a run took is kept for the next one.

    Raises:
        Exception: Of many kinds, some plain RuntimeError: the graph cannot be run.
        MissingExtraError: `onnxruntime` is not installed.
    """
    runtime = require("onnxruntime", "onnx")
    end_children_at_once()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about constants that it folds, as it should
    options.enable_cpu_mem_arena = keeps_memory
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads that spin between runs take the time of whoever else works on the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if beside is not None:
        options.add_session_config_entry(_WEIGHTS_BESIDE, str(beside))
    session: InferenceSession = runtime.InferenceSession(
        str(model) if isinstance(model, Path) else model,
        options,
        providers=["CPUExecutionProvider"],
    )
    return session
