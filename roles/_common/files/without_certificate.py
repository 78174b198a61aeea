#!/usr/bin/python3
"""without_certificate.py NAME PORT: the server's answer to a client that sends no certificate and waits."""

import socket
import ssl
import sys

name, port = sys.argv[1], int(sys.argv[2])
context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
context.minimum_version = ssl.TLSVersion.TLSv1_3
try:
    with (
        socket.create_connection((name, port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=name) as link,
    ):
        link.recv(1)
        print("the connection was closed without a reason")
except OSError as problem:
    print(problem)
