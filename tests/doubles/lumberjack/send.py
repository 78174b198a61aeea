#!/usr/bin/python3
"""send.py NAME PORT DOCUMENT: one document to the receiver there, by Lumberjack v2 and this host's certificate."""

import socket
import ssl
import struct
import sys

context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.load_cert_chain("/etc/llmkeep/pki/host.pem", "/etc/llmkeep/pki/host.key")
body = sys.argv[3].encode()
with (
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as plain,
    context.wrap_socket(plain, server_hostname=sys.argv[1]) as link,
):
    link.sendall(b"2W" + struct.pack(">I", 1) + b"2J" + struct.pack(">II", 1, len(body)) + body)
    said = b""
    while said[-6:] != b"2A" + struct.pack(">I", 1):
        part = link.recv(64)
        if not part:
            sys.exit("it closed the connection and acknowledged nothing")
        said += part
print("acknowledged")
