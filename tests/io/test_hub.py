"""Bases and adapters on a hub: a stand-in on the loopback address, spoken to by the real client."""

import base64
import hashlib
import json
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from torch import Tensor
from towers import Tower

from tinyspan import Basis, InputError, StorageError, SubspaceModel, by_layer, random_basis
from tinyspan.io.hub import anonymize, card, fetched


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as `create_repo`, `upload_folder` and `snapshot_download` ask of it."""

    commits: dict[str, dict[str, bytes]]  # commit -> files
    heads: dict[str, str]  # repository -> commit
    asked: list[str]
    private = ""  # who reads repositories whose names begin so needs a token

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        else:
            repository, revision = "/".join(parts[:2]), parts[3]
        hidden = self.private and repository.startswith(self.private)
        if repository not in self.heads or (hidden and self.headers.get("Authorization") != "Bearer right"):
            return self.reply({"error": "absent"}, 404, X_Error_Code="RepoNotFound")
        commit = self.heads[repository] if revision == "main" else revision
        if commit not in self.commits:
            return self.reply({"error": "absent"}, 404, X_Error_Code="RevisionNotFound")
        files = self.commits[commit]
        if parts[4:5] == ["tree"]:
            found = [(name, len(data), hashlib.sha1(data).hexdigest()) for name, data in files.items()]
            return self.reply([{"type": "file", "path": n, "size": size, "oid": oid} for n, size, oid in found])
        if parts[:2] == ["api", "models"]:
            siblings = [{"rfilename": name} for name in files]
            return self.reply({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})
        data = files["/".join(parts[4:])]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.reply(data, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="none")

    def do_POST(self) -> None:
        self.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != "Bearer right":
            return self.reply({"error": "who are you?"}, 401)
        if self.path.startswith("/api/repos/create"):
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'me'}/{asked['name'].rpartition('/')[2]}"
            self.heads.setdefault(repository, "0" * 40)
            self.commits.setdefault("0" * 40, {})
            return self.reply({"url": f"http://{self.headers['Host']}/{repository}", "id": repository})
        if self.path == "/api/validate-yaml":  # of the model card
            assert "library_name: tinyspan" in json.loads(body)["content"]
            return self.reply({"errors": [], "warnings": []})
        repository = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.reply({"files": files})
        assert parts[4] == "commit", self.path
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        commit = hashlib.sha1(body).hexdigest()
        self.commits[commit] = {**self.commits[self.heads[repository]], **files}
        self.heads[repository] = commit
        return self.reply(
            {"commitUrl": f"http://{self.headers['Host']}/{repository}/commit/{commit}", "commitOid": commit}
        )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Serve an empty hub, and return the environment in which no other is known."""
    kind = type("Served", (Hub,), {"commits": {}, "heads": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "right",
    }
    server.shutdown()
    server.server_close()


def run(hub: dict[str, str], code: str, **environment: str) -> str:
    """Run code with a fresh huggingface_hub, which reads the environment when it is imported; return what it prints."""
    start = """
        import torch
        from towers import Tower
        from tinyspan import *
        tokens = torch.arange(12).view(3, 4) % 11
        basis = random_basis(by_layer(Tower()), 3, seed=5, density=0.5, dtype=torch.float64)
        partition = by_layer(Tower())
        dense = Basis.from_directions(partition, {b.name: torch.eye(2, b.numel).double() for b in partition})
    """
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed, torch.random.fork_rng():
        for name, value in (hub | environment).items():
            patch.setenv(name, value)
        patch.chdir(Path(hub["HF_HOME"]).parent)
        for name in imported("huggingface_hub"):
            patch.delitem(sys.modules, name)
        try:
            exec(textwrap.dedent(start) + textwrap.dedent(code), {})
        finally:
            for name in imported("huggingface_hub"):
                del sys.modules[name]
    return printed.getvalue()


def imported(package: str) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == package]


