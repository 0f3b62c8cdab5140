"""Downloads from a server on this machine: whole, interrupted, resumed, wrong, and none at all."""

import contextlib
import hashlib
import http.server
import re
import socket
import threading
import zipfile
from dataclasses import replace

import pytest

from fused_margins.fewshot.cli import main
from fused_margins.fewshot.datasets import download as module
from fused_margins.fewshot.datasets import omniglot
from fused_margins.fewshot.datasets.download import Download, fetch
from fused_margins.fewshot.datasets.omniglot import DOWNLOADS
from fused_margins.fewshot.terminal import UserError

CONTENT = bytes(range(256)) * 40 + b"end"  # no whole number of chunks


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; hangs up after `cut` bytes of an answer, and answers to Range only if `ranges`."""

    cut: int | None = None
    ranges = True
    promises_length = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        if self.path != "/file":
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        if self.server.promises_length:
            self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(CONTENT[start:][: self.server.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def file(server, monkeypatch) -> Download:
    monkeypatch.setenv("no_proxy", "*")
    url = f"http://127.0.0.1:{server.server_address[1]}/file"
    return Download(url, "below/file.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def begun(folder, content: bytes, name: str = "file.bin.part") -> None:
    """What is in the place of the file, or of its part, before it is asked for."""
    (folder / "below").mkdir()
    (folder / "below" / name).write_bytes(content)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("below/*"))


def test_what_is_no_file_in_its_place_is_named(file, tmp_path):
    (tmp_path / file.place).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{tmp_path}/below/file.bin: expected a file, got a folder"):
        fetch(file, tmp_path)


def test_whole(server, file, tmp_path, capsys):
    path = fetch(file, tmp_path)
    assert path == tmp_path / "below/file.bin"
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin"]
    assert f"{file.url} -> {path}" in capsys.readouterr().out
    fetch(file, tmp_path)
    assert server.asked == [None]


@pytest.mark.parametrize("promises_length", [True, False])
def test_interrupted_then_resumed(server, file, tmp_path, promises_length):
    server.cut, server.promises_length = 3000, promises_length
    message = f"of {len(CONTENT)} bytes have come: run the same command again to go on"
    with pytest.raises(UserError, match=rf"{file.url}: .*; 3000 {message}"):
        fetch(file, tmp_path)
    assert names(tmp_path) == ["file.bin.part"]
    with pytest.raises(UserError, match=rf"{file.url}: .*; 6000 {message}"):
        fetch(file, tmp_path)
    server.cut = None
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=3000-", "bytes=6000-"]
    assert names(tmp_path) == ["file.bin"]


def test_ctrl_c_keeps_what_has_come(server, file, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def impatient(*_, **__):
        left = iter(range(3))

        def advance():
            if next(left, None) is None:
                raise KeyboardInterrupt

        yield advance

    with monkeypatch.context() as patch:
        patch.setattr(module, "progress", impatient)
        with pytest.raises(KeyboardInterrupt):
            fetch(file, tmp_path)
    kept = (tmp_path / "below/file.bin.part").read_bytes()
    assert kept == CONTENT[: 4 * 1024]
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=4096-"]


def test_the_bar_counts_what_was_there_before(server, file, tmp_path, monkeypatch):
    seen = []
    original = module.progress

    def watched(name, total, unit, completed):
        seen.append((name, total, unit, completed))
        return original(name, total, unit, completed)

    monkeypatch.setattr(module, "progress", watched)
    begun(tmp_path, CONTENT[:5000])
    fetch(file, tmp_path)
    assert seen == [("file.bin", 11, "KiB", 4)]


def test_a_server_that_cannot_resume_starts_anew(server, file, tmp_path):
    begun(tmp_path, b"x" * 100)
    server.ranges = False
    assert fetch(file, tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_no_server(server, file, tmp_path):
    begun(tmp_path, CONTENT)
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert server.asked == []


def test_a_part_that_is_too_long_is_dropped(server, file, tmp_path):
    begun(tmp_path, CONTENT + b"more")
    assert fetch(file, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None]


def test_a_wrong_checksum_keeps_nothing(file, tmp_path):
    with pytest.raises(
        UserError, match=rf"{file.url}: expected a file with SHA-256 0{{64}}, got {file.sha256}; it is not"
    ):
        fetch(replace(file, sha256="0" * 64), tmp_path)
    assert names(tmp_path) == []


def test_a_part_of_another_file_is_found_out(file, tmp_path):
    begun(tmp_path, b"x" * 100)
    with pytest.raises(UserError, match="expected a file with SHA-256"):
        fetch(file, tmp_path)
    assert fetch(file, tmp_path).read_bytes() == CONTENT


def test_a_file_of_the_user_stays(server, file, tmp_path, capsys):
    begun(tmp_path, b"packed anew", "file.bin")
    assert fetch(file, tmp_path).read_bytes() == b"packed anew"
    assert (
        "there already, though it is not the official file (packed anew?); it is left alone" in capsys.readouterr().out
    )
    assert server.asked == []


def test_an_archive_of_the_user_that_is_cut_short_is_no_archive(server, file, tmp_path):
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a", "a" * 100)
    (tmp_path / "file.zip").write_bytes(whole.read_bytes()[:60])
    file = replace(file, place="file.zip")
    with pytest.raises(UserError, match=rf"{tmp_path}/file.zip: no whole zip archive; remove it"):
        fetch(file, tmp_path)
    (tmp_path / "file.zip").write_bytes(whole.read_bytes())
    assert fetch(file, tmp_path).read_bytes() == whole.read_bytes()
    assert server.asked == []


def test_without_a_connection_all_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: it refuses
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        downloads = [Download(f"{url}/{name}", f"below/{name}", 1, "0" * 64) for name in ("a.zip", "b.txt", "c.txt")]
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("FUSED_MARGINS_DATA", str(tmp_path))
        monkeypatch.setattr(omniglot, "missing", lambda root: downloads)
        assert main(["data", "omniglot"]) == 2
    error = capsys.readouterr().err
    assert f"{url}/a.zip: " in error
    by_hand = "refused; without the internet, fetch it elsewhere and put it at"
    others = [f"likewise {url}/{name} at {tmp_path}/below/{name}" for name in ("b.txt", "c.txt")]
    assert f"{by_hand} {tmp_path}/below/a.zip; {'; '.join(others)}" in error
    assert list(tmp_path.iterdir()) == []  # not a folder either


def test_what_the_server_does_not_have(file, tmp_path):
    with pytest.raises(
        UserError, match=rf"the server answers 404 Not Found; without the internet.* {tmp_path}/below/file.bin"
    ):
        fetch(replace(file, url=f"{file.url}s"), tmp_path)


def test_a_folder_that_cannot_be_made(file, tmp_path):
    (tmp_path / "below").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/below: cannot be made \(File exists\)"):
        fetch(file, tmp_path)


def test_omniglot_names_official_files():
    assert {d.place for d in DOWNLOADS} == {
        *("images_background.zip", "images_evaluation.zip", "all_runs.zip"),
        *(f"omniglot/vinyals/{split}.txt" for split in ("train", "val", "test")),
    }
    for download in DOWNLOADS:
        assert download.url.startswith("https://raw.githubusercontent.com/")
        assert download.url.endswith(download.place.rpartition("/")[2])
        assert re.fullmatch("[0-9a-f]{64}", download.sha256)
