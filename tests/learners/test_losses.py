"""Losses against hand-computed numbers and against TRL's own code."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from learners.config import LossConfig
from learners.losses.objective import PolicyObjective, mean_of_tokens
from learners.losses.policy import importance_weight, kl_estimate, policy_loss
from learners.losses.registry import LOSSES
from learners.losses.supervised import bradley_terry, sft_loss

pytestmark = pytest.mark.slow

MASK = torch.tensor([[True, True, False], [True, True, True]])
LOGPROBS = torch.tensor([[-0.5, -1.0, -9.0], [-2.0, -0.25, -1.0]], dtype=torch.float64)
RATIOS = torch.tensor([[1.5, 1.0, 7.0], [0.5, 1.0, 1.1]], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0], dtype=torch.float64)

# By hand: with ε = 0.2/0.28 row 0 gives −1.28, −1 and row 1 (A < 0) 0.8, 1, 1.1; with 0.2/0.2 its first is −1.2.
BY_HAND = {
    "grpo": (-2.2 / 2 + 2.9 / 3) / 2,
    "dr_grpo": (-2.2 + 2.9) / (2 * 10),
    "dapo": (-1.28 - 1 + 0.8 + 1 + 1.1) / 5,
    "gspo": (-1.0004 + 0.9997) / 2,  # ratios √1.5 and ∛0.55, both outside their tiny range
    "cispo": (0.75 + 1.0 - 1.0 - 0.25 - 1.1) / 5,
}


def loss_config(algorithm: str, **settings: object) -> LossConfig:
    length = {"max_response_tokens": 10} if algorithm == "dr_grpo" else {}
    return LossConfig(algorithm=algorithm, **(length | settings))  # type: ignore[arg-type]


def run(config: LossConfig, logprobs: Tensor, old: Tensor, behaviour: Tensor, **more: Tensor) -> tuple[Tensor, dict]:
    return policy_loss(
        logprobs, old, behaviour, ADVANTAGES, MASK, config, num_tokens_global=5, num_sequences_global=2, **more
    )


@pytest.mark.parametrize("algorithm", BY_HAND)
def test_loss_by_hand(algorithm: str) -> None:
    old = LOGPROBS - RATIOS.log()
    loss, metrics = run(loss_config(algorithm), LOGPROBS, old, old)
    assert loss.item() == pytest.approx(BY_HAND[algorithm], abs=1e-9)
    assert metrics["is_weight_mean"].item() == pytest.approx(1.0)
    assert metrics["logprob_diff_max"].item() == 0.0
    if algorithm == "dapo":
        assert metrics["ratio_mean"].item() == pytest.approx((1.5 + 1 + 0.5 + 1 + 1.1) / 5)
        assert metrics["ratio_max"].item() == pytest.approx(1.5)  # 7.0 is masked
        assert metrics["clip_fraction"].item() == pytest.approx(2 / 5)


def test_an_objective_of_ones_own_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain policy gradient, −A·log π: added from outside, it is configured, checked and computed as the others are."""

    def plain(ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_range: object) -> tuple[Tensor, Tensor]:
        return -advantages * logprobs, torch.zeros_like(ratio, dtype=torch.bool)

    parts = {"clip_range": (0.5, 0.5), "ratio_level": "token", "mean": mean_of_tokens, "needs_length": False}
    mine = PolicyObjective(name="mine", token_loss=plain, advantage_scale="none", **parts)
    with pytest.raises(TypeError, match="token_loss"):
        PolicyObjective(name="mine", advantage_scale="none", **parts)
    with pytest.raises(ValidationError, match="'mine' is no known objective; these are: grpo, dr_grpo"):
        LossConfig(algorithm="mine")
    monkeypatch.setitem(LOSSES, "mine", mine)
    config = LossConfig(algorithm="mine")
    assert config.reward_scale == "none"
    assert config.clip_range == (0.5, 0.5)
    loss, _ = run(config, LOGPROBS, LOGPROBS, LOGPROBS)
    assert loss.item() == pytest.approx((0.5 + 1.0 - 2.0 - 0.25 - 1.0) / 5)


