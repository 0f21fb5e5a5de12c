"""GRPO with tools from plain Python, without the command line: `python -m examples.tiny.train`."""

from autotraj.config.run import load
from autotraj.launch import build, measure, parts
from tasks.load import load_tasks


def main() -> None:
    config = load("examples/tiny/grpo.toml", ["grpo.num_steps=5", "eval.data.limit=100"])
    with parts(config) as gateway:  # the sandbox and Ray
        algo = build(config, gateway)  # an RLlib Algorithm: engines and learners are up
        for _ in range(config.grpo.num_steps):
            metrics = algo.train()["grpo"]
            print(f"step {algo.policy_version}: reward {metrics['reward_mean']:.2f}")
        print(f"accuracy {measure('after', algo, config, load_tasks(config.eval.data)).accuracy:.1%}")
        algo.save_to_path("runs/tiny-train-py")
        algo.stop()


if __name__ == "__main__":
    main()
