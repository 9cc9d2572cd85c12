"""Where training examples come from: text, or a task that draws them."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from kimi_jax.config.base import Config
from kimi_jax.config.mixer import PositiveInt


class Data(Config):
    """What every data source has."""

    seq_len: Annotated[int, Field(ge=2, lt=2**31)]
    """Tokens T per example; records hold seq_len + 1, so that every token but a document's first is predicted once."""
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the training examples; each epoch has an order of its own."""


class StdlibData(Data):
    """The source files of the running Python's standard library, byte by byte: real text that every machine has.

    Prepared on first use under the cache folder (`KIMI_JAX_CACHE`, default ~/.cache/kimi_jax); split by file.
    """

    kind: Literal["stdlib"] = "stdlib"
    validation_percent: Annotated[int, Field(ge=1, le=50)] = 5


class RecordData(Data):
    """Folders written by scripts/prepare_data.py."""

    kind: Literal["records"] = "records"
    train: str
    """Folder of the training records, relative to the working directory."""
    validation: str | None = None


class PalindromeData(Data):
    """Repeat a sequence backwards."""

    kind: Literal["palindrome"] = "palindrome"
    num_symbols: PositiveInt = 64

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.seq_len < 5:
            yield "seq_len", f"{self.seq_len} has no room for two symbols, a separator and two symbols"


class MqarData(Data):
    """Multi-query associative recall: values by their keys."""

    kind: Literal["mqar"] = "mqar"
    num_keys: PositiveInt | None = None
    """Different keys; unset: 1024, or as many as an example has pairs if these are more."""
    num_values: PositiveInt = 64
    num_pairs: PositiveInt | None = None
    """Pairs of an example, each asked for once; unset: a quarter of seq_len, as in the densest ones of Zoology."""

    @property
    def key_tokens(self) -> int:
        return self.num_keys or max(1024, self.pairs)

    @property
    def pairs(self) -> int:
        return self.num_pairs or self.seq_len // 4

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.pairs > self.key_tokens:
            yield "num_keys", f"{self.num_keys} is fewer than the {self.pairs} pairs of an example"
        if not 2 < 2 * self.pairs + 1 < self.seq_len:
            yield "seq_len", f"{self.seq_len} has no room for {max(self.pairs, 1)} pairs, a separator and a query"


class StackData(Data):
    """Push on and pop from many stacks."""

    kind: Literal["stack"] = "stack"
    num_stacks: PositiveInt = 64
    num_symbols: PositiveInt = 64

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.seq_len < 6:
            yield "seq_len", f"{self.seq_len} has no room for a push and a pop of three tokens each"


class NeedleData(Data):
    """Find a value by its key in noise."""

    kind: Literal["needle"] = "needle"
    num_needles: PositiveInt = 1
    num_keys: PositiveInt = 64
    num_values: PositiveInt = 64
    num_noise: PositiveInt = 64
    """Different tokens of the noise."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.num_needles > self.num_keys:
            yield "num_keys", f"{self.num_keys} is fewer than num_needles={self.num_needles}"
        if self.seq_len < 7 * self.num_needles:
            yield "seq_len", f"{self.seq_len} has no room for {self.num_needles} needles, their questions and noise"


SyntheticData = PalindromeData | MqarData | StackData | NeedleData

DataConfig = Annotated[StdlibData | RecordData | SyntheticData, Field(discriminator="kind")]
