"""ask_monitors.py PORT CERTIFICATE KEY PATH HOST…: what each host answers to GET PATH: that it has series, else its status.

CERTIFICATE and KEY may be empty: the client then has none.
"""

import http.client
import json
import ssl
import sys

port, certificate, key, path, *hosts = sys.argv[1:]
context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
if certificate:
    context.load_cert_chain(certificate, key)
for host in hosts:
    connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        series = "/query?" in path and answer.status == 200 and json.loads(body)["data"]["result"]
        print(host, "has series" if series else answer.status)
    except OSError as error:
        print(host, type(error).__name__)
