"""Text from a model: prefill of prompts, one token at a time after them, and the rule that picks each token."""
