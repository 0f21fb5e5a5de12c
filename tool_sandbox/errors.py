"""What can go wrong, one class a boundary. The last sentence of every message is the remedy.

    SandboxError
    ├── ContainerEngineError  Docker is missing, down or refuses
    ├── ImageError            the container image is missing or can't be built
    ├── AddressError          the gateway can't listen where it was told to
    ├── GatewayError          the gateway process didn't come up, or doesn't answer
    │   └── RefusedError      it won't answer this client as it is set: TLS, token, version
    ├── RunnerError           a container's runner broke its protocol or died
    ├── SearchError           the search index is missing, or its corpus can't be indexed
    ├── TlsError              the certificate files are missing or aren't ones
    └── WireError             bytes that aren't a request or a reply

A failed *call* is no exception: it is a `ToolResult` whose status says so.
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
    """The gateway process didn't come up in time, or at all; or it doesn't answer."""


class RefusedError(GatewayError):
    """No try of this client will be answered as it is set: its TLS files, its token, or another version of the gateway."""


class RunnerError(SandboxError):
    """A container's runner broke its protocol or died."""


class SearchError(SandboxError):
    """The search index is missing or unreadable, or its corpus can't be indexed."""


class TlsError(SandboxError):
    """The files for mutual TLS are missing, or hold something else."""


class WireError(SandboxError):
    """Bytes that are not a request or a reply."""
