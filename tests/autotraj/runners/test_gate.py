"""The gate, by hand: what an engine holds, and what it computes."""

from collections.abc import Sequence

import numpy as np
import pytest

from actors.engine.protocol import GateAnswer
from autotraj.errors import GateError
from autotraj.runners.gate import Difference, Gate, difference, on_policy_difference
from models.checksums import Checksums, HeldSums
from models.weight_update import LogprobProbe

OLD = {"q": 10, "k": 20, "o": 30, "norm": 40}
NEW = {"q": 11, "k": 21, "o": 31, "norm": 40}
N = 110
"""As many tokens as the real probe has, about."""


def probe(logprobs: Sequence[float] = (-1.0,) * N, version: int = 1) -> LogprobProbe:
    return LogprobProbe(
        policy_version=version, token_ids=(1,) * (len(logprobs) + 1), logprobs=np.array(logprobs, np.float32)
    )


def published(sums: dict[str, int], version: int) -> Checksums:
    return Checksums(policy_version=version, dtype="bfloat16", sums=sums)


def answer(
    held: dict[str, int | None], logprobs: Sequence[float] = (-1.0,) * N, unknown: dict[str, str] | None = None
) -> GateAnswer:
    return GateAnswer(
        logprobs=np.array(logprobs, np.float32), held=HeldSums(sums=held, unknown=unknown or {}), sums_s=0.5
    )


def passed(first: Sequence[float] = (-1.0,) * N, dtype: str = "bfloat16") -> Gate:
    """A gate after a first sync without a fault, with the second set of weights published."""
    gate = Gate(dtype)  # type: ignore[arg-type]
    gate.begin(probe(version=0), published(OLD, 0))
    gate.check(answer(dict(OLD), first), who="rollout actor 1")
    gate.begin(probe(version=1), published(NEW, 1))
    return gate


def refusal(gate: Gate, answered: GateAnswer) -> str:
    with pytest.raises(GateError) as caught:
        gate.check(answered, who="rollout actor 2")
    assert len(str(caught.value)) < 1000  # it fits on a screen
    return str(caught.value)


# --- exact ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_holds_what_was_published_passes() -> None:
    gate = passed()
    gate.check(answer(dict(NEW)), who="rollout actor 2")
    assert gate.names == list(NEW)
    assert gate.metrics["sync/tensors_unchecked"] == 0
    assert gate.metrics["sync/checksum_seconds"] == 0.5


def test_a_dropped_update_is_named() -> None:
    message = refusal(passed(), answer(dict(OLD)))
    assert "after the sync to policy version 1, rollout actor 2 does not hold what was published" in message
    assert "3 of 4 tensors differ: q (it holds q of version 0); k (it holds k of version 0)" in message
    assert "They are still those of version 0, so the update did not reach them" in message


def test_a_stale_tensor_is_named() -> None:
    message = refusal(passed(), answer(NEW | {"k": 20}))
    assert "1 of 4 tensors differ: k (it holds k of version 0)." in message


def test_exchanged_tensors_are_named() -> None:
    message = refusal(passed(), answer(NEW | {"q": 21, "k": 11}))
    assert "2 of 4 tensors differ: q (it holds k of version 1); k (it holds q of version 1)." in message


def test_what_did_not_arrive_whole_never_passes() -> None:
    assert "q (not all of it arrived, or its ranks hold different copies)" in refusal(
        passed(), answer(NEW | {"q": None})
    )
    assert "1 of 4 tensors differ: norm" in refusal(passed(), answer({n: s for n, s in NEW.items() if n != "norm"}))


def test_another_dtype_is_suspected_if_nothing_is_right() -> None:
    gate = Gate("bfloat16")
    gate.begin(probe(version=0), published(OLD, 0))
    assert "None is right: does it compute in bfloat16? If not, set engine.dtype" in refusal(
        gate, answer({name: value + 1000 for name, value in OLD.items()})
    )


def test_of_many_tensors_a_few_are_named() -> None:
    gate = Gate("bfloat16")
    gate.begin(probe(version=0), published({f"model.layers.{i}.mlp.down_proj.weight": i for i in range(500)}, 0))
    message = refusal(gate, answer({f"model.layers.{i}.mlp.down_proj.weight": i + 1 for i in range(500)}))
    assert "500 of 500 tensors differ" in message
    assert "; and 495 more. " in message


def test_tensors_without_a_checksum_are_told_once_and_left_to_the_logprobs(caplog: pytest.LogCaptureFixture) -> None:
    gate = passed()
    for _ in range(2):
        gate.check(
            answer({"q": 11}, unknown=dict.fromkeys(("k", "o", "norm"), "quantized: held as float8")), who="actor 2"
        )
    assert gate.metrics["sync/tensors_unchecked"] == 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "weight sync gate: actor 2 tells no checksum of 3 of 4 tensors, so that only logprobs show whether they arrive: "
        "k, o, norm (quantized: held as float8)"
    )
    assert "1 of 4 tensors differ: q" in refusal(
        gate, answer({"q": 10}, unknown=dict.fromkeys(("k", "o", "norm"), "no"))
    )


