"""A stand-in of OpenAI's ViT-B-32.pt: the same names, dtypes, shapes, storages and zip layout, other numbers.

vit_b_32_layout.txt has what was published of the real file. The zip archive is laid out as torch writes it:
entries are stored, begin at multiples of 64 bytes thanks to a padded extra field, and have their sizes and
CRC-32 behind their bytes. Unknown of the real file are its classes' names and its code, which `load` ignores.
"""

import math
import struct
import zlib
from pathlib import Path

import numpy as np

LAYOUT = Path(__file__).with_name("vit_b_32_layout.txt")
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
SIZES = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
FLAGS = 0x0808  # names in UTF-8, sizes behind the data


def read_layout():
    """Return {name: (storage, dtype, shape)} of the tensors, and {name: number} of the plain attributes."""
    tensors, plain = {}, {}
    for line in LAYOUT.read_text().splitlines()[1:]:
        storage, dtype, shape, name = line.split()
        if dtype == "int":
            plain[name] = int(shape)
        else:
            tensors[name] = (
                storage,
                dtype,
                tuple(map(int, shape.replace("-", "").split(",") if shape != "-" else ())),
            )
    return tensors, plain


def is_text(name):
    return not name.startswith("visual.") and name not in (*SIZES, "logit_scale")


def numbers(name, dtype, shape):
    """Return the stand-in's numbers: random in the text tower, ones in the image tower."""
    if name in SIZES:
        return np.array(SIZES[name], dtype)
    if not is_text(name):
        return np.ones(shape, dtype)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    block = (0.02 * rng.standard_normal(min(math.prod(shape), 2**17))).astype(dtype)
    return np.resize(block, shape)


def write_stand_in(path):
    """Write the stand-in, 353 MB, and return the text tower's arrays by name."""
    tensors, plain = read_layout()
    with open(path, "wb") as file:
        writer = TorchZip(file, "ViT-B-32")
        kept = {}
        for name, (storage, dtype, shape) in sorted(tensors.items(), key=lambda item: int(item[1][0])):
            array = numbers(name, dtype, shape)
            writer.add(f"data/{storage}", array.tobytes())
            if is_text(name):
                kept[name] = array
        writer.add("data.pkl", program(tensors, plain))
        writer.add("code/__torch__/multimodal.py", b"op_version_set = 1\n")
        writer.add("constants.pkl", b"\x80\x02).")
        writer.add("version", b"2\n")
        writer.finish()
    return kept


class TorchZip:
    """A writer of zip archives as torch's own lays them out."""

    def __init__(self, file, folder):
        self.file, self.folder, self.directory = file, folder, []

    def add(self, name, content):
        name = f"{self.folder}/{name}".encode()
        start, size, crc = self.file.tell(), len(content), zlib.crc32(content)
        padding = -(start + 30 + len(name) + 4) % 64
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        header = struct.pack("<4s5H3L2H", b"PK\3\4", 0, FLAGS, 0, 0, 0, 0, 0, 0, len(name), len(extra))
        self.file.write(header + name + extra)
        self.file.write(content)
        self.file.write(struct.pack("<4s3L", b"PK\7\10", crc, size, size))
        central = (b"PK\1\2", 0, 0, FLAGS, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, start)
        self.directory.append(struct.pack("<4s6H3L5H2L", *central) + name)

    def finish(self):
        start, directory = self.file.tell(), b"".join(self.directory)
        count = len(self.directory)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), start, 0)
        self.file.write(directory + end)


def program(tensors, plain):
    """Return the pickle of the modules, as TorchScript writes it."""
    tree = {}
    for name, value in {**tensors, **plain}.items():
        *modules, last = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = value
    return b"\x80\x02" + pickled(tree, "Multimodal") + b"."


def pickled(node, name):
    if isinstance(node, dict):
        items = b"".join(text(key) + pickled(child, key) for key, child in node.items())
        return b"c__torch__.multimodal\n" + name.encode() + b"\n)\x81}(" + items + b"ub"
    if isinstance(node, int):
        return whole(node)
    storage, dtype, shape = node
    count = math.prod(shape)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    place = b"(" + text("storage") + b"ctorch\n" + STORAGES[dtype].encode() + b"\n" + text(storage)
    place += text("cuda:0") + whole(count) + b"tQ"
    arguments = place + whole(0) + many(shape) + many(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def whole(number):
    return b"J" + struct.pack("<i", number)


def many(numbers):
    return b"(" + b"".join(map(whole, numbers)) + b"t"
