"""Errors of the sandbox, one class for each boundary. The last sentence of every message says what to do.

    SandboxError
    ├── ContainerEngineError  Docker is missing, down or refuses
    ├── ImageError            the container image is missing or can't be built
    ├── AddressError          the gateway can't listen where it was told to
    ├── GatewayError          the gateway process didn't start, or doesn't answer
    │   └── RefusedError      it won't answer this client with its present TLS files, token or version
    ├── RunnerError           a container's runner broke its protocol or died
    ├── SearchError           the search index is missing, or its corpus can't be indexed
    ├── TlsError              the certificate files are missing or hold something else
    └── WireError             bytes that aren't a request or a reply

A *call* that fails raises nothing: it returns a `ToolResult` whose status says so.
"""

from __future__ import annotations


class SandboxError(ValueError):
    """The tool sandbox can't do what the settings ask for."""


class ContainerEngineError(SandboxError):
    """Docker is missing, down or refuses."""


class ImageError(SandboxError):
    """The container image is missing or can't be built."""


class AddressError(SandboxError):
    """The gateway can't listen where it was told to."""


class GatewayError(SandboxError):
    """The gateway process didn't start, not in time or not at all; or it doesn't answer."""


class RefusedError(GatewayError):
    """The gateway will never answer this client with its present settings: TLS files, token, or the gateway's version."""


class RunnerError(SandboxError):
    """A container's runner broke its protocol or died."""


class SearchError(SandboxError):
    """The search index is missing or unreadable, or its corpus can't be indexed."""


class TlsError(SandboxError):
    """The files for mutual TLS are missing, or hold something else."""


class WireError(SandboxError):
    """Bytes that are not a request or a reply."""
