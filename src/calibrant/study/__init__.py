"""Studies: a grid of runs over calibration data, its store, its statistics."""
