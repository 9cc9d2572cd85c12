"""The smallest run: a config of one attention layer that trains in milliseconds a step, for tests of whole commands."""

from typing import Any


def tiny_run(*, peak_lr: float = 1e-2, **train: Any) -> dict[str, Any]:
    """The values of its config file; `train` are those under that key."""
    mla = {"kind": "mla", "num_heads": 2, "nope_dim": 8, "rope_dim": 8, "value_dim": 8, "latent_dim": 8}
    model = {"vocab_size": 264, "model_dim": 16, "num_layers": 1, "pattern": ["mla"], "mixers": {"mla": mla}}
    return {
        "model": model | {"ffn": {"kind": "dense", "hidden_dim": 16}, "dtype": "float32"},
        "data": {"kind": "palindrome", "seq_len": 16},
        "optim": {"kind": "adamw", "peak_lr": peak_lr, "schedule": {"kind": "constant"}},
        "train": {"batch_size": 8, "log_every": 1} | train,
    }
