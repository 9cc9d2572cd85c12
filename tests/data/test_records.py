"""The format on disk: what is written is read back, and any damage is an error that names the file and the record."""

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.data import records
from kimi_jax.data.packing import Record
from kimi_jax.data.records import RecordSource, decode_record, encode_record, new_folder, token_dtype
from kimi_jax.errors import UserError


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.sampled_from([258, 2**16, 2**16 + 1, 163840]), st.data())
def test_a_record_survives_its_encoding(seq_len, vocab_size, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tokens = rng.integers(vocab_size, size=seq_len + 1, dtype=np.int32)
    tokens[0] = vocab_size - 1
    record = Record(tokens, rng.random(seq_len + 1) < 0.3, int(rng.integers(1, seq_len + 2)))
    encoded = encode_record(record, token_dtype(vocab_size))
    decoded = decode_record(encoded, seq_len, token_dtype(vocab_size))
    np.testing.assert_array_equal(decoded.tokens, tokens)
    np.testing.assert_array_equal(decoded.starts, record.starts)
    assert (decoded.tokens.dtype, decoded.starts.dtype, decoded.num_valid) == (np.int32, bool, record.num_valid)

    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    flipped = bytearray(encoded)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="checksum"):
        decode_record(bytes(flipped), seq_len, token_dtype(vocab_size))
    with pytest.raises(ValueError, match="bytes, not"):
        decode_record(encoded[:-1], seq_len, token_dtype(vocab_size))


def tokens_of(source: RecordSource) -> np.ndarray:
    return np.stack([source[i].tokens for i in range(len(source))])


def test_parts_are_cut_by_size_and_read_as_one(prepared, prepare_texts, tmp_path, texts, monkeypatch):
    monkeypatch.setattr(records, "PART_BYTES", 1000)
    prepare_texts(tmp_path / "parts", texts)
    one, many = RecordSource(prepared / "train"), RecordSource(tmp_path / "parts" / "train")
    assert len(one.manifest.parts) == 1
    assert len(many.manifest.parts) > 5
    assert one.manifest.content_sha256 == many.manifest.content_sha256
    np.testing.assert_array_equal(tokens_of(one), tokens_of(many))


# ------------------------------------------------------------------ damage
def test_a_flipped_byte_in_the_file_is_an_error_or_harmless(prepared):
    """Flips a byte at 60 places; no record may come back changed, and most places must be noticed."""
    folder = prepared / "train"
    whole = RecordSource(folder)
    want = [encode_record(whole[i], token_dtype(258)) for i in range(len(whole))]
    part = folder / whole.manifest.parts[0].name
    content = part.read_bytes()
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    noticed = 0
    for place in used[np.linspace(0, len(used) - 1, 60).astype(int)]:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        part.write_bytes(damaged)
        source, errors = RecordSource(folder), []
        for i in range(len(whole)):
            try:
                assert encode_record(source[i], token_dtype(258)) == want[i]
            except UserError as error:
                errors.append(str(error))
                assert re.fullmatch(rf".*part-00000\.array_record: record {i} is damaged \(.*\); prepare.*", errors[-1])
        noticed += bool(errors)
    assert noticed > 50


def test_truncated_part(prepared):
    part = prepared / "train" / "part-00000.array_record"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"part-00000\.array_record: has \d+ bytes, manifest\.json says \d+"):
        RecordSource(prepared / "train")


def test_missing_part_and_missing_manifest(prepared):
    (prepared / "train" / "part-00000.array_record").unlink()
    with pytest.raises(UserError, match=r"part-00000\.array_record: missing, but manifest\.json lists it"):
        RecordSource(prepared / "train")
    with pytest.raises(UserError, match=r"no manifest\.json there; did you mean .*prepared/train"):
        RecordSource(prepared)
    with pytest.raises(UserError, match=r"no manifest\.json there; scripts/prepare_data\.py"):
        RecordSource(prepared / "absent")


def test_a_part_of_the_right_size_that_is_not_the_file(prepared):
    part = prepared / "train" / "part-00000.array_record"
    part.write_bytes(bytes(part.stat().st_size))
    source = RecordSource(prepared / "train")
    with pytest.raises(UserError, match="record 3 is damaged"):
        source[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other.v1"}, "format: "),
        ({"records": 3}, "records=3 is not the sum over its parts"),
        ({"surplus": 3}, "surplus: "),
        ({"seq_len": -1}, "seq_len: "),
        (None, "file: "),
    ],
)
def test_damaged_manifest(prepared, change, message):
    path = prepared / "train" / "manifest.json"
    text = path.read_text()
    path.write_text(text[:-20] if change is None else json.dumps(json.loads(text) | change))
    with pytest.raises(UserError, match=message) as caught:
        RecordSource(prepared / "train")
    assert len(caught.value.problems) == 1


# ------------------------------------------------------------------ all or nothing
def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as folder:
        (folder / "file").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    with pytest.raises(FileExistsError), new_folder(tmp_path / "a") as folder:
        (folder / "other").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_records_can_be_moved(prepared, tmp_path):
    before = tokens_of(RecordSource(prepared / "train"))
    shutil.move(prepared / "train", tmp_path / "elsewhere [0:3]")
    np.testing.assert_array_equal(tokens_of(RecordSource(tmp_path / "elsewhere [0:3]")), before)


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    """array_record says so with a RuntimeError, when a record is written or when the file is closed."""

    class Full:
        def __init__(self, path, options):
            pass

        def write(self, data):
            raise RuntimeError("write() failed: No space left on device; writing a.array_record; at byte 614400")

        close = lambda self: self.write(b"")

    monkeypatch.setattr(records, "ArrayRecordWriter", Full)
    writer = records.RecordWriter(tmp_path, np.dtype("<u2"))
    with pytest.raises(OSError, match=r"^write\(\) failed: No space left on device$"):
        writer.write(Record(np.zeros(9, np.int32), np.zeros(9, bool), 9))
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    writer.close()
