#!/usr/bin/python3
"""ask_engine.py NAME PORT CERTIFICATE KEY PROTOCOL…: how the host NAME answers a gateway that asks for these engines.

A line for each: `offered`, `closed` once the connection was there, `refused` by TLS, or the error. CERTIFICATE and KEY are
empty for a client without one.
"""

import socket
import ssl
import sys

name, port, certificate, key, *protocols = sys.argv[1:]


def first_byte(link: ssl.SSLSocket) -> bytes:
    """What the engine sends first: its introduction, or the answer of a server of OpenAI's API, which speaks only when asked."""
    link.settimeout(1)
    try:
        return link.recv(1)
    except TimeoutError:
        link.settimeout(5)
        link.sendall(b"GET /health HTTP/1.1\r\nhost: engine\r\n\r\n")
        return link.recv(1)


for protocol in protocols:
    context = ssl.create_default_context(cafile="/etc/llmkeep/pki/root.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([protocol])
    if certificate:
        context.load_cert_chain(certificate, key)
    try:
        with (
            socket.create_connection((name, int(port)), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=name) as link,
        ):
            print(f"{protocol}: {'offered' if first_byte(link) else 'closed'}")
    except ConnectionResetError:
        print(f"{protocol}: closed")
    except ssl.SSLError:
        print(f"{protocol}: refused")
    except OSError as problem:
        print(f"{protocol}: {type(problem).__name__}")
