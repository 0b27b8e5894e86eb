"""Methods that train: rounding with gradients, learned scales."""
