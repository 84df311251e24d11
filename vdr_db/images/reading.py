"""From whatever a caller holds to an image in RGB, or one sentence on why there is none.

Paths, encoded bytes, PIL images and NumPy arrays. An image is turned the way its EXIF data says,
what is transparent becomes white, 16 bits become 8, and of an animation the first frame counts.
Only formats that Pillow reads on its own are opened: no program is ever started for one.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import numpy.typing as npt

from vdr_db.budget import BUDGET, Budget
from vdr_db.errors import InputError, require
from vdr_db.images.files import has_image_suffix

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageSource", "LoadedImage", "check_kind", "read_image"]

ImageSource: TypeAlias = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, "Image", npt.NDArray[Any]
]
"""What an image may come as: a path, the bytes of a file, a PIL image, or an array."""

FORMATS = (
    *("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "TGA", "AVIF"),
    *("JPEG2000", "QOI", "HEIF", "JXL"),
)
"""Formats that are opened; others, such as EPS, would start a program."""

PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": None}
"""Packages that read more formats, and what registers them where importing does not."""

_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_ORIENTATION = 0x0112  # the EXIF tag
# What Pillow makes of one step of a grey PNG's few bits; its tRNS value stays as it is written.
_GREY_STEP = {"1": 255, "L;2": 85, "L;4": 17}
_STRIP_PIXELS = 1 << 18
_DRAFT_PIXELS = 4  # times the limit, that a JPEG may have which is then decoded at half its scale
# A PIL image reads its file when its pixels are first asked for, and is not made for two threads at
# once; the same one may come twice in a call.
_LOADING = Lock()


@dataclass(frozen=True)
class LoadedImage:
    """An image that could be read.

    Attributes:
        image: In mode RGB, upright.
        digest: SHA-256 (hex) of the content it came as.
    """

    image: Image
    digest: str


def check_kind(source: object, index: int) -> str:
    """Name of an image for people, if what came at a place can be one at all.

    Raises:
        InputError: It is a text.
        TypeError: It is of a type no image has.
    """
    if isinstance(source, str):
        if not source or (not _is_like_path(source) and not os.path.lexists(source)):
            raise InputError(
                f"an image encoder reads images, got the text {source[:60]!r} at index {index}, "
                "which is no file; texts go to `encode_documents` or `encode_queries` of a text "
                "encoder."
            )
        return source
    if isinstance(source, os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, (bytes, bytearray, memoryview, np.ndarray)) or _is_pil(source):
        return f"image {index}"
    raise TypeError(
        "images must be paths, bytes, PIL images or NumPy arrays, got "
        f"{type(source).__name__} at index {index}"
    )


def read_image(source: ImageSource, budget: Budget = BUDGET) -> LoadedImage:
    """The image in RGB, of a kind that `check_kind` lets pass.

    Raises:
        InputError: It cannot be read; the message is the reason, without the name of the image.
        MissingExtraError: Pillow is not installed.
    """
    module = require("PIL.Image", "images")
    if isinstance(source, np.ndarray):
        image, digest = _from_array(source, budget)
        return LoadedImage(image, digest)
    if _is_pil(source):
        _check_size(source.size, budget, source)  # type: ignore[union-attr]
        clear = _clear_value(source)
        image = _guarded(lambda: _loaded(source))
        digest = _digest(f"{image.mode} {image.size}".encode(), image.tobytes())
        return LoadedImage(_guarded(lambda: _to_rgb(image, clear)), digest)
    if isinstance(source, (str, os.PathLike)):
        content = _file_content(Path(source), budget)
    else:
        content = bytes(source)  # type: ignore[arg-type] # the other kinds are gone
        _check_bytes(len(content), budget)

    def decoded() -> Image:
        with module.open(BytesIO(content), formats=_formats()) as opened:
            width, height = opened.size
            is_baseline = opened.format in ("JPEG", "MPO") and not opened.info.get("progressive")
            if (
                is_baseline
                and budget.image_pixels < width * height <= _DRAFT_PIXELS * budget.image_pixels
            ):
                opened.draft(None, (width // 2, height // 2))
            _check_size(opened.size, budget, opened)
            clear = _clear_value(opened)
            opened.load()  # which turns a TIFF
            rgb, orientation = _to_rgb(opened, clear), _orientation(opened)
        return _turned(rgb, orientation)

    return LoadedImage(_guarded(decoded, content), _digest(content))


def _is_like_path(text: str) -> bool:
    has_separator = "/" in text or os.sep in text
    return has_image_suffix(text) or (has_separator and "\n" not in text)


def _is_pil(source: object) -> bool:
    # Nobody can hold a PIL image without having imported its class.
    return any(
        kind.__name__ == "Image" and kind.__module__ == "PIL.Image" for kind in type(source).__mro__
    )


@cache
def _formats() -> tuple[str, ...]:
    """Of `FORMATS`, those this Pillow was built with."""
    module = require("PIL.Image", "images")
    module.init()
    for name, register in PLUGINS.items():
        with suppress(ImportError):
            plugin = import_module(name)
            if register:
                getattr(plugin, register)()
    return tuple(name for name in FORMATS if name in module.OPEN)


def _guarded(work: Callable[[], Image], content: bytes = b"") -> Image:
    module = require("PIL.Image", "images")
    try:
        return work()
    except InputError:
        raise
    except (module.DecompressionBombError, module.DecompressionBombWarning) as error:
        raise InputError(f"its size is that of a decompression bomb: {error}") from error
    except module.UnidentifiedImageError as error:
        form, package = _plugin_of(content)
        if form and form.split()[0] not in _formats():
            raise InputError(
                f"it is in the format {form}, which Pillow reads with a plug-in only; run "
                f"pip install {package}"
            ) from error
        raise InputError(
            "it is no image of a known format, or its beginning is damaged; convert it to PNG "
            "or JPEG"
        ) from error
    except MemoryError as error:
        raise InputError("decoding it needs more memory than there is") from error
    except Exception as error:  # decoders raise nearly every kind for damaged files
        said = str(error).splitlines()
        raise InputError(
            f"it cannot be decoded, so it is damaged or cut short ({said[0] if said else error!r})"
        ) from error


def _file_content(path: Path, budget: Budget) -> bytes:
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise InputError("it is a folder; pass the folder alone to take the images in it")
        if not stat.S_ISREG(found.st_mode):
            raise InputError("it is no file but a device or pipe")
        _check_bytes(found.st_size, budget)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            "there is no such file; a text belongs to a text encoder instead"
        ) from error
    except (OSError, ValueError) as error:  # a zero byte in a path is a ValueError
        raise InputError(f"the file cannot be read: {error}") from error


def _check_bytes(count: int, budget: Budget) -> None:
    if count == 0:
        raise InputError("it is empty")
    if count > budget.image_bytes:
        raise InputError(
            f"it has {count:,} bytes, more than the {budget.image_bytes:,} that are read"
        )


def _plugin_of(content: bytes) -> tuple[str, str]:
    """Format of a file that only a plug-in reads, and what to install for it."""
    # ISO 14496-12: a file begins with a box `ftyp` that names the brand.
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    if content[4:8] == b"ftyp" and content[8:12] in brands:
        return "HEIF (HEIC)", "'vdr-db[heif]'"
    is_jxl = content.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL "))
    return ("JXL (JPEG XL)", "pillow-jxl-plugin") if is_jxl else ("", "")


def _raw_mode(image: Any) -> str:
    """How the pixels lie in a file that is not decoded yet, such as `"RGB;16B"`."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    found = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return found if isinstance(found, str) else ""


