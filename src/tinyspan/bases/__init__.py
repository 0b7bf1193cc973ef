"""Bases: a linear map per block, found from trajectories or constructed."""
