"""Files as they get damaged: data sets and runs, each read as it is meant or refused in one line.

Every image has one grey value of its own, so that what was read can be told: after a change that means nothing, all of
them; after any other no value that is in no file, and where there are fewer images than files, something was said.
"""

import contextlib
import functools
import gzip
import io
import json
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fused_margins.fewshot import report
from fused_margins.fewshot.cli import main as command
from fused_margins.fewshot.datasets import load
from fused_margins.fewshot.errors import UserError
from fused_margins.fewshot.runs import Run
from tests.fewshot.conftest import SMALL
from tests.fewshot.layouts import lay
from tests.fewshot.test_datasets_layouts import clothes, idx

Files = dict[str, bytes]
ODD_NAMES = ("$x_{$", "\\frac", "a b", "été", "c\udce9f", "n\nl", "x" * 120, "[bold]", "-rf", "%s{0}", "CON", "a,b", '"q"')
VALUES: tuple[Any, ...] = (None, -1, 0, 10**400, float("nan"), float("inf"), 1e308, "x", "", [], {}, [[]], True, "9" * 5000)


def case(seed: int, number: int) -> str | None:
    r = random.Random(f"files {seed} {number}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"FUSED_MARGINS_CACHE": f"{folder}/cache", "FUSED_MARGINS_DATA": f"{folder}/data"}
        return run_case(r, Path(folder)) if r.random() < 0.4 else data_case(r, Path(folder))


# Data sets


def picture(r: random.Random, value: int, plain: bool) -> bytes:
    """An image of one value, in a format and a mode that hold it."""
    mode, form = r.choice((("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("L", "jpeg"), ("RGB", "bmp"), ("L", "tiff"),
                           ("I;16", "png"), ("LA", "png"), ("RGB", "webp"), ("CMYK", "jpeg"), ("1", "png"), ("F", "tiff")))  # fmt: skip
    if plain:
        mode, form = "RGB", "png"
    size = (r.randint(1, 9), r.randint(1, 9))
    image = Image.new("L", size, value).convert("RGB" if mode in ("P", "CMYK") else "L")
    if mode == "I;16":
        image = Image.fromarray(np.full(size, value * 257, np.uint16))
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def folders(r: random.Random, plain: bool) -> tuple[str, Files]:
    values = iter(r.sample(range(0, 256, 9), 24))
    splits = r.choice((("train/", "test/"), ("train/", "val/", "test/"), ("",)))
    files = {}
    for split in splits:
        for c in range(r.randint(1, 3) if split else 5):
            for i in range(r.randint(1, 2)):
                files[f"{split}{split[:2]}c{c}/{i}.png"] = picture(r, next(values), plain)
    return "folder", files


def listed(r: random.Random, plain: bool) -> tuple[str, Files]:
    values, files = iter(r.sample(range(0, 256, 9), 12)), {}
    for split in ("train", "val", "test"):
        rows = ["filename,label"]
        for i in range(4):
            files[f"images/{split}{i}.jpg"] = picture(r, next(values), plain)
            rows.append(f"{split}{i}.jpg,n{split}{i // 2}")
        files[f"{split}.csv"] = "\n".join(rows).encode() + b"\n"
    return "mini-imagenet", files


def arrays(r: random.Random, plain: bool) -> tuple[str, Files]:
    return "fashion-mnist", {name: gzip.compress(idx(array)) for name, array in clothes(r.randint(1, 4)).items()}


@functools.cache
def bomb() -> bytes:
    """2 GiB of zeros, deflated: one block again and again."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    return head + block * 2048 + zlib.compressobj(9, zlib.DEFLATED, -15).flush() + bytes(8)


def huge_picture() -> bytes:
    """A picture whose head says 60,000 x 60,000."""
    data = bytearray(picture(random.Random(0), 3, True))
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
        texts = (b"\xef\xbb\xbf" + text, text.replace(b"\n", b"\r\n"), text + b"\n\n", text.replace(b",", b" , "), text.rstrip())
        changes.append(lambda: files | {name: r.choice(texts)})
    else:
        old, new = name.split("/")[-2], r.choice(ODD_NAMES)
        changes.append(lambda: {n.replace(f"{old}/", f"{new}/"): data for n, data in files.items()})
        changes.append(lambda: {f"around/{n}": data for n, data in files.items()})
        changes.append(lambda: {n.replace(".png", r.choice((".PNG", ".Jpg", ".jfif"))): data for n, data in files.items()})
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
        odd = (b"", b"\0", b"../../outside.jpg,x", b"/etc/passwd,x", b"a,b,c,d", b"," * 9, b"x" * 200_000, b"\xff\xfe", lines[0], b'"')
        lines[i : i + r.choice((0, 1))] = [r.choice(odd)]
        data = bytearray(b"\n".join(lines))
    return files | {name: bytes(data)}


def on_disk(r: random.Random, root: Path) -> None:
    """What only a file system has: links and devices in place of a file or beside it."""
    found = sorted(p for p in root.rglob("*") if p.is_file())
    place = r.choice(found)
    target = r.choice((root, place.parent, Path("/dev/zero"), Path("/dev/null"), Path("nowhere"), place, Path("/proc/self/mem")))
    link = place.with_name("link" + r.choice(("", ".png")))
    if r.random() < 0.5:
        place.unlink()
        link = place
    if r.random() < 0.2:
        os.mkfifo(link)
    else:
        link.symlink_to(target)


def data_case(r: random.Random, folder: Path) -> str | None:
    harmless = r.random() < 0.4
    name, files = r.choice((folders, folders, listed, arrays))(r, not harmless or r.random() < 0.5)
    if name == "fashion-mnist" and harmless:
        changed = files
    else:
        changed = meaningless(r, files) if harmless else damaged(r, files)
    form, root = r.choice(("folder", "zip", "flat zip")), folder / "data"
    places = {"folder": "set", "mini-imagenet": "mini-imagenet", "fashion-mnist": "FashionMNIST/raw"}
    if name == "fashion-mnist":
        form = "folder"
    try:
        lay(root, form, places[name], changed)
    except (UnicodeError, FileExistsError, NotADirectoryError, IsADirectoryError):
        return None  # no such files can be
    if not harmless and r.random() < 0.3:
        if form == "folder":
            on_disk(r, root)
        else:
            archive = next(root.glob("*.zip"))
            archive.write_bytes(damaged(r, {"zip": archive.read_bytes()}).get("zip", b""))
    if name == "folder":
        name = f"folder:{root / ('set' if form == 'folder' else 'set.zip')}"
    said = io.StringIO()
    what = f"{name} as {form}, {'harmless' if harmless else 'damaged'}: {[n for n in changed if changed.get(n) != files.get(n)][:5]}"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            sets = load(name, 8 if name != "fashion-mnist" else 28)
    except UserError as error:
        if harmless:
            return f"refused what means the same: {error} ({what})"
        return None if "\n" not in str(error) else f"more than a line: {error} ({what})"
    except Exception as error:
        return f"{type(error).__name__}: {error} ({what})"
    expected = sum(n.lower().endswith((".png", ".jpg", ".jfif")) and "MACOSX" not in n for n in changed)
    got = sum(map(len, sets.values()))
    if name != "fashion-mnist" and got != expected and (harmless or not said.getvalue()):
        return f"{got} of {expected} images, and said {said.getvalue()!r} ({what})"
    return None


# Runs


@functools.cache
def trained() -> Path:
    """A finished run, which the children copy."""
    report._draw = lambda run, trainer, task: {}  # type: ignore[assignment]  # pictures take far longer than the rest
    folder = Path(tempfile.mkdtemp()) / "run"
    options = [*SMALL, "--loss", "margin-softmax", "--neighbours", "1", "--episodes", "5", "--threads", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert command(["train", "--output", str(folder), *options]) == 0
    return folder


def run_case(r: random.Random, folder: Path) -> str | None:
    run = Path(shutil.copytree(trained(), folder / "run"))
    name = r.choice(("config.json", "config.json", "metrics.jsonl", "report.json", "judging.json", "usage.json", "checkpoint.pt", "checkpoint.pt"))
    path, how = run / name, ""
    if r.random() < 0.5:
        path.write_bytes(damaged(r, {name: path.read_bytes()}).get(name, b""))
        how = "damaged"
    elif name.endswith(".json"):
        value = json.loads(path.read_text())
        how = changed_value(r, value)
        path.write_text(json.dumps(value))
    elif name == "checkpoint.pt":
        state = torch.load(path, weights_only=True)
        how = changed_value(r, state)
        Run(run).save_checkpoint(state)
    else:
        rows = path.read_text().splitlines()
        row = json.loads(rows[-1])
        how = changed_value(r, row)
        path.write_text("\n".join([*rows[:-1], json.dumps(row)]))
    options = r.choice(
        (["evaluate", str(run)], ["compare", str(trained()), str(run)], ["train", "--resume", "--output", str(run)])
    )
    said, errors = io.StringIO(), io.StringIO()
    what = f"{options[0]} with {name}: {how}"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = command(options)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]} ({what})"
    lines = errors.getvalue().strip().splitlines()
    if code not in (0, 2) or (code == 2 and (len(lines) != 1 or "error:" not in lines[0])):
        return f"exit {code}, {lines[:5]} ({what})"
    if any(word in errors.getvalue() for word in ("pydantic", "tyro", "Traceback")):
        return f"speaks of its parts: {lines[0]} ({what})"
    return None


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
            value = r.choice((torch.full_like(inner, torch.nan) if inner.is_floating_point() else inner[:0], inner[None], inner.double(), None))
        if isinstance(tree, dict) and r.random() < 0.2:
            del tree[key]
            return f"without {path}"
        tree[key] = value
        return f"{path} = {str(value)[:40]}"
