"""Damaged image files: each is read or refused by name, whatever was changed in it."""

from __future__ import annotations

import io
import random
import warnings

import numpy as np
import pytest

from vdr_db.budget import Budget
from vdr_db.errors import InputError
from vdr_db.images.reading import read_image

pytest.importorskip("PIL.Image")
from PIL import Image

MUTANTS = 60
SEED = 20
BUDGET = Budget(image_pixels=1 << 20)
FORMS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "TGA", "PPM", "QOI", "MPO", "HEIF")


def written(form):
    if form == "HEIF":
        pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
        import pillow_heif

        pillow_heif.register_heif_opener()
    ramp = np.arange(48 * 40 * 3).reshape(40, 48, 3) % 251
    file = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(file, form)
    return file.getvalue()


def mutant(content, choice):
    """Some bytes changed, cut out, doubled, or the end cut off."""
    made = bytearray(content)
    for _ in range(choice.randint(1, 6)):
        at = choice.randrange(len(made))
        kind = choice.randrange(4)
        if kind == 0:
            made[at] = choice.choice([0, 255, made[at] ^ (1 << choice.randrange(8))])
        elif kind == 1:
            del made[at : at + choice.randint(1, 9)]
        elif kind == 2:
            made[at:at] = made[at : at + choice.randint(1, 9)]
        else:
            del made[max(at, 16) :]
        made = made or bytearray(b"\0")
    return bytes(made)


@pytest.mark.parametrize("form", FORMS)
def test_no_foreign_error_leaves_the_reader(form):
    content, choice = written(form), random.Random(f"{SEED} {form}")
    read = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some, and reads them
        for _ in range(MUTANTS):
            try:
                image = read_image(mutant(content, choice), BUDGET).image
            except InputError:
                refused += 1
            else:
                assert image.mode == "RGB"
                read += 1
    print(f"{form}: {read} read, {refused} refused")  # noqa: T201, counts for the log of CI
    assert read + refused == MUTANTS
    assert refused
