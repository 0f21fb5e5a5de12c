"""Mutual TLS between clients and a gateway: each shows a certificate that one CA of yours has signed."""

from __future__ import annotations

from pathlib import Path

import grpc

from tool_sandbox.config import TlsFiles
from tool_sandbox.errors import TlsError


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Of a gateway that talks to nobody without a certificate of the CA. Errors: TlsError."""
    key, cert, ca = _read(files)
    return grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Of a client that talks to no gateway without one. Errors: TlsError."""
    key, cert, ca = _read(files)
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """Key, certificate and CA. gRPC itself says nothing of what it can't parse: the connection just never comes up."""
    contents = {}
    for field, marker in (("key", b"PRIVATE KEY-----"), ("cert", b"CERTIFICATE-----"), ("ca", b"CERTIFICATE-----")):
        path = Path(getattr(files, field))
        try:
            contents[field] = path.read_bytes()
        except OSError as error:
            raise TlsError(f"sandbox.tls.{field}: {path} can't be read: {error.strerror}; name a PEM file") from None
        if marker not in contents[field]:
            raise TlsError(f"sandbox.tls.{field}: {path} holds no {marker.decode().strip('-')} in PEM form")
    return contents["key"], contents["cert"], contents["ca"]
