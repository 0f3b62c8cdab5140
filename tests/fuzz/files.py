"""Files as they get damaged: data sets and runs, each read as it is meant or refused in one line.

Every image has one grey value of its own, so that what was read can be told: after a change that means nothing, all of
them; after any other no value that is in no file, and where there are fewer images than files, something was said.
"""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fused_margins.fewshot import report
from fused_margins.fewshot.cli import main as command
from fused_margins.fewshot.datasets import load
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.terminal import UserError
from tests.fewshot.conftest import SMALL
from tests.fewshot.layouts import lay

from .damage import Files, changed_value, damaged, meaningless, on_disk


def case(seed: int, number: int) -> str | None:
    r = random.Random(f"files {seed} {number}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"FUSED_MARGINS_CACHE": f"{folder}/cache", "FUSED_MARGINS_DATA": f"{folder}/data"}
        return run_case(r, Path(folder)) if r.random() < 0.4 else data_case(r, Path(folder))


# Data sets


FORMATS = {
    "png": ("RGB", "L", "P", "RGBA", "LA", "I;16"),
    "jpeg": ("L", "CMYK"),
    "bmp": ("RGB",),
    "tiff": ("L", "F"),
    "webp": ("RGB",),
}


def picture(r: random.Random, value: int, plain: bool) -> bytes:
    """An image of one value, in a format and a mode that hold it."""
    form = "png" if plain else r.choice(list(FORMATS))
    mode = "RGB" if plain else r.choice(FORMATS[form])
    size = (r.randint(1, 9), r.randint(1, 9))
    if mode == "I;16":
        image = Image.fromarray(np.full(size, value * 257, np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.full(size, value / 255, np.float32))
    else:
        image = Image.new("L", size, value).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def grey_values() -> Iterator[int]:
    return iter(range(0, 256, 9))


def folders(r: random.Random, plain: bool) -> tuple[str, Files]:
    values = grey_values()
    splits = r.choice((("train/", "test/"), ("train/", "val/", "test/"), ("",)))
    files = {}
    for split in splits:
        for c in range(r.randint(1, 3) if split else 5):
            for i in range(r.randint(1, 2)):
                files[f"{split}{split[:2]}c{c}/{i}.png"] = picture(r, next(values), plain)
    return "folder", files


def listed(r: random.Random, plain: bool) -> tuple[str, Files]:
    values, files = grey_values(), {}
    for split in ("train", "val", "test"):
        rows = ["filename,label"]
        for i in range(4):
            files[f"images/{split}{i}.jpg"] = picture(r, next(values), plain)
            rows.append(f"{split}{i}.jpg,n{split}{i // 2}")
        files[f"{split}.csv"] = "\n".join(rows).encode() + b"\n"
    return "mini-imagenet", files


def data_case(r: random.Random, folder: Path) -> str | None:
    harmless = r.random() < 0.4
    name, files = r.choice((folders, folders, listed))(r, not harmless or r.random() < 0.5)
    changed = meaningless(r, files) if harmless else damaged(r, files)
    form, root = r.choice(("folder", "zip", "flat zip")), folder / "data"
    places = {"folder": "set", "mini-imagenet": "mini-imagenet"}
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
    others = [n for n in changed if changed.get(n) != files.get(n)][:5]
    what = f"{name} as {form}, {'harmless' if harmless else 'damaged'}: {others}"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            sets = load(name, 8)
    except UserError as error:
        if harmless:
            return f"refused what means the same: {error} ({what})"
        return None if "\n" not in str(error) else f"more than a line: {error} ({what})"
    except Exception as error:
        return f"{type(error).__name__}: {error} ({what})"
    expected = sum(n.lower().endswith((".png", ".jpg", ".jfif")) and "MACOSX" not in n for n in changed)
    got = sum(map(len, sets.values()))
    if name.startswith("folder") and got != expected and (harmless or not said.getvalue()):
        return f"{got} of {expected} images, and said {said.getvalue()!r} ({what})"
    if harmless:
        read = torch.cat([255 * s.pixels().flatten(1).mean(1) for s in sets.values()]).sort().values
        if len(read) != expected or bool(((read - 9 * torch.arange(expected)).abs() > 4).any()):
            return f"read as {read.tolist()} ({what})"
    return None


# Runs


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # which goes when the program ends


@functools.cache
def trained() -> Path:
    """A finished run, which the children copy."""
    report._draw = lambda run, trainer, task: {}  # type: ignore[assignment]  # pictures take far longer than the rest
    folder = Path(_home().name) / "run"
    options = [*SMALL, "--loss", "margin-softmax", "--neighbours", "1", "--episodes", "5", "--threads", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert command(["train", "--output", str(folder), *options]) == 0
    return folder


def run_case(r: random.Random, folder: Path) -> str | None:
    run = Path(shutil.copytree(trained(), folder / "run"))
    name = r.choice(
        (
            "config.json",
            "config.json",
            "metrics.jsonl",
            "report.json",
            "judging.json",
            "usage.json",
            "checkpoint.pt",
            "checkpoint.pt",
        )
    )
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
    if any(word in errors.getvalue() for word in ("pydantic", "Traceback")):
        return f"speaks of its parts: {lines[0]} ({what})"
    return None
