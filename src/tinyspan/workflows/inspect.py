"""Description of a folder: its content, model, size, and whether it is complete."""

from collections.abc import Sequence
from pathlib import Path

from tinyspan.bases.basis import Basis
from tinyspan.io.folders import RESULT, is_unfinished
from tinyspan.io.manifests import MANIFEST, FileEntry, Manifest, damage, read_manifest
from tinyspan.io.storage import read_json, reading
from tinyspan.model.adapters import CARRIED
from tinyspan.trajectories.trajectory import Trajectory, stored_partition

__all__ = ["describe"]


def describe(folder: Path, verify: bool = False) -> tuple[list[tuple[str, str]], list[str]]:
    """Return rows of (name, value) about a trajectory, basis or adapter, and one sentence per damaged file.

    Args:
        folder: folder of a trajectory, basis or adapter.
        verify: compare every file with its hash, instead of its size only.

    Raises:
        InputError: the folder is not a trajectory, basis or adapter.
        StorageError: the manifest is damaged.
    """
    manifest = read_manifest(folder)
    with reading(folder / MANIFEST):
        return _rows(folder, manifest, verify)


def _rows(folder: Path, manifest: Manifest, verify: bool) -> tuple[list[tuple[str, str]], list[str]]:
    files = _files(folder, manifest)
    problems = damage(folder, files, content=verify)
    partition = stored_partition(folder, manifest)
    size = sum(entry.bytes for entry in files.values())
    rows = [
        ("kind", f"{manifest.kind}, schema {manifest.schema_version}"),
        ("hash", manifest.content_hash()),
        ("model", str(manifest.details.get("model") or "unknown")),
        ("blocks", f"{len(partition)}, {partition.blocks[0].name} .. {partition.blocks[-1].name}"),
        ("numbers", f"{partition.numel:,} in all blocks, {partition.blocks[0].numel:,} in the first"),
        ("theta_0", _short(next(iter(manifest.fingerprint.values()), None)) + " (first block)"),
        ("size", f"{size / 1e6:,.1f} MB in {len(files)} files"),
        ("made by", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        *_kind_rows(folder, manifest, sound=not problems),
        *_result_rows(folder, sound=not problems),
        ("whole", _whole(folder, problems, verify)),
    ]
    return rows, problems


def _whole(folder: Path, problems: Sequence[str], verify: bool) -> str:
    """Return whether a folder is complete."""
    if problems:
        return f"NO, {len(problems)} files are damaged"
    if is_unfinished(folder):
        return "NO, the work is unfinished; repeat the command that started it"
    return "yes, every file has its hash" if verify else "every file has its size; --verify compares the hashes"


def _files(folder: Path, manifest: Manifest) -> dict[str, FileEntry]:
    """Return all files that belong to the folder."""
    content = Trajectory(folder).files if manifest.kind == "trajectory" else manifest.files
    carried = {}
    if manifest.kind == "adapter" and manifest.details.get("basis") == CARRIED:
        files = read_manifest(folder / CARRIED, "basis").files
        carried = {f"{CARRIED}/{name}": entry for name, entry in files.items()}
    return {**content, **manifest.attached, **carried}


def _kind_rows(folder: Path, manifest: Manifest, sound: bool) -> list[tuple[str, str]]:
    construction = manifest.construction
    origin = construction.get("basis", construction)
    constructor = ", ".join(f"{name} {value}" for name, value in origin.items() if value is not None)
    parents = ", ".join(_short(parent) for parent in manifest.parents) or "none"
    if manifest.kind == "trajectory":
        steps = Trajectory(folder).steps
        return [
            (
                "points",
                f"{len(steps)}, after steps {', '.join(map(str, steps[:12]))}"
                + (" ..." if len(steps) > 12 else "")
                + " (the first is step 0)",
            )
        ]
    if manifest.kind == "adapter":
        return [
            ("basis", f"{_short(manifest.parents[0])}, {constructor}"),
            ("basis at", str(manifest.details.get("basis") or "not stored: rebuilt from its construction")),
            ("trained directly", ", ".join(construction.get("modules_to_save", [])) or "none"),
            ("ensemble", str(construction.get("ensemble"))),
        ]
    rows = [("made from", f"{constructor}; trajectories {parents}")]
    if sound:
        basis = Basis.from_pretrained(folder)
        ranks = sorted(set(basis.ranks.values()))
        rows.append(("rank", " to ".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))))
        for name, values in basis.spectrum.items():
            if len(values):
                shown = ", ".join(f"{value:.3g}" for value in values[:8].tolist())
                rows.append((f"sigma of {name}", shown + (" ..." if len(values) > 8 else "")))
    return rows


def _result_rows(folder: Path, sound: bool) -> list[tuple[str, str]]:
    path = folder / RESULT
    if not sound or not path.is_file():
        return []
    with reading(path):
        result = read_json(path)
        return [
            ("run", f"{result['method']} on {result['task']}, seed {result['seed']}, {result['epochs']} epochs"),
            ("score", f"{result['metric']} {result['score']:.4f} on held-out rows"),
        ]


def _short(digest: str | None) -> str:
    return f"{digest[:12]}..." if digest else "any"
