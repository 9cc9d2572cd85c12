"""The safetensors format: a writer and a reader that hold one tensor at a time; no header is trusted.

Files are read by position, not mapped: a file that shrinks while it is read ends in an error instead of a signal, its
pages do not count as memory of the process, and a tensor lands in a buffer of its own.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from kimi_jax.data.json_files import parse_object
from kimi_jax.errors import UserError

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
NUMPY_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
METADATA = {"format": "pt"}  # transformers refuses a file without it
LENGTH_BYTES = 8  # of the number before the header
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_RANK = 8
SHOWN = 8  # problems of one kind named before "and n more"


class TensorSpec(NamedTuple):
    """A tensor as the header describes it."""

    name: str
    dtype: str
    """As in the format: "F32", "BF16", ..."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    start: int
    """Of its data, in bytes from the start of the file."""
    spec: TensorSpec

    def read(self) -> np.ndarray:
        """Reads the tensor into memory of its own.

        Raises:
          UserError: the file is shorter than its header said, or cannot be read.
        """
        value = np.empty(self.spec.shape, NUMPY_DTYPES[self.spec.dtype])
        try:
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self.start)
                missing = memoryview(value.reshape(-1).view(np.uint8))
                while len(missing) and (count := stream.readinto(missing)):
                    missing = missing[count:]
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from None
        if len(missing):
            raise UserError(f"{self.file}: damaged: it ends within {self.spec.name}")
        return value


# ------------------------------------------------------------------ writing
def in_file_order[T](tensors: Iterable[T], spec_of) -> list[T]:
    """Sorts wide dtypes first, so that every tensor of a file starts at a multiple of its item size."""
    return sorted(tensors, key=lambda tensor: -ITEM_BYTES[spec_of(tensor).dtype])


def write_file(path: Path, specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray]) -> None:
    """Writes a file; the arrays are taken one by one.

    Args:
      path: the new file.
      specs: in file order.
      arrays: one per spec, of its shape and dtype, in any memory layout.
    """
    with open(path, "xb") as file:
        file.write(header_bytes(specs))
        for spec, array in zip(specs, arrays, strict=True):
            if array.shape != spec.shape or array.dtype != NUMPY_DTYPES[spec.dtype]:
                raise ValueError(f"write_file: {spec.name} is {array.dtype} {array.shape}, declared as {spec}")
            # A transposed view would otherwise be written in the order of its memory, not of its indices.
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def header_bytes(specs: Sequence[TensorSpec]) -> bytes:
    """The length of the header and the header itself; the data follow in the order of `specs`."""
    header, end = {"__metadata__": METADATA}, 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


# ------------------------------------------------------------------ reading
def read_header(path: Path) -> list[StoredTensor]:
    """Reads the header of a file and checks it against the length of the file; no tensor is read.

    Raises:
      UserError: no such file, or its header does not describe exactly the bytes that follow it.
    """
    try:
        with open(path, "rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            data_bytes = file_bytes - LENGTH_BYTES - length
            if data_bytes < 0 or length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes in a file of {file_bytes}")
            entries = parse_object(stream.read(length))
        entries.pop("__metadata__", None)
        tensors = [_parse_entry(path, name, entry, LENGTH_BYTES + length) for name, entry in entries.items()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())}") from None
    problems = list(_gaps(tensors, LENGTH_BYTES + length, file_bytes))
    if problems:
        raise UserError([f"{path}: damaged: {problem}" for problem in problems[:SHOWN]])
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, origin: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and dtype in ITEM_BYTES):
        raise ValueError(f"{_short(name)} has the dtype {_short(dtype)}; known: {', '.join(ITEM_BYTES)}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"{_short(name)} has the shape {_short(shape)} and the offsets {_short(offsets)}")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.num_bytes:
        rule = f"do not span {dtype} {_short(shape)}"
        raise ValueError(f"{_short(name)}: its offsets {_short(offsets)} {rule}")
    return StoredTensor(path, origin + offsets[0], spec)


def _gaps(tensors: Iterable[StoredTensor], origin: int, file_bytes: int) -> Iterator[str]:
    """Yields every place where tensors overlap, or where bytes belong to none."""
    end = origin
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.spec.num_bytes)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "follows bytes that belong to no tensor"
            yield f"{_short(tensor.spec.name)} starts at byte {_short(tensor.start - origin)} of the data and {what}"
        end = tensor.start + tensor.spec.num_bytes
    if end != file_bytes:
        yield f"its tensors end at byte {_short(end)}, the file at byte {file_bytes}"


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_RANK and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."
