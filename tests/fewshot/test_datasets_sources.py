"""Links, devices, archives that unpack to far more, and what systems leave behind: read once, or named; and said."""

import os
import re
import shutil
import stat
import zipfile
from itertools import chain
from pathlib import Path

import pytest

from fused_margins.fewshot.datasets import decoding, load, sources
from fused_margins.fewshot.datasets.folders import split_by_name
from fused_margins.fewshot.terminal import UserError

from .layouts import FORMS, lay, pack, png, values, write

TREE = {"train/a/1.png": png(1), "train/b/2.png": png(2), "test/c/3.png": png(3)}


@pytest.fixture
def tree(tmp_path) -> Path:
    write(tmp_path / "tree", TREE)
    return tmp_path / "tree"


def found(path: Path) -> dict[str, list[int]]:
    return {split: values(images) for split, images in load(f"folder:{path}", 4).items()}


# Links


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/", "../b"])
def test_a_link_to_what_is_read_already_or_lies_above_is_left_out_and_said(tree, target, capsys):
    (tree / "train/a/up").symlink_to(target)
    assert found(tree) == {"train": [1, 2], "test": [3]}
    assert (
        f"{tree}: 1 left out, links to folders that are read already or lie above: train/a/up/\n"
        in capsys.readouterr().out
    )


def test_a_folder_is_read_where_it_lies_and_not_where_a_link_says(tree):
    (tree / "train/0").symlink_to("b")
    assert load(f"folder:{tree}", 4)["train"].class_names == ("a", "b")


def test_links_that_lead_to_each_other_end(tree):
    for name in "xyz":
        (tree / "train/a" / name).symlink_to("../b")
        (tree / "train/b" / name).symlink_to("../a")
    assert found(tree) == {"train": [1, 2], "test": [3]}


def test_links_of_the_users_own_lead_out_of_the_root(tree, tmp_path):
    write(tmp_path / "elsewhere", {"4.png": png(4), "deeper/5.png": png(5)})
    (tree / "train/d").symlink_to(tmp_path / "elsewhere")
    (tree / "train/a/6.png").symlink_to(tmp_path / "elsewhere/4.png")
    assert found(tree) == {"train": [1, 4, 2, 4, 5], "test": [3]}


def test_splits_may_be_links_to_one_store(tmp_path):
    write(tmp_path / "store", {"a/1.png": png(1), "b/2.png": png(2), "c/3.png": png(3)})
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        (tmp_path / "tree" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / split / name).symlink_to(tmp_path / "store" / name)
    assert found(tmp_path / "tree") == {"train": [1, 2], "test": [3]}


def test_a_link_to_nothing_or_to_itself_is_named(tree):
    for target, reason in (("none", "No such file"), ("0.png", "Too many levels of symbolic links")):
        (tree / "train/a/0.png").symlink_to(target)
        with pytest.raises(UserError, match=rf"{tree}/train/a/0.png: {reason}"):
            found(tree)
        (tree / "train/a/0.png").unlink()


def test_a_folder_that_cannot_be_listed_is_named(tree, monkeypatch):
    scan = os.scandir

    def denied(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=rf"{tree}/train/b: cannot be listed \(Permission denied\)"):
        found(tree)


# What is no regular file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # bind takes names of at most 108 bytes


