"""Mutual TLS between clients and a gateway: each shows a certificate that one CA of yours has signed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

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


def check_files(files: TlsFiles) -> None:
    """Errors: TlsError, as of the credentials, without making any."""
    _read(files)


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
    _check_pair(files, contents["key"], contents["cert"])
    return contents["key"], contents["cert"], contents["ca"]


def _check_pair(files: TlsFiles, key: bytes, cert: bytes) -> None:
    """TlsError unless the key is the certificate's, and the certificate is valid today."""
    try:
        certificate = x509.load_pem_x509_certificates(cert)[0]  # of a chain, the first is the holder's own
    except ValueError as error:
        raise TlsError(f"sandbox.tls.cert: {files.cert} holds no certificate that can be read: {error}") from None
    try:
        authority = x509.load_pem_x509_certificates(Path(files.ca).read_bytes())[0]
    except (OSError, ValueError) as error:
        raise TlsError(f"sandbox.tls.ca: {files.ca} holds no certificate that can be read: {error}") from None
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise TlsError(f"sandbox.tls.key: {files.key} holds no key that can be read: {error}") from None
    if private.public_key() != certificate.public_key():
        raise TlsError(
            f"sandbox.tls.key: the key in {files.key} and the certificate in {files.cert} don't belong together; "
            "name the key that the certificate was made for"
        )
    now = datetime.now(UTC)
    if now > authority.not_valid_after_utc:
        raise TlsError(f"sandbox.tls.ca: {files.ca} expired on {authority.not_valid_after_utc}; make a new one")
    if now > certificate.not_valid_after_utc:
        raise TlsError(f"sandbox.tls.cert: {files.cert} expired on {certificate.not_valid_after_utc}; make a new one")
    if now < certificate.not_valid_before_utc:
        raise TlsError(f"sandbox.tls.cert: {files.cert} is not valid before {certificate.not_valid_before_utc}")
