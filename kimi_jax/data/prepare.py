"""How a corpus becomes folders of records: tokenised, split and packed in one pass, one piece of text at a time."""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kimi_jax.config.data import StdlibData
from kimi_jax.data import records, sources
from kimi_jax.data.packing import Packer
from kimi_jax.data.records import Manifest, RecordWriter, TokenizerEntry
from kimi_jax.data.sources import Document
from kimi_jax.data.tokenizers import ByteTokenizer, Tokenizer, check_text
from kimi_jax.errors import UserError

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Plan:
    """What decides the records, besides the text.

    Attributes:
      seq_len: tokens per example; a record holds one more.
      validation_percent: share of the documents held out, in [0, 100); 0 writes no validation folder.
      seed: salt of the hash that splits documents, >= 0.
    """

    seq_len: int
    validation_percent: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.seq_len < 2:
            raise UserError(f"seq_len={self.seq_len} must be at least 2")
        if not 0 <= self.validation_percent < 100:
            raise UserError(f"validation_percent={self.validation_percent} must be in [0, 100)")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")


class _SplitWriter:
    """Packs and writes the documents of one split."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, plan: Plan):
        self._folder = folder
        self._tokenizer = tokenizer
        self._packer = Packer(plan.seq_len, tokenizer.pad_id)
        self._writer = RecordWriter(folder, records.token_dtype(tokenizer.vocab_size))
        self._counts = {"documents": 0, "empty_documents": 0, "tokens": 0, "bytes": 0}

    def add(self, document: Document, advance: Callable[[int], None]) -> None:
        tokens = 0
        for text, input_bytes in document.pieces:
            ids = self._tokenizer.encode(text)
            self._append(ids, starts_document=tokens == 0)
            tokens += len(ids)
            self._counts["bytes"] += len(text.encode())
            advance(input_bytes)
        if tokens:
            self._append(self._tokenizer.encode_document(""), starts_document=False)
        self._counts["documents" if tokens else "empty_documents"] += 1

    def _append(self, ids, *, starts_document: bool) -> None:
        for record in self._packer.add(ids, starts_document=starts_document):
            self._writer.write(record)
        self._counts["tokens"] += len(ids)

    def finish(self, **facts) -> Manifest:
        """Writes what is left and the manifest."""
        for record in self._packer.finish():
            self._writer.write(record)
        self._writer.close()
        tokenizer = self._tokenizer
        for file in tokenizer.files:
            shutil.copyfile(file, self._folder / file.name)
        entry = TokenizerEntry(
            kind=tokenizer.kind,
            files=tuple(file.name for file in tokenizer.files),
            fingerprint=tokenizer.fingerprint(),
            vocab_size=tokenizer.vocab_size,
        )
        parts = self._writer.parts()
        manifest = Manifest(
            tokenizer=entry,
            parts=parts,
            records=sum(part.records for part in parts),
            content_sha256=self._writer.content_sha256(),
            **self._counts,
            **facts,
        )
        records.write_manifest(self._folder, manifest)
        return manifest

    def close(self) -> None:
        self._writer.close()


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    plan: Plan,
    output: Path,
    *,
    source: str,
    advance: Callable[[int], None] = lambda input_bytes: None,
) -> dict[str, Manifest]:
    """Writes `output/train` and, if anything is to be held out, `output/validation`.

    All or nothing: `output` appears when everything is written. Memory does not grow with the corpus.

    Args:
      documents: read once.
      tokenizer: makes the tokens; its files are copied beside the manifests.
      plan: see `Plan`.
      output: the new folder.
      source: where the text came from, for the manifest.
      advance: called after each piece of text with its bytes of input.

    Returns:
      The manifests by split name.

    Raises:
      UserError: damaged input, no text at all, a split without a document, or a name for `output` that is not UTF-8.
      FileExistsError: `output` exists and is not empty, now or when all is written.
    """
    check_text(str(output), f"output {output}")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(output)
    splits = (TRAIN, VALIDATION) if plan.validation_percent else (TRAIN,)
    with records.new_folder(output) as folder:
        writers = {split: _SplitWriter(folder / split, tokenizer, plan) for split in splits}
        try:
            for document in documents:
                held_out = sources.in_validation(document.split_key, percent=plan.validation_percent, seed=plan.seed)
                writers[VALIDATION if held_out else TRAIN].add(document, advance)
            facts = {
                "source": source,
                "validation_percent": plan.validation_percent,
                "seed": plan.seed,
                "seq_len": plan.seq_len,
            }
            manifests = {split: writers[split].finish(split=split, **facts) for split in splits}
        finally:
            for writer in writers.values():
                writer.close()
        _refuse_empty(manifests, plan, source)
    return manifests


def _refuse_empty(manifests: dict[str, Manifest], plan: Plan, source: str) -> None:
    documents = sum(manifest.documents for manifest in manifests.values())
    if documents == 0:
        raise UserError(f"{source}: the input holds no text")
    for split, manifest in manifests.items():
        if manifest.documents == 0:
            raise UserError(
                f"{source}: validation_percent={plan.validation_percent:g} of {documents} documents leaves the {split} "
                "split empty; give more documents, or another percentage or seed"
            )


def cache_folder() -> Path:
    """The folder of prepared default corpora: `KIMI_JAX_CACHE`, default ~/.cache/kimi_jax."""
    return Path(os.environ.get("KIMI_JAX_CACHE") or Path.home() / ".cache" / "kimi_jax")


def prepare_stdlib(cfg: StdlibData) -> Path:
    """Prepares the standard library corpus, or finds it prepared.

    Two processes may do so at once: both write folders of their own, and the first to finish gives its the final name.

    Returns:
      The folder that holds `train` and `validation`.
    """
    files = sources.stdlib_files()
    version = platform.python_version()
    facts = [f"{records.FORMAT} {cfg.seq_len} {cfg.validation_percent}"]
    key = hashlib.sha256("\n".join(facts + [f"{file.name} {file.size}" for file in files]).encode()).hexdigest()[:16]
    output = cache_folder() / f"stdlib-{version}-{cfg.seq_len}-{key}"
    if output.is_dir():
        return output
    plan = Plan(cfg.seq_len, cfg.validation_percent)
    source = f"standard library of Python {version}"
    try:
        prepare(sources.read_documents(files), ByteTokenizer(), plan, output, source=source)
    except FileExistsError:
        pass  # another process was faster; what it wrote is the same
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {output} ({reason}); set KIMI_JAX_CACHE to a writable folder") from error
    return output
