"""A whole training run as data."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from kimi_jax.config.base import Config
from kimi_jax.config.data import DataConfig
from kimi_jax.config.evaluation import Evaluation, LossEvaluation
from kimi_jax.config.mesh import Mesh
from kimi_jax.config.mixer import PositiveInt
from kimi_jax.config.model import ModelConfig
from kimi_jax.config.optim import Optimizer, schedule_problems

MAX_TOKENS = 2**31  # of a batch, which counts them in int32
MAX_B2_BFLOAT16 = 0.99  # each step moves the second moment by 1 - b2 of its distance; bfloat16 resolves 1/256


class NoRemat(Config):
    """Keep every activation."""

    kind: Literal["none"] = "none"


class BlockRemat(Config):
    """Keep the input of each block and recompute the rest in the backward pass."""

    kind: Literal["block"] = "block"


class NamedRemat(Config):
    """Keep the input of each block and what `keep` names, recompute the rest in the backward pass."""

    kind: Literal["named"] = "named"
    keep: tuple[Literal["products", "operators"], ...] = ("products", "operators")
    """products: results of products with weights; operators: what attention, recurrence and experts keep for their
    backward pass. Norms, convolutions and activations but SwiGLU's are always recomputed."""
    on: Literal["device", "host"] = "device"
    """Where it is kept; host memory is as large as you like, at a transfer each way per step."""


Remat = Annotated[NoRemat | BlockRemat | NamedRemat, Field(discriminator="kind")]


class StopOnNonFinite(Config):
    """A loss or gradient that is not finite ends the run and names the step, the value and the last good checkpoint."""

    kind: Literal["stop"] = "stop"


class SkipNonFinite(Config):
    """A step whose loss or gradient is not finite changes nothing; too many in a row end the run."""

    kind: Literal["skip"] = "skip"
    max_consecutive: PositiveInt = 10


NonFinite = Annotated[StopOnNonFinite | SkipNonFinite, Field(discriminator="kind")]


class Validation(Config):
    """When and on how much validation data the loss is measured."""

    every: PositiveInt = 100
    """Steps between validations; the last step always has one."""
    batches: PositiveInt = 8
    """Batches per validation, the same ones each time."""


class Checkpoints(Config):
    """When checkpoints are written and which stay."""

    every: PositiveInt = 500
    """Steps between checkpoints; the last step always has one."""
    keep: PositiveInt = 2
    """The newest so many stay."""


class Watchdog(Config):
    """What happens when nothing happens."""

    silence_s: Annotated[float, Field(gt=0, le=1e9)] | None = 1800.0
    """Seconds without a step, compilation included, after which each process writes the stacks of its threads to
    `stacks/<process>.txt`; unset: never."""
    exit: bool = True
    """Whether the process then ends (exit code 1)."""
    heartbeat_s: PositiveInt = 60
    """Seconds without a sign of life after which a process is taken for dead, and the others end."""


class Flags(Config):
    """Settings of XLA and NCCL; those that XLA_FLAGS or the environment already have stay as they are."""

    preset: Literal["default", "overlap", "deterministic"] = "default"
    """overlap: communication beside computation, in large messages; deterministic: equal bits in every process."""
    xla: dict[str, str] = Field(default_factory=dict)
    """Flags of XLA by name, without dashes."""
    nccl: dict[Annotated[str, Field(pattern="^NCCL_[A-Z0-9_]+$")], str] = Field(default_factory=dict)
    """Environment variables of NCCL."""


class Train(Config):
    """The loop."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Sequences per optimizer step, over all devices and microbatches."""
    grad_accum: PositiveInt = 1
    """Microbatches per step, summed in float32 in one compiled scan."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the parameters."""
    init_from: str | None = None
    """Directory of the run, or of the import, whose weights are the first ones; unset: drawn from `seed`."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """What matrices, their gradients and their optimizer state are held in; the update's arithmetic is float32.

    bfloat16 halves all three and rounds updated parameters stochastically.
    """
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-sum-exp of the logits."""
    loss_chunk: PositiveInt | None = None
    """Tokens whose logits exist at one time; unset: 32768, or as many as take 6 GiB with the gradient of the logits."""
    remat: Remat = NoRemat()
    non_finite: NonFinite = StopOnNonFinite()
    log_every: PositiveInt = 10
    validation: Validation = Validation()
    evaluations: dict[str, Evaluation] = Field(default_factory=dict)
    """What else is measured, by name."""
    checkpoints: Checkpoints = Checkpoints()
    watchdog: Watchdog = Watchdog()
    flags: Flags = Flags()

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.batch_size % self.grad_accum:
            yield "grad_accum", f"{self.grad_accum} does not divide batch_size={self.batch_size}"
        if "validation" in self.evaluations:
            yield "evaluations.validation", "is what the run's own validation is called; choose another name"
        for name in self.evaluations:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # metrics and files are called after it
                yield "evaluations", f"{name!r} must be of letters, digits, - and _"

    def evaluations_of[E: Config](self, kind: type[E]) -> dict[str, E]:
        """The evaluations of one kind, by name."""
        return {name: evaluation for name, evaluation in self.evaluations.items() if isinstance(evaluation, kind)}


class Wandb(Config):
    """Weights & Biases (extra `log`)."""

    project: str
    mode: Literal["online", "offline"] = "offline"


class Logging(Config):
    """Where metrics go besides metrics.jsonl, which is always written."""

    tensorboard: bool = False
    wandb: Wandb | None = None


class RunConfig(Config):
    """One training run: what a YAML file under experiments/ describes."""

    model: ModelConfig
    data: DataConfig
    optim: Optimizer
    train: Train
    mesh: Mesh = Mesh()
    logging: Logging = Logging()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from schedule_problems(self.optim.schedule, self.train.steps)
        yield from self._token_problems("train", self.train.batch_size, self.data.seq_len)
        for name, cfg in self.train.evaluations_of(LossEvaluation).items():
            rows, seq_len = cfg.batch_size or self.train.batch_size, cfg.seq_len or (cfg.data or self.data).seq_len
            yield from self._token_problems(f"train.evaluations.{name}", rows, seq_len)
        if self.train.parameters == "bfloat16" and self.optim.b2 > MAX_B2_BFLOAT16:
            rule = f"train.parameters=bfloat16 needs at most {MAX_B2_BFLOAT16}: a smaller share would be rounded away"
            yield "optim.b2", f"{self.optim.b2}; {rule}"

    @staticmethod
    def _token_problems(where: str, rows: int, seq_len: int) -> Iterator[tuple[str, str]]:
        if rows * seq_len >= MAX_TOKENS:
            yield f"{where}.batch_size", f"{rows} sequences of {seq_len} tokens, must be less than {MAX_TOKENS} tokens"
