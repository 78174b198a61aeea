"""A model on a hub, pinned to a commit, fetched with huggingface_hub's own client.

HF_ENDPOINT, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT, the proxies of the environment and SSL_CERT_FILE apply, as its documentation
says. `hf_hub_download` of 2.4 starts an interrupted file again (its temporary file has a random name, and is removed), so files
are fetched by the `http_get` below it, which continues at a byte.

"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmkeep.errors import printable
from llmkeep.models.contents import TENSORS, File
from llmkeep.models.refusal import DAMAGED, HUB, UNFIT, ModelRefused
from llmkeep.resumable import Resumable

PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
SOURCE = re.compile(rf"hub:(?P<repository>{PART}/{PART})(@(?P<commit>[^@\s]{{1,255}}))?")
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # sha256 of a file in LFS, git's of another one
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Hub:
    """A source: files with the hub's digests (sha256 of LFS files, git's blob id of others)."""

    checked_by = "the hub's digest"

    def __init__(self, source: str) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        try:
            from huggingface_hub import constants
        except ImportError as error:
            raise ModelRefused(
                UNFIT,
                f"{source}: huggingface_hub is not installed here ({error}); run it on the builder, after `make env`",
            ) from error
        match = SOURCE.fullmatch(source)
        if not match or ".." in source:
            raise ModelRefused(
                UNFIT, f"{source[:120]!r} is not a hub repository: write hub:OWNER/REPO@COMMIT"
            )
        self.repository = match["repository"]
        self.timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        parts = urlsplit(constants.ENDPOINT)
        self.endpoint = constants.ENDPOINT
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # without a password
        if parts.scheme != "https" and parts.hostname not in LOOPBACK:
            raise ModelRefused(
                UNFIT, f"HF_ENDPOINT is {self.shown}: hubs are contacted only by https; give an https address"
            )
        self.commit = match["commit"] or "the default branch"
        self._refuse_unpinned()
        self.name = self.repository.split("/")[1]
        self.source = f"hub:{self.repository}@{self.commit}"
        self.purl = f"pkg:huggingface/{self.repository}@{self.commit}"
        self.facts = {"repository": self.repository, "commit": self.commit, "endpoint": self.shown}

    def _refuse_unpinned(self) -> None:
        """Refuse a branch or tag, naming its present commit."""
        if re.fullmatch(r"[0-9a-f]{40}", self.commit):
            return
        with self._answering():
            now = self._info(None if " " in self.commit else self.commit).sha
        raise ModelRefused(
            UNFIT,
            f"{printable(self.commit)} may change at any time: pin the commit, at present hub:{self.repository}@{now}",
        )

    def _info(self, revision: str | None, files: bool = False) -> Any:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, library_name="llmkeep")
        return api.model_info(self.repository, revision=revision, files_metadata=files, timeout=self.timeout)

    def files(self) -> list[File]:
        """The files of the commit, with their digests."""
        from huggingface_hub import constants

        with self._answering():
            answer = self._info(self.commit, files=True)
            if answer.sha != self.commit:
                raise ModelRefused(
                    DAMAGED,
                    f"{self.shown} was asked for commit {self.commit} and answers with {answer.sha}: do not use this hub",
                )
            files = [
                File(item.rfilename, item.size, item.lfs.sha256 if item.lfs else None, item.blob_id)
                for item in answer.siblings
            ]
            for file in files:
                stated = file.blob if file.sha256 is None else file.sha256
                if not DIGEST.fullmatch(stated or "") or not isinstance(file.size, int) or file.size < 0:
                    raise ModelRefused(
                        DAMAGED,
                        f"{self.shown} states no size or digest for {printable(str(file.path))}: use a hub that does",
                    )
                if TENSORS.fullmatch(file.path) and file.size > (most := constants.MAX_HTTP_DOWNLOAD_SIZE):
                    raise ModelRefused(
                        UNFIT,
                        f"{file.path} has {file.size} bytes, but hubs send at most {most} by HTTP: "
                        "fetch it with `hf download --local-dir`, and give the directory",
                    )
        return files

    def folders(self) -> list[str]:
        """No folders apart from the files in them."""
        return []

    def copy(self, file: File, target: Resumable) -> None:
        """Continue to fetch a file into TARGET, and compare it with the hub's digest; TARGET is emptied if they differ."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers

        url = hf_hub_url(self.repository, file.path, revision=self.commit, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="llmkeep") | {"Accept-Encoding": "identity"}
        begin = target.resume()
        while True:
            with self._answering():
                http_get(
                    url,
                    target,  # type: ignore[arg-type]  # it writes, tells, seeks and truncates
                    resume_size=begin,
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.path,
                )
            actual, expected = (
                (target.digest(), file.sha256) if file.sha256 else (git_blob(target.path), file.blob)
            )
            if actual == expected:
                return
            target.seek(0)
            target.truncate()
            if begin == 0:
                raise ModelRefused(
                    DAMAGED,
                    f"{file.path} arrived with the digest {actual}, but the hub states {expected}: it is not used. Run it "
                    "again; if this recurs, a proxy or the hub alters files",
                    resumable=True,
                )
            begin = 0  # what an earlier run left was not of this file

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn the client's errors into one sentence with a remedy."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code
            raise ModelRefused(
                HUB,
                f"{self.shown} answered {status} for {self.repository}: {self._way(status, error.response)}",
            ) from error
        except OfflineModeIsEnabled as error:
            raise ModelRefused(HUB, "HF_HUB_OFFLINE is set: unset it, or give a directory") from error
        except httpx2.HTTPError as error:
            reason = printable(str(error)) or type(error).__name__
            raise ModelRefused(
                HUB,
                f"{self.shown} did not answer for {self.repository} ({reason}; the limit is {self.timeout} s of silence): "
                "check HF_ENDPOINT, proxy and network, and run it again",
            ) from error
        except HFValidationError as error:
            raise ModelRefused(UNFIT, f"{self.repository}: {error}; write hub:OWNER/REPO@COMMIT") from error
        except OSError as error:
            if error.errno is not None:  # of this machine
                raise
            raise ModelRefused(
                HUB, f"{self.shown} ended early: {error}; run it again, what was fetched is kept"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelRefused(
                HUB,
                f"{self.shown} returned an invalid answer for {self.repository} ({printable(str(error))}): check "
                "HF_ENDPOINT",
            ) from error

    def _way(self, status: int, response: Any) -> str:
        from huggingface_hub import get_token

        token = "a token was sent" if get_token() else "no token was sent"
        if status == 401:
            return f"it is private, gated or missing, and {token}; check its name, and set HF_TOKEN"
        if status == 403:
            return f"{token}, which does not permit this; accept its terms on the hub's page, or set another HF_TOKEN"
        if status == 404:
            return f"no such repository, commit or file ({printable(self.commit)}); compare it with the hub's page"
        if status == 429:
            wait = response.headers.get("retry-after")
            after = f" after {printable(wait)} s" if wait else " later"
            return f"too many requests, and {token}; run it again{after}, what was fetched is kept"
        return "run it again later, what was fetched is kept"


def git_blob(path: Path) -> str:
    """The id that git gives to a file with these bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
