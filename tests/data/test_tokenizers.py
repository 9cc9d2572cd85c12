"""Tokenizers: round trips, the bytes each token stands for, special tokens as text and as tokens, damaged files."""

import base64
import hashlib
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.data import kimi_tokenizer
from kimi_jax.data.kimi_tokenizer import KimiTokenizer
from kimi_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from kimi_jax.errors import UserError

regex = pytest.importorskip("regex")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")

MIXED = "The cat's 12345 日本語のテキスト and 你好, world!\r\n\n  한국어 Ωmega É́t DON'T \t१२३ 😀\x00\x7f end  "


def byte_level_file(folder, *, eos="<|endoftext|>", **settings):
    """Trains and saves a small byte-level BPE; `settings` go into its JSON."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=[eos], initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator([MIXED, "the cat and the hat " * 5], trainer)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(engine.to_str()) | settings), encoding="utf-8")
    return path


def metaspace_file(folder):
    """A sentencepiece-like BPE with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁ab", "é"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b")]
    model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    engine.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(prepend_scheme="never")]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    path = folder / "tokenizer.json"
    engine.save(str(path))
    return path


@pytest.fixture(scope="module", params=["bytes", "kimi", "byte_level", "metaspace"])
def tokenizer(request, rank_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    builders = {
        "bytes": lambda: "bytes",
        "kimi": lambda: rank_file,
        "byte_level": lambda: byte_level_file(folder),
        "metaspace": lambda: metaspace_file(folder),
    }
    return load_tokenizer(str(builders[request.param]()))


def test_round_trip_and_byte_counts(tokenizer):
    # Metaspace tokenizers write a space as U+2581, so they cannot tell the two apart.
    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=80))
    def check(text):
        ids = tokenizer.encode_document(text)
        assert ids.dtype == np.int32
        assert ids[-1] == tokenizer.eos_id
        assert ids.min() >= 0
        assert ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())

    check()
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED


def test_special_tokens_have_no_bytes(tokenizer):
    counts = tokenizer.token_bytes()
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts[tokenizer.eos_id] == counts[tokenizer.pad_id] == 0


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size, tokenizer.vocab_size + 1):
        with pytest.raises(UserError, match=f"token id {bad} is outside"):
            tokenizer.decode([0, bad])


def test_bytes_layout():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (258, 256, 257)
    assert tokenizer.encode_document("aé").tolist() == [97, 195, 169, 256]
    assert tokenizer.encode("x<eos>y<pad><eos>", specials=True).tolist() == [120, 256, 121, 257, 256]
    assert tokenizer.decode_bytes(tokenizer.encode("<eos>")) == b"<eos>"


def test_fingerprints_are_fixed(rank_file, tmp_path):
    # A change of this value means that data prepared before cannot be read any more.
    assert ByteTokenizer().fingerprint() == "11d546dfc9d09c522da7dee90b8aef468707ac79620d355b8848d3be34aafa29"
    other = tmp_path / "renamed.model"
    other.write_bytes(rank_file.read_bytes())
    assert KimiTokenizer(other).fingerprint() == KimiTokenizer(rank_file).fingerprint()
    other.write_bytes(rank_file.read_bytes() + base64.b64encode(b"zzz") + b" %d\n" % _num_ranks(rank_file))
    assert KimiTokenizer(other).fingerprint() != KimiTokenizer(rank_file).fingerprint()


def _num_ranks(rank_file):
    return len(rank_file.read_text().splitlines())


# ------------------------------------------------------------------ Kimi
def test_kimi_pattern_is_the_published_one():
    # SHA-256 of pat_str in tokenization_kimi.py, as recorded in public inventories of tokenizers.
    digest = hashlib.sha256(kimi_tokenizer.PATTERN.encode()).hexdigest()
    assert digest == "de5781783b193d5ccf5b1b28edfa70fa816ce78d54603fdc422cfd8d4ea4411f"


def test_kimi_engine_splits_as_an_independent_regex_engine(tmp_path):
    """The engine handles class intersections: a vocabulary of the expected pieces gives exactly those pieces."""
    pattern = regex.compile(kimi_tokenizer.PATTERN, regex.V1)
    pieces = [match.group() for match in pattern.finditer(MIXED)]
    assert "".join(pieces) == MIXED
    assert {"日本語", "のテキスト", "你好", "'s"} & set(pieces) == {"日本語", "のテキスト", "你好"}
    tokens = {bytes([i]): None for i in range(256)}
    for piece in pieces:
        data = piece.encode()
        tokens |= {data[:n]: None for n in range(2, len(data) + 1)}
    path = tmp_path / "tiktoken.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    tokenizer = KimiTokenizer(path)
    assert [tokenizer.table[i].decode() for i in tokenizer.encode(MIXED)] == pieces


def test_kimi_special_ids_follow_the_ranks(rank_file):
    tokenizer = KimiTokenizer(rank_file)
    first = _num_ranks(rank_file)
    # The released file has 163,584 ranks: [BOS] 163584, [EOS] 163585, <|im_end|> 163586, ..., [PAD] 163839.
    assert tokenizer.vocab_size == first + 256
    assert [tokenizer.specials[name] - first for name in ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>")] == [
        0,
        1,
        2,
        3,
    ]
    assert [tokenizer.specials[name] - first for name in ("<|im_system|>", "<|im_middle|>", "[UNK]")] == [10, 17, 254]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (first + 1, first + 255)
    assert tokenizer.specials[f"<|reserved_token_{first + 5}|>"] == first + 5
    assert len(tokenizer.specials) == 256


