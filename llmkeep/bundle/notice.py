"""NOTICE: the third-party content of a bundle, and its licences. The licence texts are in the artifacts themselves."""

from collections.abc import Iterable

from llmkeep.bundle import licences
from llmkeep.bundle.lock import Artifact

NAME = "NOTICE"
HEADER = """\
llmkeep, Apache-2.0: see tree/LICENSE.

This bundle contains the following third-party artifacts, by licence as an SPDX expression;
for LicenseRef-… and NOASSERTION see the artifact. The texts are in the artifacts: a Debian package's in
usr/share/doc/NAME/copyright, a wheel's in NAME.dist-info, a model's and a script's beside it.
"""


def text(artifacts: Iterable[Artifact]) -> str:
    """The text of NOTICE, sorted by licence. The same artifacts give the same text."""
    by_licence: dict[str, set[str]] = {}
    for artifact in artifacts:
        by_licence.setdefault(licences.spdx(artifact.licence), set()).add(artifact.purl)
    parts = [
        f"{expression}\n" + "".join(f"  {purl}\n" for purl in sorted(purls))
        for expression, purls in sorted(by_licence.items())
    ]
    return "\n".join([HEADER, *parts])
