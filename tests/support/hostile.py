"""Hostile pickles, archives and headers, none of which may run, hang or fill memory."""

import io
import itertools
import os
import pickle
import pickletools
import struct
import warnings
import zipfile

import numpy as np

from tests.support.archives import tensor_pickle


class Evil:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def deep(opening, closing=b"", depth=60_000):
    return b"\x80\x02" + opening * depth + closing * depth + b"."


HOSTILE = {
    "os.system": pickle.dumps({"token_embedding.weight": Evil(os.system, "echo run > HIT")}, 2),
    "builtins.eval": pickle.dumps(Evil(eval, "open('HIT', 'w')"), 2),
    "nested": pickle.dumps({"x": [{"y": (Evil(os.mkdir, "HIT"),)}]}, 4),
    "getattr": pickle.dumps(Evil(getattr, "x", "upper"), 2),
    "torch.load": b"\x80\x02ctorch\nload\nX\x03\x00\x00\x00HIT\x85R.",
    "a torch class": b"\x80\x02c__torch__.os\nsystem\nX\x03\x00\x00\x00HIT\x85R.",
    "a call of a class": b"\x80\x02ccollections\nOrderedDict\n]X\x01\x00\x00\x00a\x85a\x85R.",
    "set a class's attribute": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "instance": b"(cos\nsystem\nX\x03\x00\x00\x00HITo.",
    "inst": b"(X\x03\x00\x00\x00HITios\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
    "deep lists": deep(b"]", b"a"),
    "deep tuples": b"\x80\x02)" + b"\x85" * 60_000 + b".",
    "deep tuple as key": b"\x80\x02})" + b"\x85" * 60_000 + b"K\x01s.",
    "deep dicts": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 1000 + b"K\x01" + b"s" * 1000 + b".",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "doubling": b"\x80\x02}q\x00" + b"".join(
        b"}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cuq%c" % (i, i, i + 1) for i in range(40)
    ) + b".",
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "huge string": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00N.",
    "too many instructions": b"\x80\x02" + b"}0" * 60_000 + b"N.",
    "many marks": b"\x80\x02" + b"(" * 40_000 + b"t" * 40_000 + b".",
    "empty stack": b"\x80\x02s.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02}",
    "empty": b"",
    "no pickle": b"<html>",
    "negative offset": tensor_pickle(offset=-1),
    "negative stride": tensor_pickle(strides=(-1,)),
    "negative size": tensor_pickle(shape=(-2,)),
    "out of range": tensor_pickle(offset=3),
    "far out of range": tensor_pickle(offset=2**62),
    "overlapping elements": tensor_pickle(shape=(2, 2), strides=(1, 1)),
    "one number a billion times": tensor_pickle(shape=(10**9,), strides=(0,)),
    "other number of strides": tensor_pickle(shape=(2, 2)),
    "storage too long": tensor_pickle(count=5),
    "storage far too long": tensor_pickle(count=2**61),
    "negative storage": tensor_pickle(count=-1),
    "no such storage": tensor_pickle(key="7"),
    "storage elsewhere": tensor_pickle(key="../../etc/passwd"),
    "not a tower": tensor_pickle(),
}  # fmt: skip


def with_names(*names):
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a/data.pkl", tensor_pickle())
        archive.writestr("a/data/0", bytes(16))
        for name in names:
            archive.writestr(name, b"x")
    return out.getvalue()


def overlapping():
    """Two directory entries over the same bytes."""
    content = bytearray(with_names("a/data/1"))
    first, second = (
        content.index(b"PK\1\2", i) for i in (0, content.index(b"a/data/1", content.index(b"PK\1\2")) - 46)
    )
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    return bytes(content)


def bomb(kind):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        if kind == "npz":
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, {"descr": "<f4", "fortran_order": False, "shape": (2**19, 64)}
            )
            archive.writestr("token_embedding.weight.npy", header.getvalue() + bytes(2**27))
        else:
            archive.writestr("a/data.pkl", b"\x80\x02" + b"}0" * 2**24 + b"N.")
    return out.getvalue()


def huge_npy():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 64)}
        )
        archive.writestr("token_embedding.weight.npy", header.getvalue())
    return out.getvalue()


