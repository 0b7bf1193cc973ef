"""Models that train z: theta(z) as a function, the engine that computes it in place, and adapters."""
