"""Runs the attacks of code (attack.py) and of clients (on_gateway.py), and judges the results.

During each attack a neighbour makes calls, each with its own secret. Before and after, a call in every slot looks at what it
finds there. Where slots share a container, the neighbour is in the same one as the attack.
"""

from __future__ import annotations

import secrets
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tool_sandbox.attacks.attack import BREACH, END, PREAMBLE, Attack
from tool_sandbox.attacks.on_files import FILES
from tool_sandbox.attacks.on_gateway import ClientAttack, Target
from tool_sandbox.attacks.on_privileges import ESCALATION
from tool_sandbox.attacks.on_processes import PROCESSES, RESOURCES
from tool_sandbox.attacks.on_shares import SHARES
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.local import LocalGateway
from trajectory.types import ToolResult

ATTACKS: tuple[Attack, ...] = (*ESCALATION, *PROCESSES, *FILES, *RESOURCES, *SHARES)
"""All attacks of code, in the order in which they are run."""

NUM_SLOTS = 2  # one for the attack and one for the neighbour
NEIGHBOUR_TIMEOUT_S = 20.0
"""If a neighbour's call isn't answered within this time, the attack has succeeded."""
LOOK_TIMEOUT_S = 20.0
MAX_LOOKS = 20
HOLD_S = 0.2

NEIGHBOUR = """
import os, time
secret = {secret!r}
os.environ["SECRET"] = secret
open("secret", "w").write(secret)
try:
    open("/tmp/secret" + str(os.getpid()), "w").write(secret)
except OSError:
    pass  # what the slots of a container share may be full
time.sleep(0.02)
print(open("secret").read())
"""
LOOK = f"""
import builtins, math, os, resource, signal, sys, time
time.sleep({HOLD_S})
me = os.getuid()
def runs_as_me(pid):
    try:
        status = open(f"/proc/{{pid}}/status").read()
    except OSError:
        return False
    return f"\\nUid:\\t{{me}}\\t" in status and "\\nState:\\tZ" not in status
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
def mine(path):
    try:
        return os.lstat(path).st_uid == me
    except FileNotFoundError:  # a neighbour's, who has removed it since
        return False
path, umask = os.getcwd(), os.umask(0o077)
print(repr((me, {{
    "processes": [p for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid() and runs_as_me(p)],
    "files": [n for d in (path, "/tmp", "/dev/shm") for n in os.listdir(d) if mine(f"{{d}}/{{n}}")][:9],
    "directory": (path == f"/w/{{path[3:]}}", oct(os.stat(path).st_mode)),
    "descriptors": [fd for fd in range(256) if is_open(fd)],
    "sys.path": [p.replace(path, "here") for p in sys.path],
    "modules": (math.pi, hasattr(builtins, "print2"), os._exit.__module__, sys.modules.get("json", 0) is None),
    "import hooks": [type(h).__name__ if not isinstance(h, type) else h.__name__ for h in sys.meta_path],
    "environment": sorted(k for k in os.environ),
    "limits": [resource.getrlimit(n) for n in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE)],
    "signals": [n for n in range(1, 65) if n not in (2, 13, 25, 32, 33) and signal.getsignal(n) != signal.SIG_DFL],
    "others": (oct(umask), os.getpriority(os.PRIO_PROCESS, 0)),
}})))
"""
"""Prints what a call finds in its slot, which must be the same after an attack as before."""


@dataclass(frozen=True, slots=True)
class AttackResult:
    """The result of one attack. `problems` is empty if the sandbox held."""

    attack: Attack | ClientAttack
    status: str  # of the attack's own call; for a client's attack it is `done`
    duration_s: float
    problems: tuple[str, ...]
    neighbour_ms: tuple[float, ...]  # the duration of each of its calls
    clean: bool  # the next calls found no trace of it

    @property
    def held(self) -> bool:
        return not self.problems


class Neighbour:
    """Makes calls while a `with` block runs."""

    def __init__(self, client: SandboxClient, work: str = "", *, crowded_out: bool = False) -> None:
        """`work` is done first in each call. With `crowded_out`, a call may be `unavailable`."""
        self.secret = secrets.token_hex(12)
        self.latencies_ms: list[float] = []
        self.wrong: list[str] = []
        self._client = client
        self._code = (PREAMBLE + work if work else "") + NEIGHBOUR.format(secret=self.secret)
        self._crowded_out = crowded_out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not (self._stop.is_set() and self.latencies_ms):
            started = time.monotonic()
            result = self._client.call("python", self._code, timeout_s=NEIGHBOUR_TIMEOUT_S)
            if self._crowded_out and result.status == "unavailable":
                self._stop.wait(result.retry_after_s)
                continue
            self.latencies_ms.append((time.monotonic() - started) * 1000)
            if (result.status, result.output) != ("ok", self.secret + "\n"):
                self.wrong.append(f"{result.status} {result.message} {result.output[-300:]!r}")

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()  # this ends, as its call has a deadline


