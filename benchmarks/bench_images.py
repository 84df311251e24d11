"""A thousand image files into an embedded Qdrant: time per image, and whether memory grows.

    python benchmarks/bench_images.py [--out benchmarks/results/images.csv]

JPEG and PNG files of 320 x 240 to 1280 x 960 pixels are written first, and among them every broken
file of the tests, which must all be named and stop nothing. `add_images` then decodes, encodes and
writes them, with a tiny image encoder of random weights (a ViT of 49 patches), so that what grows
or waits is the way there, not the model. Processor time is that of all threads. Memory: resident
after 200 images against the most until the end, in a fresh process. Thumbnails: the same with one
of 64 pixels kept for each image; `store` is the folder's size, `thumbnail` that of the address.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "support")]

from measure import resident, rows_of, write_csv  # noqa: E402

IMAGES, EARLY, BATCH = 1000, 200, 100
SIZES = ((320, 240), (480, 640), (800, 600), (1280, 960))
THUMBNAIL_PX = 64


def main() -> int:
    """Measures, prints and writes the table; 1 when a file went missing or memory grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="table to write")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, store, thumbnail_px = arguments.child
        print(json.dumps(add_all(Path(folder), Path(store), int(thumbnail_px) or None)))
        return 0
    rows = []
    is_good = True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        broken = write_files(folder)
        for name, thumbnail_px in (("add_images", 0), ("add_images, thumbnails", THUMBNAIL_PX)):
            store = Path(place) / f"store{thumbnail_px}"
            command = [sys.executable, __file__, "--child", str(folder), str(store)]
            done = subprocess.run(
                [*command, str(thumbnail_px)], stdout=subprocess.PIPE, text=True, check=True
            )
            told: dict[str, Any] = json.loads(done.stdout)
            growth = told["most"] / told["early"]
            print(f"{name}: {IMAGES} images, memory x{growth:.3f} from {EARLY} images on")
            is_good &= told["stored"] == IMAGES and told["refused"] == len(broken) and growth < 1.05
            samples = {
                "processor time (ms/image)": [1000 * told["processor"] / IMAGES],
                "memory after 200 (MB)": [told["early"] / 1e6],
                "most memory after 200 to 1000 (MB)": [told["most"] / 1e6],
                "broken files refused (files)": [float(told["refused"])],
                "store (kB/image)": [size_of(store) / IMAGES / 1000],
            }
            if thumbnail_px:
                samples["thumbnail (characters)"] = told["thumbnails"]
            rows += rows_of(name, "edge", f"N={IMAGES}", "float32", samples)
    for row in rows:
        print(row)
    if arguments.out:
        write_csv(arguments.out, rows)
    return 0 if is_good else 1


def write_files(folder: Path) -> list[str]:
    """Writes the good files and the broken ones; returns the names of those."""
    from broken_images import broken_contents
    from image_folders import pixels
    from PIL import Image

    folder.mkdir()
    kinds = [Image.fromarray(pixels(*size, seed=i)) for i, size in enumerate(SIZES)]
    for i in range(IMAGES):
        image = kinds[i % len(kinds)].copy()
        # No two alike, at the price of one pixel.
        image.putpixel((i % 300, i // 300), (i % 251, i % 7 * 30, 99))
        if i % 10:
            image.save(folder / f"{i:04}.jpg", quality=88)
        else:
            image.resize((320, 240)).save(folder / f"{i:04}.png", compress_level=1)
    contents = broken_contents()
    for i, (name, content) in enumerate(contents.items()):
        (folder / f"{40 * i:04} {name}").write_bytes(content)
    return list(contents)


def add_all(folder: Path, store: Path, thumbnail_px: int | None) -> dict[str, Any]:
    """Adds a folder to a new store, in this process; tells time and resident memory."""
    from image_folders import VIT, write_cross_modal
    from tokenizers import Tokenizer

    from vdr_db import CrossModalEncoder
    from vdr_db.checkpoints.assets import fetch
    from vdr_db.connectors import VDRQdrant
    from vdr_db.errors import RejectedRows

    vit = {**VIT, "resolution": 224, "patch_size": 32, "width": 64}
    tokenizer = Tokenizer.from_file(str(fetch("tiny-splade") / "tokenizer.json"))
    folder_of_model = store.parent / f"model{thumbnail_px}"
    model = write_cross_modal(folder_of_model, tokenizer=tokenizer, topk=256, vit=vit)
    encoder = CrossModalEncoder.from_pretrained(model, device="cpu")
    names = sorted(path.name for path in folder.iterdir())
    early = most = 0
    stored = refused = 0
    start = time.process_time()
    with VDRQdrant("images", encoder, path=store) as collection:
        for at in range(0, len(names), BATCH):
            batch = names[at : at + BATCH]
            try:
                collection.add_images(
                    [folder / name for name in batch], ids=batch, thumbnail_px=thumbnail_px
                )
            except RejectedRows as rejection:
                refused += len(rejection.ids)
            now = resident("VmRSS")
            if at + BATCH <= EARLY:
                early = max(early, now)
            else:
                most = max(most, now)
        processor = time.process_time() - start
        stored = collection.count({"modality": "image"})
        good = [name for name in names if " " not in name][:200]
        small = [len(record.payload.get("thumbnail", "")) for record in collection.get(good)]
    return {
        "processor": processor,
        "early": early,
        "most": most,
        "stored": stored,
        "refused": refused,
        "thumbnails": small,
    }


def size_of(folder: Path) -> int:
    """Bytes that a folder takes on its disk."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
