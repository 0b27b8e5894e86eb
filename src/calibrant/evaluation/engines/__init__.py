"""Programs that serve models, asked in processes of their own what they compute.

The workers are scripts: they run in the Python of the engine's environment, which need not have calibrant.
"""