SPECIAL = {
    "named pipe": fifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": bound_socket,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_read(tree, kind, root):
    SPECIAL[kind](tree / "train/a/0.png")
    with pytest.raises(UserError, match=rf"{tree}/train/a/0.png: expected a file, got a {kind}"):
        found(tree)
    SPECIAL[kind](tree / "x.zip")
    with pytest.raises(UserError, match=rf"{tree}/x.zip: expected a file, got a {kind}"):
        found(tree / "x.zip")
    write(root / "mini-imagenet", {"images/a.jpg": png(1)})
    SPECIAL[kind](root / "mini-imagenet/train.csv")
    with pytest.raises(UserError, match=r"no mini-imagenet/train\.csv"):
        load("mini-imagenet")


# Archives


@pytest.fixture
def small_files(monkeypatch) -> None:
    monkeypatch.setattr(sources, "FILE_BYTES", 1 << 20)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tree, tmp_path, small_files, monkeypatch):
    monkeypatch.setattr(sources, "bounded", lambda *_: pytest.fail("read"))
    large = bytes((1 << 20) + 1)
    write(tree, {"train/a/0.png": large})
    archive = pack(tmp_path / "x.zip", TREE | {"train/a/0.png": large}, zipfile.ZIP_DEFLATED)
    for path, name in ((tree, f"{tree}/train/a/0.png"), (archive, f"{archive}: train/a/0.png")):
        with pytest.raises(UserError, match=f"{name}: larger than 1 MiB"):
            found(path)


def test_a_file_that_is_larger_than_it_says_is_refused_while_it_is_read(tree, small_files, monkeypatch):
    write(tree, {"train/a/0.png": bytes(9 << 20)})
    monkeypatch.setattr(sources.Folder, "stamp", lambda self, name: name)
    taken = []
    check = sources._check_size
    monkeypatch.setattr(sources, "_check_size", lambda size, where: taken.append(size) or check(size, where))
    with pytest.raises(UserError, match=r"train/a/0.png: larger than 1 MiB"):
        found(tree)
    assert max(taken) <= (1 << 20) + sources._CHUNK_BYTES


