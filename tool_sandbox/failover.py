"""One client for several gateways: it calls the nearest live one, and another one if that doesn't answer.

    call ─▶ the nearest that isn't paused ──no answer──▶ pause it, ask the next nearest ──none left──▶ wait, second round
                    │  └──`unavailable`: full, stopping──▶ the next nearest
                    └──any other answer──▶ done

All of this happens within the one deadline of the call, which is the same as `client`'s. **It is harmless to run a call
again**: code has no network, its directory is wiped when it ends, and a search only reads. So a call whose answer was lost
may run twice without any effect. **A cell of a session is different**, because its process has a state. A session stays on
its gateway. If that doesn't answer, the cell runs once more, only on another gateway, in a new session, and its result says
so (`fresh: true`). It is never sent to the same gateway twice, as the first try may have changed the state there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import grpc

from tool_sandbox import wire
from tool_sandbox.admission import RUN_SHARE
from tool_sandbox.client import MARGIN_S, QUEUE_TIMEOUT_S, AsyncSandboxClient
from tool_sandbox.config import TlsFiles
from tool_sandbox.errors import WireError
from tool_sandbox.tls import channel_credentials
from trajectory.types import ToolResult

FIRST_REST_S, MAX_REST_S = 0.5, 30.0
"""How long a gateway that didn't answer isn't asked again, seconds; doubles with each failure in a row."""
MIN_PAUSE_S = 0.1
"""Shortest pause before the second round of one call, seconds, whatever the gateways say; doubles with each round."""
MAX_PINS = 10_000
"""Sessions whose gateway is remembered. When there are more, those unused for longest may start anew on another gateway."""


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway and where it is."""

    address: str  # host:port
    node: str = ""  # of the cluster; empty: unknown


class _Gateway:
    """What this client knows of one gateway. Times are from the monotonic clock."""

    def __init__(self, site: Site, client: AsyncSandboxClient) -> None:
        self.site, self.client = site, client
        self.num_in_flight = 0
        self.num_failures = 0  # in a row
        self.rests_until = 0.0
        self.gone = False

    def didnt_answer(self, now: float) -> None:
        if now >= self.rests_until or not self.num_failures:  # count many calls that fail together as one failure
            self.num_failures += 1
            self.rests_until = now + min(FIRST_REST_S * 2 ** (self.num_failures - 1), MAX_REST_S)

    def answered(self, result: ToolResult, now: float) -> None:
        self.num_failures = 0
        busy_s = (result.retry_after_s or 0.0) * random.uniform(1.0, 1.5) if result.status == "unavailable" else 0.0
        self.rests_until = now + busy_s


@dataclass(slots=True)
class _Pin:
    """The gateway of a session. The session's id there is `id#num_moves`, so that a session which moved away and comes back
    doesn't find its old state."""

    gateway: _Gateway | None = None
    num_moves: int = 0


