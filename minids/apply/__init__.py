"""Applied to a model from outside: the FP8 recipe, recomputation, weights for decoding."""
