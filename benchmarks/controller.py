"""Measures how many trajectories a second the controller can handle, with everything around it simulated.

    python -m benchmarks.controller [--runners 500] [--processes 4] [--tokens 2000] [--steps 4] [--profile]

These parts are real: the GRPO loop, its ledger, admission, runner pool (a call, a deadline and a weight sync with its gate
for every runner), the object store, scoring, the trajectory log, the training batch and its transfer to the learners. These
are simulated: rollout actors answer at once with a trajectory made beforehand, and the learner takes no time. A Ray process
needs some 80 MB, so `--processes` of them hold all `--runners` rollout actors; the controller sees each as a runner.

Prints trajectories a second and what limits them: the controller's thread if it is always busy, else the machine, which also
runs the simulated actors. Also prints, in CPU time, which depends little on other load, how many trajectories the thread
alone could handle, and where its time goes. `--profile` adds its functions.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from actors.engine.protocol import GateAnswer, UpdateReport
from actors.rollout import RolloutActor
from autotraj.config.run import RunConfig, load
from autotraj.loop.grpo import GRPOConfig
from autotraj.runners.calls import managed
from cluster.session import ray_session
from learners.batching import Sample
from learners.group import LearnerGroup, StepResult
from models.checksums import Checksums, HeldSums
from models.weight_update import LogprobProbe, WeightUpdate
from trajectory.types import Group, Segment, Task, ToolCall, ToolResult, Trajectory, Turn

PROMPT_TOKENS = 200
PROBE_IDS = tuple(range(32))
GOLD, WRONG = "{gold}", "-7"
"""Where the right answer is put. Without right and wrong answers a group has no variance, and no step is taken."""


def siblings(num_tokens: int, group_size: int) -> list[Trajectory]:
    """Trajectories of two turns with a tool call between them. Half of them are right."""
    rng = np.random.default_rng(0)
    half, result = num_tokens // 2, num_tokens // 20
    mask = np.ones(num_tokens, dtype=np.bool_)
    mask[half : half + result] = False
    call, answered = ToolCall(tool="python", content="print(631+98*4)"), ToolResult(status="ok", output="1023\n")
    made = []
    for index in range(group_size):
        first = f"<think>{'a step of reasoning. ' * (num_tokens // 12)}</think>\n<code>\nprint(631+98*4)\n</code>"
        answer = f"<think>So.</think>\n<answer>\\boxed{{{GOLD if index % 2 else WRONG}}}</answer>"
        made.append(
            Trajectory(
                task_id="",
                index=index,
                prompt_ids=rng.integers(0, 320, PROMPT_TOKENS, dtype=np.int32),
                response_ids=rng.integers(0, 320, num_tokens, dtype=np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, rng.normal(-0.5, 0.2, num_tokens), 0.0).astype(np.float32),
                segments=(),
                turns=(
                    Turn(text=first, start=0, end=half, result_end=half + result, tool_call=call, tool_result=answered),
                    Turn(text=answer, start=half + result, end=num_tokens, result_end=num_tokens),
                ),
                text=f"{first}\n<result>\n1023\n</result>\n{answer}",
                finish_reason="answer",
            )
        )
    return made


class SimulatedRunner(RolloutActor):
    """Answers at once. `config.rollout_settings` is read for the group's size, `max_response_tokens` for the length."""

    async def start(self) -> None:
        settings = self._settings
        self._siblings = siblings(settings.episode.max_response_tokens, settings.rollout.group_size)
        self._version = 0

    async def rollout_group(self, lease_id: str, task: Task, seed: int) -> Group:
        segment = Segment(start=0, end=len(self._siblings[0].response_ids), policy_version=self._version)
        trajectories = tuple(
            dataclasses.replace(
                t,
                task_id=task.id,
                segments=(segment,),
                text=t.text.replace(GOLD, task.golds[0]),
                turns=(t.turns[0], dataclasses.replace(t.turns[1], text=t.turns[1].text.replace(GOLD, task.golds[0]))),
            )
            for t in self._siblings
        )
        return Group(lease_id=lease_id, task=task, trajectories=trajectories)

    async def update_weights(self, update: Sequence[ray.ObjectRef]) -> UpdateReport:
        weights: WeightUpdate = await update[0]
        self._version = weights.policy_version
        return UpdateReport(policy_version=self._version, write_s=0.0, paused_s=0.0, num_kept=0)

    async def answer_gate(self, token_ids: Sequence[int], names: Sequence[str]) -> GateAnswer:
        logprobs = np.zeros(len(token_ids) - 1, dtype=np.float32)
        return GateAnswer(logprobs=logprobs, held=HeldSums.none(names, "simulated"), sums_s=0.0)

    async def shutdown(self) -> None:
        pass


@ray.remote(num_cpus=0)
class SimulatedLearner:
    """Takes a batch from the object store, as a rank would."""

    def train(self, samples: list[Sample]) -> int:
        return len(samples)


class SimulatedStep:
    def __init__(self, ref: ray.ObjectRef, result: StepResult) -> None:
        self.refs, self._result = [ref], result

    def poll(self, timeout_s: float = 0.0) -> StepResult | None:
        done, _ = ray.wait(self.refs, timeout=timeout_s)
        return self._result if done else None


