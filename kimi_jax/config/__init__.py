"""The schema of an experiment: frozen pydantic models, and the YAML loader that fills them."""
