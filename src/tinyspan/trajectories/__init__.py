"""Trajectories of fine-tuning runs: recorded, read back, or made of checkpoints."""
