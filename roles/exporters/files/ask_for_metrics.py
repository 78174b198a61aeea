"""ask_for_metrics.py HOST PORT CERTIFICATE KEY PATH[=SAMPLE]…: the status of each GET, and whether it has samples, or this one.

CERTIFICATE and KEY may be empty: the client then has none.
"""

import http.client
import ssl
import sys

host, port, certificate, key, *paths = sys.argv[1:]
context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
if certificate:
    context.load_cert_chain(certificate, key)
for path, _, sample in (word.partition("=") for word in paths):
    connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
    connection.request("GET", path)
    answer = connection.getresponse()
    samples = [line for line in answer.read().decode().splitlines() if line[:1] not in ("#", "")]
    complete = answer.status == 200 and (sample in samples if sample else samples)
    print(answer.status, path, "with samples" if complete else "without samples")
