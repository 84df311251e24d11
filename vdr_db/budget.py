"""How much is read of what others wrote, and given to those who ask: one object for all of it."""

from __future__ import annotations

from dataclasses import dataclass

from vdr_db.errors import ConfigError

__all__ = ["BUDGET", "Budget"]


@dataclass(frozen=True)
class Budget:
    """The most that is read, decoded, sent and waited for; the defaults fit a small server.

    Layers of a model have no number here: they are counted against the weights that there are.

    Attributes:
        line_characters: Of a line of a text file, unpacked: a line of 3.5 GB packs into 3.5 MB.
        record_characters: Of a row of a table that takes several lines; bytes of a row of a Parquet
            file, unpacked, on average of a row group.
        vocabulary_ids: Token ids of a tokenizer, the largest plus one; vectors are as wide.
        image_pixels: Of an image, width times height; twice that where a pixel has more than 4
            bytes, as in colours of 16 bits. A file says its size before its pixels are decoded, so
            a decompression bomb costs nothing. Baseline JPEG up to 4 times as large is decoded at
            half its scale. Decoding takes up to 8 bytes a pixel beside the file.
        image_bytes: Of a file of an image.
        upload_pixels: As `image_pixels`, of an image that is sent to `serve`.
        upload_bytes: Of such an image, and of any other body of a request.
        decodes: Images that `serve` decodes at once; further uploads wait.
        query_characters: Of a query.
        page_size: Hits on a page at most.
        depth: How far results can be paged through.
        texts: Texts or images to encode, or documents to write, of one request.
        text_characters: Of one of them.
        batch_texts: Texts of several requests that are encoded together; 1 encodes each alone.
        answer_bytes: Of an answer.
        requests: Requests at once; further ones are told to come again (503).
        connections: Open connections; beyond them the oldest without a request is closed.
        first_byte_s: Seconds from opening a connection to the end of the headers of a request.
        body_s: Seconds between two parts of a body.
        idle_s: Seconds an answered connection is kept for another request.

    Raises:
        ConfigError: A number is not positive, or of another type.
    """

    line_characters: int = 1 << 24
    record_characters: int = 1 << 24
    vocabulary_ids: int = 1 << 22
    image_pixels: int = 1 << 26
    image_bytes: int = 1 << 28
    upload_pixels: int = 1 << 24
    upload_bytes: int = 10 * 1024 * 1024
    decodes: int = 1
    query_characters: int = 1000
    page_size: int = 50
    depth: int = 1000
    texts: int = 256
    text_characters: int = 100_000
    batch_texts: int = 256
    answer_bytes: int = 32 * 1024 * 1024
    requests: int = 64
    connections: int = 512
    first_byte_s: float = 1.5
    body_s: float = 10.0
    idle_s: float = 5.0

    def __post_init__(self) -> None:
        """Checks the numbers; see above."""
        for name, value in vars(self).items():
            kinds = (int, float) if name.endswith("_s") else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                wanted = "a number above 0" if name.endswith("_s") else "an integer of at least 1"
                raise ConfigError(f"the budget `{name}` must be {wanted}, got {value!r}.")


BUDGET = Budget()
"""The budget where none is passed."""
