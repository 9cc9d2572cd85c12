"""Where training text comes from."""

from typing import Annotated, Literal

from pydantic import Field

from kimi_jax.config.base import Config


class Data(Config):
    """What every data source has."""

    seq_len: Annotated[int, Field(ge=2)]
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


DataConfig = Annotated[StdlibData | RecordData, Field(discriminator="kind")]