def test_cispo_keeps_the_gradient_of_clipped_tokens_and_dapo_does_not() -> None:
    old = LOGPROBS - torch.tensor([[9.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log()
    grads = {}
    for algorithm in ("cispo", "dapo"):
        logprobs = LOGPROBS.clone().requires_grad_()
        run(loss_config(algorithm), logprobs, old, old)[0].backward()
        grads[algorithm] = logprobs.grad[0, 0].item()
    assert grads["cispo"] == pytest.approx(-5.0 / 5)  # weight clipped at 1 + 4, advantage 1, five tokens
    assert grads["dapo"] == 0.0


def test_masked_entries_may_hold_anything() -> None:
    logprobs = LOGPROBS.clone()
    logprobs[0, 2] = -math.inf
    logprobs.requires_grad_()
    behaviour = LOGPROBS.clone()
    behaviour[0, 2] = math.nan
    loss, metrics = run(loss_config("dapo"), logprobs, logprobs.detach(), behaviour)
    loss.backward()
    assert logprobs.grad[0, 2].item() == 0.0
    assert torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(v.item()) for v in metrics.values())


@pytest.mark.parametrize(
    ("settings", "weights", "corrected"),
    [
        ({"is_correction": "none"}, [[1, 1, 1]], [[0, 0, 0]]),
        ({"is_correction": "tis", "is_max": 2.0}, [[2, 0.25, 1]], [[1, 0, 0]]),
        ({"is_correction": "mis", "is_max": 2.0, "is_min": 0.5}, [[0, 0, 1]], [[1, 1, 0]]),
        ({"is_correction": "mis", "is_max": 4.0}, [[3, 0.25, 1]], [[0, 0, 0]]),
        ({"is_correction": "tis", "is_level": "sequence", "is_max": 2.0}, [[0.75]], [[0]]),
        ({"is_correction": "tis", "is_level": "sequence", "is_max": 0.5}, [[0.5]], [[1]]),
    ],
)
def test_importance_weights_by_hand(settings: dict, weights: list, corrected: list) -> None:
    """Proximal/behaviour ratios 3 and 1/4; the third token is masked and must not enter the sequence's product."""
    old = torch.tensor([[3.0, 0.25, 99.0]]).log()
    mask = torch.tensor([[True, True, False]])
    weight, flag = importance_weight(old, torch.zeros(1, 3), mask, LossConfig(**settings))
    torch.testing.assert_close(weight, torch.tensor(weights, dtype=torch.float32))
    assert flag.int().tolist() == corrected


def test_weight_scales_the_gradient_and_has_none_of_its_own() -> None:
    """Behaviour 4 times less likely than proximal: truncated to 2, so every gradient doubles."""
    grads = []
    for shift in (0.0, math.log(4.0)):
        logprobs = LOGPROBS.clone().requires_grad_()
        run(loss_config("dapo"), logprobs, LOGPROBS, LOGPROBS - shift)[0].backward()
        grads.append(logprobs.grad)
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_kl_estimators_by_hand() -> None:
    logprobs = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([math.log(0.25)], dtype=torch.float64)
    k = math.log(2.0)
    expected = {"k1": (k, k), "k2": (k * k / 2, k), "k3": (0.5 - 1 + k, 1 - 0.5)}  # value, derivative by log π
    for name, (value, derivative) in expected.items():
        estimate = kl_estimate(logprobs, ref, name)
        (grad,) = torch.autograd.grad(estimate.sum(), logprobs)
        assert estimate.item() == pytest.approx(value), name
        assert grad.item() == pytest.approx(derivative), name


def test_what_the_engine_sampled_with_the_same_weights_by_hand() -> None:
    drift = torch.tensor(
        [[0.5, -0.25, torch.nan], [3.0, 3.0, 3.0]], dtype=torch.float64
    )  # the second row is of older weights
    same = torch.tensor([True, False])
    _, metrics = run(loss_config("dapo"), LOGPROBS, LOGPROBS, LOGPROBS - drift, on_policy=same)
    assert metrics["on_policy_tokens"].item() == 2
    assert metrics["on_policy_diff"].item() == pytest.approx(0.75)
    assert metrics["on_policy_kl"].item() == pytest.approx((math.exp(0.5) - 1.5) + (math.exp(-0.25) - 0.75))


def test_micro_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs, old, behaviour = (-torch.rand(6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 4, generator=generator) > 0.4
    on_policy = torch.tensor([True, False, True, True, False, True])
    for algorithm in BY_HAND:
        config = loss_config(algorithm)

        def part(rows: slice, config: LossConfig = config) -> tuple[Tensor, dict]:
            return policy_loss(
                logprobs[rows],
                old[rows],
                behaviour[rows],
                advantages[rows],
                mask[rows],
                config,
                num_tokens_global=int(mask.sum()),
                num_sequences_global=6,
                on_policy=on_policy[rows],
            )

        whole, metrics = part(slice(0, 6))
        parts = [part(slice(0, 1)), part(slice(1, 4)), part(slice(4, 6))]
        torch.testing.assert_close(sum(p[0] for p in parts), whole)
        for name, value in metrics.items():
            values = torch.stack([p[1][name] for p in parts])
            torch.testing.assert_close(values.max() if name.endswith("_max") else values.sum(), value)


def test_sft_loss_is_the_mean_over_all_loss_tokens() -> None:
    loss, _ = sft_loss(LOGPROBS, MASK, num_tokens_global=5)
    assert loss.item() == pytest.approx((0.5 + 1 + 2 + 0.25 + 1) / 5)


# -- TRL ---------------------------------------------------------------------------------------------------------

TRL = {  # ours → (loss_type, importance_sampling_level)
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
    "cispo": ("cispo", "token"),
}


def trl_loss(algorithm: str, config: LossConfig, logprobs: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """TRL's `GRPOTrainer._compute_loss`, run on given logprobs."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    loss_type, level = TRL[algorithm]
    low, high = config.clip_range
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=1 + high if algorithm == "cispo" else high,  # TRL's is the bound itself there
        max_completion_length=10,
        beta=config.kl_coef,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        _metrics={"eval": defaultdict(list)},
    )
    loss: Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize("algorithm", TRL)
@pytest.mark.parametrize(
    "settings",
    [
        {"is_correction": "none"},
        {"is_correction": "tis", "is_max": 1.2},
        {"is_correction": "mis", "is_max": 1.2, "is_min": 0.8},
        {"is_correction": "tis", "is_level": "sequence", "is_max": 1.2},
        {"is_correction": "none", "kl_estimator": "k3", "kl_coef": 0.1},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_loss_and_gradient_equal_trl(algorithm: str, settings: dict) -> None:
    if algorithm == "gspo" and settings["is_correction"] != "none":
        settings = settings | {"is_level": "sequence"}
    config = loss_config(algorithm, **settings)
    generator = torch.Generator().manual_seed(7)
    num_rows, num_cols = 5, 8
    lengths = torch.tensor([8, 3, 5, 1, 6])
    completion = torch.arange(num_cols)[None] < lengths[:, None]
    tool = torch.rand(num_rows, num_cols, generator=generator) > 0.2
    tool[:, 0] = True
    mask = completion & tool
    values = -3 * torch.rand(num_rows, num_cols, generator=generator, dtype=torch.float64)
    old = values + 0.3 * torch.randn(num_rows, num_cols, generator=generator, dtype=torch.float64)
    behaviour = old + 0.2 * torch.randn(num_rows, num_cols, generator=generator, dtype=torch.float64)
    ref = values + 0.5 * torch.randn(num_rows, num_cols, generator=generator, dtype=torch.float64)
    advantages = torch.randn(num_rows, generator=generator, dtype=torch.float64)

    # As TRL's `_generate_and_score_completions` does; not separable from generation there.
    diff = (old - behaviour) * mask
    weight = torch.exp(diff.sum(-1, keepdim=True) if config.sequence_level_is else diff)
    if config.is_correction == "none":
        weight = torch.ones_like(weight)
    elif config.is_correction == "tis":
        weight = weight.clamp(max=config.is_max)
    else:
        weight = weight.masked_fill((weight < (config.is_min or 0)) | (weight > config.is_max), 0.0)

    theirs_in = values.clone().requires_grad_()
    theirs = trl_loss(
        algorithm,
        config,
        theirs_in,
        {
            "prompt_ids": torch.zeros(num_rows, 1, dtype=torch.long),
            "prompt_mask": torch.ones(num_rows, 1, dtype=torch.long),
            "completion_ids": torch.zeros(num_rows, num_cols, dtype=torch.long),
            "completion_mask": completion.long(),
            "tool_mask": tool.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "importance_sampling_ratio": weight,
            "num_items_in_batch": mask.sum(),
        },
    )
    ours_in = values.clone().requires_grad_()
    ours, _ = policy_loss(
        ours_in,
        old,
        behaviour,
        advantages,
        mask,
        config,
        num_tokens_global=int(mask.sum()),
        num_sequences_global=num_rows,
        ref_logprobs=ref if config.kl_coef > 0 else None,
    )
    theirs.backward()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, atol=1e-6, rtol=0)


def test_bradley_terry_by_hand() -> None:
    """Gaps ln 3, 0 and −ln 3, the last with a margin of ln 3: σ is 3/4, 1/2 and 1/10."""
    chosen = torch.tensor([math.log(3), 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, 1.0, math.log(3)], dtype=torch.float64)
    margins = torch.tensor([0.0, 0.0, math.log(3)], dtype=torch.float64)
    loss, metrics = bradley_terry(chosen, rejected, margins, num_pairs_global=3)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2) + math.log(10)) / 3)
    assert metrics["accuracy"].item() == pytest.approx(0.5)  # right, a tie, wrong
    assert metrics["margin_mean"].item() == pytest.approx(0.0)
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert gradient.tolist() == pytest.approx([-0.25 / 3, -0.5 / 3, -0.9 / 3])  # −(1 − σ) / N


def test_bradley_terry_of_shares_adds_up_and_of_nothing_is_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = (100 * torch.rand(5, generator=generator) for _ in range(3))
    whole, _ = bradley_terry(chosen, rejected, margins, num_pairs_global=5)
    cuts = [slice(0, 2), slice(2, 2), slice(2, 5)]
    shares = [bradley_terry(chosen[c], rejected[c], margins[c], num_pairs_global=5)[0] for c in cuts]
    assert sum(shares).item() == pytest.approx(whole.item())
    assert shares[1].item() == 0.0
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - margins).mean()  # TRL 1.16, RewardTrainer
    assert whole.item() == pytest.approx(expected.item())
