"""`grpo` within a run: trains the policy online, starting from what supervised training made, and measures it."""

from __future__ import annotations

import time
from typing import Any

from autotraj.config.run import with_changes
from autotraj.config.stage_registry import GRPO, REWARD_MODEL
from autotraj.launch import build_algorithm, export_policy, train
from autotraj.loop.refreshed_models import require_reward_model
from autotraj.run_folder.folder import RunFolder
from autotraj.stages.pipeline import Pipeline
from autotraj.status.progress import GrpoProgress
from autotraj.training import supervised
from storage.locations import join


def run(pipeline: Pipeline) -> dict[str, Any]:
    """The stage, in `pipeline`. Returns its figures. Raises `supervised.Interrupted`."""
    config = with_changes(
        pipeline.config,
        {
            "model": supervised.start_of(GRPO.name, pipeline.config),
            "run_dir": join(pipeline.config.run_dir, GRPO.folder),
            "reward_model.path": _reward_model_path(pipeline),
        },
    )
    folder, checkpoint = RunFolder.stage(pipeline.config, GRPO.folder)
    with folder:
        if checkpoint is not None:
            require_reward_model(config, checkpoint)
        algo = build_algorithm(config, pipeline.gateway, trajectory_log=folder.trajectory_log)
        try:
            if checkpoint is None and "sft" in pipeline.config.stages and "evaluate-sft" not in pipeline.done:
                pipeline.evaluate("sft", algo)
            if checkpoint is not None:
                algo.restore_from_path(checkpoint.folder, learners=checkpoint.learners)
                pipeline.console.print(f"grpo: resumed at step {algo.policy_version}")
            started = time.monotonic()
            with GrpoProgress(config.grpo.num_steps, pipeline.console) as view:
                complete = train(
                    algo, folder, num_steps=config.grpo.num_steps, on_step=view.grpo_step, interrupt=pipeline.interrupt
                )
            if not complete:
                raise supervised.Interrupted
            export_policy(algo, folder)
            pipeline.evaluate("grpo", algo, seconds=time.monotonic() - started)
        finally:
            algo.stop()
    return {"num_steps": config.grpo.num_steps}


def _reward_model_path(pipeline: Pipeline) -> str:
    if REWARD_MODEL.name in pipeline.config.stages:
        return supervised.require_model(pipeline.location, REWARD_MODEL.folder, "model", made_by=REWARD_MODEL.name)
    return pipeline.config.reward_model.path
