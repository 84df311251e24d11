"""What towers of texts and of images share where torch computes them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vdr_db.errors import ConfigError

__all__ = ["TorchTower", "check_process"]

_computes_in: int | None = None
"""Process in which torch first computed for this library."""


def check_process() -> None:
    """Says that torch is about to compute, and refuses where it would wait for ever.

    Its threads do not come along into a forked process, which does not know that.

    Raises:
        ConfigError: Torch has computed in the process that this one was forked from.
    """
    global _computes_in
    if _computes_in is None:
        _computes_in = os.getpid()
    elif _computes_in != os.getpid() and torch.get_num_threads() > 1:
        raise ConfigError(
            f"torch has computed in process {_computes_in}, which this process was forked from, "
            "and its threads stayed there; start processes with the method 'spawn', load models "
            "after the fork only, use runtime='onnx', or call torch.set_num_threads(1) here."
        )


class TorchTower(nn.Module, ABC):
    """A body and its head as a module; see `vdr_db.towers.interface` for what it offers others."""

    @property
    @abstractmethod
    def head_name(self) -> str:
        """Name of the head in stamps and files."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The vocabulary matrix, `[V, H]` in the dtype of the weights."""

    def plain_matrix(self) -> Tensor:
        """The same without a head's scales: what images may share."""
        return self.matrix()

    def bias_rows(self) -> Tensor | None:
        """What is added to the score of each column, `[V]`, or None."""
        return None

    @property
    def columns(self) -> int:
        """Number V of columns of the vocabulary matrix."""
        return self.matrix().shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and the hidden states."""
        return next(self.parameters()).dtype

    @property
    def precision(self) -> str:
        """The same as a text, such as `"bfloat16"`."""
        return str(self.dtype).removeprefix("torch.")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients, and without dropout even in the middle of a training run."""
        check_process()
        was_training = self.training
        if was_training:  # walking all modules takes longer than a small model takes for a query
            self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if was_training:
                self.train()

    def rows(self, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows of the vocabulary matrix, `[D, H]` float32."""
        return self._chosen(self.matrix(), columns)

    def plain_rows(self, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows of `plain_matrix`, `[D, H]` float32."""
        return self._chosen(self.plain_matrix(), columns)

    def bias(self, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
        """What is added to the scores of some columns, `[D]` float32, or None."""
        bias = self.bias_rows()
        return None if bias is None else self._chosen(bias, columns)

    def _chosen(self, values: Tensor, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        chosen = torch.tensor(columns, dtype=torch.int64, device=values.device)
        found: npt.NDArray[np.float32] = values.detach()[chosen].float().cpu().numpy()
        return found
