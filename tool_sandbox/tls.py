"""Mutual TLS between clients and a gateway: each shows a certificate that one CA of yours has signed.

gRPC calls every connection that doesn't come up "unavailable". `mismatch` tells which of them never will.
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
"""What gRPC says when a connection didn't come up; one that broke later is another matter."""
CLOSED = ("Socket closed", "Connection reset", "Broken pipe")
LOOK_S = 2.0
"""For one connection of our own, to see what the other side speaks."""


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


def must_look(details: str) -> bool:
    """Whether `mismatch` will connect to tell, for `LOOK_S` at most for each step."""
    return NO_CONNECTION in details and any(words in details for words in CLOSED)


def mismatch(address: str, tls: TlsFiles | None, details: str) -> str:
    """Why no try of this client will ever reach the gateway at `address`, as a sentence with the setting to change.

    `details` is gRPC's text of an UNAVAILABLE. Empty if it may work next time."""
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
    if "WRONG_VERSION_NUMBER" in details:  # BoringSSL's word for an answer that isn't TLS
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
    """Whether a TLS handshake there gets an answer in TLS."""
    try:
        _connect(address, _anyone()).close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:  # gone, or silent
        return False
    return True


def _refuses(address: str, tls: TlsFiles) -> bool:
    """Whether the gateway hangs up on whoever shows this certificate: one that takes it speaks first, and at once."""
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
        except OSError:  # an alert, or a reset
            return True


def _anyone() -> ssl.SSLContext:
    """gRPC has looked at the other side's certificate; this is about ours."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _connect(address: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Raises OSError, of which ssl.SSLError is one."""
    raw = socket.create_connection(_host_and_port(address), LOOK_S)
    try:
        return context.wrap_socket(raw)
    except BaseException:
        raw.close()
        raise


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
