"""Preparing data: the script as a user runs it, and the default corpus on first use, by several processes at once."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kimi_jax.config.data import RecordData, StdlibData
from kimi_jax.data import prepare as preparing
from kimi_jax.data import sources
from kimi_jax.data.pipeline import build_dataset
from kimi_jax.data.prepare import Plan, prepare, prepare_stdlib
from kimi_jax.data.records import RecordSource
from kimi_jax.data.sources import Document, InputFile, Piece
from kimi_jax.data.tokenizers import ByteTokenizer
from kimi_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def run_script(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)


def stored_texts(folder: Path) -> list[str]:
    """Recovers the documents of a folder of byte records, sorted."""
    source = RecordSource(folder)
    records = [source[i] for i in range(len(source))]
    stream = np.concatenate([r.tokens[: r.num_valid][0 if i == 0 else 1 :] for i, r in enumerate(records)])
    return sorted(bytes(part.astype(np.uint8)).decode() for part in np.split(stream, np.flatnonzero(stream == 256) + 1)
                  for part in [part[part != 256]] if len(part))  # fmt: skip


def test_script_prepares_what_training_reads(tmp_path, texts):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    args = ("--tokenizer", "bytes", "--seq-len", 32, "--text-field", "body", "--validation-percent", 25)
    done = run_script(tmp_path / "in.jsonl", *args, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("documents", "bytes per token", "vocab_size 258", "data: {kind: records, seq_len: 32"):
        assert shown in done.stdout

    train, validation = (stored_texts(tmp_path / "out" / split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(filter(None, texts))
    manifest = RecordSource(tmp_path / "out" / "train").manifest
    assert manifest.documents == len(train)
    assert manifest.bytes == sum(len(text.encode()) for text in train)
    assert manifest.tokens == manifest.bytes + len(train)
    assert (manifest.seed, manifest.validation_percent, manifest.split) == (0, 25, "train")
    cfg = RecordData(seq_len=32, train=str(tmp_path / "out" / "train"))
    assert next(build_dataset(cfg, batch_size=4).train_iterator())["inputs"].shape == (4, 32)

    again = run_script(tmp_path / "in.jsonl", *args, "--output", tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr == f"error: output {tmp_path / 'out'}: exists already; name a new folder, or remove it\n"


def test_script_fails_with_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"texts": "typo"}\n')
    out = tmp_path / "out"
    done = run_script(tmp_path / "bad.jsonl", "--tokenizer", "bytes", "--seq-len", 32, "--output", out)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'bad.jsonl'}, line 2: no field 'text'; the line has 'texts'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_terminated_script_leaves_nothing(tmp_path, start_process):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "large.txt").write_text("line of text\n" * 10_000_000)
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), str(tmp_path / "in"), "--tokenizer", "bytes"]
    command += ["--seq-len", "8", "--output", str(tmp_path / "out")]
    process = start_process(command, env={"PYTHONPATH": str(ROOT)})
    while not any(path.name.endswith(".partial") for path in tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait() == 143
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ------------------------------------------------------------------ prepare
def test_names_of_input_files_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("some text")
    found = sources.read_documents(sources.find_files([tmp_path / name]))
    prepare(found, ByteTokenizer(), Plan(8), tmp_path / "out", source=str(tmp_path / name))
    assert RecordSource(tmp_path / "out" / "train").manifest.source.endswith("caf?.txt")
    with pytest.raises(UserError, match=r"output .*: character \d+ is not UTF-8"):
        prepare([], ByteTokenizer(), Plan(8), tmp_path / "out" / name, source="")


def documents(*texts: str) -> list[Document]:
    return [Document(text, (Piece(text, len(text)),)) for text in texts]


@pytest.mark.parametrize(
    ("texts", "percent", "message"),
    [
        ((), 0, "here: the input holds no text"),
        (("", ""), 0, "here: the input holds no text"),
        (("only one",), 1, "validation_percent=1 of 1 documents leaves the validation split empty"),
        (("only one",), 99.9, "validation_percent=99.9 of 1 documents leaves the train split empty"),
    ],
)
def test_empty_input_and_empty_split(tmp_path, texts, percent, message):
    with pytest.raises(UserError, match=message):
        prepare(documents(*texts), ByteTokenizer(), Plan(8, percent), tmp_path / "out", source="here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "plan", [{"seq_len": 1}, {"validation_percent": 100}, {"validation_percent": -1}, {"seed": -1}]
)
def test_impossible_plans(plan):
    with pytest.raises(UserError, match=f"{next(iter(plan))}="):
        Plan(**({"seq_len": 8} | plan))


def test_preparing_twice_gives_the_same_records(prepare_texts, tmp_path, texts):
    def manifest(name, texts):
        return RecordSource(prepare_texts(tmp_path / name, texts, percent=0) / "train").manifest

    first = manifest("a", texts)
    assert first == manifest("b", texts)
    assert first.content_sha256 != manifest("c", [*texts[:-1], "another text"]).content_sha256


def test_text_is_read_as_it_is_written(tmp_path):
    """A corpus far larger than what may be held: no more than one document is open at a time."""
    alive = set()

    def pieces(i):
        alive.add(i)
        yield Piece(f"document {i}\n", 1)
        yield Piece("its second piece", 1)
        alive.discard(i)

    def stream():
        for i in range(50):
            assert alive == set()
            yield Document(f"{i}", pieces(i))

    advanced = []
    prepare(stream(), ByteTokenizer(), Plan(16), tmp_path / "out", source="stream", advance=advanced.append)
    want = sorted(f"document {i}\nits second piece" for i in range(50))
    assert stored_texts(tmp_path / "out" / "train") == want
    assert sum(advanced) == 100


# ------------------------------------------------------------------ the default corpus
@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    """A standard library of 40 files, and a cache folder of its own."""
    library = tmp_path / "library"
    library.mkdir()
    files = []
    for i in range(40):
        (library / f"m{i}.py").write_text(f"import m{i}\n" * 20)
        files.append(InputFile(library / f"m{i}.py", f"m{i}.py"))
    monkeypatch.setattr(sources, "stdlib_files", lambda: files)
    monkeypatch.setenv("KIMI_JAX_CACHE", str(tmp_path / "cache"))
    return library


def test_the_corpus_is_prepared_once_per_content(small_stdlib, tmp_path, monkeypatch):
    cfg = StdlibData(seq_len=32, validation_percent=20)
    folder = prepare_stdlib(cfg)
    assert folder.parent == tmp_path / "cache"
    data = build_dataset(cfg, batch_size=4)
    assert data.train.folder == folder / "train"
    assert data.train.manifest.documents + data.validation.manifest.documents == 40
    monkeypatch.setattr(preparing, "prepare", None)  # it would be called now
    assert (
        prepare_stdlib(cfg) == prepare_stdlib(StdlibData(seq_len=32, validation_percent=20, shuffle_seed=3)) == folder
    )
    monkeypatch.undo()


def test_another_length_split_or_library_is_another_corpus(small_stdlib):
    def folders():
        return {prepare_stdlib(StdlibData(seq_len=s, validation_percent=p)) for s, p in [(32, 20), (33, 20), (32, 40)]}

    before = folders()
    assert len(before) == 3
    assert folders() == before
    (small_stdlib / "m3.py").write_text("changed, so that the size differs")
    assert not folders() & before


def test_first_use_by_many_at_once(small_stdlib, tmp_path):
    cfg = StdlibData(seq_len=32, validation_percent=20)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: prepare_stdlib(cfg), range(16)))
    assert len(folders) == 1
    assert [path for path in (tmp_path / "cache").iterdir()] == list(folders)
    assert len(build_dataset(cfg, batch_size=4).train) > 4


def test_a_cache_that_cannot_be_written(small_stdlib, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KIMI_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*; set KIMI_JAX_CACHE to a writable folder"):
        prepare_stdlib(StdlibData(seq_len=32))


def test_two_processes_prepare_the_real_library_at_once(tmp_path, start_process):
    code = (
        "from kimi_jax.config.data import StdlibData; from kimi_jax.data import prepare, records;"
        "folder = prepare.prepare_stdlib(StdlibData(seq_len=2048));"
        "sources = [records.RecordSource(folder / split) for split in ('train', 'validation')];"
        "print(*(len({source[i].num_valid for i in range(len(source))}) for source in sources));"
        "print(*(source.manifest.bytes for source in sources))"
    )
    env = {"KIMI_JAX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    running = [start_process(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    distinct_lengths, (train_bytes, validation_bytes) = (map(int, line.split()) for line in outputs[0].splitlines())
    assert list(distinct_lengths) == [2, 2]  # all records can be read, and only the last is padded
    assert train_bytes > 5_000_000
    assert 0.02 < validation_bytes / train_bytes < 0.15
    assert len(list(tmp_path.iterdir())) == 1
