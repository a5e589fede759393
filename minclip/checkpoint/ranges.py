"""Download a text tower alone, by HTTP ranges: the directory of the file first, then the tower's bytes.

OpenAI's .pt files are zip archives and the Hugging Face hub's are safetensors. Both begin or end with a
directory of their tensors, so the image tower need not be downloaded: half of ViT-B/32's file, 5/7 of
ViT-L/14's. Each zip entry is checked by its CRC-32. The sha256 of the complete file cannot be checked.

remotezip and fsspec read remote archives too. Neither resumes a download, and they bring 5 and 14 packages;
zipfile reads the directory through the `RemoteFile` below just as well.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import mmap
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import safetensors.numpy

from minclip.checkpoint import dialects
from minclip.checkpoint.download import (
    BASE,
    CHUNK,
    cache_folder,
    download,
    fetch,
    find_model,
    progress_bar,
    request,
    why,
)
from minclip.checkpoint.pickle_machine import PickleMachine, Storage
from minclip.checkpoint.tensor_files import DTYPES, Stored, map_file, only_when_complete, without_duplicates
from minclip.checkpoint.torch_archive import check_size, flatten, refusing
from minclip.checkpoint.zip_archive import MOST_ENTRIES, check_crc, read_entry

if TYPE_CHECKING:
    import http.client

GAP = 2**16  # ranges nearer to each other than this are requested as one
BUFFER = 2**16  # bytes of a directory that are requested at once
LARGEST_DIRECTORY = 2**24  # bytes; that of ViT-L/14 has 0.1 MB
HUB_FILES = (
    ("config.json", "model.safetensors"),
    ("open_clip_config.json", "open_clip_model.safetensors"),
)
NO_RANGES = (400, 405, 416, 501)  # HTTP statuses of servers that refuse the Range header


class NoRangesError(OSError):
    """The server does not serve byte ranges."""


class RemoteFile(io.RawIOBase):
    """A file on a server that is read by byte ranges, as if it were a local one.

    Raises NoRangesError where the server sends the complete file, OSError where it sends another range.
    """

    def __init__(self, url: str):
        self.url, self.size, self.position = url, 0, 0
        self.failure: OSError | None = None  # zipfile calls a failed read a bad archive
        with self.request(0, 1):
            pass

    def request(self, start: int, end: int) -> http.client.HTTPResponse:
        """Return the server's response to a request for the bytes from start to end."""
        import urllib.error

        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            response = request(self.url, headers)
        except urllib.error.HTTPError as error:
            if error.code in NO_RANGES:
                raise NoRangesError(f"the server refuses byte ranges ({error})") from None
            raise
        if response.status != 206:
            response.close()
            raise NoRangesError("the server sends no byte ranges")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        first, last, size = map(int, found.groups()) if found else (-1, -1, -1)
        if (first, last + 1) != (start, end) or self.size not in (0, size):
            response.close()
            raise OSError(f"the server sent another range than bytes {start} to {end - 1}")
        self.size = size
        return response

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from start to end. Ask again where the connection breaks after some bytes."""
        while start < end:
            before = start
            with self.request(start, end) as response:
                while chunk := read_some(response, end - start):
                    yield chunk
                    start += len(chunk)
            if start == before:
                raise OSError(f"the connection broke at byte {start}")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        try:
            found = b"".join(self.chunks(self.position, end))
        except OSError as error:
            self.failure = error
            raise
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)


def read_some(response: http.client.HTTPResponse, most: int) -> bytes:
    """Return the next bytes of a response, none where the connection broke."""
    import http.client

    try:
        return response.read(min(CHUNK, most))
    except (OSError, http.client.HTTPException):
        return b""


class Plan(NamedTuple):
    """The part of a file that is to be downloaded.

    spans   (start, end) of its byte ranges, in order
    tag     a number that changes with the directory: parts of another file are not resumed
    write   called with the downloaded `Pieces` and a path, it writes the tower there. Raises ValueError
            where the bytes are damaged
    """

    spans: list[tuple[int, int]]
    tag: int
    write: Callable[[Pieces, Path], None]


class Pieces:
    """The downloaded ranges of a file, in one local file. `pieces[start:end]` reads by the remote offsets."""

    def __init__(self, path: Path, spans: list[tuple[int, int]]):
        self.data = map_file(path)
        self.starts = [start for start, _ in spans]
        self.offsets = [0, *itertools.accumulate(end - start for start, end in spans)]

    def position(self, start: int) -> int:
        """Return the position in `data` of a remote offset."""
        at = bisect.bisect_right(self.starts, start) - 1
        return self.offsets[at] + start - self.starts[at]

    def __getitem__(self, place: slice) -> bytes:
        first = self.position(place.start)
        return self.data[first : first + place.stop - place.start]


def download_text_tower(name: str, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a file with the text tower of one of OpenAI's models. Download it if need be.

    name, cache   as `download` takes them

    The file is FILE.text.safetensors, which `load` reads. The next call resumes an interrupted download.
    The complete file is used if it is there, and downloaded if the server takes no ranges.
    Raises ValueError for an unknown name or damaged bytes, OSError if the download fails. Warns that the
    sha256 is not checked.
    """
    digest, filename = find_model(name)
    folder = cache_folder(cache)
    path = text_file(name, cache)
    if (folder / filename).is_file():
        return download(name, cache=cache)
    if path.is_file():
        return path
    url = f"{BASE}/{digest}/{filename}"
    try:
        fetch_text_tower(url, path, activation="quick_gelu")
    except NoRangesError as error:
        warnings.warn(f"{error}: downloading all of {filename}", stacklevel=4)
        return download(name, cache=cache)
    warnings.warn(
        f"{path} holds the text tower alone. Each of its tensors has the CRC-32 of OpenAI's archive, but the "
        "sha256 of the complete file could not be checked",
        stacklevel=4,
    )
    return path


