"""Find the handful of directions along which a pre-trained model fine-tunes, and train in them."""

from tinyspan.bases.basis import Basis
from tinyspan.bases.constructors import register_basis
from tinyspan.bases.discovery import svd_basis
from tinyspan.bases.empty import empty_basis
from tinyspan.bases.fastfood import fastfood_basis
from tinyspan.bases.random import random_basis
from tinyspan.errors import InputError, MismatchError, StorageError, TinyspanError
from tinyspan.io.manifests import package_versions
from tinyspan.maps.base import LinearMap, register_map
from tinyspan.maps.dense import DenseMap
from tinyspan.maps.fastfood import FastfoodMap
from tinyspan.maps.kronecker import KroneckerMap
from tinyspan.maps.sparse import SparseMap
from tinyspan.model.subspace import SubspaceModel
from tinyspan.partition import Block, Partition
from tinyspan.partitioning import (
    by_layer,
    by_module,
    by_pattern,
    register_partition,
    trainable_by_layer,
    whole_model,
)
from tinyspan.trajectories.from_checkpoints import trajectory_from_checkpoints
from tinyspan.trajectories.recorder import TrajectoryRecorder
from tinyspan.trajectories.trajectory import Trajectory

__version__ = package_versions().get("tinyspan", "unknown")

__all__ = [
    "Basis",
    "Block",
    "DenseMap",
    "FastfoodMap",
    "InputError",
    "KroneckerMap",
    "LinearMap",
    "MismatchError",
    "Partition",
    "SparseMap",
    "StorageError",
    "SubspaceModel",
    "TinyspanError",
    "Trajectory",
    "TrajectoryRecorder",
    "__version__",
    "by_layer",
    "by_module",
    "by_pattern",
    "empty_basis",
    "fastfood_basis",
    "random_basis",
    "register_basis",
    "register_map",
    "register_partition",
    "svd_basis",
    "trainable_by_layer",
    "trajectory_from_checkpoints",
    "whole_model",
]
