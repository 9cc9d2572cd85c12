"""Models: one pre-norm block, the layout of a hybrid stack, the decoder, and its counts in closed form."""
