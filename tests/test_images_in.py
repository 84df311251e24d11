"""Pictures as callers have them: every format, and every way a file can be broken."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from broken_images import PICTURE, broken_contents, encoded
from image_folders import pixels, write_cross_modal
from model_folders import write_bert
from tiny_png import MAGIC, chunk, deep_png

from vdr_db import ImageEncoder, SparseEncoder
from vdr_db.budget import Budget
from vdr_db.errors import ConfigError, InputError
from vdr_db.images import reading
from vdr_db.images.files import has_image_suffix, list_images
from vdr_db.images.reading import read_image

pytest.importorskip("PIL.Image")
from PIL import Image

BUDGET = Budget()


def read(source, budget=BUDGET):
    return np.asarray(read_image(source, budget).image)


def why(source, budget=BUDGET):
    with pytest.raises(InputError) as caught:
        read_image(source, budget)
    return str(caught.value)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = write_cross_modal(tmp_path_factory.mktemp("models") / "m")
    return ImageEncoder.from_pretrained(folder, device="cpu")


# One picture, however it comes


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "P", "L", "1", "RGBA", "LA")),
        *(("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"), ("PPM", "RGB")),
        *(("TGA", "RGB"), ("ICO", "RGBA"), ("WEBP", "RGB"), ("QOI", "RGB")),
    ],
)
def test_lossless_formats(form, mode):
    image = Image.fromarray(PICTURE[:, :30]).resize((32, 32)).convert(mode)
    options = {"lossless": True} if form == "WEBP" else {}
    if form == "ICO":
        options = {"sizes": [(32, 32)]}
    got = read(encoded(image, form, **options))
    assert got.shape == (32, 32, 3)
    np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "JPEG2000", "AVIF"])
def test_lossy_formats(form):
    smooth = np.broadcast_to(np.linspace(20, 230, 40)[None, :, None], (30, 40, 3)).astype(np.uint8)
    got = read(encoded(Image.fromarray(smooth), form, quality=95))
    assert np.abs(got.astype(int) - smooth).max() < 16


def test_a_progressive_cmyk_jpeg():
    red = Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")
    got = read(encoded(red, "JPEG", quality=95, progressive=True))
    assert np.abs(got.astype(int) - (200, 30, 30)).max() < 12


def test_paths_bytes_images_and_arrays_are_the_same_picture(tmp_path, encoder):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(PICTURE), "PNG"))
    with Image.open(file) as lazy:
        sources = [
            *(file, str(file), file.read_bytes(), bytearray(file.read_bytes())),
            *(memoryview(file.read_bytes()), Image.fromarray(PICTURE), lazy, PICTURE),
            *(PICTURE.astype(np.float32) / 255, PICTURE.astype(np.uint16) * 257),
        ]
        for source in sources:
            np.testing.assert_array_equal(read(source), PICTURE)
        result = encoder.encode_images(sources, threads=4)
    assert not result.refused
    assert all(result.rows[i] == result.rows[0] for i in range(len(sources)))
    assert result.names[:3] == (str(file), str(file), "image 2")
    assert result.kept.tolist() == list(range(len(sources)))
    assert result.digests[0] == result.digests[1] == result.digests[2], "of the content"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(form, orientation):
    upright = np.zeros((24, 48, 3), np.uint8)
    upright[:12, :24] = (255, 0, 0)  # a red corner and a blue one tell all eight apart
    upright[12:, 24:] = (0, 0, 255)
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if form in {"JPEG", "WEBP"} else {}
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **options)
    got = read(content)
    assert got.shape == upright.shape
    for y, x in ((6, 6), (6, 42), (18, 6), (18, 42)):
        assert np.abs(got[y, x].astype(int) - upright[y, x]).max() < 40


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture():
    content = encoded(Image.fromarray(PICTURE), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert read(content).shape == PICTURE.shape


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    image.paste((90, 90, 90, 255), (0, 0, 4, 8))
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([10, 20, 30, 90, 90, 90])
        image.paste(1, (0, 0, 4, 8))
        content = encoded(image, "PNG", transparency=0)
    else:
        content = encoded(image.convert(mode), "PNG")
    got = read(content)
    assert (got[:, :4] == 90).all()
    assert (got[:, 4:] == 255).all()


def keyed_png(depth, samples, clear):
    """A PNG of one line, grey or in colours of `depth` bits, where one value is transparent."""
    values = np.asarray(samples)
    if depth < 8:
        bits = "".join(f"{value:0{depth}b}" for value in values.ravel())
        line = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    else:
        line = values.astype(f">u{depth // 8}").tobytes()

    head = struct.pack(">IIBBBBB", len(values), 1, depth, 0 if values.ndim == 1 else 2, 0, 0, 0)
    parts = {b"IHDR": head, b"tRNS": np.asarray(clear).astype(">u2").tobytes()}
    parts |= {b"IDAT": zlib.compress(b"\0" + line), b"IEND": b""}
    return MAGIC + b"".join(chunk(*part) for part in parts.items())


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white(depth):
    most = 2**depth - 1
    samples = [0, 1, most // 2, most]
    for clear in sorted(set(samples)):
        file = keyed_png(depth, samples, clear)
        grey = [255 if one == clear else round(255 * one / most) for one in samples]
        for source in (file, Image.open(BytesIO(file))):
            np.testing.assert_array_equal(read(source), np.repeat(grey, 3).reshape(1, 4, 3))


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_is_white(depth):
    scale = 257 if depth == 16 else 1
    samples = scale * np.array([[10, 20, 30], [30, 20, 10], [10, 20, 31]])
    got = read(keyed_png(depth, samples, samples[1]))
    assert got.tolist() == [[[10, 20, 30], [255, 255, 255], [10, 20, 31]]]


def test_large_images_are_put_on_white_strip_by_strip(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (37, 29, 4)).astype(np.uint8)
    for mode in ("RGBA", "LA", "La", "PA", "L", "CMYK", "YCbCr", "LAB", "1", "I;16"):
        whole = Image.fromarray(image)
        if mode == "I;16":
            whole = Image.fromarray(image[:, :, 0].astype(np.uint16) * 250)
        elif mode == "LAB":
            whole = Image.frombytes("LAB", (29, 37), image[:, :, :3].tobytes())
        else:
            whole = (
                whole.convert("LA").convert(mode)
                if mode in ("La", "PA")
                else (
                    whole.convert("RGB").convert(mode)
                    if mode in ("CMYK", "YCbCr")
                    else whole.convert(mode)
                )
            )
        expected = read(whole)
        monkeypatch.setattr(reading, "_STRIP_PIXELS", 100)
        np.testing.assert_array_equal(read(whole), expected)
        monkeypatch.undo()


def test_half_transparent_pixels_are_mixed_with_white():
    got = read(np.full((2, 2, 4), (100, 0, 200, 51), np.uint8))
    np.testing.assert_allclose(got[0, 0], [224, 204, 244], atol=1)


def test_sixteen_bits_become_eight():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.repeat(np.rint(ramp[:, :, None] / 257), 3, axis=2)
    for form in ("PNG", "TIFF", "PPM"):
        np.testing.assert_allclose(read(encoded(Image.fromarray(ramp), form)), expected, atol=1)
    np.testing.assert_allclose(read(ramp), expected, atol=0.5)
    wide = Image.fromarray(ramp.astype(np.int32))
    np.testing.assert_allclose(read(wide), expected, atol=1)
    assert "must lie in [0, 65535]" in why(Image.fromarray(ramp.astype(np.int32) * 2))


def test_floats_lie_between_zero_and_one():
    grey = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    expected = np.repeat(np.rint(grey[:, :, None] * 255), 3, axis=2)
    np.testing.assert_array_equal(read(grey), expected)
    np.testing.assert_array_equal(read(Image.fromarray(grey)), expected)
    np.testing.assert_array_equal(read(encoded(Image.fromarray(grey), "TIFF")), expected)
    for bad in (grey * 255, grey - 1, np.where(grey > 0.5, np.nan, grey)):
        assert "must lie in [0, 1]" in why(bad)


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (read(content) == (255, 0, 0)).all(), form


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64, bool])
def test_arrays(shape, dtype):
    got = read(np.zeros(shape, dtype))
    assert got.shape == (5, 6, 3)
    assert (got == (255 if shape[-1] == 4 else 0)).all()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"[height, width, 1, 3 or 4], got [3, 8, 8]"),
        (np.zeros(8, np.uint8), "got [8]"),
        (np.zeros((8, 8), np.int64), "uint8, uint16, bool or float in [0, 1], got int64"),
        (np.zeros((0, 8), np.uint8), "no pixels"),
        (np.zeros((8, 8), complex), "got complex128"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value.shape),
)
def test_arrays_that_are_no_pictures(array, reason):
    assert reason in why(array)


# Broken files


@pytest.mark.parametrize("warned", ["error", "ignore"])
def test_every_broken_file_is_named_with_a_reason(tmp_path, encoder, warned):
    contents = broken_contents()
    assert len(contents) >= 20
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.png").write_bytes(encoded(Image.fromarray(PICTURE), "PNG"))
    os.symlink("nowhere", tmp_path / "dangling.png")
    os.symlink("circle.png", tmp_path / "circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    with warnings.catch_warnings():  # Pillow warns of some, which callers may have made an error
        warnings.simplefilter(warned)
        result = encoder.encode_images(tmp_path, batch_size=4)
    assert result.names == tuple(sorted(result.names))
    assert set(result.names) == {*contents, "good.png", "dangling.png", "circle.png", "pipe.png"}
    good = result.names.index("good.png")
    assert result.kept.tolist() == [good]
    assert set(result.refused) == set(range(len(result))) - {good}
    assert (result.rows.counts > 0).nonzero()[0].tolist() == [good]
    assert result.rows[good] == encoder.encode_images([PICTURE]).rows
    reasons = {result.names[i]: reason for i, reason in result.refused.items()}
    assert all(reason and "\n" not in reason for reason in reasons.values())
    assert "empty" in reasons["empty.png"]
    assert "60,000 by 60,000 pixels" in reasons["bomb.png"] or "bomb" in reasons["bomb.png"]
    assert "bomb" in reasons["bigger_bomb.png"]
    for name in ("text.jpg", "zeros.png", "page.eps.png", "drawing.png"):
        assert "no image of a known format" in reasons[name]
    for name in ("cut.png", "cut.jpg", "flipped.png"):
        assert "damaged or cut short" in reasons[name]
    assert "no such file" in reasons["dangling.png"]
    assert "no file but a device or pipe" in reasons["pipe.png"]


def test_limits(tmp_path, encoder):
    assert "40 by 30 pixels, more than the 1,199" in why(PICTURE, Budget(image_pixels=1199))
    assert "40 by 30 pixels" in why(Image.fromarray(PICTURE), Budget(image_pixels=1199))
    content = encoded(Image.fromarray(PICTURE), "PNG")
    assert "40 by 30 pixels" in why(content, Budget(image_pixels=1199))
    assert "bytes, more than the 9 that are read" in why(content, Budget(image_bytes=9))
    file = tmp_path / "a.png"
    file.write_bytes(content)
    assert "bytes, more than" in why(file, Budget(image_bytes=9))
    result = encoder.encode_images([file, PICTURE[:5]], max_pixels=1199)
    assert list(result.refused) == [0]
    with pytest.raises(ConfigError, match="`max_pixels` must be"):
        encoder.encode_images([PICTURE], max_pixels=0)


def test_deep_colours_count_twice():
    content = deep_png(100)
    assert read(content, Budget(image_pixels=20_000)).shape == (100, 100, 3)
    said = why(content, Budget(image_pixels=19_999))
    assert "100 by 100 pixels of 16 bits a colour, more than the 9,999" in said


def test_a_bomb_is_refused_before_it_is_decoded(encoder):
    content = deep_png(7000)
    assert len(content) < 500_000
    start = time.perf_counter()
    tracemalloc.start()
    result = encoder.encode_images([content] * 4)
    took, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all("7,000 by 7,000 pixels of 16 bits" in said for said in result.refused.values())
    assert list(result.refused) == [0, 1, 2, 3]
    assert took < 2
    assert peak < 20e6


def test_a_large_photograph_is_decoded_at_half_its_scale():
    photo = np.repeat(np.repeat(PICTURE, 8, axis=0), 8, axis=1)
    content = encoded(Image.fromarray(photo), "JPEG", quality=95)
    height, width, _ = photo.shape
    assert read(content, Budget(image_pixels=width * height)).shape == photo.shape
    half = read(content, Budget(image_pixels=width * height - 1))
    assert half.shape == (height // 2, width // 2, 3)
    gap = np.abs(half.astype(int) - photo[1::2, 1::2].astype(int))
    assert gap.mean() < 3
    assert "pixels, more than" in why(content, Budget(image_pixels=width * height // 4 - 1))
    progressive = encoded(Image.fromarray(photo), "JPEG", quality=95, progressive=True)
    assert "pixels, more than" in why(progressive, Budget(image_pixels=width * height - 1))


def test_the_callers_images_stay_as_they_are():
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    array = np.zeros((4, 4, 4), np.uint8)
    read(image), read(array)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (1, 2, 3, 4)
    assert (array == 0).all()


# Folders, batches, threads


def test_folders(tmp_path, encoder):
    content = encoded(Image.fromarray(PICTURE), "PNG")
    for name in (
        "b.png",
        "a/z.PNG",
        "a/y.jpg",
        ".hidden.png",
        ".git/x.png",
        "notes.txt",
        "._b.png",
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    assert list_images(tmp_path) == ["a/y.jpg", "a/z.PNG", "b.png"]
    for given in (tmp_path, str(tmp_path)):
        result = encoder.encode_images(given)
        assert result.names == ("a/y.jpg", "a/z.PNG", "b.png")
        assert not result.refused
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="must hold images"):
        encoder.encode_images(tmp_path / "none")
    inside = encoder.encode_images([tmp_path / "a", tmp_path / "b.png"])
    assert "it is a folder; pass the folder alone" in inside.refused[0]


def test_photographs_of_phones_and_cameras(tmp_path, encoder):
    first, second = (Image.new("RGB", (40, 30), colour) for colour in ("red", "lime"))
    first.save(tmp_path / "stereo.MPO", "MPO", save_all=True, append_images=[second])
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.from_pillow(first).save(tmp_path / "phone.heic", quality=-1)
    assert list_images(tmp_path) == ["phone.heic", "stereo.MPO"]
    result = encoder.encode_images(tmp_path)
    assert not result.refused
    assert (result.rows.counts > 0).all()
    for name in result.names:
        assert np.abs(read(tmp_path / name).astype(int) - (255, 0, 0)).max() < 9
    # Without the plug-in a HEIC file is counted and named.
    code = f"""
