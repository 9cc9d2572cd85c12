"""Experiments from config files: what is run around a training run, and how its results are shown."""