def test_kimi_specials_as_text_and_as_tokens(rank_file):
    tokenizer = KimiTokenizer(rank_file)
    text = "<|im_user|>the<|im_end|>"
    as_text = tokenizer.encode(text)
    assert as_text.max() < _num_ranks(rank_file)
    assert tokenizer.decode(as_text) == text
    as_tokens = tokenizer.encode(text, specials=True)
    assert [as_tokens[0], as_tokens[-1]] == [tokenizer.specials["<|im_user|>"], tokenizer.specials["<|im_end|>"]]
    assert tokenizer.decode(as_tokens) == "the"


def test_kimi_refuses_the_two_ids_without_a_row(rank_file):
    tokenizer = KimiTokenizer(rank_file)
    for index in (tokenizer.vocab_size, tokenizer.vocab_size + 1):
        name = f"<|reserved_token_{index}|>"
        with pytest.raises(UserError, match=r"has no row in the embedding"):
            tokenizer.encode(f"a{name}b", specials=True)
        assert tokenizer.decode(tokenizer.encode(name)) == name


def test_kimi_cuts_long_runs_where_the_released_tokenizer_does(monkeypatch):
    def reference(text, window, run):
        """Cuts character by character: a new part where a run of space, or of anything else, exceeds `run`."""
        for start in range(0, len(text), window):
            part, length, space = "", 0, None
            for character in text[start : start + window]:
                length = length + 1 if character.isspace() == space else 1
                space = character.isspace()
                if length > run:
                    yield part
                    part, length = "", 1
                part += character
            yield part

    rng = np.random.default_rng(0)
    text = "".join(c * int(n) for c, n in zip("a b\t" * 3, rng.integers(30_000, 60_000, 12), strict=True))
    assert list(kimi_tokenizer._cut(text)) == list(reference(text, 400_000, 25_000))
    monkeypatch.setattr(kimi_tokenizer, "MAX_CHARS", 40)
    monkeypatch.setattr(kimi_tokenizer, "MAX_RUN", 5)
    monkeypatch.setattr(kimi_tokenizer, "_LONG_RUN", kimi_tokenizer.re.compile(r"\s{6,}|\S{6,}"))
    for _ in range(200):
        text = "".join(c * int(n) for c, n in zip("a b\t" * 3, rng.integers(0, 20, 12), strict=True))
        assert list(kimi_tokenizer._cut(text)) == list(reference(text, 40, 5))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:3], "no rank", *lines[4:]], "line 4: not a base64 token"),
        (lambda lines: [*lines[:3], "@@@@ 3", *lines[4:]], "line 4: not a base64 token"),
        (lambda lines: [*lines[:3], *lines[4:]], "line 4: rank 4, but ranks"),
        (lambda lines: lines[:200], "no token for the single byte 0xc8"),
        (lambda lines: [], "no token for the single byte 0x00"),
    ],
)
def test_damaged_rank_file(rank_file, tmp_path, damage, message):
    path = tmp_path / "tiktoken.model"
    path.write_text("".join(f"{line}\n" for line in damage(rank_file.read_text().splitlines())))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(path))
    assert len(caught.value.problems) == 1


# ------------------------------------------------------------------ Hugging Face
def test_hf_specials_as_text_and_as_tokens(tmp_path):
    tokenizer = load_tokenizer(str(byte_level_file(tmp_path)))
    text = "the<|endoftext|>cat"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.encode(text, specials=True) == tokenizer.eos_id).sum() == 1


def test_hf_truncation_and_padding_are_off(tmp_path):
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load_tokenizer(str(byte_level_file(tmp_path, truncation=truncation)))
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED


def test_hf_end_token_comes_from_the_config_beside_it(tmp_path):
    path = byte_level_file(tmp_path, eos="<stop>")
    with pytest.raises(UserError, match=r"no end token; put a tokenizer_config\.json"):
        load_tokenizer(str(path))
    path.with_name("tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.eos_id == tokenizer.pad_id == 0
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


def test_hf_without_definite_bytes_is_refused(tmp_path):
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"needs ByteLevel or Metaspace.*it has Whitespace"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]"])
def test_damaged_tokenizer_json(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON: nested too deeply"),
        ("[]", "is not JSON: it is a list at top level, must be an object"),
        ('{"eos_token": ["</s>"]}', r"eos_token: got \['</s>'\], must be the name of a token"),
        ('{"pad_token": {"content": 3}}', "pad_token: got 3, must be the name of a token"),
        ('{"eos_token": "<other>"}', r"no end token.*\(the vocabulary has none of <other>\)"),
    ],
)
def test_damaged_settings_of_a_tokenizer(tmp_path, content, message):
    path = byte_level_file(tmp_path)
    path.with_name("tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(path))


# ------------------------------------------------------------------ other files
@pytest.mark.parametrize("kind", ["kimi", "hf"])
def test_what_lies_beside_the_tokenizer_goes_with_it(kind, rank_file, tmp_path):
    if kind == "kimi":
        path = tmp_path / "tiktoken.model"
        path.write_bytes(rank_file.read_bytes())
    else:
        path = byte_level_file(tmp_path)
    before = load_tokenizer(str(path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "weights.bin").write_text("no part of it")
    after = load_tokenizer(str(path))
    assert [file.name for file in after.files] == [path.name, "tokenizer_config.json", "chat_template.jinja"]
    assert after.fingerprint() == before.fingerprint()


def test_special_tokens_by_name(tokenizer):
    assert tokenizer.eos_id in tokenizer.specials.values()
    for name, index in tokenizer.specials.items():
        assert tokenizer.encode(name, specials=True).tolist() == [index]
        assert tokenizer.decode(tokenizer.encode(name)) == name


# ------------------------------------------------------------------ by name
def test_missing_file_and_missing_extra(tmp_path, rank_file, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "absent.json"))
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"needs the package tiktoken: pip install 'kimi_jax\[hf\]'"):
        load_tokenizer(str(rank_file))
