"""Settings of the tool sandbox."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trajectory.paths import IsPath, LocalPath
from trajectory.section import Section

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class SearchConfig(Section):
    """The tool `search`."""

    kind: Literal["none", "bm25", "http"] = "none"
    """Where documents come from: nowhere (calls are `rejected`), a local `index`, or a retriever at `url`."""

    index: LocalPath = ""
    """For `bm25`: the folder that `python -m autotraj search-index` made, as seen from the repository root."""

    corpus: Annotated[str, IsPath(but=("word-problems",))] = ""
    """For `bm25`: what a run makes `index` from if it isn't there: a .jsonl file, or `word-problems`, the corpus of that
    data source's lookups."""

    url: str = ""
    """For `http`: the retriever's address, without `/search`."""

    top_n: int = Field(default=3, ge=1, le=100)
    """Documents of one result."""

    max_document_chars: int = Field(default=1000, ge=20)
    """A longer document is cut, characters."""

    max_chars: int = Field(default=4000, ge=20)
    """Most characters of a result; `episode.max_result_chars` cuts it once more, in the middle."""

    max_query_chars: int = Field(default=1000, ge=1)
    """A longer query is `rejected`."""

    max_concurrent: int = Field(default=8, ge=1, le=256)
    """Queries that run at once; more wait, `queue_timeout_s` at most."""

    batch_size: int = Field(default=1, ge=1, le=1024)
    """For `http`: queries that one request carries at most. Above 1, those that come together go to `/batch_search`."""

    attempts: int = Field(default=3, ge=1, le=10)
    """For `http`: tries of one request, all within the call's own deadline."""

    request_timeout_s: float = Field(default=5.0, gt=0)
    """For `http`: longest wait for one try to connect, and for the next bytes of its answer, seconds."""

    @model_validator(mode="after")
    def _has_its_source(self) -> SearchConfig:
        if self.kind == "bm25" and not self.index:
            raise ValueError('kind = "bm25" needs index, the folder that `python -m autotraj search-index` made')
        if self.corpus and self.kind != "bm25":
            raise ValueError(f'corpus has no effect with kind = "{self.kind}"')
        if self.kind == "http" and not self.url.startswith(("http://", "https://")):
            raise ValueError(f'kind = "http" needs url, an address with http:// or https://; it is {self.url!r}')
        return self


class TlsFiles(Section):
    """Three PEM files. A gateway and its clients may share them: the certificate must then serve both purposes."""

    cert: LocalPath = Field(min_length=1)
    """This side's certificate, with the chain up to the CA. A gateway's must name the host that clients connect to."""

    key: LocalPath = Field(min_length=1)
    """Its private key."""

    ca: LocalPath = Field(min_length=1)
    """The CA that the other side's certificate must be signed by; nobody else gets in."""

    name: str = ""
    """What clients expect in a gateway's certificate instead of the host that they connect to: one name for all gateways,
    where nodes come and go and nobody knows their addresses beforehand. Empty: the host."""


class SandboxConfig(Section):
    """The gateway, its pool of containers, and what one call may use."""

    address: str = "127.0.0.1:0"
    """Where the gateway listens, `host:port`; port 0 takes a free one. Anything but loopback needs `tls` or a `token`."""

    token: str = Field(default="", repr=False)
    """A shared secret that every call must bring. Without `tls` it travels in the clear: for networks that you trust."""

    tls: TlsFiles | None = None
    """Mutual TLS: certificate, key and CA. None: none."""

    metrics_address: str = ""
    """Where Prometheus may ask, `host:port`, over HTTP on loopback and with `tls` anywhere; empty: nowhere."""

    num_containers: int = Field(default=2, ge=1, le=256)
    """Warm containers on this node; one zygote forks serially, so one container per one or two cores."""

    num_spares: int = Field(default=1, ge=0, le=16)
    """Containers that are warm beside those: one that dies, or is due, is replaced by one of these at once. 0: by one that
    is started then."""

    slots_per_container: int = Field(default=4, ge=1, le=16)
    """Calls and open sessions that may run at once in a container. Slots of a container share its loopback, process list
    and total memory: 1 is the strict mode."""

    image: str = ""
    """Container image; empty means the one built from `tool_sandbox/image/`, whose tag is the hash of its sources."""

    runtime: str = ""
    """The engine's runtime for the containers, such as `runsc` (gVisor); empty: its default. Refused at start if the engine
    has none of that name. gVisor needs `slots_per_container = 1`, as it doesn't keep the slots of a container apart."""

    memory_mib: int = Field(default=512, ge=64)
    """Memory of one call, MiB, on top of what the interpreter and its preloaded libraries have mapped."""

    scratch_mib: int = Field(default=64, ge=1)
    """Size of a call's own directory, MiB; it is memory, and wiped after the call."""

    cpus: float = Field(default=2.0, gt=0)
    """Cores that one container may use."""

    max_processes: int = Field(default=64, ge=1)
    """Processes and threads of one call."""

    max_timeout_s: float = Field(default=60.0, gt=0)
    """Longest execution time that a call may ask for, seconds."""

    max_content_bytes: int = Field(default=256 * 1024, ge=1, le=1024 * 1024)
    """Longest code, bytes of UTF-8; longer is `rejected`."""

    max_output_bytes: int = Field(default=250_000, ge=1, le=8 * 1024 * 1024)
    """Most output of a call, bytes; a call that writes more is killed with status `output_limit`. A model reads far less."""

    max_queue: int = Field(default=1024, ge=0)
    """Calls that may wait for a slot; one more is answered `unavailable` at once, or makes the client that waits with
    the most calls lose its newest."""

    queue_timeout_s: float = Field(default=30.0, gt=0)
    """Longest wait for a slot, seconds; then the answer is `unavailable`."""

    session_idle_s: float = Field(default=300.0, gt=0)
    """An open session that isn't used for so long is closed and its slot freed."""

    recycle_after_violations: int = Field(default=20, ge=0)
    """A container in which so many calls were stopped at their memory or output limit is replaced; 0: never."""

    recycle_after_calls: int = Field(default=50_000, ge=0)
    """A container that ran so many calls is replaced; 0: never."""

    recycle_after_s: float = Field(default=3600.0, ge=0)
    """A container of this age, or up to a fifth younger, is replaced; 0: never."""

    drain_s: float = Field(default=5.0, ge=0)
    """Time that calls get to end when the gateway is told to stop; new ones are `unavailable` meanwhile."""

    start_timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for the first container to be ready, seconds."""

    search: SearchConfig = SearchConfig()
    """The tool `search`, which runs in the gateway itself."""

    @model_validator(mode="after")
    def _only_for_those_who_may(self) -> SandboxConfig:
        host = _host("address", self.address)
        if "runsc" in self.runtime and self.slots_per_container > 1:
            raise ValueError(
                f"runtime {self.runtime!r} is gVisor, in which the slots of a container can read each other; "
                "set slots_per_container = 1"
            )
        if host not in LOOPBACK and not self.token and self.tls is None:
            raise ValueError(
                f"address {self.address!r} is reachable from outside this machine and would run anyone's code; "
                "set tls, set a token, or listen on 127.0.0.1"
            )
        if self.metrics_address and _host("metrics_address", self.metrics_address) not in LOOPBACK and self.tls is None:
            raise ValueError(
                f"metrics_address {self.metrics_address!r} is reachable from outside this machine; "
                "set tls, or listen on 127.0.0.1"
            )
        return self


def _host(name: str, address: str) -> str:
    """The host of `host:port`. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{name} {address!r} is not host:port")
    return host