def text_file(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the path where the text tower of one of OpenAI's models is kept."""
    _, filename = find_model(name)
    return cache_folder(cache) / f"{Path(filename).stem}.text.safetensors"


def download_from_hub(source: str, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder with the config and the text tower of a model of the Hugging Face hub.

    source   "hf:OWNER/NAME". The hub's address is $HF_ENDPOINT, or else https://huggingface.co
    cache    as `download` takes it

    The weights must be model.safetensors or open_clip_model.safetensors, which carry no checksum.
    Raises ValueError for another source or damaged bytes, OSError if the download fails.
    """
    name = source.removeprefix("hf:")
    if not re.fullmatch(r"[\w.-]*\w/[\w.-]*\w", name):
        raise ValueError(f"{source!r:.80} is not a model of the Hugging Face hub: write hf:OWNER/NAME")
    folder = cache_folder(cache) / name.replace("/", "--")
    base = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{name}/resolve/main"
    for config, weights in HUB_FILES:
        if (folder / config).is_file() and (folder / weights).is_file():
            return folder
    for config, weights in HUB_FILES:
        text = fetch_config(f"{base}/{config}")
        if text is not None:
            fetch_weights(f"{base}/{weights}", folder / weights)
            (folder / config).write_bytes(text)
            return folder
    raise FileNotFoundError(
        f"the Hugging Face hub has no {name}, or it has neither config.json nor open_clip_config.json"
    )


def fetch_config(url: str) -> bytes | None:
    """Return a config of the hub, None where there is none. Raises OSError if the download fails."""
    import http.client
    import urllib.error

    try:
        with request(url, {}) as response:
            return response.read(LARGEST_DIRECTORY)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 404):
            return None  # the hub answers 401 for a model that is not there
        raise OSError(f"cannot download {url}: {why(error)}") from None


def fetch_weights(url: str, path: Path) -> None:
    """Download the text tower of the hub's weights, or all of them from a server without ranges."""
    try:
        fetch_text_tower(url, path)
    except NoRangesError as error:
        warnings.warn(f"{error}: downloading all of {path.name}", stacklevel=6)
        part = path.with_name(f"{path.name}.part")
        fetch(url, part)
        os.replace(part, path)


def fetch_text_tower(url: str, path: Path, *, activation: str | None = None) -> None:
    """Download the text tower of a .pt or safetensors file to path, as safetensors.

    activation   that of a .pt file's weights. Without it, only safetensors are accepted

    Raises NoRangesError where the server takes no ranges, other OSErrors where the download fails, ValueError
    where the file has no text tower or is damaged.
    """
    import http.client

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remote = RemoteFile(url)
        plan = plan_download(remote, activation)
        part = path.with_name(f"{path.name}.{plan.tag:08x}.part")
        fetch_spans(remote, plan.spans, part)
    except NoRangesError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"cannot download {url}: {why(error)}; run it again to resume") from None
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from None
    try:
        with only_when_complete(path) as partial:
            plan.write(Pieces(part, plan.spans), partial)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url}: {error}. The downloaded bytes were deleted: try again") from None
    part.unlink()


def fetch_spans(remote: RemoteFile, spans: list[tuple[int, int]], part: Path) -> None:
    """Append to part the bytes of the spans that it does not hold yet."""
    total = sum(end - start for start, end in spans)
    have = part.stat().st_size if part.exists() else 0
    with progress_bar(part.name.partition(".text")[0]) as bar, open(part, "ab") as file:
        bar.reset(total=total)
        bar.update(have)
        for start, end in spans:
            skip = min(have, end - start)
            have -= skip
            for chunk in remote.chunks(start + skip, end):
                file.write(chunk)
                bar.update(len(chunk))


def plan_download(remote: RemoteFile, activation: str | None) -> Plan:
    """Read the directory of a .pt or safetensors file, and return which of its bytes are the text tower's."""
    file = io.BufferedReader(remote, BUFFER)
    head = file.read(8)
    if head.startswith(b"PK\3\4") and activation:
        return plan_archive(file, activation)
    (size,) = struct.unpack("<Q", head.ljust(8, b"\xff"))
    return plan_safetensors(file, size, remote.size)


