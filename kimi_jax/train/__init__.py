"""Training: optimizers, loss, one compiled step, the loop, checkpoints and metrics."""
