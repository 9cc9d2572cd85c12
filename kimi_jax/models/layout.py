"""Where each layer lives: which layers are unrolled, and which repeat and share one compiled body under a scan."""

from dataclasses import dataclass

from kimi_jax.config.mixer import Mixer
from kimi_jax.config.model import Ffn, ModelConfig

MIN_REPEATS = 2  # a scan over fewer groups saves no compilation


@dataclass(frozen=True)
class Location:
    """Where the parameters of one layer are found.

    Args:
      part: "prefix", "groups" or "tail".
      index: which block of that part, as its key: "0", "1", ...
      repeat: index into the leading "layers" axis of a block of `groups`; None elsewhere.
    """

    part: str
    index: str
    repeat: int | None = None


@dataclass(frozen=True)
class Layout:
    """`prefix` unrolled layers, then `repeats` groups of `group` layers under one scan, then `tail` unrolled layers."""

    prefix: int
    group: int
    repeats: int
    tail: int

    @property
    def num_layers(self) -> int:
        return self.prefix + self.group * self.repeats + self.tail

    def locate(self, layer: int) -> Location:
        """Returns where 0-indexed `layer` lives."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"locate: {layer=} must be in 0 .. {self.num_layers - 1}")
        if layer < self.prefix:
            return Location("prefix", str(layer))
        repeat, index = divmod(layer - self.prefix, max(self.group, 1))
        if repeat < self.repeats:
            return Location("groups", str(index), repeat)
        return Location("tail", str(layer - self.num_layers + self.tail))

    def first_layer(self, part: str, index: int) -> int:
        """Returns the first layer that block `index` of `part` stands for: in `groups`, the one of repeat 0."""
        return {"prefix": 0, "groups": self.prefix, "tail": self.num_layers - self.tail}[part] + index


def layer_kinds(cfg: ModelConfig) -> tuple[tuple[Mixer, Ffn], ...]:
    """Returns the (mixer, feed-forward) configs of each layer, 0-indexed."""
    return tuple((cfg.mixers[name], cfg.ffn_of_layer(layer)) for layer, name in enumerate(cfg.mixer_names))


def plan_layout(cfg: ModelConfig) -> Layout:
    """Finds the longest run of layers that repeats with the period of the pattern; everything around it is unrolled.

    The run may start inside the pattern: the released model, K K K M six times and K K M with a dense first layer,
    gives one unrolled layer, six groups K K M K, and K M.
    """
    if not cfg.scan_layers:
        return unrolled(cfg)
    kinds, period = layer_kinds(cfg), len(cfg.pattern)
    best = Layout(prefix=len(kinds), group=0, repeats=0, tail=0)
    for start in range(len(kinds)):
        end = start + period
        while end < len(kinds) and kinds[end] == kinds[end - period]:
            end += 1
        repeats = (end - start) // period
        if end <= len(kinds) and repeats >= MIN_REPEATS and repeats > best.repeats:
            best = Layout(prefix=start, group=period, repeats=repeats, tail=len(kinds) - start - repeats * period)
    return best


def unrolled(cfg: ModelConfig) -> Layout:
    """Returns the layout without a scan."""
    return Layout(prefix=cfg.num_layers, group=0, repeats=0, tail=0)
