"""Where documents come from: text files, JSONL, Parquet, and the running Python's standard library."""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kimi_jax.data.tokenizers import import_extra
from kimi_jax.errors import UserError

PIECE_BYTES = 2**20  # a longer text file is read, and tokenised, in pieces that end at a line end
JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")

PACKAGED_APART = frozenset(("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip"))
NOT_STDLIB = frozenset(("site-packages", "dist-packages", "lib-dynload", "__pycache__"))
TABLES = frozenset(("encodings", "pydoc_data"))  # data in the form of programs


class Piece(NamedTuple):
    """A piece of a document's text, and how many bytes of the input file it stands for (for progress)."""

    text: str
    input_bytes: int


@dataclass(frozen=True)
class Document:
    """One document, read as it is consumed.

    Attributes:
      split_key: decides, hashed, between train and validation.
      pieces: its text, in order.
    """

    split_key: str
    pieces: Iterable[Piece]


@dataclass(frozen=True)
class InputFile:
    """A file and its name relative to the input that the user gave, with '/' between folders."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def kind(self) -> str:
        """Its last suffix, in lower case."""
        return self.path.suffix.lower()


def find_files(inputs: Sequence[str | Path]) -> list[InputFile]:
    """Lists input files in a fixed order: inputs as given, files below a folder by name, without hidden ones.

    Raises:
      UserError: an input is empty, does not exist, holds no file, or is compressed.
    """
    files = []
    if "" in inputs:
        raise UserError("input '': is empty, must name a file or a folder")
    for given in map(Path, inputs):
        if given.is_file():
            found = [InputFile(given, given.name)]
        elif given.is_dir():
            found = _files_below(given)
        else:
            raise UserError(f"input {given}: no such file or folder")
        if not found:
            raise UserError(f"input {given}: the folder holds no file")
        files += found
    for file in files:
        if file.kind in COMPRESSED:
            raise UserError(f"{file.path}: compressed input ({file.kind}) is not read; decompress it first")
    return files


def _files_below(folder: Path) -> list[InputFile]:
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = sorted(path.as_posix() for path in relative if not any(part.startswith(".") for part in path.parts))
    return [InputFile(folder / name, name) for name in names]


def stdlib_files() -> list[InputFile]:
    """Lists the source files of the running Python's standard library, sorted by name.

    Left out is what distributions package apart, what is not part of the library, and tables.

    Raises:
      UserError: this Python comes without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    excluded = PACKAGED_APART | NOT_STDLIB | TABLES
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [n for n in names if excluded.isdisjoint(n.split("/")) and not n.startswith("_sysconfigdata")]
    if not kept:
        raise UserError(f"data.kind=stdlib: {root} holds no Python source files; prepare a corpus of your own instead")
    return [InputFile(root / name, name) for name in kept]


def read_documents(files: Iterable[InputFile], *, text_field: str = "text") -> Iterator[Document]:
    """Reads documents: one per text file, one per line of JSONL, one per row of Parquet.

    A text file is split by its name, a line or row by its text, so that the split depends neither on order nor on what
    else is there, and equal lines never stand on both sides.

    Args:
      files: from `find_files` or `stdlib_files`.
      text_field: JSONL field or Parquet column that holds the text.

    Raises:
      UserError: damaged input; names the file and the line or row.
    """
    for file in files:
        if file.kind in JSONL:
            yield from _read_jsonl(file, text_field)
        elif file.kind in PARQUET:
            yield from _read_parquet(file, text_field)
        else:
            yield Document(file.name, _read_text(file.path))


def _decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        what = f"invalid UTF-8 (byte 0x{data[error.start]:02x}, {error.reason})"
        raise UserError(f"{path}, line {line}: {what}; convert the file to UTF-8 or leave it out") from error


def _read_text(path: Path) -> Iterator[Piece]:
    line, rest = 1, b""
    with path.open("rb") as stream:
        while block := stream.read(PIECE_BYTES):
            end = block.rfind(b"\n") + 1
            if end == 0:
                rest += block
                continue
            piece, rest = rest + block[:end], block[end:]
            yield Piece(_decode(piece, path, line), len(piece))
            line += piece.count(b"\n")
    if rest:
        yield Piece(_decode(rest, path, line), len(rest))


def _read_jsonl(file: InputFile, field: str) -> Iterator[Document]:
    with file.path.open("rb") as stream:
        for number, data in enumerate(stream, start=1):
            if data.isspace():
                continue
            text = _text_of_line(_decode(data, file.path, number), field, f"{file.path}, line {number}")
            yield Document(text, (Piece(text, len(data)),))


def _text_of_line(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise UserError(f"{where}: JSON that Python does not read ({_first_line(error)})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with a field {field!r}")
    if field not in row:
        raise UserError(f"{where}: no field {field!r}; the line has {', '.join(map(repr, row)) or 'none'}")
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} holds a lone surrogate \\u{ord(text[error.start]):04x}") from error
    return text


def _read_parquet(file: InputFile, column: str) -> Iterator[Document]:
    arrow = import_extra("pyarrow", "Parquet input")
    parquet = import_extra("pyarrow.parquet", "Parquet input")
    try:
        table = parquet.ParquetFile(file.path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file.path}: not a whole Parquet file ({_first_line(error)})") from error
    with table:
        schema = table.schema_arrow
        if column not in schema.names:
            raise UserError(f"{file.path}: no column {column!r}; the file has {', '.join(map(repr, schema.names))}")
        kind = schema.field(column).type
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
            raise UserError(f"{file.path}: column {column!r} is {kind}, not string")
        row_bytes = file.size // max(table.metadata.num_rows, 1)
        for row, text in enumerate(_parquet_rows(table, column, file.path), start=1):
            if text is None:
                raise UserError(f"{file.path}, row {row}: column {column!r} is null")
            yield Document(text, (Piece(text, row_bytes),))


def _parquet_rows(table, column: str, path: Path) -> Iterator[str | None]:
    batches = table.iter_batches(batch_size=1024, columns=[column])
    row = 0
    while True:
        try:
            batch = next(batches, None)
            texts = [] if batch is None else batch.column(0).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these; so is UnicodeDecodeError
            raise UserError(f"{path}: damaged after row {row} ({_first_line(error)})") from error
        if batch is None:
            return
        yield from texts
        row += len(texts)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def in_validation(split_key: str, *, percent: float, seed: int) -> bool:
    """Decides by hash whether a document is held out.

    Args:
      split_key: see `Document`.
      percent: share of documents held out, in expectation, in [0, 100].
      seed: another seed holds out other documents.
    """
    key = f"{seed}:{split_key}".encode(errors="surrogateescape")  # names of files need not be UTF-8
    digest = hashlib.sha256(key).digest()
    return int.from_bytes(digest[:8], "big") < percent / 100 * 2**64
