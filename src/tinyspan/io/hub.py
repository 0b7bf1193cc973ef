"""Download and upload of bases and adapters, with a model card, on the Hugging Face hub.

Only manifests, safetensors files and the model card are transferred. Downloaded files are compared with the hashes in
the manifest, as in any folder. The hub is contacted only if a name is not a local folder.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from tinyspan.errors import InputError, StorageError
from tinyspan.io.manifests import MANIFEST, Manifest, read_manifest, write_manifest
from tinyspan.io.storage import reading

__all__ = ["anonymize", "card", "downloaded", "fetched", "push"]

CARD = "README.md"
FILES = (f"*{MANIFEST}", "*.safetensors", CARD)  # the star also matches slashes
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
MODEL = re.compile(r"(?:[\w.-]+/)?[\w.-]+")  # models of the hub's first years, such as gpt2, have no user


def fetched(
    name: str | Path, revision: str | None = None, token: str | None = None, files: Sequence[str] = FILES
) -> Path:
    """Return the folder of a basis or adapter: the local folder of this name, or the cached copy of a hub repository.

    Args:
        name: a folder, or the id of a repository, `user/name`.
        revision: branch, tag or commit of the repository.
        token: access token for a private repository; by default the token of the logged-in user.
        files: patterns of the files to download.

    Raises:
        InputError: neither a folder nor a repository of this name exists, the repository has no such revision, or it is
            gated and the token has no access.
        StorageError: the hub cannot be reached, and the cache has no copy.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise InputError(f"{name} is a local folder, which has no revision {revision!r}")
        return Path(name)
    return downloaded(str(name), revision, token, files)


def downloaded(name: str, revision: str | None = None, token: str | None = None, files: Sequence[str] = FILES) -> Path:
    """Return the folder of a hub repository in the cache, downloading it if necessary; see `fetched`."""
    if not REPOSITORY.fullmatch(name):
        raise InputError(f"{name} is neither a folder nor the id of a repository on the hub (user/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise InputError(
            f"{name} on the hub is gated: ask for access on its page, then log in with `hf auth login`, or pass token="
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise InputError(f"{name} is not a local folder, and the hub has no such repository{at}") from error
    except Exception as error:  # of the hub, or of the HTTP library that the client uses
        raise StorageError(f"{name} is not a local folder, and the hub cannot be reached: {error}") from error


def anonymize(folder: Path, carried: bool) -> None:
    """Remove the local paths of the basis and of the model from the manifests."""
    manifest = read_manifest(folder)
    if carried:
        anonymize(folder / manifest.details["basis"], False)
    else:
        manifest.details["basis"] = None
    if not MODEL.fullmatch(manifest.details.get("model") or "") or Path(manifest.details["model"]).exists():
        manifest.details["model"] = None
    write_manifest(folder, manifest)


def push(
    folder: Path, repository: str, *, carried: bool = False, private: bool | None, token: str | None, message: str
) -> tuple[str, str]:
    """Upload a folder's files with a model card, and return the full name of the repository and the commit.

    Args:
        folder: a copy made for the upload: local paths are removed from its manifest, and a model card is added.
        repository: id of the repository, `user/name`.
        carried: whether the folder is an adapter that contains its basis.
        private: whether the repository is created as private.
        token: access token with write permission.
        message: commit message.

    Raises:
        InputError: the hub rejects the name or the token.
        StorageError: the hub cannot be reached, or an upload fails.
    """
    anonymize(folder, carried)
    (folder / CARD).write_text(card(folder, repository))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=message, allow_patterns=list(FILES)
        )
    except HFValidationError as error:
        raise InputError(f"{repository!r} is not a valid id of a repository on the hub: {error}") from error
    except Exception as error:  # of the hub, or of the HTTP library that the client uses
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"this token has no permission to write {repository}: {error}; log in with `hf auth login`"
            ) from error
        raise StorageError(f"{repository} could not be pushed: {error}") from error
    return str(url.repo_id), str(commit.oid)


def card(folder: Path, repository: str | None = None) -> str:
    """Return the model card of a basis or adapter, written from its manifest.

    Args:
        folder: folder of the basis or adapter.
        repository: id of the repository in the card; `user/name` by default.

    Raises:
        InputError: the folder is not a basis or an adapter.
        StorageError: its manifest is damaged.
    """
    manifest = read_manifest(folder)
    with reading(folder / MANIFEST):
        carried = read_manifest(folder / "basis") if manifest.details.get("basis") == "basis" else None
        return "\n".join([*_header(manifest), *_body(manifest, carried, repository or "user/name"), ""])


def _header(manifest: Manifest) -> list[str]:
    model = manifest.details.get("model")
    base = [f"base_model: {model}"] if model and MODEL.fullmatch(model) else []
    return ["---", "library_name: tinyspan", *base, "tags:", "- tinyspan", f"- {manifest.kind}", "---", ""]


def _body(manifest: Manifest, carried: Manifest | None, repository: str) -> list[str]:
    construction = manifest.construction.get("basis", manifest.construction)
    files = [*manifest.files.values(), *(carried.files.values() if carried else ())]
    size = sum(entry.bytes for entry in files)
    blocks = [block["name"] for block in manifest.partition]
    rows = [
        ("model", manifest.details.get("model") or "not named"),
        ("blocks", f"{len(blocks)}, {blocks[0]} .. {blocks[-1]}"),
        ("basis", ", ".join(f"{key} {value}" for key, value in construction.items() if value is not None)),
        ("size", f"{size / 1e6:,.2f} MB"),
    ]
    if manifest.kind == "adapter":
        modules = ", ".join(manifest.construction.get("modules_to_save", [])) or "nothing"
        rows += [("trained beside z", modules), ("basis hash", f"`{manifest.parents[0]}`")]
        pushed = manifest.details.get("basis_on_hub")
        where = "It contains its basis." if carried else "Its basis is generated again from its seed."
        if pushed:
            where = f"Its basis is `{pushed}` and is downloaded with it."
        what = "z, a few numbers per layer, and the modules trained beside it: an adapter of"
        use = [
            "from tinyspan import SubspaceModel",
            f'model = SubspaceModel.from_pretrained(base_model, "{repository}")',
        ]
    else:
        rows.append(("hash", f"`{manifest.content_hash()}`"))
        where = "Each block's map is stored in its own safetensors file."
        what = "The directions along which a model fine-tunes, V in theta = theta_0 + V z: a basis of"
        use = [
            "from tinyspan import Basis, SubspaceModel",
            f'model = SubspaceModel(base_model, Basis.from_pretrained("{repository}"))',
        ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    name = repository.rpartition("/")[2]
    return [f"# {name}", "", f"{what} tinyspan. {where}", "", *table, "",
            "`base_model` must hold exactly the weights it was created from; others are rejected with an error.", "",
            "```python", *use, "```"]  # fmt: skip
