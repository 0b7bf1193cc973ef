"""Subspace models: theta(z) as a function, the engine that writes the weights in place, and adapters."""
