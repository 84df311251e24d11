"""A text finds an image and an image a text: python images.py FOLDER "QUERY"

FOLDER holds images of any kind that Pillow reads; without arguments two are drawn.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from vdr_db.connectors import VDRQdrant

folder, query = sys.argv[1:] or ("images", "circle")
if not Path(folder).is_dir():
    Path(folder).mkdir()
    for name in ("circle", "square"):
        image = Image.new("RGB", (128, 128), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if name == "circle" else draw.rectangle)((24, 24, 104, 104), fill="navy")
        image.save(Path(folder, f"{name}.png"))

with VDRQdrant("album", path=":memory:") as album:
    names = album.add_images(folder, thumbnail_px=64)
    album.add_texts(["A circle.", "A square."], ids=["text of a circle", "text of a square"])
    hits = album.search(query, filter={"modality": "image"}, limit=3)
    print(f"images for {query!r}: {[hit.id for hit in hits]}")
    nearest = album.search_by_image(Path(folder, names[0]), limit=5)
    print(f"nearest to {names[0]}: {[hit.id for hit in nearest]}")
