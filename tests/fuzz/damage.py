"""Changes of files: those that mean nothing, damage, and links and devices in place of files."""

import functools
import io
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

Files = dict[str, bytes]
ODD_NAMES = (
    "$x_{$",
    "\\frac",
    "a b",
    "été",
    "c\udce9f",
    "n\nl",
    "x" * 120,
    "[bold]",
    "-rf",
    "%s{0}",
    "CON",
    "a,b",
    '"q"',
)
VALUES: tuple[Any, ...] = (
    None,
    -1,
    0,
    10**400,
    float("nan"),
    float("inf"),
    1e308,
    "x",
    "",
    [],
    {},
    [[]],
    True,
    "9" * 5000,
)


@functools.cache
def bomb() -> bytes:
    """2 GiB of zeros, deflated: one block again and again."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    return head + block * 2048 + zlib.compressobj(9, zlib.DEFLATED, -15).flush() + bytes(8)


def huge_picture() -> bytes:
    """A picture whose head says 60,000 x 60,000."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")
    data = bytearray(buffer.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def meaningless(r: random.Random, files: Files) -> Files:
    """The same to whoever reads it."""
    lists = [n for n in files if n.endswith(".csv")]
    name = r.choice(lists or sorted(files))
    changes: list[Callable[[], Files]] = [
        lambda: files,
        lambda: files | {".DS_Store": b"x", "Thumbs.db": b"y", "__MACOSX/._x.png": b"z"},
        lambda: files | {"notes.txt": b"of mine"},
    ]
    if lists:
        text = files[name]
        texts = (
            b"\xef\xbb\xbf" + text,
            text.replace(b"\n", b"\r\n"),
            text + b"\n\n",
            text.replace(b",", b" , "),
            text.rstrip(),
        )
        changes.append(lambda: files | {name: r.choice(texts)})
    else:
        old, new = name.split("/")[-2], r.choice(ODD_NAMES)
        changes.append(lambda: {n.replace(f"{old}/", f"{new}/"): data for n, data in files.items()})
        changes.append(lambda: {f"around/{n}": data for n, data in files.items()})
        changes.append(
            lambda: {n.replace(".png", r.choice((".PNG", ".Jpg", ".jfif"))): data for n, data in files.items()}
        )
    return r.choice(changes)()


def damaged(r: random.Random, files: Files) -> Files:
    name = r.choice(sorted(files))
    data = bytearray(files[name])
    kind = r.randrange(9)
    if kind == 0:
        for _ in range(r.choice((1, 1, 8))):
            data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    elif kind == 1:
        del data[r.randrange(len(data)) :]
    elif kind == 2:
        return {n: d for n, d in files.items() if n != name}
    elif kind == 3:
        data = bytearray(r.choice((b"", bytes(100), b"GIF89a", b"%PDF", r.randbytes(300), huge_picture(), bomb())))
    elif kind == 4:
        return files | {name.rpartition("/")[0] + "/more" + r.choice((".png", ".txt", "/x.png", ".zip")): bytes(data)}
    elif kind == 5:
        return {(f"{n}/x" if n == name else n): d for n, d in files.items()}
    else:
        lines = bytes(data).split(b"\n")
        i = r.randrange(len(lines))
        odd = (
            b"",
            b"\0",
            b"../../outside.jpg,x",
            b"/etc/passwd,x",
            b"a,b,c,d",
            b"," * 9,
            b"x" * 200_000,
            b"\xff\xfe",
            lines[0],
            b'"',
        )
        lines[i : i + r.choice((0, 1))] = [r.choice(odd)]
        data = bytearray(b"\n".join(lines))
    return files | {name: bytes(data)}


def on_disk(r: random.Random, root: Path) -> None:
    """What only a file system has: links and devices in place of a file or beside it."""
    found = sorted(p for p in root.rglob("*") if p.is_file())
    place = r.choice(found)
    target = r.choice(
        (root, place.parent, Path("/dev/zero"), Path("/dev/null"), Path("nowhere"), place, Path("/proc/self/mem"))
    )
    link = place.with_name("link" + r.choice(("", ".png")))
    if r.random() < 0.5:
        place.unlink()
        link = place
    if r.random() < 0.2:
        os.mkfifo(link)
    else:
        link.symlink_to(target)


def changed_value(r: random.Random, tree: Any) -> str:
    """One value somewhere in nested settings or states; says which."""
    path = []
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = r.choice(keys)
        path.append(key)
        inner = tree[key]
        if isinstance(inner, dict | list) and inner and r.random() < 0.8:
            tree = inner
            continue
        value = r.choice(VALUES)
        if isinstance(inner, torch.Tensor):
            numbers = inner.double()
            value = r.choice((numbers * torch.nan, numbers[None], numbers, -inner, None))
            value = (
                value.to(inner.dtype) if r.random() < 0.5 and value is not None and inner.is_floating_point() else value
            )
        if isinstance(tree, dict) and r.random() < 0.2:
            del tree[key]
            return f"without {path}"
        tree[key] = value
        return f"{path} = {str(value)[:40]}"
