"""Writes documents in bulk, item by item accounted for.

The helpers of the official client give no acknowledgement per document in order, and their parallel
form does not retry refused ones; so the loop is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vdr_db.connectors.elasticsearch.transport import Transport, busy, error_reason
from vdr_db.connectors.halving import RefusedBatch, deliver
from vdr_db.connectors.retry import Allowance
from vdr_db.errors import StoreError, StoreUnavailable
from vdr_db.failure import Failure

__all__ = ["BulkReport", "BulkWriter"]


# A rollover blocks writes until the alias has moved: minutes, for a large index.
_BLOCKED = "index write (api)"
_BLOCKED_S = 1.0


@dataclass
class BulkReport:
    """What became of the items of a call, by their number in the call.

    Attributes:
        written: Items written, or deleted.
        skipped: Items that were there already (`create`), or were not there (`delete`).
        rejected: Number of each refused item -> reason.
        requests: Requests that took.
    """

    written: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)
    requests: int = 0


class BulkWriter:
    """Sends bulk lines to one index or alias.

    Attributes:
        max_docs: Most items in one request.
        max_bytes: Most bytes in one request; falls when the server calls a request too large.
    """

    def __init__(
        self, transport: Transport, *, max_docs: int = 500, max_bytes: int = 8 << 20
    ) -> None:
        self.max_docs = max_docs
        self.max_bytes = max_bytes
        self._transport = transport

    def write(
        self,
        path: str,
        lines: Sequence[bytes],
        *,
        action: Literal["index", "create", "delete"],
        require_alias: bool,
        refresh: bool = False,
    ) -> BulkReport:
        """Writes every item that the server takes, however often it must be asked.

        Items whose lines are empty are passed over. With `require_alias` the server refuses, rather
        than make a new index with types of its own guess, when the alias is gone. `refresh` makes
        what the last request writes visible, which needs no right beyond that to write.
        """
        report = BulkReport()
        params = {"require_alias": "true"} if require_alias else {}
        last = {**params, "refresh": "true"} if refresh else params
        address = f"/{path}/_bulk"

        def fitting(numbers: Sequence[int]) -> int:
            count = size = 0
            for number in numbers[: self.max_docs]:
                size += len(lines[number])
                if count and size > self.max_bytes:
                    break
                count += 1
            return count

        def attempt(numbers: Sequence[int]) -> None:
            waiting = numbers

            def send() -> None:
                nonlocal waiting
                while waiting:
                    given = last if waiting[-1] == items[-1] else params
                    waiting = self._send(address, given, waiting, lines, action, report)

            self._transport.retrier.call(send, is_splittable=len(numbers) > 1)

        def refuse(numbers: Sequence[int], error: Exception) -> None:
            report.rejected[numbers[0]] = str(error)

        items = [number for number, line in enumerate(lines) if line]
        deliver(items, attempt, refuse, fitting=fitting)
        report.written.sort()
        report.skipped.sort()
        return report

    def _send(
        self,
        address: str,
        params: Mapping[str, str],
        numbers: Sequence[int],
        lines: Sequence[bytes],
        action: str,
        report: BulkReport,
    ) -> list[int]:
        """Sends items in one request; returns those to send again, after a wait."""
        body = b"".join(lines[number] for number in numbers)
        # Ids are the caller's, so a request whose answer was lost may be sent again.
        report.requests += 1
        reply = self._transport.once("POST", address, body, params=params, allow=(400, 413))
        if reply.status == 400:
            raise RefusedBatch(error_reason(reply.body))
        if reply.status == 413:
            if len(numbers) > 1:
                self.max_bytes = max(1, len(body) // 2)
            raise RefusedBatch("the document is larger than the server takes in one request")
        replaced = f"no such index [{address.split('/')[1]}-" if "require_alias" in params else None
        left, failure = _account(reply.body, numbers, action, report, replaced)
        allowance = Allowance.in_charge()
        if len(left) < len(numbers):
            allowance.progress()
        if failure is not None:
            error = StoreUnavailable(failure.reason, failure=failure)
            allowance.wait(failure, error, has_tries=_BLOCKED not in failure.reason)
        return left


def _passing(status: int, reason: str, replaced: str | None) -> Failure | None:
    """What an item's refusal means that passes: busy servers, and an index that is replaced.

    A rollover blocks writes, and at its end the index is gone that the alias had stood for when
    the request came; `replaced` is how the server tells that.
    """
    if status == 403 and _BLOCKED in reason:
        return Failure("transient", reason, _BLOCKED_S)
    if status == 404 and replaced is not None and replaced in reason:
        return Failure("transient", reason)
    return busy(status, reason)


def _account(
    answer: Any, part: Sequence[int], action: str, report: BulkReport, replaced: str | None
) -> tuple[list[int], Failure | None]:
    """Sorts the items of an answer into the report; returns those to send again, and why."""
    items = answer.get("items") if isinstance(answer, dict) else None
    if not isinstance(items, list) or len(items) != len(part):
        raise StoreUnavailable(
            f"a bulk answer for {len(part)} items must list as many, got "
            f"{len(items) if isinstance(items, list) else 'none'}; a proxy may have cut it, so run "
            "the same call again."
        )
    left: list[int] = []
    passing: Failure | None = None
    for number, item in zip(part, items, strict=True):
        outcome = next(iter(item.values()))
        status = int(outcome.get("status", 500))
        if status < 300:
            report.written.append(number)
        elif failure := _passing(status, error_reason(outcome), replaced):
            left.append(number)
            passing = failure
        elif (status == 409 and action == "create") or (
            status == 404 and action == "delete" and "error" not in outcome
        ):
            report.skipped.append(number)
        elif status in (401, 403, 404):
            raise StoreError(
                f"the server cannot write there ({error_reason(outcome)}); "
                "create the index first and check what the credentials allow.",
                failure=Failure("setup", error_reason(outcome)),
            )
        else:
            report.rejected[number] = error_reason(outcome)
    if passing is not None:
        passing = replace(passing, reason=f"{len(left)} items refused for now: {passing.reason}")
    return left, passing