def _check_size(size: tuple[int, int], budget: Budget, image: Any = None) -> None:
    width, height = size
    is_deep = ";16" in _raw_mode(image) and image.mode in ("RGB", "RGBA", "CMYK")
    if width < 1 or height < 1:
        raise InputError(f"it has no pixels: {width} by {height}")
    if width * height * (1 + is_deep) > budget.image_pixels:
        raise InputError(
            f"it has {width:,} by {height:,} pixels{' of 16 bits a colour' if is_deep else ''}, "
            f"more than the {budget.image_pixels // (1 + is_deep):,} that are decoded; raise "
            "`max_pixels` if it is no decompression bomb"
        )


def _loaded(image: Any) -> Image:
    with _LOADING:
        image.load()
    return _turned(image, _orientation(image))


def _orientation(image: Any) -> object:
    """What the EXIF data say; damaged ones say nothing."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # the pixels are good, whatever stands beside them
        return None


def _turned(image: Image, orientation: object) -> Image:
    transpose = require("PIL.Image", "images").Transpose
    turns = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    is_known = isinstance(orientation, int) and orientation in turns
    return image.transpose(turns[orientation]) if is_known else image  # type: ignore[index]


def _clear_value(image: Any) -> int | tuple[int, ...] | None:
    """The one grey or colour of a PNG that is transparent, as its decoded pixels will have it.

    Of colours of 16 bits the upper 8 count: Pillow decodes no more.
    """
    clear, raw = image.info.get("transparency"), _raw_mode(image)
    if isinstance(clear, tuple):
        return tuple(value >> 8 for value in clear) if raw == "RGB;16B" else clear
    if not isinstance(clear, int) or image.mode == "P":
        return None
    return clear * _GREY_STEP.get(image.mode if image.mode == "1" else raw, 1)


def _to_rgb(image: Image, clear: int | tuple[int, ...] | None = None) -> Image:
    """The image on white in RGB, strip by strip: copies of a whole one take memory."""
    if image.mode == "RGB" and clear is None and "transparency" not in image.info:
        return image
    made: Image = require("PIL.Image", "images").new("RGB", image.size)
    width, height = image.size
    rows = max(_STRIP_PIXELS // width, 1)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        made.paste(_strip_to_rgb(strip, clear), (0, top))
    return made


def _strip_to_rgb(image: Image, clear: int | tuple[int, ...] | None) -> Image:
    module = require("PIL.Image", "images")
    if clear is not None:
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
        is_clear = (values == clear).all(axis=2) if values.ndim == 3 else values == clear
        image.info.pop("transparency", None)
        rgb = _strip_to_rgb(image, None)
        rgb.paste((255, 255, 255), mask=module.fromarray(is_clear.astype(np.uint8) * 255))
        return rgb
    if image.mode == "F" or image.mode in _SIXTEEN_BITS:
        narrow = _from_float if image.mode == "F" else _eight_bits
        image = module.fromarray(narrow(np.asarray(image)))
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        straight = image.convert("LA") if image.mode == "La" else image
        seen = straight.convert("RGBA")
        white = module.new("RGBA", seen.size, (255, 255, 255, 255))
        return module.alpha_composite(white, seen).convert("RGB")  # type: ignore[no-any-return]
    return image.convert("RGB")


def _eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if values.dtype.itemsize > 2 and values.size and (values.min() < 0 or values.max() > 65535):
        raise InputError(
            f"its values must lie in [0, 65535], got [{values.min()}, {values.max()}]; scale it"
        )
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _from_float(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise InputError(
            f"its float values must lie in [0, 1], got [{low:g}, {high:g}]; scale it, or pass uint8"
        )
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)


def _from_array(values: npt.NDArray[Any], budget: Budget) -> tuple[Image, str]:
    shape = values.shape
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        raise InputError(
            "an array must be [height, width] or [height, width, 1, 3 or 4], got "
            f"{list(shape)}; colours come last"
        )
    _check_size((values.shape[1], values.shape[0]), budget)
    if values.dtype == np.bool_:
        pixels = values.astype(np.uint8) * 255
    elif values.dtype.kind == "f":
        pixels = _from_float(values)
    elif values.dtype == np.uint16:
        pixels = _eight_bits(values)
    elif values.dtype == np.uint8:
        pixels = values
    else:
        raise InputError(
            f"an array must be uint8, uint16, bool or float in [0, 1], got {values.dtype}"
        )
    pixels = np.ascontiguousarray(pixels)
    digest = _digest(f"array {pixels.shape}".encode(), pixels.tobytes())
    flat = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return _to_rgb(require("PIL.Image", "images").fromarray(flat)), digest


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def __getattr__(name: str) -> Any:
    """Older names, which warn."""
    newer = {"Picture": "LoadedImage", "read_picture": "read_image"}.get(name)
    if newer is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"`{name}` is now `{newer}`.", DeprecationWarning, stacklevel=2)
    return globals()[newer]
