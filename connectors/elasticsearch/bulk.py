"""Writes documents in bulk, item by item accounted for.

The helpers of the official client give no acknowledgement per document in order, and their parallel
form does not retry refused ones; so the loop is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vdr_db.connectors.elasticsearch.transport import BUSY, Backoff, Overloaded, Wire, error_reason
from vdr_db.errors import StoreError, StoreUnavailable

__all__ = ["BulkReport", "BulkWriter"]


@dataclass
class BulkReport:
    """What became of the items of a call, by their number in the call.

    Attributes:
        written: Items written, or deleted.
        skipped: Items that were there already (`create`), or were not there (`delete`).
        rejected: Number of each refused item -> reason.
    """

    written: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)


class BulkWriter:
    """Sends bulk lines to one index or alias.

    Attributes:
        max_docs: Most items in one request.
        max_bytes: Most bytes in one request; falls when the server calls a request too large.
    """

    def __init__(self, wire: Wire, *, max_docs: int = 500, max_bytes: int = 8 << 20) -> None:
        """Sends through `wire`."""
        self.max_docs = max_docs
        self.max_bytes = max_bytes
        self._wire = wire

    def write(
        self,
        path: str,
        lines: Sequence[bytes],
        *,
        action: Literal["index", "create", "delete"],
        require_alias: bool,
    ) -> BulkReport:
        """Writes every item that the server takes, however often it must be asked.

        Args:
            path: Quoted name of the index or alias.
            lines: The bytes of each item; empty ones are passed over.
            action: What the lines ask for.
            require_alias: Lets the server refuse, rather than make a new index with types of its
                own guess, when the alias is gone.

        Raises:
            StoreUnavailable: The server stayed busy or away; items before are written.
            StoreError: The index is gone, or the credentials do not allow writing.
        """
        report = BulkReport()
        params = {"require_alias": "true"} if require_alias else {}
        waiting = [number for number, line in enumerate(lines) if line]
        while waiting:
            chunk = self._next_chunk(waiting, lines)
            waiting = waiting[len(chunk) :]
            self._write_chunk(path, params, chunk, lines, action, report)
        report.written.sort()
        report.skipped.sort()
        return report

    def _next_chunk(self, waiting: Sequence[int], lines: Sequence[bytes]) -> list[int]:
        chunk: list[int] = []
        size = 0
        for number in waiting[: self.max_docs]:
            size += len(lines[number])
            if chunk and size > self.max_bytes:
                break
            chunk.append(number)
        return chunk

    def _write_chunk(
        self,
        path: str,
        params: dict[str, str],
        chunk: Sequence[int],
        lines: Sequence[bytes],
        action: str,
        report: BulkReport,
    ) -> None:
        backoff = self._wire.backoff()
        parts = [list(chunk)]
        while parts:
            part = parts.pop()
            body = b"".join(lines[number] for number in part)
            if len(body) > self.max_bytes and len(part) > 1:
                parts.extend(_halves(part))
                continue
            try:
                # Ids are the caller's, so a request whose answer was lost may be sent again.
                reply = self._wire.once(
                    "POST", f"/{path}/_bulk", body, params=params, allow=(400, 413)
                )
            except Overloaded as error:
                self._pause(backoff, error)
                parts.append(part)
                continue
            if reply.status in (400, 413):
                self._split(reply.status, reply.body, part, len(body), parts, report)
                continue
            busy, reason = _account(reply.body, part, action, report)
            if len(busy) < len(part):
                backoff.progress()
            if busy:
                self._pause(backoff, Overloaded(f"{len(busy)} items refused for now: {reason}"))
                parts.append(busy)

    def _pause(self, backoff: Backoff, error: Overloaded) -> None:
        backoff.wait(error)
        self._wire.retries += 1

    def _split(
        self,
        status: int,
        answer: Any,
        part: list[int],
        size: int,
        parts: list[list[int]],
        report: BulkReport,
    ) -> None:
        """Halves a request that was refused as a whole, to spare the neighbours of the culprit."""
        if len(part) == 1:
            reason = "the document is larger than the server takes in one request"
            report.rejected[part[0]] = error_reason(answer) if status == 400 else reason
            return
        if status == 413:
            self.max_bytes = max(1, size // 2)
        parts.extend(_halves(part))


def _halves(part: list[int]) -> list[list[int]]:
    """Both halves, the first one last, where it is taken from first."""
    middle = len(part) // 2
    return [part[middle:], part[:middle]]


def _account(
    answer: Any, part: Sequence[int], action: str, report: BulkReport
) -> tuple[list[int], str]:
    """Sorts the items of an answer into the report; returns those to send again, and why."""
    items = answer.get("items") if isinstance(answer, dict) else None
    if not isinstance(items, list) or len(items) != len(part):
        raise StoreUnavailable(
            f"a bulk answer for {len(part)} items must list as many, got "
            f"{len(items) if isinstance(items, list) else 'none'}; a proxy may have cut it, so run "
            "the same call again."
        )
    busy: list[int] = []
    reason = ""
    for number, item in zip(part, items, strict=True):
        outcome = next(iter(item.values()))
        status = int(outcome.get("status", 500))
        if status < 300:
            report.written.append(number)
        elif status in BUSY:
            busy.append(number)
            reason = error_reason(outcome)
        elif (status == 409 and action == "create") or (
            status == 404 and action == "delete" and "error" not in outcome
        ):
            report.skipped.append(number)
        elif status in (401, 403, 404):
            raise StoreError(
                f"the server cannot write there ({error_reason(outcome)}); "
                "create the index first and check what the credentials allow."
            )
        else:
            report.rejected[number] = error_reason(outcome)
    return busy, reason
