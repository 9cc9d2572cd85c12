"""Token mixers as data: KDA, Gated DeltaNet, Mamba2, MLA, and the parts they are ablated by."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from kimi_jax.config.base import Config

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]  # sizes and steps are counted in int32
Epsilon = Annotated[float, Field(ge=2.0**-126)]  # what is smaller float32 may hold as 0
KdaImplementation = Literal["auto", "mosaic_gpu", "chunked", "reference"]


# ------------------------------------------------------------------ short convolution
class ShortConv(Config):
    """Depthwise causal convolution with SiLU on q, k and v."""

    kind: Literal["short"] = "short"
    width: Annotated[int, Field(ge=2, le=8)] = 4


class NoConv(Config):
    """SiLU on q, k and v without a convolution."""

    kind: Literal["none"] = "none"


Conv = Annotated[ShortConv | NoConv, Field(discriminator="kind")]


# ------------------------------------------------------------------ decay
TIME_STEP = (1e-3, 1e-1)  # as Mamba2 has it: range of the time steps at initialisation


class Softplus(Config):
    """g = -exp(a_log) softplus(raw + dt_bias): unbounded below; the released Kimi Linear."""

    kind: Literal["softplus"] = "softplus"
    time_step: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = TIME_STEP
    """Range of softplus(dt_bias) at initialisation, log-uniform: small ones remember for long from the first step."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.time_step[0] > self.time_step[1]:
            yield "time_step", f"{self.time_step[0]} is more than {self.time_step[1]}; the smaller one comes first"


class LowerBound(Config):
    """g = bound * sigmoid(exp(a_log) (raw + dt_bias)): never below `bound`; Kimi K3 and GLM-5.3-Flash."""

    kind: Literal["lower_bound"] = "lower_bound"
    bound: Annotated[float, Field(ge=-5.0, lt=0.0)] = -5.0


Gate = Annotated[Softplus | LowerBound, Field(discriminator="kind")]


class ChannelDecay(Config):
    """KDA: one decay per key channel, through a bottleneck of rank R."""

    kind: Literal["channel"] = "channel"
    rank: PositiveInt = 128
    gate: Gate = Softplus()


class HeadDecay(Config):
    """One decay per head, straight from the input, as in Gated DeltaNet."""

    kind: Literal["head"] = "head"
    gate: Gate = Softplus()


class NoDecay(Config):
    """No forgetting (g = 0): DeltaNet."""

    kind: Literal["none"] = "none"


Decay = Annotated[ChannelDecay | HeadDecay | NoDecay, Field(discriminator="kind")]


# ------------------------------------------------------------------ output gate
class SigmoidGate(Config):
    """out = RMSNorm(o) * sigmoid(low-rank(x))."""

    kind: Literal["sigmoid"] = "sigmoid"
    rank: PositiveInt = 128


class SwishGate(Config):
    """out = RMSNorm(o) * silu(low-rank(x))."""

    kind: Literal["swish"] = "swish"
    rank: PositiveInt = 128


class NoGate(Config):
    """out = RMSNorm(o)."""

    kind: Literal["none"] = "none"


OutputGate = Annotated[SigmoidGate | SwishGate | NoGate, Field(discriminator="kind")]


# ------------------------------------------------------------------ mixers
class LinearMixer(Config):
    """What the linear-attention mixers share: heads, convolution, output norm and gate."""

    num_heads: PositiveInt
    """Query and key heads H."""
    num_value_heads: PositiveInt | None = None
    """Value heads HV, a multiple of H; unset: H."""
    key_dim: PositiveInt = 128
    value_dim: PositiveInt = 128
    conv: Conv = ShortConv()
    output_gate: OutputGate = SigmoidGate()
    norm_eps: Epsilon = 1e-5
    """Added under the root of the output RMSNorm."""
    chunk_size: Literal[16, 32, 64] | None = None
    """Tokens per chunk C of the operator, no effect on the result beyond rounding; unset: the implementation's own."""

    @property
    def value_heads(self) -> int:
        return self.num_value_heads or self.num_heads

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.value_heads % self.num_heads:
            yield "num_value_heads", f"{self.value_heads} is not a multiple of num_heads={self.num_heads}"


class KdaMixer(LinearMixer):
    """Kimi Delta Attention: gated delta rule (arXiv 2510.26692)."""

    kind: Literal["kda"] = "kda"
    decay: Decay = ChannelDecay()
    implementation: KdaImplementation = "auto"
    """Which implementation of the operator runs; auto: the fastest that takes these shapes on this device."""


class GdnMixer(LinearMixer):
    """Gated DeltaNet: the delta rule with one decay per head (arXiv 2412.06464)."""

    kind: Literal["gdn"] = "gdn"
    decay: HeadDecay = HeadDecay()
    implementation: KdaImplementation = "auto"


class Mamba2Mixer(LinearMixer):
    """Mamba2 as the paper's baseline: one decay per head and no delta correction (arXiv 2405.21060)."""

    kind: Literal["mamba2"] = "mamba2"
    decay: HeadDecay = HeadDecay()
    implementation: Literal["auto", "chunked", "reference"] = "auto"


class NoPosition(Config):
    """NoPE: the shared key and query dimensions stay unrotated."""

    kind: Literal["none"] = "none"


class Rope(Config):
    """Rotary embedding of the shared key and the matching query dimensions, by position within the document."""

    kind: Literal["rope"] = "rope"
    theta: Annotated[float, Field(gt=0)] = 10_000.0


Position = Annotated[NoPosition | Rope, Field(discriminator="kind")]


class MlaMixer(Config):
    """Multi-head latent attention (DeepSeek-V2), by default without position encoding."""

    kind: Literal["mla"] = "mla"
    num_heads: PositiveInt
    nope_dim: PositiveInt = 128
    """Query and key dimensions per head that come from the latent."""
    rope_dim: PositiveInt = 64
    """Query dimensions per head that meet the one key shared by all heads; rotated only if `position` says so."""
    value_dim: PositiveInt = 128
    latent_dim: PositiveInt = 512
    latent_norm_eps: Epsilon = 1e-6
    """Added under the root of the latent's RMSNorm; the released model uses 1e-6 here and 1e-5 elsewhere."""
    position: Position = NoPosition()
    implementation: Literal["auto", "mosaic_gpu", "cudnn", "xla"] = "auto"
    """What runs over whole sequences; auto: the fastest that takes these shapes on this device. A cache takes auto."""

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    def problems(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.position, Rope) and self.rope_dim % 2:
            yield (
                "rope_dim",
                f"{self.rope_dim} is odd; position kind 'rope' rotates pairs, so it must be even",
            )


Mixer = Annotated[KdaMixer | GdnMixer | Mamba2Mixer | MlaMixer, Field(discriminator="kind")]
