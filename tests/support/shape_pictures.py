"""Pictures that a test draws itself: coloured shapes and what they are called."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

# Named by words that the small test vocabulary has.
COLOURS = {
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "heavy": (20, 20, 20),
    "light": (250, 250, 250),
}
SHAPES = ("sun", "book", "wave", "star")
BACKGROUND = (170, 170, 170)


def draw_shape(colour: str, shape: str, draw: random.Random, side: int = 32) -> Image.Image:
    """A shape at a random place in a random size."""
    picture = Image.new("RGB", (side, side), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    radius = draw.uniform(0.28, 0.42) * side
    x, y = (draw.uniform(radius, side - radius) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    fill = tuple(max(0, min(255, part + draw.randint(-15, 15))) for part in COLOURS[colour])
    thin = radius / 3
    if shape == "sun":
        pen.ellipse(box, fill=fill)
    elif shape == "book":
        pen.rectangle(box, fill=fill)
    elif shape == "wave":
        pen.rectangle((box[0], y - thin, box[2], y + thin), fill=fill)
        pen.rectangle((x - thin, box[1], x + thin, box[3]), fill=fill)
    else:
        pen.polygon(
            [(x, box[1]), (box[2], box[3]), (box[0], y), (box[2], y), (box[0], box[3])], fill
        )
    return picture


def write_shapes(folder: Path, name: str, *, each: int, seed: int = 0) -> Path:
    """A file of pairs with `each` pictures of every colour and shape."""
    draw = random.Random(seed)
    (folder / name).mkdir(parents=True)
    lines = []
    for colour in COLOURS:
        for shape in SHAPES:
            for i in range(each):
                image = f"{name}/{colour}-{shape}-{i}.png"
                draw_shape(colour, shape, draw).save(folder / image)
                lines.append(json.dumps({"image": image, "text": f"{colour} {shape}"}) + "\n")
    file = folder / f"{name}.jsonl"
    file.write_text("".join(lines), "utf-8")
    return file
