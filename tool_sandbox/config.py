"""Settings of the tool sandbox."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trajectory.paths import WORD_PROBLEMS, IsPath, LocalPath
from trajectory.section import Section

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class SearchConfig(Section):
    """The tool `search`."""

    kind: Literal["none", "bm25", "http"] = "none"
    """Where documents come from: nowhere (calls are `rejected`), a local `index`, or a retriever at `url`."""

    index: LocalPath = ""
    """For `bm25`: the folder that `python -m autotraj search-index` made, as seen from the repository root."""

    corpus: Annotated[str, IsPath(but=(WORD_PROBLEMS,))] = ""
    """For `bm25`: what a run makes `index` from if it isn't there: a .jsonl file, or `word-problems`, the corpus for the
    lookups of that data source."""

    url: str = ""
    """For `http`: the retriever's address, without `/search`."""

    top_n: int = Field(default=3, ge=1, le=100)
    """Number of documents in one result."""

    max_document_chars: int = Field(default=1000, ge=20)
    """A document that is longer than this is cut, characters."""

    max_chars: int = Field(default=4000, ge=20)
    """Most characters of a result; `episode.max_result_chars` then shortens it once more, in the middle."""

    max_query_chars: int = Field(default=1000, ge=1)
    """A query that is longer than this, in characters, is `rejected`."""

    max_concurrent: int = Field(default=8, ge=1, le=256)
    """Queries that may run at once. Others wait, at most `queue_timeout_s`."""

    batch_size: int = Field(default=1, ge=1, le=1024)
    """For `http`: most queries in one request. Above 1, queries that arrive together go to `/batch_search`."""

    attempts: int = Field(default=3, ge=1, le=10)
    """For `http`: how often one request is tried, always within the call's own deadline."""

    request_timeout_s: float = Field(default=5.0, gt=0)
    """For `http`: longest wait of one try, seconds, for the connection and then for the next bytes of the answer."""

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
    """The CA that must have signed the other side's certificate. A peer without such a certificate is refused."""

    name: str = ""
    """The name that clients expect in a gateway's certificate instead of the host that they connect to. Use one name for all
    gateways where nodes come and go and their addresses aren't known in advance. Empty: the host."""


class SandboxConfig(Section):
    """The gateway, its pool of containers, and what one call may use."""

    address: str = "127.0.0.1:0"
    """Where the gateway listens, `host:port`; port 0 takes a free one. An address other than loopback needs `tls` or a
    `token`."""

    token: str = Field(default="", repr=False)
    """A shared secret that every call must send. Without `tls` it isn't encrypted: use it only in trusted networks."""

    tls: TlsFiles | None = None
    """Mutual TLS: certificate, key and CA. None: no TLS."""

    metrics_address: str = ""
    """Where Prometheus reads the metrics, `host:port`, over HTTP; other than on loopback it needs `tls`. Empty: no metrics
    server."""

    num_containers: int = Field(default=2, ge=1, le=256)
    """Warm containers on this node. A zygote forks one call at a time, so use one container for each one or two cores."""

    num_spares: int = Field(default=1, ge=0, le=16)
    """Further containers that are kept warm. Such a spare replaces a container that died or must be replaced at once. 0: a
    new container is started only then."""

    slots_per_container: int = Field(default=4, ge=1, le=16)
    """Calls and open sessions that may run at once in a container. Slots of a container share its loopback, process list
    and total memory; with 1 they share nothing."""

    image: str = ""
    """Container image; empty means the one built from `tool_sandbox/image/`, whose tag is the hash of its sources."""

    runtime: str = ""
    """The engine's runtime for the containers, such as `runsc` (gVisor); empty: its default. The gateway doesn't start if
    the engine has no runtime of this name. gVisor needs `slots_per_container = 1`, as it doesn't isolate the slots of a
    container from each other."""

    memory_mib: int = Field(default=512, ge=64)
    """Memory of one call, MiB, in addition to what the interpreter and its preloaded libraries have mapped."""

    scratch_mib: int = Field(default=64, ge=1)
    """Size of a call's own directory, MiB. The directory is in memory, and it is wiped after the call."""

    cpus: float = Field(default=2.0, gt=0)
    """Cores that one container may use."""

    max_processes: int = Field(default=64, ge=1)
    """Processes and threads of one call."""

    max_timeout_s: float = Field(default=60.0, gt=0)
    """Longest execution time that a call may request, seconds."""

    max_content_bytes: int = Field(default=256 * 1024, ge=1, le=1024 * 1024)
    """Longest code, bytes of UTF-8. Longer code is `rejected`."""

    max_output_bytes: int = Field(default=250_000, ge=1, le=8 * 1024 * 1024)
    """Most output of a call, bytes. A call that writes more is killed with status `output_limit`. A model reads far less."""

    max_queue: int = Field(default=1024, ge=0)
    """Calls that may wait for a slot. When so many wait, a further call is answered `unavailable` at once, or it replaces
    the newest call of the client with the most waiting calls."""

    queue_timeout_s: float = Field(default=30.0, gt=0)
    """Longest wait for a slot, seconds; then the answer is `unavailable`."""

    session_idle_s: float = Field(default=300.0, gt=0)
    """An open session that wasn't used for this long is closed and its slot becomes free, seconds."""

    recycle_after_violations: int = Field(default=20, ge=0)
    """A container in which this many calls were stopped at their memory or output limit is replaced; 0: never."""

    recycle_after_calls: int = Field(default=50_000, ge=0)
    """A container that ran this many calls is replaced; 0: never."""

    recycle_after_s: float = Field(default=3600.0, ge=0)
    """A container of this age, or up to a fifth younger, is replaced, seconds; 0: never."""

    drain_s: float = Field(default=5.0, ge=0)
    """Time for running calls to end when the gateway is told to stop, seconds. New calls are `unavailable` meanwhile."""

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
