"""The base of every config type: frozen, strict about keys, with rules between fields."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

COLLECT = "collect_problems"  # validation context key: the loader sets it and asks for the problems itself


def nearest(name: object, options: Iterable[str]) -> str:
    """Says which option the user may have meant, and lists them all."""
    options = list(options)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    listed = f"known: {', '.join(options)}" if options else "nothing is known here"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed


class Config(BaseModel):
    """A frozen config; unknown keys are errors.

    A subclass states the rules between its fields in `problems`. They hold for every instance: built in Python, a
    broken rule raises pydantic's `ValidationError`; read from YAML, `load` gathers them all before it reports.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with it); the field is the one a user would edit."""
        yield from ()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        if not (info.context or {}).get(COLLECT):
            found = [f"{field}: {what}" for field, what in self.problems()]
            if found:
                raise ValueError("; ".join(found))
        return self