def test_an_archive_that_understates_its_sizes_is_named(tmp_path):
    archive = pack(tmp_path / "x.zip", TREE | {"train/a/0.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    archive.write_bytes(archive.read_bytes().replace((1 << 20).to_bytes(4, "little"), (99).to_bytes(4, "little")))
    with pytest.raises(UserError, match=rf"{archive}: train/a/0.png: cannot be read \(Bad CRC-32"):
        found(archive)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_are_unpacked_without_a_bound_are_refused(tmp_path, method):
    archive = pack(tmp_path / "x.zip", TREE, method)
    with pytest.raises(UserError, match=rf"{archive}: train/a/1.png: neither stored nor deflated"):
        found(archive)


def test_names_that_lead_out_of_an_archive_are_left_out_and_said(tmp_path, capsys):
    write(tmp_path, {"4.png": png(4)})
    outside = {"../4.png": b"", "train/a/../../../4.png": b"", "/train/a/4.png": png(4)}
    pack(tmp_path / "x.zip", TREE | outside)
    assert found(tmp_path / "x.zip") == {"train": [1, 2], "test": [3]}
    assert "x.zip: 3 left out, names that lead out of the archive: ../4.png, ...\n" in capsys.readouterr().out


def test_names_that_come_twice_in_an_archive_are_said_and_the_last_counts(tmp_path, capsys):
    archive = pack(tmp_path / "x.zip", TREE, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(archive, "a") as opened, pytest.warns(UserWarning, match="Duplicate name"):
        opened.writestr("train/a/1.png", png(9))
    assert found(archive) == {"train": [9, 2], "test": [3]}
    assert "x.zip: 1 left out, names that come again later in the archive: train/a/1.png\n" in capsys.readouterr().out


def test_archives_of_windows_and_macos_have_the_names_that_are_meant(tmp_path):
    files = {name.replace("train/a", "train/äå"): data for name, data in TREE.items()}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        for name, data in files.items():
            info = zipfile.ZipInfo(name.replace("/", "\\"))
            info.create_system = 0
            opened.writestr(info, data)
    said = (0x800).to_bytes(2, "little")  # UTF-8, as Python says and macOS does not
    unsaid = tmp_path / "y.zip"
    unsaid.write_bytes((tmp_path / "x.zip").read_bytes().replace(said, bytes(2)))
    for archive in (tmp_path / "x.zip", unsaid):
        assert load(f"folder:{archive}", 4)["train"].class_names == ("b", "äå")


def test_a_backslash_of_linux_is_part_of_the_name(tmp_path):
    pack(tmp_path / "x.zip", {name.replace("train/a", "train/\\frac"): data for name, data in TREE.items()})
    assert load(f"folder:{tmp_path / 'x.zip'}", 4)["train"].class_names == ("\\frac", "b")


def outcome(path: Path) -> str:
    try:
        return f"{sum(map(len, found(path).values()))} images"
    except UserError as error:
        return str(error)


def test_an_archive_of_which_a_byte_changed_is_read_or_named(tmp_path):
    archive = pack(tmp_path / "x.zip", TREE, zipfile.ZIP_DEFLATED)
    whole = archive.read_bytes()
    for place in range(0, len(whole), 2):
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert outcome(archive) in ("2 images", "3 images") or str(archive) in outcome(archive)


# Folders as people have them


NESTED = ["", "birds/", "birds/birds/", "my birds/final/"]


@FORMS
@pytest.mark.parametrize("nested", NESTED)
def test_splits_and_classes_may_lie_in_folders_of_whatever_name(tmp_path, form, nested):
    plain = {f"{name}/{name}.png": png(i) for i, name in enumerate("abcd")}
    for files, expected in ((TREE, {"train": [1, 2], "test": [3]}), (plain, {"train": [0, 1], "test": [2, 3]})):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        lay(tmp_path, form, "x", {nested + name: data for name, data in files.items()} | {"__MACOSX/x": b""})
        result = found(tmp_path / ("x" if form == "folder" else "x.zip"))
        assert {split: len(images) for split, images in result.items()} == {s: len(v) for s, v in expected.items()}
        assert sorted(chain(*result.values())) == sorted(chain(*expected.values()))


@FORMS
def test_what_is_named_may_lie_one_folder_deeper(root, form):
    lists = dict.fromkeys(("train", "val", "test"))
    files = {f"{s}.csv": f"filename,label\n{s}.jpg,{s}\n".encode() for s in lists}
    lay(root, form, "mini-imagenet", {f"mini/{name}": data for name, data in files.items()} | {"images/x.txt": b""})
    shutil.rmtree(root)
    images = {f"images/{s}.jpg": png(i) for i, s in enumerate(lists)}
    lay(root, form, "mini-imagenet", {f"nested/{name}": data for name, data in (files | images).items()})
    assert {split: values(images) for split, images in load("mini-imagenet", 4).items()} == {
        "train": [0],
        "val": [1],
        "test": [2],
    }


def test_archives_may_lie_in_a_folder_of_the_root(root):
    pack(
        root / "downloads/mini-imagenet.ZIP", {f"{s}/{s}/1.png": png(i) for i, s in enumerate(("train", "val", "test"))}
    )
    assert [len(images) for images in load("mini-imagenet", 4).values()] == [1, 1, 1]


def test_an_archive_within_an_archive_is_named(tmp_path):
    pack(tmp_path / "x.zip", {"inner.zip": b""})
    with pytest.raises(UserError, match=r"x.zip: expected the folders train .*, got none; .*, inner.zip: unpack it"):
        found(tmp_path / "x.zip")


@pytest.mark.parametrize(
    "names", [("Train", "Valid", "TEST"), ("training", "validation", "testing"), ("train", "val", "test")]
)
def test_splits_have_the_names_that_people_give_them(tmp_path, names):
    write(tmp_path, {f"{name}/{i}/x.png": png(i) for i, name in enumerate(names)})
    assert found(tmp_path) == {"train": [0], "val": [1], "test": [2]}


def test_a_split_that_is_there_twice_is_named(tmp_path):
    write(tmp_path, TREE | {"val/d/1.png": png(1), "valid/d/1.png": png(1)})
    with pytest.raises(UserError, match=rf"{tmp_path}/valid: .*/val is the val split, too"):
        found(tmp_path)


@FORMS
def test_what_is_left_out_is_counted_and_said(tmp_path, form, capsys):
    others = {
        ".DS_Store": b"",
        "train/a/.thumbnails/1.png": png(9),
        "__MACOSX/train/a/._1.png": b"",
        "test/c/Thumbs.db": b"",
        "train/a/notes.txt": b"",
        "train/b/3.psd": b"",
        "train/4.png": png(4),
        "README.md": b"",
        "more/d/5.png": png(5),
    }
    lay(tmp_path, form, "x", TREE | others)
    assert found(tmp_path / ("x" if form == "folder" else "x.zip")) == {"train": [1, 2], "test": [3]}
    said = capsys.readouterr().out
    # Of a folder the splits are looked into, and none that are hidden; of an archive all is known.
    assert said.count(" 1 left out, hidden or of the system: ") == (2 if form == "folder" else 0)
    assert said.count(" 4 left out, hidden or of the system: ") == (0 if form == "folder" else 1)
    assert re.search(r": 3 left out, no images by their names, or in no class: (x/)?train/4.png, \.\.\.\n", said)
    assert "2 left out, neither train, val nor test: README.md, ...\n" in said


def test_images_have_every_usual_suffix(tmp_path):
    write(tmp_path, TREE | {f"train/a/{n}": png(i) for i, n in enumerate(("2.jfif", "3.JPEG", "4.jpe", "5.Tiff"))})
    assert found(tmp_path)["train"] == [1, 0, 1, 2, 3, 2]


# Folders of classes alone


@FORMS
def test_a_folder_of_class_folders_is_split_by_name_and_says_so(tmp_path, form, capsys):
    names = [f"class {i}" for i in range(20)]
    lay(tmp_path, form, "x", {f"{name}/deeper/1.png": png(i) for i, name in enumerate(names)})
    splits = load(f"folder:{tmp_path / ('x' if form == 'folder' else 'x.zip')}", 4)
    assert {split: list(images.class_names) for split, images in splits.items()} == split_by_name(names)
    assert [names.index(name) for s in splits.values() for name in s.class_names] == [
        v for s in splits.values() for v in values(s)
    ]
    said = capsys.readouterr().out
    assert "no folders train and test, so the 20 classes are split by name, seed 0:\n" in said
    for split, images in splits.items():
        assert f"  {split}, {len(images.class_names)} of " in said
        assert f": {', '.join(images.class_names)}\n" in said


def test_the_split_is_of_names_and_seed():
    names = [f"class {i}" for i in range(100)]
    split = split_by_name(names)
    assert {name: len(classes) for name, classes in split.items()} == {"train": 64, "val": 16, "test": 20}
    assert sorted(chain(*split.values())) == sorted(names)
    assert split_by_name(names[::-1]) == split
    assert split_by_name(names, seed=1) != split
    assert split["test"][:3] == ["class 1", "class 10", "class 19"]  # the same on every machine, for good
    larger = split_by_name([*names, "class 100"])
    assert sum(len(set(split[s]) - set(larger[s])) for s in split) <= 3
    assert {s: len(c) for s, c in split_by_name(names[:4]).items()} == {"train": 2, "test": 2}


@pytest.mark.parametrize(("names", "got"), [("", "none"), ("a", "none"), ("abc", r"3 \(a, b, c\)")])
def test_too_few_classes_to_split(tmp_path, names, got):
    write(tmp_path, {f"{name}/1.png": png(1) for name in names} | {"x.txt": b""})
    with pytest.raises(UserError, match=rf"{tmp_path}.*: .*at least 4 folders of classes, got {got}"):
        found(tmp_path)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    write(tmp_path, {f"{name}/1.png": png(i) for i, name in enumerate(("boat", "bus", "plane", "train"))})
    assert sum(map(len, found(tmp_path).values())) == 4


# Paths


def test_a_home_that_nobody_has_is_named():
    with pytest.raises(UserError, match="~nobody-of-this-name/x: "):
        load("folder:~nobody-of-this-name/x")


def test_names_as_long_as_they_can_be(tmp_path):
    folder = tmp_path / ("n" * 255)
    write(folder, TREE)
    assert found(folder) == {"train": [1, 2], "test": [3]}
    assert len(list(decoding.cache_folder().iterdir())) == 2
