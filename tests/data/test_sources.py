"""Reading text, JSONL and Parquet: what is a document, where a mistake is, and on which side of the split it falls."""

import json
from pathlib import Path

import pytest

from kimi_jax.data import sources
from kimi_jax.data.sources import find_files, in_validation, read_documents, stdlib_files
from kimi_jax.errors import UserError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def read(*inputs: Path, **options) -> list[str]:
    return ["".join(piece.text for piece in d.pieces) for d in read_documents(find_files(inputs), **options)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, **columns) -> Path:
    parquet.write_table(arrow.table(columns), path, row_group_size=2)
    return path


def test_all_formats_give_the_same_documents(tmp_path, texts):
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    assert read(folder) == texts
    assert read(write_jsonl(tmp_path / "a.jsonl", texts)) == texts
    assert read(write_jsonl(tmp_path / "b.jsonl", texts, "body"), text_field="body") == texts
    assert read(write_parquet(tmp_path / "a.parquet", text=texts, other=[0] * len(texts))) == texts
    large = arrow.array(texts, arrow.large_string())
    assert read(write_parquet(tmp_path / "b.parquet", body=large), text_field="body") == texts


def test_files_below_a_folder_are_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("b/z.txt", "a/y.txt", "c.txt", ".hidden", ".git/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert read(tmp_path) == ["a/y.txt", "b/z.txt", "c.txt"]
    assert read(tmp_path / "c.txt", tmp_path / "a") == ["c.txt", "a/y.txt"]


@pytest.mark.parametrize("text", ["", "x" * 100, "zeile\n" * 50, "ä\n日本\r\n" * 30 + "ende ohne Umbruch", "\n" * 40])
def test_long_files_are_read_in_pieces_that_end_lines(tmp_path, monkeypatch, text):
    monkeypatch.setattr(sources, "PIECE_BYTES", 16)
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode())
    (document,) = read_documents(find_files([path]))
    pieces = list(document.pieces)
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.input_bytes for piece in pieces) == len(text.encode())
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\nthr\xffee", r"a\.txt, line 3: invalid UTF-8 \(byte 0xff"),
        ("a.txt", b"one\ntwo \xe6\x97", r"a\.txt, line 2: invalid UTF-8 \(byte 0xe6"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: invalid UTF-8"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1: a JSON list, not an object"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', r"a\.jsonl, line 1: no field 'text'; the line has 'body', 'id'"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl, line 1: field 'text' is NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: field 'text' holds a lone surrogate \\ud800"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl, line 1: JSON that Python does not read"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl, line 1: JSON that Python does not read"),
        ("a.parquet", b"PAR1 nothing", r"a\.parquet: not a whole Parquet file"),
        ("a.txt.gz", b"\x1f\x8b", r"compressed input \(\.gz\)"),
        ("A.TXT.GZ", b"\x1f\x8b", r"compressed input \(\.gz\)"),
        ("A.JSONL", b'{"text": null}\n', r"A\.JSONL, line 1: field 'text' is NoneType"),
        ("A.Parquet", b"PAR1 nothing", r"A\.Parquet: not a whole Parquet file"),
    ],
)
def test_damaged_input_names_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_invalid_utf8_is_found_in_later_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 16)
    (tmp_path / "a.txt").write_bytes(b"eleven chars\n" * 20 + b"\xff\n")
    with pytest.raises(UserError, match="line 21: invalid UTF-8"):
        read(tmp_path)


def test_damaged_parquet(tmp_path, texts):
    with pytest.raises(UserError, match=r"no column 'text'; the file has 'body'"):
        read(write_parquet(tmp_path / "a.parquet", body=["x"]))
    with pytest.raises(UserError, match=r"column 'text' is int64, not string"):
        read(write_parquet(tmp_path / "b.parquet", text=[1]))
    with pytest.raises(UserError, match=r"row 3: column 'text' is null"):
        read(write_parquet(tmp_path / "c.parquet", text=["a", "b", None]))
    whole = write_parquet(tmp_path / "d.parquet", text=texts).read_bytes()
    cut = tmp_path / "e.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"e\.parquet: not a whole Parquet file"):
        read(cut)
    cut.write_bytes(whole[:4] + b"\xff" * 400 + whole[404:])
    with pytest.raises(UserError, match=r"e\.parquet: damaged after row 0"):
        read(cut)


def test_missing_and_empty_inputs(tmp_path):
    with pytest.raises(UserError, match="absent: no such file or folder"):
        find_files([tmp_path / "absent"])
    with pytest.raises(UserError, match=r"^input '': is empty, must name a file or a folder$"):
        find_files([tmp_path, ""])
    with pytest.raises(UserError, match="the folder holds no file"):
        find_files([tmp_path])


# ------------------------------------------------------------------ the split
def test_the_split_depends_on_nothing_but_key_and_seed(texts, tmp_path):
    documents = [*read_documents(find_files([write_jsonl(tmp_path / "a.jsonl", texts)]))]
    turned = [*read_documents(find_files([write_jsonl(tmp_path / "b.jsonl", [*texts[::-1], "new"])]))]

    def held_out(documents, seed=0):
        return {d.split_key for d in documents if in_validation(d.split_key, percent=30, seed=seed)}

    assert held_out(documents) == held_out(turned) - {"new"}
    assert held_out(documents, seed=1) != held_out(documents)


def test_the_split_has_its_share_and_grows_with_it():
    keys = [f"key {i}" for i in range(4000)]
    held_out = {p: {k for k in keys if in_validation(k, percent=p, seed=0)} for p in (0, 1, 10, 100)}
    assert held_out[0] == set()
    assert held_out[1] < held_out[10] < held_out[100] == set(keys)
    assert 0.08 < len(held_out[10]) / len(keys) < 0.12  # 4 standard deviations


def test_the_split_is_the_same_on_every_machine():
    # `printf 7:a | sha256sum` and so on: held out if the first hexadecimal digit is below 8.
    held_out = "".join(key for key in "abcdefgh" if in_validation(key, percent=50, seed=7))
    assert held_out == "ce"


def test_the_standard_library_is_real_and_large_enough():
    files = stdlib_files()
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} < set(names)
    assert not any(part in sources.PACKAGED_APART | sources.NOT_STDLIB for n in names for part in n.split("/"))
    assert sum(file.size for file in files) > 5_000_000
