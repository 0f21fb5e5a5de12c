"""Runs as a job: asks for a learner gang, two engines and a sandbox as a run does, and says on which nodes they came up."""

import json
import time

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

MARK = 0.001
TIMEOUT_S = 150


@ray.remote
class Where:
    def roles(self) -> list[str]:
        own = ray.get_runtime_context().get_node_id()
        (node,) = [n for n in ray.nodes() if n["NodeID"] == own]
        return sorted(r for r in node["Resources"] if r in ("learner", "rollout", "sandbox"))


ray.init()
gang = placement_group([{"CPU": 1, "learner": MARK}] * 2)
assert gang.wait(TIMEOUT_S), "no learner node came"
actors = {f"learner{i}": Where.options(
    num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(gang, placement_group_bundle_index=i)
).remote() for i in range(2)}  # fmt: skip
actors |= {f"rollout{i}": Where.options(num_cpus=1, resources={"rollout": MARK}).remote() for i in range(2)}
actors["sandbox0"] = Where.options(num_cpus=0, resources={"sandbox": MARK}).remote()
found = dict(zip(actors, ray.get([a.roles.remote() for a in actors.values()], timeout=TIMEOUT_S), strict=True))
peak = sum(n["Alive"] for n in ray.nodes())
for actor in actors.values():
    ray.kill(actor)
ray.util.remove_placement_group(gang)
deadline = time.monotonic() + TIMEOUT_S
while (left := sum(n["Alive"] for n in ray.nodes())) > 1 and time.monotonic() < deadline:
    time.sleep(0.5)
print("PLACED " + json.dumps({"found": found, "peak": peak, "left": left}), flush=True)
