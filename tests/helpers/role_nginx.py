"""nginx as _common and one more role configure it, in a folder of its own."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plugin_modules import ROOT
from waiting import until

# An expression for `rendered`, which gives `made["nginx"]`; `_common_nginx_user` has to be root, whose folder it is.
COMMON = {"nginx": f"lookup('ansible.builtin.template', '{ROOT}/roles/_common/templates/nginx.conf.j2')"}
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def configuration(folder: Path, common: str, server: str, instead: dict[str, str] | None = None) -> str:
    """nginx.conf with the role's file in it, certificates in FOLDER/pki, and what is INSTEAD of other texts."""
    paths = "".join(f"{each}_temp_path {folder}/{each};\n" for each in TEMPORARY)
    text = re.sub(r"include /etc/nginx/conf.d.*;", lambda _: paths + server, common)
    for there, here in {"/etc/llmkeep/pki": f"{folder}/pki", **(instead or {})}.items():
        assert there in text
        text = text.replace(there, here)
    return text


@contextmanager
def running(folder: Path, configured: str) -> Iterator[None]:
    """nginx, in the network namespace of this thread; its errors go to FOLDER/nginx.log."""
    (folder / "nginx.conf").write_text(configured)
    options = ["-c", str(folder / "nginx.conf"), "-g", f"daemon off; pid {folder}/nginx.pid;"]
    process = subprocess.Popen(["nginx", *options], stderr=(folder / "nginx.log").open("w"))
    try:
        until((folder / "nginx.pid").exists)
        yield
    finally:
        process.terminate()
        process.wait()
