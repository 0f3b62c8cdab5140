"""A run's folder: config.json, metrics.jsonl, checkpoint.pt, and the report. Files appear whole or not at all."""

import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from .config import Judging, TrainConfig, explain_validation
from .terminal import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block succeeds, and is removed if it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # as the user has it; safetensors writes files that nobody else may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """JSON knows no NaN: a figure that does not exist (the spread of one class, say) becomes null."""
    write_text(path, json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n")


def plain(settings: BaseModel) -> dict[str, Any]:
    """Settings as JSON has them."""
    return settings.model_dump(mode="json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checksum(content: bytes) -> bytes:
    return b"sha256:" + hashlib.sha256(content).hexdigest().encode()


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_path = folder / "config.json"
        self.metrics_path = folder / "metrics.jsonl"
        self.checkpoint_path = folder / "checkpoint.pt"
        self.judging_path = folder / "judging.json"
        self.preset_path = folder / "preset.json"
        self.usage_path = folder / "usage.json"
        self.result_path = folder / "report.json"

    @classmethod
    def create(cls, folder: Path, config: TrainConfig, preset: str | None = None) -> "Run":
        """A new run, and the preset that its settings began with; refuses a folder that holds one already."""
        run = cls(folder)
        if run.config_path.exists():
            raise UserError(f"output: {folder} holds a run already: choose another folder, or give --resume")
        write_json(run.preset_path, {"preset": preset})
        run.save_config(config)
        return run

    @contextmanager
    def locked(self) -> Iterator["Run"]:
        """This run, for one process at a time; the lock ends with the process, however it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"output: another process is at work in {self.folder}") from None
        try:
            yield self
        finally:
            lock.release()

    def save_config(self, config: TrainConfig) -> None:
        write_text(self.config_path, config.model_dump_json(indent=2) + "\n")

    def config(self) -> TrainConfig:
        """The stored configuration."""
        try:
            return TrainConfig.model_validate_json(self.config_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.folder}: no run here (there is no config.json)") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.config_path}: not text ({error.reason} at byte {error.start})") from None
        except ValidationError as error:
            raise UserError(f"{self.config_path}: {explain_validation(error)}") from None

    def save_judging(self, judging: Judging) -> None:
        write_json(self.judging_path, plain(judging))

    def judging(self) -> Judging:
        """How the run is to be judged; the defaults where that was not stored."""
        try:
            return Judging.model_validate(read_json(self.judging_path))
        except ValidationError as error:
            raise UserError(f"{self.judging_path}: {explain_validation(error)}") from None

    def preset(self) -> str | None:
        """The preset that the run's settings began with; None where there was none, or none was stored."""
        return read_json(self.preset_path).get("preset")

    def usage(self) -> dict[str, float]:
        """Seconds of training and the peak memory in MiB, over all resumptions; empty before the first."""
        usage = read_json(self.usage_path)
        if not all(isinstance(value, int | float) for value in usage.values()):
            raise UserError(f"{self.usage_path}: expected numbers, got {usage}")
        return usage

    def save_usage(self, usage: dict[str, float]) -> None:
        write_json(self.usage_path, usage)

    def result(self) -> dict[str, Any]:
        """Settings, figures and usage of a run that was judged; empty for one that was not."""
        return read_json(self.result_path)

    def save_result(self, result: dict[str, Any]) -> None:
        write_json(self.result_path, result)

    def append_metrics(self, row: dict[str, Any]) -> None:
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def epochs_logged(self) -> int:
        """Whole lines of the log, while somebody else may be writing to it."""
        try:
            return self.metrics_path.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_path.exists():
            return []
        rows = []
        for number, line in enumerate(self.metrics_path.read_bytes().splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.metrics_path}: line {number} is not JSON ({error})") from None
        return rows

    def write_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """The log anew, as the checkpoint that a resumed run continues from has it: whatever came after it is gone."""
        write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """A zip archive as torch writes it, its comment the checksum of all that is before."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()[:-2]  # without the length of the comment, which torch leaves empty
        comment = _checksum(content)
        with replacing(self.checkpoint_path) as temporary:
            temporary.write_bytes(content + len(comment).to_bytes(2, "little") + comment)

    def load_checkpoint(self, restore: Callable[[dict[str, Any]], None]) -> None:
        """Verify the checkpoint's checksum and hand its state to `restore`; failures name the file and the reason."""
        path = self.checkpoint_path
        if not path.exists():
            raise UserError(f"{self.folder}: no checkpoint.pt to continue from")
        try:
            data = path.read_bytes()
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                comment = archive.comment
                # Without a comment an earlier version wrote it: the archive's own checksums cover the tensors alone.
                damaged = None if comment else archive.testzip()
            if damaged is not None:
                raise ValueError(f"checksum of {damaged} does not match")
            if comment and comment != _checksum(data[: -2 - len(comment)]):
                raise ValueError("its checksum does not match")
            restore(torch.load(io.BytesIO(data), weights_only=True))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except ValidationError as error:
            raise UserError(f"{path}: not a usable checkpoint: {explain_validation(error)}") from None
        except Exception as error:  # damage shows itself in many ways, all of which mean the same to the user
            # torch's first line names the module that did not take its state.
            reason = re.sub(r"^Error\(s\) in loading state_dict for \w+:", "", str(error))
            reason = " ".join(reason.split())[:200] or "it is none"
            raise UserError(f"{path}: not a usable checkpoint: {reason}") from error
