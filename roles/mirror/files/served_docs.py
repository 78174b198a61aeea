"""served_docs.py URL SITE POLICY: does the mirror serve the first page of this site, with this Content-Security-Policy?

Exit 0: yes, or the bundle has no site. Exit 1: prints the answer.
"""

import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

PAGE = "docs/README.html"


def main() -> int:
    url, site, policy = sys.argv[1:]
    page = Path(site, PAGE)
    if not page.exists():
        print("the bundle has no documentation site")
        return 0
    context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        with urllib.request.urlopen(f"{url}/docs/{PAGE}", context=context, timeout=5) as reply:  # noqa: S310
            same, header = reply.read() == page.read_bytes(), reply.headers["Content-Security-Policy"]
    except urllib.error.HTTPError as refusal:
        print(f"/docs/{PAGE} answered {refusal.code}")
        return 1
    print(f"the page is {'the' if same else 'not the'} bundle's; its policy: {header}")
    return int(not same or header != policy)


if __name__ == "__main__":
    sys.exit(main())
