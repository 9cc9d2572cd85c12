"""Neural network layers: one token mixer per file, all called (x_BTD, cache, segment_ids_BT) -> (y_BTD, cache)."""