def plan_archive(file: Any, activation: str) -> Plan:
    """Return the plan of a PyTorch archive, whose pickle says which entries hold the text tower."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            program, folder = read_pickle(archive, infos)
            ends = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError, RuntimeError) as error:
        raise file.raw.failure or ValueError(f"not a complete zip archive ({error})") from None
    machine = PickleMachine()
    with refusing("its pickle, data.pkl,"):
        tensors, _ = flatten(machine.run(io.BytesIO(program)))
    tower = the_tower(tensors)
    storages = {f"{folder}data/{key}": machine.storages[key] for key in storage_keys(tower)}
    entries = [(info, end) for info, end in zip(infos, ends, strict=True) if info.filename in storages]
    if len(entries) < len(storages):
        raise ValueError("the archive lacks an entry that its pickle names")

    def write(pieces: Pieces, path: Path) -> None:
        for info, _ in entries:
            place(storages[info.filename], info, pieces)
        write_tower(tower, activation, path)

    tag = zlib.crc32(repr([(info.filename, info.CRC, end) for info, end in entries]).encode())
    return Plan(joined((info.header_offset, end) for info, end in entries), tag, write)


def the_tower(tensors: dict[str, Stored]) -> dialects.Tower:
    """Return the one text tower among the tensors."""
    return dialects.Tower(tensors, dialects.choose_prefix(dialects.find_towers(tensors), None))


def write_tower(tower: dialects.Tower, activation: str, path: Path) -> None:
    """Write a tower in its own dtypes, as `save` does."""
    metadata = {"format": "minclip", "activation": activation, "heads": str(tower.sizes["D"] // 64)}
    arrays = {name: tower.array(name, lambda tensor, _: np.asarray(tensor)) for name in tower.sources}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(contiguous, path, metadata=metadata)


def read_pickle(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo]) -> tuple[bytes, str]:
    """Return (data.pkl, checked by its CRC-32, and the folder that it lies in)."""
    found = [info for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
    if len(found) != 1 or len(infos) > MOST_ENTRIES:
        raise ValueError(f"a zip archive with {len(found)} entries NAME/data.pkl; PyTorch's have one")
    if found[0].file_size > LARGEST_DIRECTORY or found[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("data.pkl is larger than any model's, or compressed, as PyTorch never writes it")
    return archive.read(found[0]), found[0].filename.removesuffix("data.pkl")


def storage_keys(tower: dialects.Tower) -> list[str]:
    """Return the keys of the storages that hold a tower, each once."""
    return list(dict.fromkeys(tower.tensors[name].storage.key for name in tower.tensor_names()))


def place(storage: Storage, info: zipfile.ZipInfo, pieces: Pieces) -> None:
    """Tell a storage where its numbers lie, once its entry is undamaged."""
    entry = read_entry(info, cast(mmap.mmap, pieces))  # it only takes slices of it
    check_size(storage, entry.size)
    storage.data, storage.start = pieces.data, pieces.position(entry.start)
    if entry.crc:
        check_crc(entry, zlib.crc32(memoryview(pieces.data)[storage.start : storage.start + entry.size]))


def plan_safetensors(file: Any, size: int, end: int) -> Plan:
    """Return the plan of a safetensors file of `end` bytes, whose header of `size` bytes has the places."""
    if size > LARGEST_DIRECTORY:
        raise ValueError("neither OpenAI's zip archive nor safetensors")
    start = 8 + size
    text = file.read(size)
    try:
        header = json.loads(text, object_pairs_hook=without_duplicates)
        header.pop("__metadata__", None)
        places = {name: place_of(about["data_offsets"], end - start) for name, about in header.items()}
        tensors = {
            name: Stored(about["shape"], DTYPES.get(about["dtype"], about["dtype"]), unread, 0)
            for name, about in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: {error!s:.200}") from None
    names = sorted(the_tower(tensors).tensor_names(), key=places.__getitem__)
    spans = [(start + first, start + last) for first, last in (places[name] for name in names)]

    def write(pieces: Pieces, path: Path) -> None:
        content = (pieces[first:last] for first, last in spans)
        write_tensors({name: header[name] for name in names}, content, path)

    return Plan(joined(spans), zlib.crc32(text), write)


def write_tensors(header: dict[str, Any], content: Iterable[bytes], path: Path) -> None:
    """Write a safetensors file of the tensors of a header, each with its bytes. The library checks it."""
    start = 0
    for about in header.values():
        first, last = about["data_offsets"]
        about["data_offsets"] = [start, start + last - first]
        start += last - first
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(content)
    try:
        with safetensors.safe_open(path, "numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from None


def unread() -> np.ndarray:
    raise NotImplementedError("a remote tensor has a shape and no numbers")


def place_of(offsets: list[int], size: int) -> tuple[int, int]:
    """Return the offsets of a tensor. Raises ValueError if they lie outside the size bytes of the tensors."""
    first, last = offsets
    if type(first) is not int or type(last) is not int or not 0 <= first <= last <= size:
        raise ValueError("a tensor lies outside the file")
    return first, last


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ordered spans, those with little between them as one."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and start - found[-1][1] < GAP:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
