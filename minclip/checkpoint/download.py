"""Download OpenAI's files: resume interrupted downloads, check the sha256, leave no half-written file.

Functions that use the network import http.client and urllib themselves, because these take time to import.
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import http.client

    from tqdm import tqdm

BASE = "https://openaipublic.azureedge.net/clip/models"
MODELS = {  # name: sha256 and file name, from openai/CLIP's clip/clip.py
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": (
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "ViT-L-14-336px.pt",
    ),
}
CHUNK = 2**20
TIMEOUT = 30  # seconds without a byte


def available_models() -> list[str]:
    """Return the names of OpenAI's models, as `clip.available_models()` does.

    >>> available_models()[:2]
    ['RN50', 'RN101']
    """
    return list(MODELS)


def download(name: str, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a model's file, after checking its sha256. Download the file if it is not there.

    name    one of `available_models()`
    cache   folder to keep the file in. The default is $MINCLIP_CACHE, or else ~/.cache/clip, where
            OpenAI's own `clip` keeps the same file

    An interrupted download stays beside the file as FILE.part, and the next call resumes from there.
    Raises ValueError for an unknown name or a wrong sha256, OSError if the file cannot be downloaded.
    """
    import http.client

    digest, filename = find_model(name)
    folder = cache_folder(cache)
    path, part = folder / filename, folder / f"{filename}.part"
    if path.is_file() and sha256(path) == digest:
        return path
    url = f"{BASE}/{digest}/{filename}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"cannot download {url}: {why(error)}; run it again to resume, or put the file at {path}"
        ) from None
    if sha256(part) != digest:
        part.unlink()
        raise ValueError(
            f"{url} has the wrong sha256 and was deleted: try again, or put the right file at {path}"
        )
    os.replace(part, path)
    return path


def find_model(name: str) -> tuple[str, str]:
    """Return the sha256 and the file name of one of OpenAI's models.

    Raises ValueError for any other name, and suggests the nearest one.
    """
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the models are {', '.join(MODELS)}"
    raise ValueError(f"no model {name!r:.80}: {hint}")


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of downloaded files: cache, or $MINCLIP_CACHE, or ~/.cache/clip."""
    return Path(cache or os.environ.get("MINCLIP_CACHE") or "~/.cache/clip").expanduser()


def fetch(url: str, part: Path) -> None:
    """Download url to part, resuming from the bytes that part already holds.

    Raises OSError if the server sends no further bytes.
    """
    with progress_bar(part.stem) as bar:
        while True:
            before = part.stat().st_size if part.exists() else 0
            if fetch_rest(url, part, before, bar):
                return
            if part.stat().st_size <= before:
                raise OSError(f"the connection broke at {before} bytes")


def fetch_rest(url: str, part: Path, have: int, bar: tqdm) -> bool:
    """Append the missing bytes to part. Return whether part is complete."""
    import urllib.error

    try:
        response = request(url, {"Range": f"bytes={have}-"} if have else {})
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range", f"bytes */{have}") == f"bytes */{have}":
            return True  # no byte comes after the ones in part
        part.unlink()
        return fetch_rest(url, part, 0, bar)
    with response:
        if response.headers["Content-Length"] is None:
            raise OSError("the server does not announce the file's length")
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError(f"the server sent another range than the bytes from {have} on")
        size = int(response.headers["Content-Length"]) + (have if resumed else 0)
        bar.reset(total=size)
        bar.update(have if resumed else 0)
        with open(part, "ab" if resumed else "wb") as file:
            copy(response, file, bar)
            return file.tell() == size


def request(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Return a server's response. Raises HTTPError, closed, where the server answers with an error."""
    import urllib.error
    import urllib.request

    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()  # the error is a response too, and holds its connection
        raise


def copy(response, file, bar):
    """Write the bytes of the response to file until it ends or the connection breaks."""
    import http.client

    while True:
        try:
            chunk = response.read(CHUNK)
        except (OSError, http.client.HTTPException):  # the bytes received so far are good
            return
        if not chunk:
            return
        file.write(chunk)
        bar.update(len(chunk))


def why(error: Exception) -> str:
    """Return the reason of a failed download, which urllib wraps in an error of its own."""
    reason = getattr(error, "reason", None)
    return reason.strerror or str(reason) if isinstance(reason, OSError) else str(error)


def progress_bar(name: str) -> tqdm:
    """Return a progress bar in bytes, shown only on a terminal."""
    from tqdm import tqdm  # here, because it takes time to import

    return tqdm(desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty())


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    import hashlib  # here, because it takes time to import

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
