"""Answers Prometheus over HTTP, from threads beside the gateway.

It has a server of its own, as the library's isn't made for hostile clients: `prometheus_client.start_http_server` prints a
traceback for every client that goes away, shakes hands over TLS in the thread that accepts, so that one silent connection
keeps everybody out, and lets a connection hold its thread for ever.
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
"""Longest wait for a client's next bytes, its handshake included."""


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: Prometheus comes every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:  # it shakes hands when its own thread reads
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or is none: it is nobody's fault here."""
        logger.debug("a client of the metrics at %s went wrong", client_address, exc_info=True)


def serve(host: str, port: int, registry: CollectorRegistry, tls: TlsFiles | None) -> int:
    """Listen from now on, in a thread that ends with the process; the port. With `tls`, only to those whose certificate its
    CA has signed. Raises OSError if the address can't be had."""
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
