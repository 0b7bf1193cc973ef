"""The results that Zhang, Liu and Shao (2023) report, in per cent, for comparison with ours.

Source: "Fine-tuning Happens in Tiny Subspaces", ACL 2023, pp. 1701-1713, doi:10.18653/v1/2023.acl-long.95.
"""

from collections.abc import Mapping

__all__ = ["DIMENSIONS", "DISABLED", "LARGEST", "LAYERS", "MODELS", "TASKS", "TRANSDUCTIVE", "UNIFIED"]

MODELS = ("bert-base-cased", "roberta-base")
TASKS = ("cola", "mrpc", "sst2", "stsb", "qqp", "mnli", "qnli", "rte")
Rows = Mapping[str, Mapping[str, float]]  # row -> task -> value


def _rows(**rows: tuple[float, ...]) -> Rows:
    return {name.replace("_", " "): dict(zip(TASKS, values, strict=True)) for name, values in rows.items()}


TRANSDUCTIVE: Mapping[str, Rows] = {  # Table 1
    "bert-base-cased": _rows(
        full=(59.37, 84.46, 91.95, 89.08, 91.07, 83.39, 90.77, 66.93),
        freeze=(27.52, 69.66, 88.81, 78.35, 84.48, 71.55, 81.61, 56.46),
        random=(37.89, 70.78, 89.47, 81.41, 85.86, 72.91, 83.38, 58.63),
        intrinsic=(60.27, 84.31, 89.93, 89.51, 89.73, 81.21, 87.73, 67.00),
    ),
    "roberta-base": _rows(
        full=(61.04, 89.31, 94.29, 90.70, 91.72, 87.23, 92.48, 76.68),
        freeze=(0.00, 68.38, 85.32, 15.69, 82.81, 71.16, 79.11, 53.86),
        random=(27.58, 68.38, 91.45, 75.47, 86.33, 77.10, 84.49, 58.27),
        intrinsic=(61.07, 87.21, 92.43, 89.43, 90.18, 85.53, 90.57, 78.77),
    ),
}

UNIFIED: Mapping[str, Rows] = {  # Table 2
    "bert-base-cased": _rows(
        random=(32.49, 70.15, 88.65, 79.29, 84.84, 71.75, 82.29, 57.11),
        **{"zero-shot": (35.35, 78.09, 91.06, 85.17, 87.57, 75.29, 84.01, 75.23)},
        unified=(61.58, 84.41, 91.06, 89.71, 91.27, 83.85, 90.97, 67.00),
    ),
    "roberta-base": _rows(
        random=(0.00, 68.38, 89.47, 27.60, 84.51, 73.16, 82.10, 54.44),
        **{"zero-shot": (32.93, 80.44, 90.60, 83.10, 87.12, 78.76, 84.46, 67.12)},
        unified=(63.80, 89.12, 93.55, 90.88, 91.85, 87.20, 92.36, 77.91),
    ),
}

DISABLED: Mapping[str, Rows] = {  # Table 3
    "bert-base-cased": _rows(
        zero_random=(57.27, 84.46, 91.79, 88.66, 90.66, 83.68, 90.41, 64.48),
        zero_outliers=(0.00, 68.38, 50.92, 0.00, 63.18, 33.64, 49.89, 52.71),
    ),
    "roberta-base": _rows(
        zero_random=(58.80, 87.65, 93.95, 89.52, 91.29, 87.76, 92.61, 68.88),
        zero_outliers=(0.00, 70.49, 50.92, 28.05, 63.67, 36.15, 49.89, 52.71),
    ),
}

DIMENSIONS: Mapping[str, Mapping[int, Mapping[str, float]]] = {  # Tables 5 and 6
    "bert-base-cased": {
        8: _rows(x=(54.06, 75.05, 89.52, 87.95, 87.61, 76.93, 86.54, 65.41))["x"],
        16: _rows(x=(57.17, 77.94, 90.05, 89.02, 89.12, 78.48, 86.83, 66.07))["x"],
        32: _rows(x=(60.27, 84.31, 89.93, 89.51, 89.73, 78.70, 87.73, 67.00))["x"],
    },
    "roberta-base": {
        8: _rows(x=(58.04, 75.59, 91.93, 84.10, 87.58, 79.96, 89.35, 74.30))["x"],
        16: _rows(x=(60.27, 78.20, 92.34, 88.10, 89.25, 81.77, 89.14, 78.56))["x"],
        32: _rows(x=(61.07, 87.21, 92.43, 89.43, 90.18, 82.32, 90.57, 78.77))["x"],
    },
}

LARGEST: Mapping[str, int | None] = {  # Table 4, BERT on MRPC: in how many of 12 layers; None where only named
    "attention.self.query.weight": 11,
    "attention.self.query.bias": None,
    "attention.self.key.bias": None,
    "attention.output.LayerNorm.weight": 11,
    "attention.output.LayerNorm.bias": None,
    "intermediate.dense.weight": None,
    "output.dense.weight": 11,
    "output.LayerNorm.weight": 4,
}
LAYERS = 12
