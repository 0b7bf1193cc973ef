"""Trajectories of fine-tuning runs: recording, reading, and conversion from checkpoints."""
