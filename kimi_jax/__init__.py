"""kimi_jax: pretraining, ablations and export of Kimi Linear models in JAX."""
