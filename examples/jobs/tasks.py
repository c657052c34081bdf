"""The tasks of a small photo service. Customers choose their inputs."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request

from celery import Celery
from PIL import Image

from rcon_celery import confined, install

app = Celery("photos", broker=os.environ["PHOTOS_REDIS"], backend=os.environ["PHOTOS_REDIS"])
app.conf.update(broker_connection_retry_on_startup=True)
install(app)

Image.MAX_IMAGE_PIXELS = None  # the memory limit bounds the size of pictures


@app.task(name="photos.thumbnail")
@confined(memory="96M", timeout="20s", pids=8)
def thumbnail(source: str, target: str, edge: int) -> list[int]:
    """Write a small copy of a picture; return its width and height."""
    with Image.open(source) as picture:
        picture.thumbnail((edge, edge))
        picture.convert("RGB").save(target, "JPEG")
        return [picture.width, picture.height]


@app.task(name="photos.album")
@confined(memory="128M", timeout="20s", pids=8)
def album(sources: list[str], target: str) -> int:
    """Write a PDF with a page for each picture; return its size in bytes."""
    pages = [Image.open(source).convert("RGB") for source in sources]
    pages[0].save(target, "PDF", save_all=True, append_images=pages[1:])
    return os.stat(target).st_size  # noqa: PTH116 - one call


@app.task(name="photos.search")
@confined(cpu="50%", memory="96M", timeout="2s", pids=8)
def search(pattern: str, captions: list[str]) -> list[str]:
    """Return the captions that match a customer's regular expression."""
    return [caption for caption in captions if re.match(pattern, caption)]


@app.task(name="photos.hook")
@confined(memory="96M", timeout="20s", pids=16)
def hook(command: str) -> str:
    """Run a customer's command when an album is ready; return its output."""
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@app.task(name="photos.fetch")
@confined(memory="96M", timeout="2s", pids=8)
def fetch(url: str) -> int:
    """Download a page from a customer's server; return its size in bytes."""
    with urllib.request.urlopen(url) as answer:
        return len(answer.read())