def object_npy():
    out = io.BytesIO()
    np.savez(out, **{"token_embedding.weight": np.array([Evil(os.system, "echo > HIT")], object)})
    return out.getvalue()


FILES = {
    "absolute name": lambda: with_names("/etc/passwd"),
    "parent name": lambda: with_names("a/../../x"),
    "Windows name": lambda: with_names("C:\\x"),
    "backslashes": lambda: with_names("a\\..\\..\\x"),
    "twice the same": lambda: with_names("a/data/0"),
    "two pickles": lambda: with_names("b/data.pkl"),
    "overlapping entries": overlapping,
    "pickle bomb": lambda: bomb("pt"),
    "npz bomb": lambda: bomb("npz"),
    "npz with a huge header": huge_npy,
    "npz with objects": object_npy,
    "empty": lambda: b"",
    "web page": lambda: b"<!DOCTYPE html><html><body>404</body></html>" * 9,
    "LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "bare pickle": lambda: pickle.dumps(Evil(os.system, "echo > HIT"), 2),
    "end of a zip only": lambda: b"PK\5\6" + bytes(18),
    "zeros": lambda: bytes(1000),
    "safetensors, huge header": lambda: struct.pack("<Q", 2**60) + b"{}",
    "safetensors, header of 99 MB": lambda: struct.pack("<Q", 99_000_000) + b"{}",
    "safetensors, deep header": lambda: struct.pack("<Q", 20_000) + b'{"a":' * 4000,
    "safetensors, overlapping": lambda: safe_header(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    ),
    "safetensors, outside": lambda: safe_header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[96,104]}}'),
    "safetensors, overflowing": lambda: safe_header(
        '{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,12]}}'
    ),
}


def safe_header(text):
    return struct.pack("<Q", len(text)) + text.encode() + bytes(12)


def text(string):
    """Return the instructions that push a string."""
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def call(module, name, *strings):
    """Return the instructions that call a global with strings."""
    return f"c{module}\n{name}\n(".encode() + b"".join(map(text, strings)) + b"tR"


def program(*instructions):
    return b"\x80\x02" + b"".join(instructions) + b"."


def nested(levels):
    """Return the instructions of a tuple that holds a tuple twice, level by level: its repr doubles."""
    return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(levels))


def long_paths(key=1000, depth=1, leaves=90_000):
    """Return a pickle of nested dicts under one long key, whose dotted names would fill memory."""
    leaf = b"}q\1" + text("k" * key) + b"q\0" + b"0("
    leaf += b"".join(b"J" + struct.pack("<i", i) + b"h\1" for i in range(leaves)) + b"u"
    return program(leaf, b"q\2", b"".join(b"}h\0h\2sq\2" for _ in range(depth)))


