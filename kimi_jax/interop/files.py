"""The names of the files of a public checkpoint."""

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG, RANKS = "tokenizer.json", "tokenizer_config.json", "tiktoken.model"