import sys
sys.modules["pillow_heif"] = None
from vdr_db.errors import InputError
from vdr_db.images.files import list_images
from vdr_db.images.reading import read_image
folder = {str(tmp_path)!r}
print(list_images(folder))
try:
    read_image(folder + "/phone.heic")
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, said = done.stdout.splitlines()
    assert listed == "['phone.heic', 'stereo.MPO']"
    assert said.startswith("it is in the format HEIF (HEIC)")
    assert said.endswith("pip install 'vdr-db[heif]'")


def test_generators_are_read_a_few_batches_ahead(encoder):
    taken = 0
    most = 0

    def images():
        nonlocal taken
        for i in range(40):
            taken += 1
            yield pixels(24, 24, seed=i)

    encode = encoder._encode_batch

    def watch(batch, *, first):
        nonlocal most
        most = max(most, taken - first - len(batch))
        return encode(batch, first=first)

    encoder._encode_batch = watch
    try:
        result = encoder.encode_images(images(), batch_size=4, threads=2)
    finally:
        del encoder._encode_batch
    assert len(result) == 40
    assert most <= 8
    assert result.rows[7] == encoder.encode_images([pixels(24, 24, seed=7)]).rows


def test_no_thread_is_left_behind(encoder):
    before = threading.active_count()

    def images():
        yield PICTURE
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        encoder.encode_images(images())
    encoder.encode_images([PICTURE] * 5, threads=3)
    assert threading.active_count() == before


