"""Bases and adapters on the Hugging Face hub: fetched into its cache, pushed with a model card.

Only manifests, safetensors files and the card travel; what arrives is compared with the manifest's hashes
like any folder. Nothing here runs unless a name is no folder of this machine.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from tinyspan.errors import InputError, StorageError
from tinyspan.io.storage import MANIFEST, Manifest, read_manifest, reading, write_manifest

__all__ = ["anonymize", "card", "downloaded", "fetched", "push"]

CARD = "README.md"
FILES = (f"*{MANIFEST}", "*.safetensors", CARD)  # a star crosses folders
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def fetched(
    name: str | Path, revision: str | None = None, token: str | None = None, files: Sequence[str] = FILES
) -> Path:
    """Return the folder of a basis or adapter: the one of this name, or the hub's repository as it lies in the cache.

    Args:
        name: a folder, or a repository's id, `user/name`.
        revision: of the repository: branch, tag or commit.
        token: for a private one, if it is not the one that is logged in.
        files: patterns of those that are wanted of a repository.

    Raises:
        InputError: there is no such folder, and no such repository or revision.
        StorageError: the hub cannot be reached, and the cache has no copy.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"{name} is a folder of this machine, which has no revision {revision!r}")
        return Path(name)
    return downloaded(str(name), revision, token, files)


def downloaded(name: str, revision: str | None = None, token: str | None = None, files: Sequence[str] = FILES) -> Path:
    """Return where a repository of the hub lies in the cache, fetched if it is not there; see `fetched`."""
    if not REPOSITORY.fullmatch(name):
        raise InputError(f"{name} is no folder, and no id of a repository on the hub (user/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=list(files)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise InputError(f"{name} is no folder of this machine, and the hub has no such repository{at}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise StorageError(
            f"{name} is no folder of this machine, and the hub cannot be reached to fetch it: {error}"
        ) from error


def anonymize(folder: Path, carried: bool) -> None:
    """Take out of manifests what tells of this machine: paths of the basis and of the model."""
    manifest = read_manifest(folder)
    if carried:
        anonymize(folder / manifest.details["basis"], False)
    else:
        manifest.details["basis"] = None
    if not REPOSITORY.fullmatch(manifest.details.get("model") or "") or Path(manifest.details["model"]).exists():
        manifest.details["model"] = None
    write_manifest(folder, manifest)


def push(
    folder: Path, repository: str, *, carried: bool = False, private: bool | None, token: str | None, message: str
) -> tuple[str, str]:
    """Upload a folder's files with a model card, and return the repository's full name and the commit they became.

    Args:
        folder: of a copy made for this: its manifest loses what tells of this machine, and a card is written there.
        repository: where to, `user/name`.
        carried: whether it is an adapter that carries its basis.
        private: whether the repository is made private.
        token: for writing.
        message: of the commit.

    Raises:
        InputError: the hub refuses the name or the token.
        StorageError: it cannot be reached, or an upload fails.
    """
    anonymize(folder, carried)
    (folder / CARD).write_text(card(folder, repository))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=message, allow_patterns=list(FILES)
        )
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no id of a repository on the hub: {error}") from error
    except Exception as error:  # of the hub, or of whatever library the client speaks to it with
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise InputError(f"the hub does not let this token write {repository}: {error}; `hf auth login`") from error
        raise StorageError(f"{repository} could not be pushed: {error}") from error
    return str(url.repo_id), str(done.oid)


def card(folder: Path, repository: str | None = None) -> str:
    """Return the model card of a basis or adapter, written from its manifest.

    Args:
        folder: of the basis or adapter.
        repository: where it will lie; by default the card says `user/name`.

    Raises:
        InputError: the folder is neither.
        StorageError: its manifest is damaged.
    """
    manifest = read_manifest(folder)
    with reading(folder / MANIFEST):
        carried = read_manifest(folder / "basis") if manifest.details.get("basis") == "basis" else None
        return "\n".join([*_header(manifest), *_body(manifest, carried, repository or "user/name"), ""])


def _header(manifest: Manifest) -> list[str]:
    model = manifest.details.get("model")
    base = [f"base_model: {model}"] if model and REPOSITORY.fullmatch(model) else []
    return ["---", "library_name: tinyspan", *base, "tags:", "- tinyspan", f"- {manifest.kind}", "---", ""]


def _body(manifest: Manifest, carried: Manifest | None, repository: str) -> list[str]:
    made = manifest.construction.get("basis", manifest.construction)
    files = [*manifest.files.values(), *(carried.files.values() if carried else ())]
    size = sum(entry.bytes for entry in files)
    blocks = [block["name"] for block in manifest.partition]
    rows = [
        ("model", manifest.details.get("model") or "not named"),
        ("blocks", f"{len(blocks)}, {blocks[0]} .. {blocks[-1]}"),
        ("basis", ", ".join(f"{key} {value}" for key, value in made.items() if value is not None)),
        ("size", f"{size / 1e6:,.2f} MB"),
    ]
    if manifest.kind == "adapter":
        ordinary = ", ".join(manifest.construction.get("modules_to_save", [])) or "nothing"
        rows += [("trained beside z", ordinary), ("basis hash", f"`{manifest.parents[0]}`")]
        pushed = manifest.details.get("basis_on_hub")
        where = "It carries its basis along." if carried else "Its basis is made again from its seed."
        if pushed:
            where = f"Its basis is `{pushed}`, fetched with it."
        what = "z, a few numbers per layer, and the modules trained beside it: an adapter of"
        use = [
            "from tinyspan import SubspaceModel",
            f'model = SubspaceModel.from_pretrained(base_model, "{repository}")',
        ]
    else:
        rows.append(("hash", f"`{manifest.content_hash()}`"))
        where = "Every block's map lies in a safetensors file of its own."
        what = "The directions along which a model fine-tunes, V in theta = theta_0 + V z: a basis of"
        use = [
            "from tinyspan import Basis, SubspaceModel",
            f'model = SubspaceModel(base_model, Basis.from_pretrained("{repository}"))',
        ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    name = repository.rpartition("/")[2]
    return [f"# {name}", "", f"{what} [tinyspan](https://pypi.org/project/tinyspan/). {where}", "", *table, "",
            "`base_model` holds the weights it was made from, to the bit; others are refused by name.", "",
            "```python", *use, "```"]  # fmt: skip
