"""The engine: vLLM's `AsyncLLM`, with one class for CPU and GPU.

vLLM's core runs in its own process, so a tool call or a slow tokenizer in this process never delays decoding. vLLM is
imported when an engine starts, because it reads its environment variables at import.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.config import EngineConfig
from actors.engine import adapter, checkpoint, host_weights, vllm_setup
from actors.engine.protocol import (
    EngineDead,
    EngineError,
    EngineTimeout,
    Generation,
    RequestFailed,
    Sampling,
    UpdateReport,
)
from models.checksums import HeldSums, merged
from models.on_disk import tensor_shapes
from models.weight_update import WeightUpdate
from storage.objects import StorageError, fetch
from trajectory.types import Segment

T = TypeVar("T")

SHUTDOWN_TIMEOUT_S = 10.0
"""How long vLLM's processes may take to end by themselves before they are killed, seconds."""


class VLLMEngine:
    """`Engine` on vLLM's `AsyncLLM`. Make it and use it inside one event loop."""

    def __init__(self, config: EngineConfig, *, seed: int = 0) -> None:
        self._config = config
        self._seed = seed
        self._llm: Any = None
        self._expected: dict[str, tuple[int, ...]] = {}  # the checkpoint's tensors
        self._by_adapter = config.weight_transfer == "adapter"
        self._holds_adapter = False
        self._adapter: dict[str, tuple[int, ...]] = {}  # the tensors of the newest adapter
        self._policy_version = 0
        self._cause_of_death = ""
        self._in_flight: set[asyncio.Timeout] = set()
        self._num_scores = 0
        self._updating = asyncio.Lock()
        self._admitting = asyncio.Event()
        self._admitting.set()

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @property
    def cause_of_death(self) -> str:
        """Why this engine can't be used any more; empty as long as it can."""
        return self._cause_of_death

    @property
    def num_requests(self) -> int:
        """Number of running requests."""
        return len(self._in_flight)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model. Raises ValueError for a checkpoint that can't be served, `EngineError` for all other errors."""
        try:
            model = await asyncio.to_thread(fetch, self._config.model)
        except StorageError as error:
            raise ValueError(f"engine.model: {error}") from error
        self._config = self._config.model_copy(update={"model": model})
        self._expected = tensor_shapes(self._config.model)
        if self._config.weight_transfer in ("host", "adapter"):
            await asyncio.to_thread(host_weights.remove_unused)
        vllm_setup.set_environment(self._config)
        try:
            # In a thread: loading takes half a minute, and this actor must answer health checks meanwhile.
            async with asyncio.timeout(self._config.start_timeout_s):
                await asyncio.to_thread(self._load)
        except TimeoutError:
            self._cause_of_death = "it did not come up in time"
            raise EngineTimeout(
                f"vLLM did not come up within engine.start_timeout_s = {self._config.start_timeout_s:g} s"
            ) from None
        except ValueError as error:  # settings that vLLM refuses
            raise ValueError(f"vLLM did not come up: {error}") from error
        except Exception as error:
            raise EngineDead(f"vLLM did not come up: {error}") from error
        # The first request starts vLLM's output handler, which `_call` watches.
        await self._run_request([0], _sampling_params(Sampling(max_tokens=1)), "warm-up")
        await self._call(self._llm.update_weight_version(str(self._policy_version)), "take its first policy version")
        if self._by_adapter:
            await self._call(self._llm.collective_rpc("hold_zero_adapter"), "hold an adapter that changes nothing")
            self._holds_adapter = True
        shapes = {name: list(shape) for name, shape in self._expected.items()}
        await self._call(self._llm.collective_rpc("locate_weights", args=(shapes,)), "locate its weights")

    def _load(self) -> None:
        # Assigned here and not returned: if a library keeps an import error, the error holds the frames of this call.
        # Through them it would hold the engine until the interpreter ends, where vLLM's finalizer fails.
        self._llm = vllm_setup.start_engine(self._config, self._seed)

    async def shutdown(self) -> None:
        """Stop the engine's processes. Running requests fail."""
        if self._llm is not None:
            await self._die("it was shut down")
            self._llm = None

    # --- requests -----------------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Continue `prompt_ids`. Cancelling this coroutine removes the request from the engine."""
        output, began_with = await self._run_request(prompt_ids, _sampling_params(sampling), request_id)
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise RequestFailed(f"vLLM ended request {request_id} with {completion.finish_reason!r}")
        finish_reason: Literal["stop_string", "eos", "length"] = "length"
        if completion.finish_reason == "stop":
            finish_reason = "stop_string" if isinstance(completion.stop_reason, str) else "eos"
        return Generation(
            token_ids=list(completion.token_ids),
            logprobs=list(
                completion.logprobs.logprobs
            ),  # `FlatLogprobs`: for each token only the sampled token's logprob
            text=completion.text,
            finish_reason=finish_reason,
            segments=_segments(completion.weight_versions, began_with),
            num_cached_tokens=output.num_cached_tokens or 0,
        )

    async def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """log p(token_ids[i + 1] | token_ids[: i + 1]) at temperature 1, (len − 1,), computed without the cache."""
        from vllm import SamplingParams

        if len(token_ids) < 2:
            return np.zeros(0, np.float32)
        self._num_scores += 1
        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            # The cache holds keys and values but no logits, so positions from the cache would have no logprob.
            skip_reading_prefix_cache=True,
            output_kind=_final_only(),
        )
        output, _ = await self._run_request(token_ids, params, f"score-{self._num_scores}")
        rows = output.prompt_logprobs[1:]
        return np.array([row[token].logprob for row, token in zip(rows, token_ids[1:], strict=True)], np.float32)

    async def _run_request(self, token_ids: Sequence[int], params: Any, request_id: str) -> tuple[Any, int]:
        """The final output, and the policy version under which the request began."""
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._check_alive()
        limit = self._config.request_timeout_s
        deadline = asyncio.timeout(limit)
        self._in_flight.add(deadline)
        try:
            async with deadline:
                # A request during an update could fill the new version's cache with keys of the old weights.
                await self._admitting.wait()
                self._check_alive()
                began_with = self._policy_version
                prompt = tokens_input(list(token_ids), cache_salt=f"policy-{began_with}")
                output = None
                policy = adapter.request() if self._holds_adapter else None
                outputs = self._llm.generate(prompt, params, request_id, lora_request=policy)
                async for output in outputs:  # noqa: B007  # only the last one counts
                    pass
        except TimeoutError:
            self._check_alive()  # `_die` ends deadlines early
            raise EngineTimeout(
                f"vLLM did not finish request {request_id} within engine.request_timeout_s = {limit:g} s"
            ) from None
        except EngineDeadError as error:
            self._cause_of_death = self._cause_of_death or "its core process died"
            raise EngineDead(f"the vLLM engine is dead: {self._cause_of_death}") from error
        except (EngineGenerateError, ValueError) as error:
            raise RequestFailed(f"vLLM failed request {request_id}: {error.__cause__ or error}") from error
        finally:
            self._in_flight.discard(deadline)
        assert output is not None, "vLLM always yields a final output"
        return output, began_with

    # --- weights ------------------------------------------------------------------------------------------------------

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Join the learner's NCCL group; `init_info` is vLLM's `NCCLWeightTransferInitInfo`. The learner must join, too."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        # vLLM would forget the communicator of an earlier group without releasing its memory.
        await self._call(self._llm.shutdown_weight_transfer_engine(), "release the earlier weight-transfer group")
        request = WeightTransferInitRequest(init_info=init_info)
        await self._call(self._llm.init_weight_transfer_engine(request), "join the weight-transfer group")

    async def update_weights(self, update: WeightUpdate) -> UpdateReport:
        """Load new weights while requests run: these keep their tokens and their KV, and continue under the new version.

        vLLM counts a request's tokens as they leave the core. There, weights change only while it is paused and its output
        queue is empty, so the spans in `Generation.segments` are exact. The prefix cache is salted with the version, so no
        later request finds keys of older weights. One that began before, and waited, may: its first segment is empty.
        Raises ValueError, and changes nothing, if `update` isn't for this model.
        """
        checkpoint.check_backend(update, self._config.weight_transfer)
        if self._by_adapter:
            adapter.check(update, self._expected, max_rank=self._config.adapter_rank or 0)
        else:
            checkpoint.check_update(update, self._expected)
        async with self._updating:
            started = time.monotonic()
            async with _payload(update, self._config.update_timeout_s) as info:
                written = time.monotonic()
                num_kept = await self._swap(info, update.policy_version)
                if self._by_adapter:
                    self._adapter = dict(zip(update.names, update.shapes, strict=True))
        finished = time.monotonic()
        return UpdateReport(
            policy_version=update.policy_version,
            write_s=written - started,
            paused_s=finished - written,
            num_kept=num_kept,
        )

    async def held_sums(self, names: Sequence[str]) -> HeldSums:
        """Checksums of what the workers hold of the checkpoint's tensors, computed there, between two steps of decoding."""
        self._check_alive()
        async with self._updating:
            if self._by_adapter:
                shapes = {name: self._adapter[name] for name in names if name in self._adapter}
                call = self._llm.collective_rpc("held_adapter_sums", args=(shapes,))
            else:
                shapes = {name: self._expected.get(name, ()) for name in names}
                call = self._llm.collective_rpc("held_sums", args=(list(names),))
            ranks = await self._call(call, "sum its weights")
        pieces = [
            {name: tuple(found) if isinstance(found, list) else found for name, found in rank.items()} for rank in ranks
        ]
        return merged(pieces, {name: shapes.get(name, ()) for name in names})

    async def _swap(self, info: dict[str, Any], policy_version: int) -> int:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._admitting.clear()
        try:
            await self._call(self._llm.pause_generation(mode="keep", clear_cache=False), "pause")
            num_kept = len(self._in_flight)
            if self._by_adapter:
                await self._call(self._llm.add_lora(adapter.request(info["folder"])), "load a new adapter")
                await self._call(self._llm.update_weight_version(str(policy_version)), "take a new policy version")
            else:
                await self._call(self._llm.start_weight_update(), "begin a weight update")
                await self._call(self._llm.update_weights(WeightTransferUpdateRequest(info)), "load new weights")
                await self._call(self._llm.finish_weight_update(str(policy_version)), "finish a weight update")
            self._policy_version = policy_version
            await self._call(self._llm.resume_generation(), "resume")
            return num_kept
        except BaseException as error:
            # Some layers may still be the old ones, so no policy version describes what this engine would sample now.
            await self._die(f"its update to policy version {policy_version} failed: {error!r}")
            raise
        finally:
            self._admitting.set()

    # --- every wait has a limit -----------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._cause_of_death:
            raise EngineDead(f"the vLLM engine is dead: {self._cause_of_death}")
        if self._llm is None:
            raise EngineDead("the vLLM engine was not started")

    async def _call(self, coroutine: Coroutine[Any, Any, T], what: str) -> T:
        """Await a control call of vLLM until the update deadline, or until the engine dies.

        When the core process dies, vLLM fails the requests but leaves control calls pending forever (0.32). So this also
        watches vLLM's output handler, which ends with the engine.
        """
        call = asyncio.ensure_future(coroutine)
        limit = self._config.update_timeout_s
        try:
            done, _ = await asyncio.wait(
                {call, self._llm.output_handler}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            if not call.done():
                call.cancel()
        if call in done:
            try:
                return call.result()
            except Exception as error:
                raise EngineError(f"vLLM failed to {what}: {error}") from error
        if done:
            self._cause_of_death = self._cause_of_death or f"its core process died when asked to {what}"
            raise EngineDead(f"the vLLM engine is dead: {self._cause_of_death}")
        raise EngineTimeout(f"vLLM did not {what} within engine.update_timeout_s = {limit:g} s")

    async def _die(self, cause: str) -> None:
        """Stop vLLM. Running requests, which vLLM's own shutdown leaves waiting, fail, and so do all later ones."""
        self._cause_of_death = self._cause_of_death or cause
        for deadline in self._in_flight:
            deadline.reschedule(asyncio.get_running_loop().time())
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would report this intended end as a failure
        await asyncio.to_thread(self._llm.shutdown, SHUTDOWN_TIMEOUT_S)


def _sampling_params(sampling: Sampling) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        seed=sampling.seed,
        logprobs=0,  # only those of the sampled tokens
        flat_logprobs=True,
        output_kind=_final_only(),
    )


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY  # intermediate outputs would wake this process for every token