# --- numeric --------------------------------------------------------------------------------------------------------


def test_mean_and_k3_by_hand() -> None:
    found = difference(np.array([-1.0, -2.0]), np.array([-1.0, -2.5]))
    assert (found.num_tokens, found.mean, found.largest) == (2, 0.25, 0.5)
    assert found.kl == pytest.approx((np.exp(0.5) - 1 - 0.5) / 2)
    assert difference(np.array([-2.5]), np.array([-2.0])).kl == pytest.approx(np.exp(-0.5) - 1 + 0.5)


def test_later_differences_may_be_five_times_those_of_the_first_sync() -> None:
    first = tuple(-1.0 + 0.03 * (-1) ** i for i in range(N))
    for mean, passes in ((0.14, True), (0.16, False)):
        gate = passed(first)
        later = answer(dict(NEW), tuple(-1.0 + mean * (-1) ** i for i in range(N)))
        if passes:
            gate.check(later, who="rollout actor 2")
            assert gate.metrics["sync/logprob_diff_mean"] == pytest.approx(0.14, abs=1e-4)
        else:
            assert "0.16 nats on average (allowed: 0.15, from 0.03 at the first sync)" in refusal(gate, later)


@pytest.mark.parametrize(("dtype", "passes", "fails"), [("float32", 9e-4, 1.1e-3), ("bfloat16", 0.019, 0.021)])
def test_if_the_first_sync_was_exact_a_floor_is_allowed(dtype: str, passes: float, fails: float) -> None:
    gate = passed(dtype=dtype)
    gate.check(answer(dict(NEW), (-1.0 - passes,) * N), who="rollout actor 2")
    assert "on average (allowed: " in refusal(gate, answer(dict(NEW), (-1.0 - fails,) * N))


@pytest.mark.parametrize(("dtype", "fails"), [("float32", 2e-4), ("bfloat16", 0.25)])
def test_the_first_sync_is_no_licence(dtype: str, fails: float) -> None:
    gate = Gate(dtype)  # type: ignore[arg-type]
    gate.begin(probe(version=0), published(OLD, 0))
    assert f"in {dtype} before any training" in refusal(gate, answer(dict(OLD), (-1.0 - fails,) * N))


def test_rounding_of_real_size_in_bfloat16_passes_and_one_token_far_off_only_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As measured without a fault between vLLM and a bfloat16 trainer: deviation 0.05, largest 0.48."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        first, later = rng.standard_t(4, (2, N)) * 0.05 / np.sqrt(2)
        gate = passed(tuple(-1.0 + first.clip(-0.48, 0.48)))
        later[7] = rng.choice([-0.48, 0.48])
        gate.check(answer(dict(NEW), tuple(-1.0 + later)), who="rollout actor 2")
    assert not caplog.records
    later[7] = -1.2
    gate.check(answer(dict(NEW), tuple(-1.0 + later)), who="rollout actor 2")
    assert "differ on the probe by 1.2 nats on one token" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_what_is_no_number_never_passes(value: float) -> None:
    assert "weight sync gate" in refusal(passed(), answer(dict(NEW), (value, *(-1.0,) * (N - 1))))
    with pytest.raises(GateError, match=r"weights of policy version 1 .* training has broken the policy"):
        passed().begin(probe((value, -1.0)), published(NEW, 1))


def test_sampled_tokens_are_judged_by_their_own_first_step() -> None:
    gate = passed()
    few = on_policy_difference({"on_policy_tokens": 10.0, "on_policy_diff": 30.0, "on_policy_kl": 30.0})
    assert few == Difference(num_tokens=10.0, mean=3.0, kl=3.0)
    gate.check_sampled(few)  # too few to say anything
    gate.check_sampled(on_policy_difference({"on_policy_tokens": 0.0, "on_policy_diff": 0.0, "on_policy_kl": 0.0}))
    assert "sync/sampled_kl" not in gate.metrics
    gate.check_sampled(Difference(num_tokens=1000.0, mean=0.02, kl=0.001))
    gate.check_sampled(Difference(num_tokens=1000.0, mean=0.09, kl=0.002))
    assert gate.metrics["sync/sampled_logprob_diff_mean"] == 0.09
    with pytest.raises(
        GateError, match=r"on the tokens that were sampled for the last step: .* from 0\.02 at the first sync"
    ):
        gate.check_sampled(Difference(num_tokens=1000.0, mean=0.11, kl=0.002))
    with pytest.raises(GateError, match=r"k3 is 0\.03 \(allowed: 0\.025\)"):
        gate.check_sampled(Difference(num_tokens=1000.0, mean=0.02, kl=0.03))
