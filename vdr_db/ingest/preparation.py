"""From records to rows: what is stored beside a vector, and which records need no vector at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from vdr_db.connectors.halving import deliver
from vdr_db.connectors.ids import checked_id
from vdr_db.connectors.images import THUMBNAIL_KEY, EncodeImages
from vdr_db.connectors.passages import PassageRows, checked_passages
from vdr_db.connectors.validation import FINGERPRINT_FIELD, RESERVED_PREFIX, clean_payload
from vdr_db.errors import InputError, ShapeError
from vdr_db.ingest.batches import Piece
from vdr_db.ingest.images import image_digest
from vdr_db.ingest.options import IngestOptions
from vdr_db.ingest.quarantine import Refusal
from vdr_db.ingest.report import Totals
from vdr_db.ingest.source import Block
from vdr_db.readers import Record
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["Preparation", "Prepared", "comparable_stamp", "encode_readable"]


_IDS_AT_ONCE = 512
_JSON_BYTES_PER_WEIGHT = 25  # id and weight in a JSON body; gRPC needs about 7
_RECORD_BYTES = 120
_OBJECT_BYTES = 600  # Python objects of one waiting record, beside text and vector


def comparable_stamp(stamp: EncoderStamp | None) -> dict[str, Any]:
    """What of a stamp changes vectors."""
    if stamp is None:
        return {}
    facts = stamp.as_before().to_dict()
    for name in ("model", "revision", "library_version"):
        facts.pop(name, None)
    if stamp.settings:
        told = [dict(one.settings) for one in (stamp, stamp.image) if one is not None]
        facts["settings"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return facts


@overload
def encode_readable(
    encode: Callable[[list[str]], SparseRows], texts: Sequence[str], width: int
) -> tuple[SparseRows, dict[int, str]]: ...
@overload
def encode_readable(
    encode: Callable[[list[str]], SparseRows | PassageRows], texts: Sequence[str], width: int
) -> tuple[SparseRows | PassageRows, dict[int, str]]: ...
def encode_readable(
    encode: Callable[[list[str]], SparseRows | PassageRows], texts: Sequence[str], width: int
) -> tuple[SparseRows | PassageRows, dict[int, str]]:
    """Rows of the texts that can be encoded, and place → reason for the others.

    Raises:
        ShapeError: The encoder gives other than one row of that width for each text.
    """
    parts: list[SparseRows | PassageRows] = []
    errors: dict[int, str] = {}

    def attempt(places: range) -> None:
        rows = encode([texts[i] for i in places])
        if len(rows) != len(places) or rows.width != width:
            raise ShapeError(
                f"the encoder must give one row of width {width} per text, got {rows!r} for "
                f"{len(places)} texts."
            )
        parts.append(rows)

    def refuse(places: range, error: Exception) -> None:
        errors[places[0]] = str(error)

    deliver(range(len(texts)), attempt, refuse, refusing=InputError)
    if not parts:
        return SparseRows.empty(0, width), errors
    cut = [part for part in parts if isinstance(part, PassageRows)]
    whole = [part for part in parts if isinstance(part, SparseRows)]
    if len(parts) == 1:
        return parts[0], errors
    return (PassageRows.concat(cut) if cut else SparseRows.concat(whole)), errors


@dataclass(frozen=True)
class Prepared:
    """What became of a block: the piece to write, and what needs no write.

    `nbytes` is the memory the piece takes; `skipped` are numbers that are settled without a write,
    of which `existing`, `unchanged` or `repeated` (their id comes again in the block) are counted
    apart; `empty` counts rows without weights.
    """

    piece: Piece
    nbytes: int
    skipped: Sequence[int]
    refused: Sequence[Refusal]
    existing: int
    unchanged: int
    repeated: int
    empty: int

    def count(self, totals: Totals) -> None:
        """Adds what became of the block to the running totals, apart from refusals."""
        totals.encoded += len(self.piece)
        totals.nonzeros += self.piece.rows.nnz
        totals.existing += self.existing
        totals.unchanged += self.unchanged
        totals.repeated += self.repeated
        totals.empty += self.empty


class Preparation:
    """Turns blocks into pieces.

    Args:
        encode: Texts to rows, or to rows of their passages; may be `None` when every block brings
            rows.
        stamp: Identity of the encoder, part of each fingerprint.
        width: Width of the rows.
        text_key: Payload field the text is kept in; `None` does not keep it.
        options: Whether payloads get `_vdr_fp`, what happens to rows without weights, what is
            skipped.
        stored: `stored(ids)` → id → payload for those in the store; `None` skips nothing.
        images: Turns images to rows, for blocks of images in place of texts.
        thumbnail_px: Longest side of their small copies, part of each fingerprint.
    """

    def __init__(
        self,
        *,
        encode: Callable[[list[str]], SparseRows | PassageRows] | None,
        stamp: EncoderStamp | None,
        width: int,
        text_key: str | None,
        options: IngestOptions,
        stored: Callable[[Sequence[int | str]], dict[int | str, dict[str, Any]]] | None = None,
        images: EncodeImages | None = None,
        thumbnail_px: int | None = None,
    ) -> None:
        self._encode = encode
        self._images = images
        self._thumbnail_px = thumbnail_px
        self._width = width
        self._text_key = text_key
        self._has_fingerprint = options.has_fingerprint
        self._empty = options.empty
        self._stored = stored
        self._skip = None if stored is None else options.skip
        facts = comparable_stamp(stamp)
        if (passages := checked_passages(options.passages)) is not None:
            facts["passages"] = passages.to_dict()
        self._key = json.dumps(facts, sort_keys=True).encode()

    def __call__(self, block: Block) -> Prepared:
        """The piece to write for a block, and what needs no write."""
        refused: list[Refusal] = []
        payloads: dict[int, dict[str, Any]] = {}
        sizes: dict[int, int] = {}
        last_of_id: dict[int | str, int] = {}
        skipped: list[int] = []
        for i, record in enumerate(block.records):
            try:
                payloads[i], sizes[i] = self._payload(record, is_spooled=block.rows is not None)
            except InputError as error:
                refused.append(block.refusal(i, str(error)))
                continue
            earlier = last_of_id.pop(record.id, None)
            if earlier is not None:
                skipped.append(block.numbers[earlier])
            last_of_id[record.id] = i
        repeated = len(skipped)
        chosen = sorted(last_of_id.values())
        existing = unchanged = 0
        if self._skip is not None and chosen:
            known = self._known(block, chosen, payloads)
            skipped.extend(block.numbers[i] for i in known)
            existing = len(known) if self._skip == "existing" else 0
            unchanged = len(known) if self._skip == "unchanged" else 0
            chosen = [i for i in chosen if i not in known]
        rows: SparseRows | PassageRows
        if self._images is not None and chosen:
            rows, kept, failed = self._image_rows(self._images, block, chosen, payloads, sizes)
        else:
            rows, kept, failed = self._rows(block, chosen)
        refused.extend(failed)
        is_empty = rows.counts == 0
        empty = int(is_empty.sum())
        if empty and self._empty != "store":
            for i in np.flatnonzero(is_empty).tolist():
                if self._empty == "skip":
                    skipped.append(block.numbers[kept[i]])
                else:
                    refused.append(block.refusal(kept[i], "its vector has no weight"))
            rows = rows[~is_empty]
            kept = [i for i, gone in zip(kept, is_empty, strict=True) if not gone]
        records = [block.records[i] for i in kept]
        texts = np.array([sizes[i] for i in kept], np.int64)
        piece = Piece(
            [block.numbers[i] for i in kept],
            [record.id for record in records],
            rows,
            [payloads[i] for i in kept],
            [record.source for record in records],
            rows.counts * _JSON_BYTES_PER_WEIGHT + texts + _RECORD_BYTES,
        )
        nbytes = rows.nbytes + 2 * int(texts.sum()) + _OBJECT_BYTES * len(kept)
        return Prepared(piece, nbytes, skipped, refused, existing, unchanged, repeated, empty)

    def _payload(self, record: Record, *, is_spooled: bool) -> tuple[dict[str, Any], int]:
        """Payload as it is stored, and its size as JSON."""
        if record.fault:
            raise InputError(record.fault)
        checked_id(record.id)
        payload, _ = clean_payload(record.payload)
        given = payload.pop(FINGERPRINT_FIELD, None) if is_spooled else None
        for name in payload:
            if name.startswith(RESERVED_PREFIX):
                raise InputError(
                    f"payload fields must not start with {RESERVED_PREFIX!r}, got {name!r}; "
                    "rename the field"
                )
        if self._images is not None:
            return self._image_payload(record, payload)
        text = json.dumps([record.text, payload], sort_keys=True)
        key = self._text_key
        if key is not None and payload.setdefault(key, record.text) != record.text:
            raise InputError(
                f"its payload has another value in the field {key!r} of the text; rename the field"
            )
        if self._has_fingerprint:
            payload[FINGERPRINT_FIELD] = given if isinstance(given, str) else self._hashed(text)
        return payload, len(text)

    def _image_payload(self, record: Record, payload: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The same for an image; its fingerprint is final when it is encoded."""
        size = len(json.dumps(payload))
        if self._has_fingerprint:
            # The file is read twice only where that can save encoding it.
            digest = image_digest(record.source) if self._skip == "unchanged" else ""
            payload[FINGERPRINT_FIELD] = self._image_fingerprint(payload, digest) if digest else ""
        return payload, size

    def _image_fingerprint(self, payload: dict[str, Any], digest: str) -> str:
        px = self._thumbnail_px
        content = f"image {digest}" + ("" if px is None else f" with a thumbnail of {px}")
        told = {name: value for name, value in payload.items() if name != FINGERPRINT_FIELD}
        return self._hashed(json.dumps([content, told], sort_keys=True))

    def _hashed(self, text: str) -> str:
        # Text, payload and encoder: any of them changed means that the document must be written.
        hashed = hashlib.blake2b(self._key, digest_size=16)
        hashed.update(text.encode("utf-8", "surrogatepass"))
        return hashed.hexdigest()

    def _known(
        self, block: Block, chosen: Sequence[int], payloads: dict[int, dict[str, Any]]
    ) -> set[int]:
        assert self._stored is not None
        known = set()
        for start in range(0, len(chosen), _IDS_AT_ONCE):
            part = chosen[start : start + _IDS_AT_ONCE]
            stored = self._stored([block.records[i].id for i in part])
            for i in part:
                payload = stored.get(block.records[i].id)
                if payload is None:
                    continue
                is_same = payload.get(FINGERPRINT_FIELD) == payloads[i].get(FINGERPRINT_FIELD)
                if self._skip == "existing" or is_same:
                    known.add(i)
        return known

    def _rows(
        self, block: Block, chosen: Sequence[int]
    ) -> tuple[SparseRows | PassageRows, list[int], list[Refusal]]:
        """Rows of the chosen records, which of them have one, and refusals for the others."""
        if block.rows is not None:
            return block.rows[list(chosen)], list(chosen), []
        if not chosen:
            return SparseRows.empty(0, self._width), [], []
        assert self._encode is not None
        texts = [block.records[i].text for i in chosen]
        rows, errors = encode_readable(self._encode, texts, self._width)
        refused = [
            block.refusal(chosen[place], f"not encoded: {error}") for place, error in errors.items()
        ]
        return rows, [i for place, i in enumerate(chosen) if place not in errors], refused

    def _image_rows(
        self,
        images: EncodeImages,
        block: Block,
        chosen: Sequence[int],
        payloads: dict[int, dict[str, Any]],
        sizes: dict[int, int],
    ) -> tuple[SparseRows, list[int], list[Refusal]]:
        """`_rows` for images; completes the payloads with what is known by then."""
        encoded = images([Path(block.records[i].source) for i in chosen])
        if len(encoded.rows) != len(chosen) or encoded.rows.width != self._width:
            raise ShapeError(
                f"the encoder must give one row of width {self._width} per image, got "
                f"{encoded.rows!r} for {len(chosen)} images."
            )
        places, refused = [], []
        for place, i in enumerate(chosen):
            reason = encoded.refused.get(place)
            if reason is not None:
                refused.append(block.refusal(i, f"not encoded: {reason}"))
                continue
            places.append(place)
            if self._has_fingerprint:
                # Of the bytes that were encoded; the file may have changed since it was hashed.
                digest = encoded.digests[place]
                payloads[i][FINGERPRINT_FIELD] = self._image_fingerprint(payloads[i], digest)
            if self._thumbnail_px is not None and (small := encoded.thumbnails[place]):
                payloads[i][THUMBNAIL_KEY] = small
                sizes[i] += len(small)
        rows = encoded.rows if not refused else encoded.rows[np.array(places, np.int64)]
        return rows, [chosen[place] for place in places], refused
