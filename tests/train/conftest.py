"""Two small models on one page of text, and one finished run that many tests look at."""

import pathlib
import textwrap
from collections.abc import Callable

import pytest

from kimi_jax.config.train import RunConfig
from kimi_jax.data.prepare import Plan, prepare
from kimi_jax.data.sources import Document, Piece
from kimi_jax.data.tokenizers import ByteTokenizer
from kimi_jax.train.loop import Result, train

SEQ_LEN = 32


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """The source of `textwrap`, packed: train/ and validation/."""
    text = pathlib.Path(textwrap.__file__).read_text()
    pieces = [text[start : start + 500] for start in range(0, len(text), 500)]
    documents = [Document(f"{i}", (Piece(piece, len(piece)),)) for i, piece in enumerate(pieces)]
    folder = tmp_path_factory.mktemp("data") / "textwrap"
    prepare(documents, ByteTokenizer(), Plan(SEQ_LEN, 20.0), folder, source="textwrap")
    return folder


@pytest.fixture(scope="session")
def hybrid(corpus) -> RunConfig:
    """A KDA and an MLA layer with experts, Muon, a checkpoint every 4 steps, every step logged."""
    kda = {"kind": "kda", "num_heads": 2, "key_dim": 16, "value_dim": 16, "implementation": "reference"}
    kda |= {"decay": {"kind": "channel", "rank": 8}, "output_gate": {"kind": "sigmoid", "rank": 8}}
    mla = {"kind": "mla", "num_heads": 2, "nope_dim": 8, "rope_dim": 8, "value_dim": 16, "latent_dim": 16}
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 264,
                "model_dim": 32,
                "num_layers": 2,
                "pattern": ["kda", "mla"],
                "mixers": {"kda": kda, "mla": mla},
                "ffn": {"kind": "moe", "num_experts": 4, "top_k": 2, "hidden_dim": 16, "balance_loss": 1e-3},
                "dtype": "float32",
            },
            "data": {"kind": "records", "train": f"{corpus}/train", "validation": f"{corpus}/validation"}
            | {"seq_len": SEQ_LEN},
            "optim": {"kind": "muon", "peak_lr": 2e-2, "schedule": {"kind": "wsd", "warmup_steps": 2}},
            "train": {
                "steps": 12,
                "batch_size": 8,
                "log_every": 1,
                "z_loss": 1e-4,
                "loss_chunk": 64,
                "validation": {"every": 6, "batches": 2},
                "checkpoints": {"every": 4, "keep": 3},
            },
            "logging": {"tensorboard": True},
        }
    )


@pytest.fixture(scope="session")
def small(hybrid) -> RunConfig:
    """One MLA layer with experts: compiles in seconds, for tests of the step alone."""
    data = hybrid.model_dump()
    data["model"] |= {"num_layers": 1, "pattern": ["mla"]}
    return RunConfig.model_validate(data)


@pytest.fixture(scope="session")
def whole(hybrid, tmp_path_factory) -> Result:
    """The hybrid, trained without interruption."""
    return train(hybrid, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="session")
def changed() -> Callable[..., RunConfig]:
    """Makes a config with some keys of its sections replaced: changed(cfg, train={"steps": 3})."""

    def change(cfg: RunConfig, **sections: dict) -> RunConfig:
        data = cfg.model_dump()
        for section, values in sections.items():
            data[section] |= values
        return RunConfig.model_validate(data)

    return change
