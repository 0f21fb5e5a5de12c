"""What can go wrong, one class a boundary. The last sentence of every message is the remedy.

    SandboxError
    ├── EngineError     Docker is missing, down or refuses
    ├── ImageError      the container image is missing or can't be built
    ├── AddressError    the gateway can't listen where it was told to
    ├── GatewayError    the gateway process didn't come up
    ├── RunnerError     a container's runner broke its protocol or died
    ├── SearchError     the search index is missing, or its corpus can't be indexed
    ├── TlsError        the certificate files are missing or aren't ones
    └── WireError       bytes that aren't a request or a reply

A failed *call* is no exception: it is a `ToolResult` whose status says so.
"""

from __future__ import annotations


class SandboxError(ValueError):
    """The tool sandbox can't do what the settings ask for."""


class EngineError(SandboxError):
    """Docker is missing, down or refuses."""


class ImageError(SandboxError):
    """The container image is missing or can't be built."""


class AddressError(SandboxError):
    """The gateway can't listen where it was told to."""


class GatewayError(SandboxError):
    """The gateway process didn't come up in time, or at all."""


class RunnerError(SandboxError):
    """A container's runner broke its protocol or died."""


class SearchError(SandboxError):
    """The search index is missing or unreadable, or its corpus can't be indexed."""


class TlsError(SandboxError):
    """The files for mutual TLS are missing, or hold something else."""


class WireError(SandboxError):
    """Bytes that are not a request or a reply."""
