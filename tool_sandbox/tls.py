"""Mutual TLS between clients and a gateway: each shows a certificate that one CA of yours has signed.

gRPC calls every connection that fails "unavailable". `mismatch` finds those that will never succeed.
"""

from __future__ import annotations

import re
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tool_sandbox.config import TlsFiles
from tool_sandbox.errors import TlsError

NO_CONNECTION = "failed to connect to all addresses"
"""gRPC's text for a connection that was never made, in contrast to one that broke later."""
CLOSED = ("Socket closed", "Connection reset", "Broken pipe")
LOOK_S = 2.0
"""Time for one connection of our own that finds out what the other side speaks, seconds."""


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """The credentials of a gateway that accepts only clients with a certificate of the CA. Errors: TlsError."""
    key, cert, ca = _read(files)
    return grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """The credentials of a client that accepts only gateways with such a certificate. Errors: TlsError."""
    key, cert, ca = _read(files)
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def check_files(files: TlsFiles) -> None:
    """Check the files without making credentials. Errors: TlsError, the same as those of the credentials."""
    _read(files)


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """Key, certificate and CA. gRPC reports nothing about files that it can't parse: the connection just never succeeds."""
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
    """TlsError unless the key belongs to the certificate and the certificate is valid today."""
    try:
        certificate = x509.load_pem_x509_certificates(cert)[0]  # in a chain, the first is the owner's certificate
    except ValueError as error:
        raise TlsError(f"sandbox.tls.cert: {files.cert} holds no certificate that can be read: {error}") from None
    try:
        authority = x509.load_pem_x509_certificates(Path(files.ca).read_bytes())[0]
    except (OSError, ValueError) as error:
        raise TlsError(f"sandbox.tls.ca: {files.ca} holds no certificate that can be read: {error}") from None
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        raise TlsError(f"sandbox.tls.key: {files.key} holds no key that can be read: {error}") from None
    if private.public_key() != certificate.public_key():
        raise TlsError(
            f"sandbox.tls.key: the key in {files.key} doesn't belong to the certificate in {files.cert}; "
            "name the key that the certificate was made for"
        )
    now = datetime.now(UTC)
    if now > authority.not_valid_after_utc:
        raise TlsError(f"sandbox.tls.ca: {files.ca} expired on {authority.not_valid_after_utc}; make a new one")
    if now > certificate.not_valid_after_utc:
        raise TlsError(f"sandbox.tls.cert: {files.cert} expired on {certificate.not_valid_after_utc}; make a new one")
    if now < certificate.not_valid_before_utc:
        raise TlsError(f"sandbox.tls.cert: {files.cert} is not valid before {certificate.not_valid_before_utc}")


def must_look(details: str) -> bool:
    """Whether `mismatch` must connect to find the reason, which takes at most `LOOK_S` for each step."""
    return NO_CONNECTION in details and any(words in details for words in CLOSED)


def mismatch(address: str, tls: TlsFiles | None, details: str) -> str:
    """Why this client can never reach the gateway at `address`, as a sentence that names the setting to change.

    `details` is gRPC's text of an UNAVAILABLE. The result is empty if a later try may succeed."""
    gateway = f"sandbox gateway {address}"
    if NO_CONNECTION not in details:
        return ""
    if "Expected SETTINGS frame" in details or "missing selected ALPN" in details:
        return (
            f"what answers at {address} is no sandbox gateway: name the gateway's own address, not that of its metrics"
        )
    if tls is None:
        if must_look(details) and _speaks_tls(address):
            return (
                f"{gateway} speaks TLS and this client doesn't: set sandbox.tls (cert, key and ca) for the client, too, or "
                "leave it out for both"
            )
        return ""
    if "WRONG_VERSION_NUMBER" in details:  # BoringSSL's text for an answer that isn't TLS
        return (
            f"{gateway} doesn't speak TLS and this client does: set sandbox.tls for the gateway, too, or leave it out "
            "for both"
        )
    if refused := re.search(r"CERTIFICATE_VERIFY_FAILED: ([^:]*)", details):
        return (
            f"the certificate of {gateway} is not one that {tls.ca} vouches for ({refused[1]}): set the CA that signed it "
            "as sandbox.tls.ca, or renew it"
        )
    if "Hostname Verification" in details:
        return (
            f"the certificate of {gateway} is for another name than {tls.name or _host_and_port(address)[0]}: set "
            "sandbox.tls.name to a name that it holds"
        )
    if must_look(details) and _refuses(address, tls):
        return (
            f"{gateway} refused the certificate {tls.cert}: set one as sandbox.tls.cert that is signed by the gateway's "
            "sandbox.tls.ca and valid today"
        )
    return ""


def _speaks_tls(address: str) -> bool:
    """Whether a TLS handshake at `address` gets an answer in TLS."""
    try:
        _connect(address, _anyone()).close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:  # no answer, or the connection was closed
        return False
    return True


def _refuses(address: str, tls: TlsFiles) -> bool:
    """Whether the gateway disconnects a client with this certificate. One that accepts it sends data first, and at once."""
    context = _anyone()
    context.load_cert_chain(tls.cert, tls.key)
    try:
        connection = _connect(address, context)
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False
    with connection:
        try:
            return not connection.recv(1)
        except TimeoutError:
            return False
        except OSError:  # a TLS alert, or a reset
            return True


def _anyone() -> ssl.SSLContext:
    """A context without checks: gRPC has checked the other side's certificate, and this connection tests ours."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _connect(address: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Connect with TLS. Raises OSError, of which ssl.SSLError is a subclass."""
    raw = socket.create_connection(_host_and_port(address), LOOK_S)
    try:
        return context.wrap_socket(raw)
    except BaseException:
        raw.close()
        raise


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
