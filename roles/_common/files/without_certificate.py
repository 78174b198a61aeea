#!/usr/bin/python3
"""without_certificate.py NAME PORT: what the server there says to a client that shows no certificate."""

import http.client
import ssl
import sys

context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
context.minimum_version = ssl.TLSVersion.TLSv1_3
link = http.client.HTTPSConnection(sys.argv[1], int(sys.argv[2]), timeout=5, context=context)
try:
    link.request("GET", "/")
    print(link.getresponse().status)
except OSError as problem:
    print(problem)