HIT = "open('HIT', 'w')"
# The kinds of attack on readers of PyTorch's files that have a CVE number, or a name among scanners' authors.
ATTACKS = {
    "CVE-2025-1716, pip as a callable": program(call("pip", "main", "install", "HIT")),
    "CVE-2025-10157, a submodule": program(call("asyncio.unix_events", "_UnixSubprocessTransport", "HIT")),
    "CVE-2026-22612, a module that no list has": program(call("runpy", "_run_module_code", HIT)),
    "CVE-2026-24747, SETITEM on a tensor": program(
        tensor_pickle()[2:-1], text("token_embedding.weight"), b"]", b"s"
    ),
    "CVE-2026-24747, SETITEMS on a tuple": program(b"()t", b"(K\1K\2u"),
    "CVE-2026-24747, a short storage": tensor_pickle(count=400, shape=(400,)),
    "memo index that is not its position": b"\x80\x04"
    + text("os")
    + b"q\x05"
    + text("system")
    + b"\x94h\5h\1\x93"
    b"(" + text("touch HIT") + b"tR.",
    "STACK_GLOBAL of the memo": b"\x80\x04" + text("builtins") + b"\x94" + text("exec") + b"\x94h\0h\1\x93"
    b"(" + text(HIT) + b"tR.",
    "STACK_GLOBAL of a huge name": b"\x80\x04"
    + text("x" * 10**6)
    + b"\x94"
    + text("y")
    + b"h\0h\0\x93" * 1000
    + b".",
    "OBJ": b"(cos\nsystem\n" + text("touch HIT") + b"o.",
    "INST": b"(" + text("touch HIT") + b"ios\nsystem\n.",
    "BUILD with a setstate": program(
        b"cargparse\nNamespace\n)\x81}", text("__setstate__"), b"cos\nsystem\nsb", text("touch HIT"), b"b"
    ),
    "a pickle inside a pickle": program(call("pickle", "loads", "cos\nsystem\n(S'touch HIT'\ntR.")),
    "operator.attrgetter": program(
        b"coperator\nattrgetter\n", text("system"), b"\x85Rcposix\n__dict__\n\x85R"
    ),
    "a second pickle after the first": program(b"}") + program(call("os", "system", "touch HIT")),
    "a call of a foreign object's attribute": program(
        b"cbuiltins\n__import__\n", text("os"), b"\x85R", text("system"), b"\x86R"
    ),
    "functools.partial": program(b"cfunctools\npartial\ncos\nsystem\n", text("touch HIT"), b"\x86R)R"),
    "copyreg._reconstructor": program(b"ccopyreg\n_reconstructor\ncos\nsystem\n", text("HIT"), b"N\x87R"),
    "torch.hub": program(call("torch.hub", "load", "evil/evil", "HIT")),
    "torch.utils.collect_env.run": program(call("torch.utils.collect_env", "run", "touch HIT")),
    "numpy.testing": program(call("numpy.testing._private.utils", "runstring", HIT)),
    "a repr that doubles": program(b"(", text("nostorage"), nested(40), text("0"), text("cpu"), b"K\1tQ"),
    "a key whose repr doubles": program(b"}", nested(40), b"K\1s"),
    "a global whose arguments double": program(b"cos\nsystem\n", nested(40), b"\x85R"),
    "a shape whose repr doubles": program(tensor_pickle()[2:-3], nested(40), b"\x85R"),
    "long names": long_paths(leaves=20_000),
    "a thousand axes": tensor_pickle(shape=(1,) * 1000, strides=(1,) * 1000),
    "equal hashes": program(
        b"}(",
        b"".join(b"\x8a\x0a" + ((i + 1) * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(20_000)),
        b"u",
    ),
    "a million instructions": program(b"}0" * 600_000),
    "a huge integer": program(b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6),
}


def archive_of(data_pkl, storages=None, compression=zipfile.ZIP_STORED):
    """Return a PyTorch archive of a pickle and its storages."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("evil/data.pkl", data_pkl)
        for key, content in (storages or {"0": np.zeros(4, np.float32).tobytes()}).items():
            archive.writestr(f"evil/data/{key}", content)
    return out.getvalue()


def patched(content, offset, form, value):
    """Return bytes with a value packed into them at an offset."""
    changed = bytearray(content)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


def central(content):
    return content.index(b"PK\1\2")


GOOD = archive_of(tensor_pickle())
ZIP_ATTACKS = {
    "CVE-2025-1944, another name in the local header": lambda: GOOD.replace(
        b"evil/data.pkl", b"evil/dat4.pkl", 1
    ),
    "CVE-2025-1945, the flag 0x20": lambda: patched(GOOD, 6, "<H", 0x20),
    "CVE-2025-1945, the flag 0x40 in the directory": lambda: patched(GOOD, central(GOOD) + 8, "<H", 0x40),
    "encrypted": lambda: patched(patched(GOOD, 6, "<H", 1), central(GOOD) + 8, "<H", 1),
    "CVE-2025-10156, a wrong CRC-32 of the pickle": lambda: patched(
        patched(GOOD, 14, "<I", 7), central(GOOD) + 16, "<I", 7
    ),
    "another CRC-32 in the local header": lambda: patched(GOOD, 14, "<I", 7),
    "another size in the local header": lambda: patched(GOOD, 22, "<I", 7),
    "another method in the local header": lambda: patched(GOOD, 8, "<H", 8),
    "an unknown method": lambda: patched(patched(GOOD, 8, "<H", 93), central(GOOD) + 10, "<H", 93),
    "bytes before the archive": lambda: b"PK\3\4" + bytes(60) + GOOD,
    "an archive before the archive": lambda: archive_of(program(b"}")) + GOOD,
    "a compressed pickle": lambda: archive_of(tensor_pickle(), compression=zipfile.ZIP_DEFLATED),
    "a name with a zero byte": lambda: with_names("a/data/1_txt").replace(b"a/data/1_txt", b"a/data/1\0txt"),
    "two entries of one name": lambda: with_names("a/data.pkl"),
    "a PyTorch archive with another suffix inside a folder": lambda: with_names("b/c/data.pkl", "d/data.pkl"),
}


def safetensors_of(header, data=bytes(16)):
    packed = header.encode()
    return struct.pack("<Q", len(packed)) + packed + data


ENTRY = '{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
SAFETENSORS_ATTACKS = {
    "one name twice": lambda: safetensors_of(f'{{"a":{ENTRY},"a":{ENTRY}}}'),
    "a header longer than the file": lambda: struct.pack("<Q", 2**40) + b"{}",
    "names that are paths": lambda: safetensors_of(f'{{"../../HIT/token_embedding.weight":{ENTRY}}}'),
    "names with line ends and escapes": lambda: safetensors_of(
        f'{{"\\u001b[2J\\n.token_embedding.weight":{ENTRY}}}'
    ),
    "a negative size": lambda: safetensors_of('{"a":{"dtype":"F32","shape":[-2,2],"data_offsets":[0,16]}}'),
    "an unknown dtype": lambda: safetensors_of('{"a":{"dtype":"Q9","shape":[2,2],"data_offsets":[0,16]}}'),
    "a dtype that is a list": lambda: safetensors_of(
        '{"a":{"dtype":["F32"],"shape":[2,2],"data_offsets":[0,16]}}'
    ),
    "a hole in the data": lambda: safetensors_of('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'),
}


def gguf_of(values=b"", tensors=b"", counts=(0, 0), version=3):
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + values + tensors


def gguf_tower(params):
    """Return a GGUF file of a text tower's arrays in float32, under their own names."""
    infos, data = b"", b""
    for name, array in params.items():
        sizes = array.shape[::-1]
        infos += gguf_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, 0, len(data))
        data += array.astype("<f4").tobytes()
    header = gguf_of(
        gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("clip"), infos, (len(params), 1)
    )
    return header + bytes(-len(header) % 32) + data


