"""Exit 1 if the host's certificate and key do not belong together."""

import ssl

FOLDER = "/etc/llmkeep/pki"

ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(f"{FOLDER}/host.pem", f"{FOLDER}/host.key")