def _segments(spans: Sequence[Any], began_with: int) -> tuple[Segment, ...]:
    """Of vLLM's spans. A request that waited, and got its first token after a change of weights, has the older prompt's keys
    and values if these were in the cache or computed already; so it begins with an empty segment of the older version."""
    found = [
        Segment(start=span.start, end=span.end, policy_version=int(span.version))
        for span in spans
        if span.end > span.start
    ]
    if found and found[0].policy_version != began_with:
        found.insert(0, Segment(start=0, end=0, policy_version=began_with))
    return tuple(found)


@asynccontextmanager
async def _payload(update: WeightUpdate, timeout_s: float) -> AsyncIterator[dict[str, Any]]:
    """The update in the form that vLLM's engine for its backend takes. Raises as `host_weights.share` does."""
    if update.backend == "nccl":
        yield {
            "names": list(update.names),
            "dtype_names": list(update.dtypes),
            "shapes": [list(shape) for shape in update.shapes],
        }
        return
    shared = await asyncio.to_thread(host_weights.share, update.publication, update.payload, timeout_s=timeout_s)
    try:
        if update.backend == "adapter":
            with adapter.as_folder(update, shared.path) as folder:
                yield {"folder": folder}
        else:
            yield {"path": str(shared.path)}
    finally:
        shared.release()
