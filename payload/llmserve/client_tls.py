"""TLS for a client of another host's server: version 1.3 only, with this host's certificate."""

import ssl

from llmcore.config import ConfigError
from llmserve.settings import ClientTls


class ClientContext:
    """Loads certificates and revocation lists, and reloads them when a file changes."""

    def __init__(self, tls: ClientTls, server: str, alpn: str | None = None) -> None:
        """`server`: the address for messages. `alpn`: the only protocol that is offered. Nothing is read yet."""
        self.server = server
        self.alpn = alpn
        self.tls = tls
        self.files = [tls.ca, tls.certificate, tls.key, *([tls.crl] if tls.crl else [])]
        self.context: ssl.SSLContext | None = None
        self.loaded: list[int] = []

    def get(self) -> ssl.SSLContext:
        """The context for the current files; raises ConfigError if they are unusable."""
        try:
            times = [file.stat().st_mtime_ns for file in self.files]
            if self.context and times == self.loaded:
                return self.context
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            if self.alpn:
                context.set_alpn_protocols([self.alpn])
            context.load_verify_locations(self.tls.ca)
            context.load_cert_chain(self.tls.certificate, self.tls.key)
            if self.alpn:
                context.set_alpn_protocols([self.alpn])
            if self.tls.crl:
                context.load_verify_locations(self.tls.crl)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        except OSError as error:
            names = ", ".join(map(str, self.files))
            raise ConfigError(
                f"cannot use the certificates for {self.server} ({error.strerror}): check {names}"
            ) from None
        self.context, self.loaded = context, times
        return context
