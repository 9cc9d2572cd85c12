"""From text to batches: sources, tokenizers, packing into fixed-length records, and the run-time pipeline."""