def test_an_adapter_goes_to_the_hub_and_comes_back_with_its_basis(hub: dict[str, str], tmp_path: Path) -> None:
    pushed = run(
        hub,
        """
        subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"], init_std=0.5)
        print(subspace.push_to_hub("me/sparse"), float(subspace(tokens).detach().sum()))
        """,
    ).split()
    fetch = """
        subspace = SubspaceModel.from_pretrained(Tower(), "me/sparse", revision=REVISION)
        print(float(subspace(tokens).detach().sum()))
        subspace.load_adapter("me/sparse", "again")
    """
    for revision in ("None", repr(pushed[0])):
        assert run(hub, fetch.replace("REVISION", revision)).split()[0] == pushed[1]
    # the cache, whose snapshots are links to blobs, serves without the hub
    assert run(hub, fetch.replace("REVISION", "None"), HF_HUB_OFFLINE="1").split()[0] == pushed[1]
    links = [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.is_symlink()]
    assert len(links) == 3  # z and two blocks
    target = links[0].resolve()
    target.write_bytes(target.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StorageError):
        run(hub, fetch.replace("REVISION", "None"), HF_HUB_OFFLINE="1")


def test_an_adapter_names_the_basis_that_was_pushed_before(hub: dict[str, str]) -> None:
    expected = run(
        hub,
        """
        subspace = SubspaceModel(Tower(), dense, modules_to_save=["head"], init_std=0.5)
        try:
            subspace.push_to_hub("me/adapter")
        except InputError as error:
            print("basis.push_to_hub() it first" in str(error))
        dense.save_pretrained("secret-project/basis")
        dense.push_to_hub("me/basis")
        subspace.push_to_hub("me/adapter")
        print(float(subspace(tokens).detach().sum()))
        """,
    ).split()
    assert expected[0] == "True"
    found = run(
        hub,
        """
        subspace = SubspaceModel.from_pretrained(Tower(), "me/adapter")
        print(float(subspace(tokens).detach().sum()), subspace.basis.on_hub.partition("@")[0])
        import huggingface_hub, pathlib
        folder = pathlib.Path(huggingface_hub.snapshot_download("me/adapter"))
        assert not any(b"secret-project" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
        subspace.push_to_hub("me/copy")  # its basis is known to be there
        print(Basis.from_pretrained("me/basis").content_hash() == dense.content_hash())
        """,
    ).split()
    assert found == [expected[1], "me/basis", "True"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ('Basis.from_pretrained("me/absent")', "the hub has no such repository"),
        ('SubspaceModel.from_pretrained(Tower(), "me/absent", revision="v2")', "at revision 'v2'"),
        ('Basis.from_pretrained("no such folder!")', "nor the id of a repository"),
        ('basis.push_to_hub("a/b/c")', "not a valid id of a repository"),
    ],
)
def test_what_the_hub_does_not_have_is_told(hub: dict[str, str], call: str, message: str) -> None:
    found = run(hub, f"try:\n    {call}\nexcept InputError as error:\n    print(error)")
    assert message in found


def test_an_adapter_in_a_drawn_basis_needs_none_on_the_hub(hub: dict[str, str], tmp_path: Path) -> None:
    """Also if that was once saved to a folder of the one who pushes."""
    found = run(
        hub,
        """
        drawn = random_basis(by_layer(Tower()), 3)
        drawn.save_pretrained(FOLDER)
        SubspaceModel(Tower(), drawn).push_to_hub("me/drawn")
        print(SubspaceModel.from_pretrained(Tower(), "me/drawn").basis.content_hash() == drawn.content_hash())
        """.replace("FOLDER", repr(str(tmp_path / "drawn"))),
    )
    assert found.split() == ["True"]


