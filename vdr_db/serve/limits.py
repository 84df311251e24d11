"""How much the service gives to one request, and to all of them."""

from __future__ import annotations

from dataclasses import dataclass

from vdr_db.errors import ConfigError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """The budget of a service; the defaults fit a small server.

    Attributes:
        query_characters: Of a query.
        page_size: Hits on a page at most.
        depth: How far results can be paged through.
        upload_bytes: Of an image, and of any other body.
        image_pixels: Of an uploaded image, see `vdr_db.images.reading.ImageLimits`; a pixel takes
            up to 8 bytes while it is decoded.
        decodes: Images that are decoded at once; further uploads wait.
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
        ConfigError: A limit is not positive.
    """

    query_characters: int = 1000
    page_size: int = 50
    depth: int = 1000
    upload_bytes: int = 10 * 1024 * 1024
    image_pixels: int = 1 << 24
    decodes: int = 1
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
        for name, value in vars(self).items():
            if value <= 0 or (isinstance(value, int) and value < 1):
                raise ConfigError(f"the limit `{name}` must be at least 1, got {value}.")