class FailoverClient:
    """Calls tools of a near gateway that answers. Make it and use it inside one event loop. A call that fails returns a
    `ToolResult`, it never raises."""

    def __init__(
        self,
        gateways: Sequence[Site] = (),
        *,
        here: str = "",
        token: str = "",
        tls: TlsFiles | None = None,
        queue_timeout_s: float = QUEUE_TIMEOUT_S,
    ) -> None:
        """`here` is the node of this process; its gateway is asked first. TlsError if the files of `tls` can't be used."""
        if tls is not None:
            channel_credentials(tls)  # check them now, not when the first gateway is known
        self._here, self._token, self._tls = here, token, tls
        self._queue_timeout_s = queue_timeout_s
        self._gateways: dict[Site, _Gateway] = {}
        self._pins: OrderedDict[str, _Pin] = OrderedDict()
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self.set_gateways(gateways)

    @property
    def gateways(self) -> list[Site]:
        return list(self._gateways)

    def set_gateways(self, sites: Sequence[Site]) -> None:
        """Use these gateways from now on. A call that waits on a removed one goes on waiting until that one answers or is
        noticed to be gone."""
        if set(sites) == self._gateways.keys():
            return
        for site in [s for s in self._gateways if s not in sites]:
            left = self._gateways.pop(site)
            left.gone = True
            self._hang_up_if_done(left)
        for site in sites:
            if site not in self._gateways:
                client = AsyncSandboxClient(site.address, token=self._token, tls=self._tls)
                self._gateways[site] = _Gateway(site, client)
        self._changed.set()

    async def call(
        self, tool: str, content: str, *, timeout_s: float = 5.0, session_id: str | None = None
    ) -> ToolResult:
        """Run `content` with `tool`, `timeout_s` seconds at most. Cancelling the call kills the code."""
        deadline = time.monotonic() + timeout_s + self._queue_timeout_s + MARGIN_S
        last_start = deadline - timeout_s / RUN_SHARE  # later than this, a gateway would cut the code's own time
        pin = self._pin(session_id) if session_id is not None else None
        was_pinned = pin is not None and pin.gateway is not None
        asked: list[_Gateway] = []  # those of this round
        num_tries, num_rounds, result = 0, 0, ToolResult(status="unavailable")
        while True:
            gateway = self._choose(asked, pin, last_start)
            if gateway is None:
                all_refused = result.status == "rejected"
                if (asked and (pin is not None or all_refused)) or not await self._pause(num_rounds, last_start):
                    return self._gave_up(result, num_tries)
                asked.clear()
                num_rounds += 1
                continue
            try:
                wire_id = f"{session_id}#{pin.num_moves}" if pin is not None and pin.num_moves else session_id
                request = wire.encode_request(
                    wire.CallRequest(tool=tool, content=content, timeout_s=timeout_s, session_id=wire_id)
                )
            except WireError as error:
                return ToolResult(status="rejected", message=f"call to the sandbox: {error}")
            result, answered = await self._ask(gateway, request, deadline - time.monotonic())
            if answered and (result.status != "unavailable" or (was_pinned and not asked)):
                return result
            asked.append(gateway)
            num_tries += 1
            if time.monotonic() >= last_start:
                return self._gave_up(result, num_tries)

    async def close(self) -> None:
        """Close all connections. Running calls are cancelled."""
        await asyncio.gather(*(gateway.client.close() for gateway in self._gateways.values()), *self._closing)

    async def __aenter__(self) -> FailoverClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _choose(self, asked: Sequence[_Gateway], pin: _Pin | None, last_start: float) -> _Gateway | None:
        """The next gateway to ask in this round: the session's own, else the nearest that isn't paused, else None."""
        now = time.monotonic()
        if pin is not None and (own := pin.gateway) is not None and not own.gone and own not in asked:
            lost = own.num_failures and own.rests_until > now
            if not lost or not self._ready(asked, now):
                return own
        ready = self._ready(asked, now)
        if not ready and not asked and self._gateways:
            # All are paused for longer than this call has. It is better to ask one too early than to ask none.
            soonest = min(self._gateways.values(), key=lambda g: g.rests_until)
            ready = [soonest] if soonest.rests_until >= last_start else []
        if not ready:
            return None
        nearest = min(ready, key=lambda g: (g.site.node != self._here, g.num_in_flight, random.random()))
        if pin is not None and pin.gateway is not nearest:
            pin.num_moves += pin.gateway is not None
            pin.gateway = nearest
        return nearest

    def _ready(self, asked: Sequence[_Gateway], now: float) -> list[_Gateway]:
        return [g for g in self._gateways.values() if g.rests_until <= now and g not in asked]

    async def _pause(self, num_rounds: int, last_start: float) -> bool:
        """Wait until a gateway may be asked again or the list of gateways changed. False: not within this call's time."""
        now = time.monotonic()
        until = min((g.rests_until for g in self._gateways.values()), default=last_start)
        until = min(max(until, now + MIN_PAUSE_S * 2**num_rounds), last_start)
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until - now):
                await self._changed.wait()
        return time.monotonic() < last_start

    async def _ask(self, gateway: _Gateway, request: bytes, deadline_s: float) -> tuple[ToolResult, bool]:
        """The result, and whether the gateway answered at all."""
        gateway.num_in_flight += 1
        try:
            result = await gateway.client.ask(request, deadline_s)
        except WireError as error:  # a gateway of another version: the next one may be of this client's version
            return await gateway.client.failed(error, deadline_s), True
        except grpc.RpcError as error:
            too_long = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # it would be too long for every gateway
            if not too_long:
                gateway.didnt_answer(time.monotonic())
            return await gateway.client.failed(error, deadline_s), too_long
        finally:
            gateway.num_in_flight -= 1
            if gateway.gone:
                self._hang_up_if_done(gateway)
        gateway.answered(result, time.monotonic())
        return result, True

    def _pin(self, session_id: str) -> _Pin:
        pin = self._pins.setdefault(session_id, _Pin())
        self._pins.move_to_end(session_id)
        if len(self._pins) > MAX_PINS:
            self._pins.popitem(last=False)
        return pin

    def _gave_up(self, result: ToolResult, num_tries: int) -> ToolResult:
        known = ", ".join(site.address for site in self._gateways) or "none"
        message = (
            f"{result.message or 'no sandbox gateway could be asked'} (tries: {num_tries}; gateways known: {known})"
        )
        return replace(result, message=message)

    def _hang_up_if_done(self, gateway: _Gateway) -> None:
        """Close the channel after its last call. Closing it earlier would cancel calls, which looks like a cancelled
        episode."""
        if gateway.num_in_flight == 0:
            task = asyncio.create_task(gateway.client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
