"""GRPO with tools from plain Python, without the command line: `python -m examples.tiny.train`."""

from autotraj.config.run import load
from autotraj.launch import build_algorithm, evaluate_engines, run_session
from tasks.load import load_tasks


def main() -> None:
    config = load("examples/tiny/grpo.toml", ["grpo.num_steps=5", "eval.data.limit=100"])
    with run_session(config) as gateway:  # the sandbox and Ray
        algo = build_algorithm(config, gateway)  # an RLlib Algorithm: engines and learners are up
        for _ in range(config.grpo.num_steps):
            metrics = algo.train()["grpo"]
            print(f"step {algo.policy_version}: reward {metrics['reward_mean']:.2f}")
        print(f"accuracy {evaluate_engines('after', algo, config, load_tasks(config.eval.data)).accuracy:.1%}")
        algo.save_to_path("runs/tiny-train-py")
        algo.stop()


if __name__ == "__main__":
    main()