def gguf_text(string):
    return struct.pack("<Q", len(string)) + string.encode()


GGUF_ATTACKS = {
    "endless counts": lambda: gguf_of(counts=(2**63, 2**63)),
    "an endless array": lambda: gguf_of(gguf_text("a") + struct.pack("<IIQ", 9, 8, 2**62), counts=(0, 1)),
    "an endless array of numbers": lambda: gguf_of(
        gguf_text("a") + struct.pack("<IIQ", 9, 5, 2**62), counts=(0, 1)
    ),
    "an array of arrays": lambda: gguf_of(gguf_text("a") + struct.pack("<IIQ", 9, 9, 3) * 9, counts=(0, 1)),
    "an endless string": lambda: gguf_of(struct.pack("<Q", 2**63), counts=(0, 1)),
    "a tensor of 2**32 axes": lambda: gguf_of(
        tensors=gguf_text("a") + struct.pack("<I", 2**32 - 1), counts=(1, 0)
    ),
    "a tensor outside the file": lambda: gguf_of(
        tensors=gguf_text("t.token_embd.weight") + struct.pack("<IQQIQ", 2, 64, 2**40, 0, 0), counts=(1, 0)
    ),
    "an alignment of 0": lambda: gguf_of(
        gguf_text("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)
    ),
    "version 1": lambda: gguf_of(version=1),
}


def all_attacks():
    """Return {a file's name: its bytes} of every hostile file here."""
    made = {f"pickle {name}": archive_of(content) for name, content in (HOSTILE | ATTACKS).items()}
    for kind in (FILES, ZIP_ATTACKS, SAFETENSORS_ATTACKS, GGUF_ATTACKS):
        made |= {name: make() for name, make in kind.items()}
    made |= {f"old format, {name}": old_format(content) for name, content in ATTACKS.items()}
    return made


def old_format(data_pkl):
    """Return a file as torch wrote it before version 1.6, with a pickle in place of its object."""
    magic = program(b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")
    system = program(b"}", text("little_endian"), b"\x88s")
    keys = program(b"](", text("0"), b"e")
    return magic + program(b"M\xe9\x03") + system + data_pkl + keys + struct.pack("<q", 4) + bytes(16)


def mutated_pickle(content, rng):
    """Return a pickle with some of its instructions removed, repeated, swapped, or with another argument."""
    positions = [position for _, _, position in pickletools.genops(content)] + [len(content)]
    parts = [content[a:b] for a, b in itertools.pairwise(positions)]
    for _ in range(rng.integers(1, 4)):
        i, j = (int(rng.integers(len(parts))) for _ in range(2))
        kind = rng.integers(6)
        if kind == 0:
            del parts[i]
        elif kind == 1:
            parts[i:i] = [parts[j]] * int(rng.integers(1, 50))
        elif kind == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif kind == 3:
            parts[i] = PIECES[rng.integers(len(PIECES))]
        elif kind == 4 and len(parts[i]) > 1:
            parts[i] = parts[i][:1] + bytes(rng.integers(0, 256, len(parts[i]) - 1, dtype=np.uint8))
        else:
            parts[i] = bytes([rng.integers(256)])
        if not parts:
            break
    return b"".join(parts)


PIECES = [
    b"(",
    b"t",
    b"u",
    b"s",
    b"R",
    b"b",
    b"Q",
    b"h\0",
    b"q\0",
    b"}",
    b"]",
    b")",
    b"0",
    b"N",
    b"\x81",
    b"\x93",
    b"\x94",
]
PIECES += [
    b"cos\nsystem\n",
    text("x" * 5000),
    nested(20),
    b"\x8a\xff" + b"\x7f" * 255,
    b"J\xff\xff\xff\x7f",
    b"M\xff\xff",
]


def mutated_header(content, rng):
    """Return a safetensors file whose header has another number, name, bracket or repeated piece."""
    size = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + size].decode()
    pieces = header.split(",")
    for _ in range(rng.integers(1, 4)):
        i, j = (int(rng.integers(len(pieces))) for _ in range(2))
        kind = rng.integers(4)
        if kind == 0:
            pieces[i] = pieces[j]
        elif kind == 1:
            pieces[i:i] = pieces[min(i, j) : max(i, j)]
        elif kind == 2:
            changes = ["0", "-1", "9223372036854775807", "1e99", "[", "]", "null", '"F8_E4M3"', '"x\\u0000"']
            pieces[i] = pieces[i].rpartition(":")[0] + ":" + changes[rng.integers(len(changes))]
        else:
            del pieces[i]
    packed = ",".join(pieces).encode()
    return struct.pack("<Q", len(packed)) + packed + content[8 + size :]


def mutated_archive(content, rng):
    """Return a zip archive with one field of one local header or directory entry changed."""
    sign, length = ((b"PK\3\4", 30), (b"PK\1\2", 46), (b"PK\5\6", 22))[rng.integers(3)]
    places = []
    at = content.find(sign)
    while at >= 0:
        places.append(at)
        at = content.find(sign, at + 4)
    at = int(places[rng.integers(len(places))]) + 4 + int(rng.integers((length - 4) // 2)) * 2
    value = int(rng.choice([0, 1, 8, 0x20, 0x40, 0x7FFF, 0xFFFF, rng.integers(0x10000)]))
    return patched(content, min(at, len(content) - 2), "<H", value)


def mutated_bytes(content, rng):
    """Return bytes of which some are flipped, overwritten, cut out or doubled: data, or the structure."""
    content = bytearray(content)
    ends = np.array([len(content), 4000, 400])
    for _ in range(rng.integers(1, 6)):
        size = len(content)
        reach = min(int(rng.choice(ends)), size)
        at = int(rng.integers(reach)) if rng.random() < 0.5 else size - 1 - int(rng.integers(reach))
        kind = rng.integers(6)
        if kind < 3:
            structure = [content.find(sign, at) for sign in (b"data.pkl", b"PK\1\2", b"ctorch", b"{")]
            near = max(structure[rng.integers(4)], 0) + int(rng.integers(-8, 64)) if kind == 2 else at
            content[near % size] = int(rng.integers(256))
        elif kind == 3:
            content[at : at + 4] = struct.pack("<I", int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1])))
        elif kind == 4:
            del content[at : at + int(rng.integers(1, 40))]
        else:
            content[at:at] = content[at : at + int(rng.integers(1, 40))]
        if not content:
            break
    return bytes(content)
