"""Names and lists as people have them: read as they are meant, or one line that names file, line and reason."""

import codecs
import io
import os
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from fused_margins.fewshot import cli, plots
from fused_margins.fewshot.datasets import load
from fused_margins.fewshot.reports import Report, Section, Table
from fused_margins.fewshot.terminal import UserError

from .layouts import pack, png, values, write

ROWS = {"train": "a.png,n1\nb.png,n2\n", "val": "c.png,n3\n", "test": "d.png,n4\n"}


@pytest.fixture
def mini(root) -> Path:
    """mini-ImageNet with four images of four classes, in lists that a test rewrites."""
    for split, rows in ROWS.items():
        write(root / "mini-imagenet", {f"{split}.csv": f"filename,label\n{rows}".encode()})
    write(root / "mini-imagenet/images", {f"{name}.png": png(i) for i, name in enumerate("abcd")})
    return root / "mini-imagenet"


def train() -> tuple[tuple[str, ...], list[int]]:
    images = load("mini-imagenet", 4)["train"]
    return images.class_names, values(images)


HEAD = "filename,label\n"
MEANT = {
    "byte order mark": codecs.BOM_UTF8 + (HEAD + ROWS["train"]).encode(),
    "utf-16": (HEAD + ROWS["train"]).encode("utf-16"),
    "windows": (HEAD + ROWS["train"]).replace("\n", "\r\n").encode(),
    "old macs": (HEAD + ROWS["train"]).replace("\n", "\r").encode(),
    "blank lines": b"\n\n" + HEAD.encode() + b"\na.png,n1\n   \n\nb.png,n2\n\n",
    "spaces": b" filename , label \n a.png , n1 \n\tb.png,\tn2\n",
    "quotes": b'"filename","label"\n"a.png","n1"\n"b.png",n2\n',
    "spaces before quotes": b'"filename", "label"\n"a.png", "n1"\n"b.png", "n2"\n',
    "semicolons": b"filename;label\na.png;n1\nb.png;n2\n",
    "tabs": b"filename\tlabel\na.png\tn1\nb.png\tn2\n",
    "capitals": b"Filename,Label\na.png,n1\nb.png,n2\n",
    "more columns": b",label,filename,x\n0,n1,a.png,1\n1,n2,b.png\n",
    "empty fields behind the last column": b"filename,label\na.png,n1,,\nb.png,n2,\n",
    "no last newline": (HEAD + ROWS["train"]).strip().encode(),
    "suffix in capitals": b"filename,label\na.PNG,n1\nB.Png,n2\n",
    "dots and slashes": b"filename,label\n./a.png,n1\nx/..//b.png,n2\n",
}


@pytest.mark.parametrize("data", MEANT.values(), ids=MEANT)
def test_a_list_is_read_as_it_is_meant(mini, data):
    write(mini, {"train.csv": data})
    assert train() == (("n1", "n2"), [0, 1])


