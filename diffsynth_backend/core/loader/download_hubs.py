"""What a model hub holds: the files of a repository with size, checksum and address, asked through the hub's library.

The libraries know addresses, mirrors, logins and revisions, so they list. They do not fetch: neither promises that a
file appears under its name only when it is whole, checks the space first, can be cancelled, or continues a file that
the other hub began. `download_file` does that, the same way for both.

HUBS may be extended: name -> function(model_id, revision) -> list of RemoteFile.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash

SECONDS = 30.0  # for an answer


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `path` is relative to it, as the hub says and thus not to be trusted.

    checksum: "sha256:…", or "git:…", the SHA-1 by which git names a content; None if the hub publishes none.
    headers: what the hub wants to be asked with. They may hold the user's token, so they are not shown.
    """

    path: str
    size: int
    checksum: str | None
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def new_hash(self) -> _Hash:
        """An empty hash of the checksum's kind."""
        if (self.checksum or "").startswith("git:"):
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return hashlib.sha256()

    def is_content(self, content: _Hash) -> bool:
        """Whether a hash over a whole content is this file's; always, if no checksum is published."""
        return self.checksum is None or content.hexdigest() == self.checksum.partition(":")[2]


Hub = Callable[[str, "str | None"], list[RemoteFile]]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


def _checksum(sha256: str | None, git: str | None = None) -> str | None:
    if sha256 and _SHA256.fullmatch(sha256.lower()):
        return f"sha256:{sha256.lower()}"
    return f"git:{git}" if git and _SHA1.fullmatch(git) else None


def _modelscope(model_id: str, revision: str | None) -> list[RemoteFile]:
    from modelscope_hub import HubApi, HubConfig

    config = HubConfig()  # a fresh one reads endpoint and token from the environment again
    hub, revision = HubApi(config), revision or "master"
    cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in hub.get_cookies() or ())
    headers = {"Cookie": cookies} if cookies else {}
    return [
        RemoteFile(file.path, file.size, _checksum(file.sha256),
                   _modelscope_url(config.endpoint, model_id, revision, file.path), headers)
        for file in hub.list_repo_files(model_id, "model", revision=revision)
        if file.type != "tree"
    ]  # fmt: skip


def _modelscope_url(endpoint: str, model_id: str, revision: str, path: str) -> str:
    query = urllib.parse.urlencode({"Revision": revision, "FilePath": path})
    return f"{endpoint}/api/v1/models/{model_id}/repo?{query}"


def _huggingface(model_id: str, revision: str | None) -> list[RemoteFile]:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    hub, headers = HfApi(), build_hf_headers()
    info = hub.model_info(model_id, revision=revision, files_metadata=True, timeout=SECONDS)
    files = []
    for file in info.siblings or ():
        # the commit rather than the branch: all files are of one version, even if a new one is published meanwhile
        url = hf_hub_url(model_id, file.rfilename, revision=info.sha, endpoint=hub.endpoint)
        checksum = _checksum(file.lfs["sha256"]) if file.lfs else _checksum(None, file.blob_id)
        files.append(RemoteFile(file.rfilename, file.size, checksum, url, headers))
    return files


HUBS: dict[str, Hub] = {"modelscope": _modelscope, "huggingface": _huggingface}
