"""Exit 1 where the host's certificate and its key do not belong together."""

import ssl

FOLDER = "/etc/llmkeep/pki"

ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(f"{FOLDER}/host.pem", f"{FOLDER}/host.key")