class Range:
    """A gateway of two slots on which attacks are run. They are in one container if the settings let slots share one."""

    def __init__(self, client: SandboxClient, token: str = "") -> None:
        self._client = client
        self._target = Target(client.address, token)
        self._before = self._look()
        with Neighbour(client) as neighbour:
            time.sleep(1.0)
        if neighbour.wrong:
            raise RuntimeError(f"calls fail without any attack: {neighbour.wrong[0]}")
        self.idle_ms = tuple(neighbour.latencies_ms)

    def run(self, attack: Attack | ClientAttack) -> AttackResult:
        work, crowded_out = ("", False) if isinstance(attack, ClientAttack) else (attack.beside, attack.crowds_out)
        with Neighbour(self._client, work, crowded_out=crowded_out) as neighbour:
            started = time.monotonic()
            if isinstance(attack, ClientAttack):
                problems = attack.run(self._target)
                status, duration_s = "done", time.monotonic() - started
            else:
                session_id = secrets.token_hex(8) if attack.session else None
                code = PREAMBLE + attack.code
                result = self._client.call("python", code, timeout_s=attack.timeout_s, session_id=session_id)
                problems = judge(attack, result, neighbour.secret)
                status, duration_s = result.status, result.duration_s
        if isinstance(attack, Attack) and attack.afterwards:
            problems += self._look_afterwards(attack)
        problems += [f"the neighbour's call: {wrong}" for wrong in neighbour.wrong]
        if (slowest_s := max(neighbour.latencies_ms) / 1000) > NEIGHBOUR_TIMEOUT_S:
            problems.append(f"the neighbour waited {slowest_s:.1f} s")
        try:
            after = self._look()
            dirt = list(differences(self._before, after))
            self._before = after if set(after) != set(self._before) else self._before  # a new container: report it once
        except RuntimeError as error:
            dirt = [str(error)]
        return AttackResult(
            attack=attack,
            status=status,
            duration_s=duration_s,
            problems=(*problems, *dirt),
            neighbour_ms=tuple(neighbour.latencies_ms),
            clean=not dirt,
        )

    def _look_afterwards(self, attack: Attack) -> list[str]:
        """Run the attack's `afterwards` while its session is open and no other call needs its slot."""
        until = time.monotonic() + LOOK_TIMEOUT_S
        while self._client.stats().pool.slots_free < NUM_SLOTS - 1 and time.monotonic() < until:
            time.sleep(0.02)
        if not (pool := self._client.stats().pool).sessions:
            return []  # the session was ended: nothing of it is left
        if pool.slots_free < 1:
            return [f"the neighbour's slot wasn't clean within {LOOK_TIMEOUT_S:.0f} s"]
        result = self._client.call("python", PREAMBLE + attack.afterwards, timeout_s=LOOK_TIMEOUT_S)
        if (result.status, result.output) != ("ok", END + "\n"):
            return [f"afterwards: {result.status} {result.message} {result.output[-300:]!r}"]
        return []

    def _look(self) -> dict[int, dict[str, object]]:
        """Each slot's uid, and what a call finds in the slot."""
        found: dict[int, dict[str, object]] = {}
        for _ in range(MAX_LOOKS):
            with ThreadPoolExecutor(
                NUM_SLOTS
            ) as threads:  # at once, and they wait, so that they run in different slots
                calls = [
                    threads.submit(self._client.call, "python", LOOK, timeout_s=LOOK_TIMEOUT_S)
                    for _ in range(NUM_SLOTS)
                ]
            for result in (call.result() for call in calls):
                if result.status != "ok":
                    raise RuntimeError(f"the next call failed: {result.status} {result.message} {result.output[-300:]}")
                uid, state = eval(result.output, {"__builtins__": {}})
                found.setdefault(uid, state)
            if len(found) >= NUM_SLOTS:
                return found
        raise RuntimeError(f"{NUM_SLOTS} slots, but calls reached {len(found)} only")


def judge(attack: Attack, result: ToolResult, secret: str) -> list[str]:
    """The problems in an attack's own result."""
    problems = [line[:200] for line in result.output.splitlines() if line.startswith(BREACH)]
    if result.status not in attack.statuses:
        problems.append(
            f"it ended {result.status} ({result.message}), not {' or '.join(attack.statuses)}: {result.output[-300:]!r}"
        )
    elif result.status == "ok" and says_end(attack) and not result.output.endswith(END + "\n"):
        problems.append(f"it did not come to its end: {result.output[-300:]!r}")
    if secret in result.output:
        problems.append("it read the neighbour's secret")
    return problems


def says_end(attack: Attack) -> bool:
    return any(f"print({quote}{END}{quote}" in attack.code for quote in ("'", '"'))


def differences(before: dict[int, dict[str, object]], after: dict[int, dict[str, object]]) -> Iterator[str]:
    """Differences between what the calls before an attack found and what those after it found."""
    if set(before) != set(after):
        yield "its container did not survive"
    usual = next(iter(before.values()))
    for state in after.values():
        for name, value in state.items():
            if value != usual[name]:
                yield f"the next call found {name}: {value!r}, not {usual[name]!r}"


def settings_for(config: SandboxConfig) -> SandboxConfig:
    """`config` with as few containers as an attack and its neighbour need: one, or two where slots share none."""
    shared = config.slots_per_container >= NUM_SLOTS
    sizes = {"num_containers": 1, "slots_per_container": 2} if shared else {"num_containers": 2}
    others = {
        "num_spares": 0,
        "address": "127.0.0.1:0",
        "tls": None,
        "search": {},
        "max_timeout_s": max(config.max_timeout_s, 30.0),
    }
    return SandboxConfig.model_validate({**config.model_dump(), **sizes, **others})


def run_all(
    config: SandboxConfig, attacks: tuple[Attack | ClientAttack, ...]
) -> Iterator[AttackResult | tuple[float, ...]]:
    """Yields first the neighbour's latencies without an attack, then the results. Errors: SandboxError."""
    settings = settings_for(config)
    with (
        LocalGateway(settings) as gateway,
        SandboxClient(gateway.address, token=settings.token, queue_timeout_s=settings.queue_timeout_s) as client,
    ):
        range_ = Range(client, settings.token)
        yield range_.idle_ms
        for attack in attacks:
            yield range_.run(attack)


def middle(latencies_ms: tuple[float, ...]) -> float:
    return statistics.median(latencies_ms)