class SimulatedLearners(LearnerGroup):
    """Takes its batches from the object store and does nothing with them."""

    _version = 0

    def start(self) -> None:
        self._learner = SimulatedLearner.remote()

    def publish(self) -> StepResult:
        update = WeightUpdate(policy_version=self._version, backend="host", names=(), dtypes=(), shapes=(), payload={})
        probe = LogprobProbe(
            policy_version=self._version,
            token_ids=PROBE_IDS,
            logprobs=np.zeros(len(PROBE_IDS) - 1, dtype=np.float32),
        )
        return StepResult(
            policy_version=self._version,
            metrics={},
            seconds={},
            update=ray.put(update),
            probe=probe,
            checksums=Checksums(policy_version=self._version, dtype="float32", sums={}),
        )

    def start_step(self, samples: Sequence[Sample]) -> Any:
        self._version += 1
        return SimulatedStep(self._learner.train.remote(ray.put(list(samples))), self.publish())

    def shutdown(self) -> None:
        ray.kill(self._learner)


class SimulatedGRPOConfig(GRPOConfig):
    def build_learner_group(self, **_: Any) -> Any:
        return SimulatedLearners(self.run_config.learner, self.run_config.loss)


PARTS = {
    "_admit": "leases and calls",
    "_take": "groups taken in",
    "_collect_scored": "scores collected, log written",
    "_begin_step": "batches made and sent",
    "_finish_step": "steps finished",
}
"""Methods of the algorithm → their names in the output. The rest is Ray's time: waiting for results and reading them."""


def count_cpu(algo: Any, names: Sequence[str]) -> Counter[str]:
    """Method → CPU seconds of the calling thread, counted from now on."""
    seconds: Counter[str] = Counter()

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begun = time.thread_time()
            try:
                return method(*args)
            finally:
                seconds[name] += time.thread_time() - begun

        return call

    for name in names:
        setattr(algo, name, counted(name, getattr(algo, name)))
    return seconds


def measure(config: RunConfig, args: argparse.Namespace, folder: Path) -> None:
    log = folder / "log"
    settings = SimulatedGRPOConfig().run(
        config, sandbox_address="127.0.0.1:1", sandbox_token="unused", trajectory_log=str(log)
    )
    # RLlib's own setter: with `GRPOConfig` the run decides what samples.
    algo = AlgorithmConfig.env_runners(
        settings, env_runner_cls=SimulatedRunner, num_cpus_per_env_runner=0.01
    ).build_algo()
    try:
        manager = managed(algo.env_runner_group)
        handles = list(manager.actors().values())
        manager.add_actors([handles[i % len(handles)] for i in range(args.runners - len(handles))])
        algo.runners.adopt(start_timeout_s=120.0)
        algo.runners.wait_ready()
        algo.train()  # warm-up
        profile, seconds = cProfile.Profile(), count_cpu(algo, list(PARTS))
        count, log_bytes = 0.0, log.stat().st_size
        busy, process, started = time.thread_time(), time.process_time(), time.monotonic()
        if args.profile:
            profile.enable()
        for step in range(args.steps):
            metrics = algo.train()["grpo"]
            count += metrics["num_trajectories"]
            print(f"step {step + 1}: {metrics['num_trajectories']:.0f} trajectories, {metrics['step_seconds']:.1f} s")
        profile.disable()
        wall, busy = time.monotonic() - started, time.thread_time() - busy
        process, log_bytes = time.process_time() - process, log.stat().st_size - log_bytes
        print(
            f"{args.runners} runners in {args.processes} processes, {args.tokens} tokens a trajectory: "
            f"{count / wall:.0f} trajectories/s ({count * args.tokens / wall / 1e6:.2f} M tokens/s)\n"
            f"the controller's thread is busy {busy / wall:.0%} of the time, its process uses {process / wall:.2f} cores; "
            f"the thread alone could do {count / busy:.0f} trajectories/s, the process on one core {count / process:.0f}\n"
            f"{log_bytes / count / 1000:.0f} kB a trajectory in the log\nthe thread's CPU time:"
        )
        seconds["Ray"] = busy - sum(seconds.values())
        for name, spent in seconds.most_common():
            print(f"  {PARTS.get(name, 'results waited for and read'):32}{spent / busy:5.0%}")
        if args.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    finally:
        algo.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runners", type=int, default=500)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--groups-per-step", type=int, default=500)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    config = load(
        "examples/tiny/grpo.toml",
        [
            f"rollout.num_actors={args.processes}",
            f"engine.max_model_len={args.tokens + PROMPT_TOKENS + 56}",
            f"episode.max_response_tokens={args.tokens}",
            f"episode.max_prompt_tokens={PROMPT_TOKENS}",
            f"grpo.groups_per_step={args.groups_per_step}",
            f"learner.micro_batch_tokens={args.tokens + PROMPT_TOKENS + 56}",
        ],
    )
    with tempfile.TemporaryDirectory() as folder, ray_session(num_cpus=args.processes, num_gpus=0):
        measure(config, args, Path(folder))


if __name__ == "__main__":
    main()
