"""Serves metrics to Prometheus over HTTP, from threads beside the gateway.

This is our own server because the library's isn't made for hostile clients. `prometheus_client.start_http_server` prints a
traceback for every client that disconnects. It does the TLS handshake in the thread that accepts, so that one silent
connection blocks all others. And a connection can hold its thread for ever.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from tool_sandbox.config import TlsFiles

logger = logging.getLogger(__name__)

SILENCE_S = 10.0
"""Longest wait for the client's next bytes, also during the handshake, seconds."""


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: Prometheus comes every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:  # the handshake happens when the connection's own thread reads
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        """Log a client that went away or sent nonsense only at debug level, since nothing is wrong with the gateway."""
        logger.debug("a client of the metrics at %s went wrong", client_address, exc_info=True)


def serve(host: str, port: int, registry: CollectorRegistry, tls: TlsFiles | None) -> int:
    """Start to listen, in a thread that ends with the process; returns the port. With `tls`, only clients whose certificate
    was signed by its CA may connect. Raises OSError if it can't listen at the address."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]

    class Server(_Server):
        address_family = family

    server = Server(address[:2], _Handler)  # type: ignore[arg-type]  # of the two families a host and a port
    server.set_app(make_wsgi_app(registry))
    if tls is not None:
        server.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca)
        server.tls.verify_mode = ssl.CERT_REQUIRED
        server.tls.load_cert_chain(tls.cert, tls.key)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port
