"""How the devices are laid out."""

from kimi_jax.config.base import Config
from kimi_jax.config.mixer import PositiveInt


class Mesh(Config):
    """Sizes of the mesh axes; their product must be the number of devices."""

    data: PositiveInt | None = None
    """Copies of the parameters, each with its part of the batch; unset: the devices that the other axes leave."""
    fsdp: PositiveInt = 1
    """Parts of the batch whose devices hold a part of every parameter each and gather them layer by layer."""
    expert: PositiveInt = 1
    """Like fsdp, but for the experts: they stay where they are, and tokens travel to them."""
    context: PositiveInt = 1
    """Parts of every sequence."""
    tensor: PositiveInt = 1
    """Parts of the heads, of the feed-forward widths and of the vocabulary."""