def test_a_token_opens_the_basis_too(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(
        hub,
        """
        dense.push_to_hub("me/private-basis")
        SubspaceModel(Tower(), dense, init_std=0.5).push_to_hub("me/private-adapter")
        """,
    )
    monkeypatch.setattr(Hub, "private", "me/private")
    found = run(
        hub,
        """
        try:
            SubspaceModel.from_pretrained(Tower(), "me/private-adapter")
        except InputError as error:
            print(error)
        subspace = SubspaceModel.from_pretrained(Tower(), "me/private-adapter", token="right")
        subspace.load_adapter("me/private-adapter", "again", revision="main", token="right")
        print(subspace.basis.content_hash() == dense.content_hash(), subspace.adapters)
        """,
        HF_TOKEN="",
        HF_HOME=hub["HF_HOME"] + "-of-another",
    )
    refused, opened = found.splitlines()
    assert refused.startswith("me/private-adapter is not a local folder, and the hub has no such repository")
    assert opened == "True ['default', 'again']"


def test_what_is_pushed_tells_nothing_of_this_machine(hub: dict[str, str], tmp_path: Path) -> None:
    """Nor does the basis that an adapter carries, whose bytes are counted with it."""
    model = Tower()
    model.name_or_path = str(tmp_path / "secret-project")  # type: ignore[assignment]
    basis = random_basis(by_layer(model), 3, density=0.5)
    basis.model_name = model.name_or_path  # type: ignore[assignment]
    subspace = SubspaceModel(model, basis)
    subspace.save_pretrained(tmp_path / "adapter")
    assert "secret-project" in (tmp_path / "adapter/basis/manifest.json").read_text()
    anonymize(tmp_path / "adapter", carried=True)
    for path in (tmp_path / "adapter").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    assert Basis.from_pretrained(tmp_path / "adapter/basis").content_hash() == basis.content_hash()
    for name in ("gpt2", "google/electra-base"):  # of the hub
        basis.model_name = name
        basis.save_pretrained(tmp_path / name)
        anonymize(tmp_path / name, carried=False)
        assert f"base_model: {name}" in card(tmp_path / name)
    held = sum(path.stat().st_size for path in (tmp_path / "adapter").rglob("*.safetensors"))
    assert f"| size | {held / 1e6:,.2f} MB |" in card(tmp_path / "adapter")


def test_a_token_that_may_not_write_is_told(hub: dict[str, str]) -> None:
    found = run(
        hub, 'try:\n    basis.push_to_hub("me/b", token="wrong")\nexcept InputError as error:\n    print(error)'
    )
    assert "has no permission to write me/b" in found


def test_a_hub_that_cannot_be_reached_is_told(hub: dict[str, str]) -> None:
    code = 'try:\n    Basis.from_pretrained("me/b")\nexcept StorageError as error:\n    print(error)'
    assert "cannot be reached" in run(hub, code, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (GatedRepoError.__new__(GatedRepoError), InputError, "me/b on the hub is gated: ask for access"),
        (RuntimeError("proxy"), StorageError, "cannot be reached: proxy"),  # as of the HTTP library or of Xet
    ],
)
def test_other_errors_of_the_hub_are_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind, match=message):
        fetched("me/b")


def test_folders_are_used_as_they_are(tmp_path: Path, tokens: Tensor) -> None:
    basis = random_basis(by_layer(Tower()), 3)
    basis.save_pretrained(tmp_path / "b")
    assert fetched(tmp_path / "b") == tmp_path / "b"
    assert Basis.from_pretrained(tmp_path / "b").on_hub is None
    with pytest.raises(InputError, match="no revision"):
        fetched(tmp_path / "b", revision="main")
    for absent in (tmp_path / "absent", "a b", "../x/y"):
        with pytest.raises(InputError, match="neither a folder nor"):
            fetched(absent)


def test_a_link_out_of_a_folder_that_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    """Also one that calls itself so: the links of a snapshot lead to the blobs beside it, nowhere else."""
    random_basis(by_layer(Tower()), 3).save_pretrained(tmp_path / "repo/snapshots/abc")
    block = tmp_path / "repo/snapshots/abc/block-000.safetensors"
    for place, sound in ((tmp_path / "repo/blobs", True), (tmp_path / "elsewhere", False)):
        place.mkdir()
        block.replace(place / "x") if not block.is_symlink() else (tmp_path / "repo/blobs/x").replace(place / "x")
        block.unlink(missing_ok=True)
        block.symlink_to(place / "x")
        if sound:
            assert Basis.from_pretrained(block.parent).maps["layers.0"].rank == 3
        else:
            with pytest.raises(StorageError, match="leaves the folder"):
                Basis.from_pretrained(block.parent)


def test_the_card_tells_what_a_reader_needs(tmp_path: Path) -> None:
    basis = random_basis(by_layer(Tower()), 3, density=0.5)
    basis.save_pretrained(tmp_path / "b")
    text = card(tmp_path / "b", "me/basis")
    assert basis.content_hash() in text
    assert 'Basis.from_pretrained("me/basis")' in text
    SubspaceModel(Tower(), basis, modules_to_save=["head"]).save_pretrained(tmp_path / "a")
    text = card(tmp_path / "a", "me/adapter")
    for part in ("contains its basis", "head", basis.content_hash(), '"me/adapter")', "density 0.5"):
        assert part in text
    assert text.startswith("---\nlibrary_name: tinyspan\n")