def test_nothing_to_encode(encoder):
    result = encoder.encode_images([])
    assert (len(result), len(result.rows), result.rows.width) == (0, 0, encoder.vocabulary.size)
    only_bad = encoder.encode_images([b"x", b"y"])
    assert only_bad.rows.counts.tolist() == [0, 0]
    assert list(only_bad.refused) == [0, 1]


# Texts and pictures mixed up


def test_an_image_encoder_given_a_text_says_so(encoder, tmp_path):
    for text in ("a photograph of a cat", "cat", ""):
        with pytest.raises(InputError, match=r"an image encoder reads images, got the text .*enc"):
            encoder.encode_images([text])
    with pytest.raises(InputError, match="an image encoder reads images, got the text 'a cat'"):
        encoder.encode_images("a cat")
    missing = encoder.encode_images([tmp_path / "no.png", "no.jpg", "some/folder/picture"])
    assert [reason.split(";")[0] for reason in missing.refused.values()] == [
        "there is no such file"
    ] * 3
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(PICTURE), "PNG"))
    for one in (file, str(file), file.read_bytes(), PICTURE, Image.fromarray(PICTURE), {}, 3):
        with pytest.raises(TypeError, match=r"pass \["):
            encoder.encode_images(one)
    with pytest.raises(TypeError, match=r"images must be paths, bytes, .* got int at index 1"):
        encoder.encode_images([PICTURE, 3])


