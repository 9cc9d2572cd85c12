"""The format on disk: checksummed records in ArrayRecord parts, described by a manifest."""

import bisect
import contextlib
import hashlib
import itertools
import json
import shutil
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from kimi_jax.config.base import Config
from kimi_jax.data.packing import Record
from kimi_jax.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "kimi_jax.records.v1"
PART_BYTES = 2**31  # before compression; large, since every part of a shuffled data set is a file held open
HEADER = np.dtype([("crc32", "<u4"), ("num_valid", "<u4")])


class Part(Config):
    """One ArrayRecord file."""

    name: str
    records: PositiveInt
    bytes: PositiveInt


class TokenizerEntry(Config):
    """Which tokenizer made the tokens."""

    kind: str
    files: tuple[str, ...]
    """Copies of its files beside the manifest; the first is the one to open."""
    fingerprint: str
    vocab_size: PositiveInt


class Manifest(Config):
    """What a folder of records holds."""

    format: Literal["kimi_jax.records.v1"] = FORMAT
    source: str
    """Where the text came from, in words."""
    split: str
    validation_percent: float
    seed: NonNegativeInt
    """Salt of the hash that splits documents into train and validation."""
    seq_len: PositiveInt
    tokenizer: TokenizerEntry
    documents: NonNegativeInt
    empty_documents: NonNegativeInt
    """Documents without a token, which are left out."""
    tokens: NonNegativeInt
    """Tokens of the documents, one end token each included."""
    bytes: NonNegativeInt
    """Bytes of UTF-8 text."""
    records: NonNegativeInt
    content_sha256: str
    """Hash of all records in order, before compression."""
    parts: tuple[Part, ...]


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a token on disk: little-endian, two bytes where they suffice."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode_record(record: Record, dtype: np.dtype) -> bytes:
    """Serialises a record: crc32 of what follows, number of valid tokens, tokens, one bit per document start."""
    body = b"".join(
        (
            np.array(record.num_valid, "<u4").tobytes(),
            record.tokens.astype(dtype).tobytes(),
            np.packbits(record.starts, bitorder="little").tobytes(),
        )
    )
    return np.array(zlib.crc32(body), "<u4").tobytes() + body


def decode_record(data: bytes, seq_len: int, dtype: np.dtype) -> Record:
    """Reverses `encode_record`.

    Raises:
      ValueError: the length or the checksum is wrong.
    """
    size = seq_len + 1
    want = HEADER.itemsize + size * dtype.itemsize + (size + 7) // 8
    if len(data) != want:
        raise ValueError(f"has {len(data)} bytes, not {want}")
    header = np.frombuffer(data, HEADER, count=1)[0]
    if zlib.crc32(memoryview(data)[4:]) != header["crc32"]:
        raise ValueError("fails its checksum")
    tokens = np.frombuffer(data, dtype, count=size, offset=HEADER.itemsize)
    bits = np.frombuffer(data, np.uint8, offset=HEADER.itemsize + tokens.nbytes)
    starts = np.unpackbits(bits, count=size, bitorder="little").view(bool)
    return Record(tokens.astype(np.int32), starts, int(header["num_valid"]))


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # as array_record reports it
        raise OSError(str(error).partition(";")[0]) from error


class RecordWriter:
    """Writes records into numbered parts of a folder, and counts them."""

    def __init__(self, folder: Path, dtype: np.dtype):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = dtype
        self._writer: ArrayRecordWriter | None = None
        self._names: list[str] = []
        self._counts: list[int] = []
        self._part_bytes = 0
        self._digest = hashlib.sha256()

    def write(self, record: Record) -> None:
        data = encode_record(record, self._dtype)
        if self._writer is None or self._part_bytes + len(data) > PART_BYTES:
            self._open_part()
        with _full_disk():
            self._writer.write(data)
        self._digest.update(data)
        self._part_bytes += len(data)
        self._counts[-1] += 1

    def _open_part(self) -> None:
        self.close()
        self._names.append(f"part-{len(self._names):05d}.array_record")
        self._counts.append(0)
        self._part_bytes = 0
        # Group size 1 makes each record readable on its own, as a global shuffle needs.
        self._writer = ArrayRecordWriter(str(self._folder / self._names[-1]), "group_size:1,zstd:3")

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with _full_disk():
                writer.close()

    def parts(self) -> tuple[Part, ...]:
        """Describes the parts, after `close`."""
        sizes = [(self._folder / name).stat().st_size for name in self._names]
        named = zip(self._names, self._counts, sizes, strict=True)
        return tuple(Part(name=name, records=count, bytes=size) for name, count, size in named)

    def content_sha256(self) -> str:
        return self._digest.hexdigest()


class RecordSource:
    """Random access to the records of a folder, each checked as it is read.

    Raises:
      UserError: on opening, the manifest is missing or damaged, or a part is missing or has the wrong size; on reading,
        a record is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._dtype = token_dtype(self.manifest.tokenizer.vocab_size)
        self._ends = list(itertools.accumulate(part.records for part in self.manifest.parts))
        _check_parts(folder, self.manifest)
        # The range in the name spares opening every part only to count its records.
        self._parts = [ArrayRecordDataSource(f"{folder / p.name}[0:{p.records}]") for p in self.manifest.parts]

    def __len__(self) -> int:
        return self.manifest.records

    def __getitem__(self, index: int) -> Record:
        part = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[part - 1] if part else 0)
        try:
            return decode_record(self._parts[part][position], self.manifest.seq_len, self._dtype)
        except (ValueError, IndexError, RuntimeError, OSError) as error:
            name = self.folder / self.manifest.parts[part].name
            reason = " ".join(str(error).split())
            raise UserError(f"{name}: record {position} is damaged ({reason}); prepare the data again") from error

    def __repr__(self) -> str:
        return f"RecordSource({self.content_sha256})"

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def content_sha256(self) -> str:
        return self.manifest.content_sha256


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a folder of records.

    Raises:
      UserError: there is none, or it is not one of this format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        hint = f"; did you mean {folder / inner[0]}?" if inner else "; scripts/prepare_data.py writes such folders"
        raise UserError(f"{folder}: no {MANIFEST} there{hint}")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: not a manifest of format {FORMAT} ({where}: {first['msg']})") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", errors="replace")  # the source may name any file


def _check_parts(folder: Path, manifest: Manifest) -> None:
    problems = []
    for part in manifest.parts:
        path = folder / part.name
        if not path.is_file():
            problems.append(f"{path}: missing, but {MANIFEST} lists it; prepare the data again")
        elif (size := path.stat().st_size) != part.bytes:
            problems.append(f"{path}: has {size} bytes, {MANIFEST} says {part.bytes}; prepare the data again")
    if manifest.records != sum(part.records for part in manifest.parts):
        problems.append(f"{folder / MANIFEST}: records={manifest.records} is not the sum over its parts")
    if problems:
        raise UserError(problems)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
      FileExistsError: `path` exists by then and is not empty.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if path.exists():
                raise FileExistsError(path) from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
