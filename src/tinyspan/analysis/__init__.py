"""Analysis of directions: pure functions of trajectories, bases and update vectors, one subject per file."""

from tinyspan.analysis.directions import Share, explained_variance, principal_angles, span_share, spectra
from tinyspan.analysis.intervals import score_interval, wilson_interval
from tinyspan.analysis.moved import Comparison, ComponentNorm, Moved, compare, component, component_norms, updates
from tinyspan.analysis.outlier_dimensions import GAUSSIAN_SHARE, Outliers, envelope, outliers, standardized
from tinyspan.analysis.planes import Plane, Surface, coordinates, loss_surface, plane, surface_around

__all__ = [
    "GAUSSIAN_SHARE",
    "Comparison",
    "ComponentNorm",
    "Moved",
    "Outliers",
    "Plane",
    "Share",
    "Surface",
    "compare",
    "component",
    "component_norms",
    "coordinates",
    "envelope",
    "explained_variance",
    "loss_surface",
    "outliers",
    "plane",
    "principal_angles",
    "score_interval",
    "span_share",
    "spectra",
    "standardized",
    "surface_around",
    "updates",
    "wilson_interval",
]