def test_a_text_encoder_given_a_picture_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = SparseEncoder.from_pretrained(write_bert(tmp_path / "m"), device="cpu")
    file = tmp_path / "cat.PNG"
    file.write_bytes(encoded(Image.fromarray(PICTURE), "PNG"))
    for encode in (encoder.encode_documents, encoder.encode_queries, encoder.bag_of_tokens):
        with pytest.warns(
            UserWarning, match=r"text 1 is the path of an image .*cat\.PNG.*reads the"
        ):
            encode(["a cat", file.name])
        encode(["cat.png", "see no/such/cat.jpg", "a\0.png"])  # no files: texts like any other
    for image in (Path(file), PICTURE, Image.fromarray(PICTURE), b"\x89PNG"):
        with pytest.raises(InputError, match="give images to an image encoder"):
            encoder.encode_documents([image])


def test_names_of_pictures():
    for name in ("a.png", "A.JPEG", "x/y.tif", "b.webp", ".jpg"):
        assert has_image_suffix(name)
    for name in ("", "png", "a.pngx", "a.svg", "a.pdf", "a.png ", "jpeg is a format"):
        assert not has_image_suffix(name)


def test_numbers_are_checked(encoder):
    for name in ("batch_size", "threads"):
        for value in (0, -1, True, 1.5):
            with pytest.raises(ConfigError, match=f"`{name}` must be an integer of at least 1"):
                encoder.encode_images([PICTURE], **{name: value})


@pytest.mark.parametrize(
    ("older", "newer"), [("read_picture", "read_image"), ("Picture", "LoadedImage")]
)
def test_older_names_work_and_warn(older, newer):
    with pytest.warns(DeprecationWarning, match=f"is now `{newer}`"):
        assert getattr(reading, older) is getattr(reading, newer)