REFUSED = {
    "nul": ("a.png,n1\nb\0.png,n2\n", r"line 3: a NUL byte"),
    "long": ("a.png," + "n" * 200_000, r"line 2: expected at most 4096 characters, got 200006"),
    "open quote": ('a.png,"n1\nb.png,n2\n', r"line 2: unexpected end of data"),
    "outside": ("../../elsewhere.png,n1\n", r"line 2: ../../elsewhere.png leads out of .*/mini-imagenet/images"),
    "absolute": ("/etc/passwd,n1\n", r"line 2: /etc/passwd leads out of"),
    "missing": ("a.png,n1\nz.png,n2\n", r"line 3: there is no images/z.png in .*/mini-imagenet"),
    "a folder": (".,n1\n", r"line 2: there is no images/\."),
    "two classes": (
        "a.png,n1\n\na.png,n2\n",
        "line 4: the image images/a.png is of the class n2 here, but of the class n1 in line 2",
    ),
    "an unquoted comma": (
        "a.png,shark, great white\n",
        "line 2: expected 2 fields, got 3; a name with ',' needs quotes",
    ),
    "no label": ("a.png, \n", "line 2: expected a file name and a label"),
    "empty": ("", "no images in this list"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_list_that_cannot_be_meant_is_refused_by_file_and_line(mini, text, message):
    write(mini.parent, {"elsewhere.png": png(9)})
    write(mini, {"train.csv": (HEAD + text).encode()})
    with pytest.raises(UserError, match=rf"{mini}/train.csv: {message}"):
        train()


@pytest.mark.parametrize("text", [b"", b"\n \n", codecs.BOM_UTF8, b"file,label\na.png,n1\n"])
def test_a_list_without_columns(mini, text):
    got = r"\['file', 'label'\]" if b"label" in text else "None"
    write(mini, {"train.csv": text})
    with pytest.raises(UserError, match=rf"train.csv: expected the columns filename and label, got {got}"):
        train()


@pytest.mark.parametrize("column", ["filename", "label"])
def test_a_column_that_is_named_twice_is_refused(mini, column):
    write(mini, {"train.csv": f"filename,label,{column}\na.png,n1,b.png\n".encode()})
    with pytest.raises(UserError, match=rf"train.csv: line 1: expected one column {column}, got 2"):
        train()


@pytest.mark.parametrize(("split", "former"), [("val", "train"), ("test", "train"), ("test", "val")])
def test_a_class_or_an_image_in_two_splits_is_refused(mini, split, former):
    file, label = ROWS[former].splitlines()[0].split(",")
    write(mini, {f"{split}.csv": (HEAD + f"d.png,{label}\n").encode()})
    with pytest.raises(
        UserError,
        match=rf"{split}.csv: line 2: the class {label} is in {split} here, but in {former} in line 2 of {former}",
    ):
        train()
    write(mini, {f"{split}.csv": (HEAD + f"{file},n9\n").encode()})
    with pytest.raises(
        UserError, match=rf"{split}.csv: line 2: the image images/{file} is of the class n9 here, but of"
    ):
        train()


def test_rows_twice_count_once_and_are_said(mini, capsys):
    write(mini, {"train.csv": (HEAD + "a.png,n1\nb.png,n2\na.png,n1\nA.png,n1\n").encode()})
    assert train() == (("n1", "n2"), [0, 1])
    assert f"{mini}: 2 left out, listed twice: image images/a.png in line 4, ...\n" in capsys.readouterr().out


def test_images_that_no_list_names_are_said(mini, capsys):
    write(mini, {"images/x.png": png(1), "images/more/y.png": png(1), "images/.z.png": png(1)})
    assert train() == (("n1", "n2"), [0, 1])
    assert f"{mini}/images: 2 left out, in no list: images/more/y.png, ...\n" in capsys.readouterr().out


def test_lists_of_validation_may_be_called_valid(mini):
    (mini / "val.csv").rename(mini / "valid.csv")
    assert values(load("mini-imagenet", 4)["val"]) == [2]


def test_a_list_that_is_far_too_long_is_refused(mini):
    write(mini, {"train.csv": b"\n" * ((16 << 20) + 1)})
    with pytest.raises(UserError, match=r"train.csv: larger than 16 MiB, expected a list"):
        train()


def test_two_files_that_a_list_could_mean_are_named(mini):
    write(mini, {"images/A.png": png(7)})
    assert train() == (("n1", "n2"), [0, 1])
    write(mini, {"train.csv": (HEAD + "a.PNG,n1\n").encode()})
    with pytest.raises(
        UserError, match=r"line 2: there is no images/a.PNG in .*; images/A.png and images/a.png are like it"
    ):
        train()


# Names


def test_names_that_are_not_utf8(mini, capsys):
    os.rename(os.fsencode(mini / "images/a.png"), os.fsencode(mini / "images") + b"/caf\xe9.png")
    write(mini, {"train.csv": HEAD.encode() + b"caf\xe9.png,n\xe9\nb.png,n2\n"})
    assert train() == (("n2", r"n\xe9"), [1, 0])
    write(mini, {"train.csv": HEAD.encode() + b"th\xe9.png,n\xe9\nb.png,n2\n"})
    with pytest.raises(UserError, match=r"line 2: there is no images/th\\xe9.png"):
        train()


def test_accents_in_either_form_are_the_same(mini):
    composed = "é.png"
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    write(mini, {f"images/{decomposed}": png(5), "train.csv": (HEAD + f"{composed},n1\n").encode()})
    assert train() == (("n1",), [5])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_in_two_forms_is_one_and_in_capitals_another(tmp_path, split):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    forms = {"train": composed, "test": composed} | {split: decomposed}
    for number, (part, form) in enumerate(forms.items()):  # "cafz" stands between the two forms
        write(tmp_path, {f"{part}/{form}/1.png": png(number), f"{part}/cafz/1.png": png(9)})
    write(tmp_path, {f"train/{composed}/2.png": png(5), f"train/{decomposed}/3.png": png(6)})
    splits = load(f"folder:{tmp_path}", 4)
    assert {s.class_names for s in splits.values()} == {("cafz", composed)}
    assert (sorted(values(splits["train"])), values(splits["test"])) == ([0, 5, 6, 9], [9, 1])
    write(tmp_path, {"train/CAFE/1.png": png(6), "train/cafe/1.png": png(7)})
    assert {"CAFE", "cafe"} < set(load(f"folder:{tmp_path}", 4)["train"].class_names)


def test_a_label_in_two_forms_is_one(mini):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(mini, {"train.csv": (HEAD + f"a.png,{composed}\nb.png,{decomposed}\n").encode()})
    assert train() == ((composed,), [0, 1])


def test_backslashes_of_windows(mini):
    write(mini, {"images/n1/a.png": png(5), "train.csv": (HEAD + "n1\\a.png,n1\n").encode()})
    assert train() == (("n1",), [5])


ODD = {
    "not utf-8": os.fsdecode(b"caf\xe9"),
    "mathematics": "$x_{$",
    "a command": "\\frac$1$",
    "newline": "a\nb",
    "escape": "a\x1b[31mb",
    "underscore": "_a",
    "chinese": "狗",
    "markup": "[bold]<b>&|",
    "blank": " ",
    "long": "n" * 255,
}


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
@pytest.mark.filterwarnings("error")
def test_class_names_are_shown_wherever_names_are_shown(tmp_path, name, capsys):
    root = tmp_path / "data"
    for split in ("train", "test"):
        for number, class_name in enumerate((name, f"{split} {name}"[:255])):
            (root / split / class_name).mkdir(parents=True)
            (root / split / class_name / "1.png").write_bytes(png(number))
    images = load(f"folder:{root}", 4)["train"]
    shown = images.class_names
    assert len(shown) == 2
    assert "".join(shown).isprintable()
    labels, points = torch.tensor([0, 1]), torch.eye(2)
    figure = plots.embedding_maps(tmp_path / "e.png", {"t": (points.numpy(), labels, shown)})
    assert len(figure.axes[0].get_legend().get_texts()) == 2
    plots.neighbour_strips(tmp_path / "n.png", images.pixels(), labels, labels, labels[:, None], shown)
    table = Table(shown[0], ["name"], [[n] for n in shown])
    Report(shown[0], "", [Section(shown[0], tables=[table])]).write(tmp_path)
    # Both splits have the class `name`, and each has another.
    assert cli.main(["data", f"folder:{root}"]) == 2
    error = capsys.readouterr().err
    assert "share 1 of 2" in error
    assert error.count("\n") == 1


def test_a_path_that_is_not_utf8_is_read_and_shown(tmp_path, capsys):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    write(root, {"train/a/1.png": png(1), "test/b/1.png": png(2), "train/a/x.txt": b""})
    assert values(load(f"folder:{root}", 4)["train"]) == [1]
    assert r"caf\xe9/train: 1 left out" in capsys.readouterr().out
    (root / "train/a/1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"caf\\xe9/train/a/1.png: not an image"):
        load(f"folder:{root}", 4)


def test_a_terminal_that_cannot_show_a_name_gets_escapes(tmp_path, monkeypatch):
    root = tmp_path / os.fsdecode("狗".encode() + b"\xe9")
    write(root, {"train/a/1.png": png(1), "test/b/1.png": png(2)})
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["fused-margins", "data", f"folder:{root}"])
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    with pytest.raises(SystemExit) as end:
        cli.script()
    assert end.value.code == 0
    sys.stdout.flush()
    assert rb"\u72d7" in output.getvalue()


# The lists of other data sets


def test_ids_of_cub(root, capsys):
    files = {
        "classes.txt": codecs.BOM_UTF8 + b"1 001.A\r\n2  002.B\r\n\r\n3 003.C\r\n4 004.D \r\n",
        "images.txt": b"1 A/a.jpg\n2 B/b.jpg\n3 C/c.jpg\n4 D/d.JPG\n4 D/d.JPG\n5 A/a.jpg\n",
        "image_class_labels.txt": b"1 1\n2 2\n3 3\n4 4\n5 1\n",
    }
    write(root / "CUB_200_2011", files | {f"images/{n}/{n.lower()}.jpg": png(i) for i, n in enumerate("ABCDE")})
    assert {split: values(images) for split, images in load("cub", 4).items()} == {
        "train": [0, 2],
        "val": [1],
        "test": [3],
    }
    said = capsys.readouterr().out
    assert "CUB_200_2011/images: 1 left out, in no list: images/E/e.jpg\n" in said
    assert "images.txt: 1 left out, listed twice: identifier 4 in line 5\n" in said
    assert "images.txt: 1 left out, listed twice: file images/A/a.jpg in line 6\n" in said
    for file, data, message in (
        ("classes.txt", b"1 001.A\n1 002.B\n", "line 2: the identifier 1 is 002.B here, but 001.A in line 1"),
        ("classes.txt", b"1 001.A\n2 001.A\n", "line 2: the class 001.A is number 2 here, but number 1 in line 1"),
        ("classes.txt", b"\n", "no classes in this list"),
        ("image_class_labels.txt", b"1 1\n2 9\n", r"line 2: no class 9 of image 2 \(B/b.jpg\) in classes.txt"),
        ("images.txt", b"1\n", "line 1: expected a number and a name, got '1'"),
        (
            "images.txt",
            b"1 A/a.jpg\n2 A/a.jpg\n",
            "line 2: the file images/A/a.jpg is of the class 002.B here, but of the",
        ),
        ("image_class_labels.txt", b"1 1\n2 2\n3 3\n4 4\n5 1\n6 1\n", "line 6: there is no such image in images.txt"),
        ("images.txt", b"1 A/a.jpg\n9 B/b.jpg\n", r"line 2: image_class_labels.txt has no class for image 9 \(B/b.jpg"),
        ("images.txt", b"1 ../../x.jpg\n", "line 1: ../../x.jpg leads out of"),
    ):
        write(root / "CUB_200_2011", files | {file: data})
        with pytest.raises(UserError, match=rf"{file}: {message}"):
            load("cub", 4)
    write(root / "CUB_200_2011", files | {"classes.txt": files["classes.txt"] + b"\n5 005.E"})
    with pytest.raises(UserError, match=r"images.txt: no images of the class 005.E"):
        load("cub", 4)
    write(
        root / "CUB_200_2011", {"classes.txt": b"1 A\n", "images.txt": b"1 A/a.jpg\n", "image_class_labels.txt": b"1 1"}
    )
    with pytest.raises(UserError, match=r"classes.txt: too few classes to split, 1"):
        load("cub", 4)


def test_classes_of_cifar_fs(root, capsys):
    names = ("bee", "fox", "ray", "bed")
    write(root / "cifar100/data", {f"{name}/1.png": png(i) for i, name in enumerate(names)})
    lists = root / "cifar100/splits/bertinetto"
    write(lists, {"train.txt": codecs.BOM_UTF8 + b"bee \r\n\r\nbee\r\nbed", "val.txt": b" fox", "test.txt": b"ray"})
    splits = load("cifar-fs")
    assert {split: values(images) for split, images in splits.items()} == {"train": [3, 0], "val": [1], "test": [2]}
    assert splits["train"].coarse_names == ("household_furniture", "insects")
    assert "bertinetto: 1 left out, listed twice: class bee in line 3\n" in capsys.readouterr().out
    write(lists, {"test.txt": b"fox"})
    with pytest.raises(
        UserError, match=r"test.txt: line 1: the class fox is in test here, but in val in line 1 of .*val.txt"
    ):
        load("cifar-fs")
    for text, reason in ((b"\n", "no classes in this list"), (b"ray\nbus\n", "line 2: there is no folder data/bus")):
        write(lists, {"test.txt": text})
        with pytest.raises(UserError, match=rf"bertinetto/test.txt: {reason}"):
            load("cifar-fs")


def test_classes_of_omniglot(root, capsys):
    drawings = {f"{a}/character{c:02d}/0001_{d:02d}.PNG": png(d) for a in "AB" for c in (1, 2) for d in (1, 2)}
    pack(root / "images_background.zip", {f"images_background/nested/{n}": data for n, data in drawings.items()})
    write(root / "images_evaluation", {"C/character01/0001_01.png": png(1), "C/notes.txt": b""})
    lists = {
        "train": "A/character01/rot000\nA/character01/rot000\n",
        "val": "B/character01/rot000",
        "test": "C/character01/rot000",
    }
    for split, text in lists.items():
        write(root / "omniglot/vinyals", {f"{split}.txt": codecs.BOM_UTF8 + text.encode()})
    assert {split: len(images) for split, images in load("omniglot", 4).items()} == {"train": 2, "val": 2, "test": 1}
    said = capsys.readouterr().out
    assert "1 left out, listed twice: class A/character01/rot000 in line 2\n" in said
    assert "1 left out, no <alphabet>/characterNN/NNNN_NN.png: C/notes.txt\n" in said
    write(root / "omniglot/vinyals", {"val.txt": b"A/character01/rot000"})
    with pytest.raises(
        UserError, match=r"val.txt: line 1: the class A/character01/rot000 is in val here, but in train in"
    ):
        load("omniglot", 4)
    write(root / "images_evaluation", {"C/character01/0002_1.png": png(1)})
    with pytest.raises(UserError, match=r"C/character01/0002_1.png: .*0001_01.png is of the same character and drawer"):
        load("omniglot", 4)
    (root / "images_evaluation/C/character01/0002_1.png").unlink()
    write(root / "images_evaluation", {"A/character01/0001_01.png": png(1)})
    with pytest.raises(UserError, match=r"A/character01 is in images_background and in images_evaluation \(1 such"):
        load("omniglot", 4)
    write(root / "images_evaluation", {f"C/character{10**15}/0001_01.png": png(1)})
    with pytest.raises(UserError, match=r"images_evaluation/C: character02 has no images"):
        load("omniglot", 4)
