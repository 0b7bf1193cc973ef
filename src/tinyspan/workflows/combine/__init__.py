"""Combination of fine-tuned models of one base model in the space that they span."""
