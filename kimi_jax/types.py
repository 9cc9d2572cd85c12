"""Type aliases, and the dtype rules that every layer follows.

Parameters are float32. Activations carry the compute dtype, which the embedding sets once (`ModelConfig.dtype`); a
layer casts its weights to the dtype of the activations it receives. Gates, log-decays, recurrent states, norms, router
scores, softmax and losses are float32.
"""

from collections.abc import Mapping
from typing import Any

type PyTree = Any
type Variables = Mapping[str, Any]  # nested dicts of arrays: the pure-dict form of a module's state
