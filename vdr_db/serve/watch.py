"""What a service tells those who run it: numbers for Prometheus, and a line for each request."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

__all__ = ["ACCESS_LOG", "METRICS_FOLDER", "METRICS_TYPE", "Watch"]

ACCESS_LOG = "vdr_db.serve.access"
"""Name of the logger that gets one JSON object for each request, at INFO."""

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of `prometheus-client`: the folder in which several processes keep their numbers."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_log = logging.getLogger(ACCESS_LOG)


class Watch:
    """Counts requests and encodings of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "vdr_db_requests",
            "Answered requests.",
            ["path", "method", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "vdr_db_request_seconds",
            "From the request to the end of its answer.",
            ["path"],
            registry=self.registry,
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
        )
        self.active = Gauge(
            "vdr_db_requests_active",
            "Going on now.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._batch_texts = Histogram(
            "vdr_db_batch_texts",
            "Texts encoded together.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        )
        self._encode_seconds = Histogram(
            "vdr_db_encode_seconds",
            "Of one call of the encoder.",
            registry=self.registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )

    def encoded(self, texts: int, seconds: float) -> None:
        """One call of the encoder."""
        self._batch_texts.observe(texts)
        self._encode_seconds.observe(seconds)

    def answered(
        self,
        client: str,
        method: str,
        path: str,
        label: str,
        status: int,
        size: int,
        seconds: float,
    ) -> None:
        """One request; `label` is its path where that is one of ours, so that labels stay few."""
        self._requests.labels(label, method, status).inc()
        self._seconds.labels(label).observe(seconds)
        if _log.isEnabledFor(logging.INFO):
            line = {
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "client": client,
                "method": method,
                "path": path,
                "status": status,
                "bytes": size,
                "ms": round(1000 * seconds, 2),
            }
            _log.info("%s", json.dumps(line))

    def metrics(self) -> bytes:
        """All numbers in the text format of Prometheus, of all workers where there are several."""
        registry = self.registry
        if METRICS_FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)
