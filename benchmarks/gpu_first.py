"""Measures the learner on this machine's GPU, in ten minutes: attention, memory against the plan, speed, rounding, copies.

    python -m benchmarks.gpu_first [--out FILE.md] [--seconds 600] [--only attention learner-7b-zero2 ...]

Run it first on a new GPU. It needs no vLLM, no Ray, no Docker and no download: only torch (2.11 or newer), transformers,
DeepSpeed, peft and pydantic. The models are random, with the shapes of Qwen2.5. Without a GPU every part runs in float32
with a model of about 1M parameters, which shows that the script works and nothing about a GPU.

Each part is a process of its own with a deadline, so a part that fails or hangs leaves the others' results alone. Its rows
are printed as soon as it ends. "plan" is what `--dry-run` says for the same learner. MFU counts the operations that the
gradient needs (2 a parameter and token forward, 2 for the activations' gradients, 2 for the weights' where they are
trained, and attention), without recomputation, as a share of a bfloat16 matrix product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from autotraj.planning.memory import learner_memory
from autotraj.planning.model_size import model_size
from learners.batching import Sample, collate
from learners.config import LearnerConfig, LoraConfig
from learners.engine import DeepSpeedEngine
from learners.model import TokenLogprobs, load_model, settle_layout
from learners.weight_sync import HostMemory, host_update
from models import attention

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
GIB = 1 << 30

SHAPES: dict[str, dict[str, Any]] = {
    "1M": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}
"""From Qwen2.5's published config.json files; `1M` is our own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    part: str
    what: str
    value: str
    beside: str = ""  # the bound or the plan to compare it with


@dataclass(frozen=True, slots=True)
class Case:
    """A learner on one GPU."""

    shape: str
    zero_stage: int
    lora: bool
    checkpointing: bool
    micro_batch_tokens: int


CASES = {
    "learner-7b-zero2": Case("7B", zero_stage=2, lora=True, checkpointing=True, micro_batch_tokens=16384),
    "learner-7b-zero3": Case("7B", zero_stage=3, lora=True, checkpointing=True, micro_batch_tokens=16384),
    "learner-0.5b": Case("0.5B", zero_stage=2, lora=False, checkpointing=False, micro_batch_tokens=16384),
    "learner-3b": Case("3B", zero_stage=2, lora=False, checkpointing=True, micro_batch_tokens=16384),
}


# -- parts ---------------------------------------------------------------------------------------------------------------


def machine() -> list[Row]:
    """The machine, and the two bounds with which other parts are compared."""
    name = torch.cuda.get_device_name() if ON_GPU else "no GPU"
    rows = [Row("machine", name, f"torch {torch.__version__}, CUDA {torch.version.cuda}")]
    if ON_GPU:
        rows.append(Row("machine", "memory", f"{torch.cuda.get_device_properties(0).total_memory / GIB:.1f} GiB"))
    rows.append(Row("machine", "matrix product", f"{_matmul_flops() / 1e12:,.1f} TFLOP/s"))
    return rows


def varlen() -> list[Row]:
    """PyTorch's variable-length kernel: whether it is used, its error beside SDPA's own in this dtype, and its time."""
    from transformers import AttentionInterface

    attention.register()
    packed = AttentionInterface()[attention.NAME]
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    lengths = [3000, 17, 1500, 700, 1, 2900] if ON_GPU else [30, 17, 1]
    borders = torch.tensor([0, *np.cumsum(lengths)], device=DEVICE, dtype=torch.int32)
    rows = []
    for shape in ("0.5B", "3B", "7B") if ON_GPU else ("1M",):
        heads, kv_heads, size = _heads(shape)
        for window in (None, 512):
            what = f"{heads} query and {kv_heads} key heads of {size}" + (f", window {window}" if window else "")
            if ON_GPU and not attention.is_available(
                DEVICE, dtype, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, windows=[window]
            ):
                rows.append(Row("attention", what, "no kernel: sequences are padded"))
                continue
            torch.manual_seed(0)
            leaves = [
                torch.randn(1, n, sum(lengths), size, device=DEVICE, dtype=dtype, requires_grad=True)
                for n in (heads, kv_heads, kv_heads)
            ]

            def by_kernel(leaves: list[Tensor], window: int | None = window) -> Tensor:
                out = packed(
                    torch.nn.Identity(),
                    *leaves,
                    None,
                    scaling=leaves[0].shape[-1] ** -0.5,
                    cu_seq_lens_q=borders,
                    max_length_q=max(lengths),
                    sliding_window=window,
                )[0]
                assert isinstance(out, Tensor)
                return out

            def by_sdpa(leaves: list[Tensor], window: int | None = window) -> Tensor:
                parts = zip(*(torch.split(x, lengths, dim=2) for x in leaves), strict=True)
                return torch.cat([_sdpa(*part, window) for part in parts], dim=2).transpose(1, 2)

            exact = _with_gradients(by_sdpa, [x.detach().float().requires_grad_() for x in leaves])
            errors = [
                max(
                    float((a.float() - b).norm() / b.norm())
                    for a, b in zip(_with_gradients(f, leaves), exact, strict=True)
                )
                for f in (by_kernel, by_sdpa)
            ]
            times = [_seconds(lambda f=f, leaves=leaves: _with_gradients(f, leaves)) for f in (by_kernel, by_sdpa)]
            rows.append(
                Row(
                    "attention",
                    what,
                    f"largest relative error of output and gradients {errors[0]:.2g}; {times[0] * 1e3:.1f} ms",
                    f"SDPA, one sequence after another: {errors[1]:.2g}; {times[1] * 1e3:.1f} ms",
                )
            )
    return rows


def rounding() -> list[Row]:
    """Compares one probe's logprobs, by each way to compute them, with float32: alone and beside other sequences."""
    rows = []
    generator = np.random.default_rng(0)
    shape = "0.5B" if ON_GPU else "1M"
    size = SHAPES[shape]["vocab_size"]
    length = 512 if ON_GPU else 48
    probe, *others = (_sample(generator.integers(0, size, n).astype(np.int32)) for n in (length, length, 2 * length))
    # A random model of the usual deviation is nearly uniform; a larger one is as sure of itself as a trained one.
    for deviation in (0.02, 0.06):
        with tempfile.TemporaryDirectory(dir=_fast_disk()) as folder:
            _write_model(shape, Path(folder), deviation=deviation)
            exact = _probe(folder, "float32", "sdpa", [probe])
            for dtype in ("float32", "bfloat16"):
                for way in ("sdpa", "varlen"):
                    if way == "varlen" and ON_GPU and dtype == "float32":
                        continue  # the kernel has no float32
                    for called, batch in (("alone", [probe]), ("beside others", [others[0], probe, others[1]])):
                        found = _probe(folder, dtype, way, batch, row=batch.index(probe))
                        ratio = found - exact
                        rows.append(
                            Row(
                                "rounding",
                                f"{shape}, weights of deviation {deviation}: {dtype}, {way}, {called}",
                                f"mean difference {np.abs(ratio).mean():.2g}, k3 {(np.expm1(ratio) - ratio).mean():.2g}, "
                                f"largest {np.abs(ratio).max():.2g}",
                                f"mean logprob {exact.mean():.2f}",
                            )
                        )
    return rows


def learner(name: str) -> list[Row]:
    """Policy steps of one case: peak memory against the plan, tokens/s, MFU, and the copy to the host that engines get."""
    case = CASES[name]
    if not ON_GPU:
        case = Case("1M", case.zero_stage, case.lora, case.checkpointing, micro_batch_tokens=512)
    length = 2048 if ON_GPU else 128
    with tempfile.TemporaryDirectory(dir=_fast_disk()) as folder:
        num_parameters = _write_model(case.shape, Path(folder))
        config = LearnerConfig(
            model=folder,
            lora=LoraConfig(rank=16, alpha=32) if case.lora else None,
            num_gpus_per_learner=int(ON_GPU),
            zero_stage=case.zero_stage,
            gradient_checkpointing=case.checkpointing,
            micro_batch_tokens=case.micro_batch_tokens,
        )
        planned = _planned(config)
        engine = DeepSpeedEngine(config)
        batch = [
            _sample(ids, advantage=1.0 if i % 2 else -1.0)
            for i, ids in enumerate(
                np.random.default_rng(0)
                .integers(0, SHAPES[case.shape]["vocab_size"], (2 * case.micro_batch_tokens // length, length))
                .astype(np.int32)
            )
        ]
        loaded = _allocated()
        engine.policy_step(batch)  # the optimizer's state is made here
        seconds, metrics = [], {}
        for _ in range(2):
            _wait()
            started = time.perf_counter()
            metrics = engine.policy_step(batch)
            _wait()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        num_tokens = sum(len(sample) for sample in batch)
        rate = num_tokens / min(seconds)
        flops = _flops_per_token(case.shape, num_parameters, length, trains_all=not case.lora)
        memory = HostMemory()
        copies = []
        for _ in range(2):  # the first one takes the memory
            _wait()
            started = time.perf_counter()
            update = host_update(engine, memory)
            copies.append(time.perf_counter() - started)
        assert update is not None
        num_bytes = sum(array.nbytes for array, _ in update.payload.values())
        del update, memory
        counted = sum(planned.values()) - (planned["overhead"] if ON_GPU else 0)  # torch doesn't count the context
        overhead = f"; the context takes {(_used() - torch.cuda.memory_reserved()) / GIB:.1f} more" if ON_GPU else ""
        how = f"{case.shape}, {'LoRA' if case.lora else 'all weights'}, ZeRO-{case.zero_stage}"
        how += ", checkpointed" if case.checkpointing else ""
        return [
            Row(
                name, f"{how}: attention", "; ".join(engine.notes) or ("packed" if ON_GPU else "padded, as on any CPU")
            ),
            Row(
                name,
                f"{how}: memory after loading",
                f"{loaded / GIB:.1f} GiB",
                f"{planned['weights'] / GIB:.1f} planned",
            ),
            Row(
                name,
                f"{how}: peak memory",
                f"{peak / GIB:.1f} GiB",
                f"{counted / GIB:.1f} planned ({counted / peak:.2f}×)" + overhead,
            ),
            Row(
                name,
                f"{how}: speed",
                f"{rate:,.0f} tokens/s, MFU {rate * flops / _matmul_flops():.2f}",
                f"loss {metrics['loss']:.3g}, gradient norm {metrics['grad_norm']:.3g}",
            ),
            Row(
                name,
                f"{how}: weights to the host",
                f"{copies[1]:.2f} s, {num_bytes / copies[1] / GIB:.1f} GiB/s (the first time {copies[0]:.2f} s)",
                _pinned(num_bytes),
            ),
        ]


PARTS: dict[str, Callable[[], list[Row]]] = {
    "machine": machine,
    "attention": varlen,
    "rounding": rounding,
    **{name: (lambda name=name: learner(name)) for name in CASES},  # type: ignore[misc]
}


# -- what the parts need -------------------------------------------------------------------------------------------------


def _write_model(shape: str, path: Path, *, deviation: float = 0.02) -> int:
    """A random model of that shape in bfloat16 as a checkpoint; returns its number of parameters."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**SHAPES[shape], initializer_range=deviation, max_position_embeddings=32768)
    with DEVICE:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lm.save_pretrained(path)
    num_parameters = int(lm.num_parameters())
    del lm
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return num_parameters


def _planned(config: LearnerConfig) -> dict[str, int]:
    """The plan's bytes by purpose."""
    return learner_memory(config, model_size(config.model)).parts


def _probe(
    folder: str, dtype: str, way: str, batch: list[Sample], row: int = 0
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(L − 1,) logprobs of the sequence in `row`."""
    config = LearnerConfig(
        model=folder,
        dtype=dtype,
        attention=way,
        num_gpus_per_learner=int(ON_GPU),  # type: ignore[arg-type]
    )
    model = load_model(folder, config, DEVICE)
    settle_layout(model, config)
    assert isinstance(model, TokenLogprobs)
    tensors = collate(tuple(batch), padded=way == "sdpa", device=DEVICE)
    layout = tensors.layout
    with torch.no_grad():
        logprobs, _ = model(
            tensors.source, tensors.targets, layout.input_ids, layout.position_ids, layout.borders, layout.longest
        )
    sizes = [sample.num_loss_tokens for sample in batch]
    found = torch.split(logprobs, sizes)[row].cpu().numpy()
    assert np.isfinite(found).all()
    return np.asarray(found)


def _sample(ids: np.ndarray[Any, np.dtype[np.int32]], advantage: float = 0.0) -> Sample:
    """All tokens but the first carry loss, with the logprobs of a uniform policy."""
    mask = np.ones(len(ids) - 1, dtype=np.bool_)
    behaviour = np.full(len(ids) - 1, -12.0, dtype=np.float32)
    return Sample(ids=ids, prompt_len=1, mask=mask, behaviour_logprobs=behaviour, advantage=advantage)


def _flops_per_token(shape: str, num_parameters: int, length: int, *, trains_all: bool) -> float:
    """Operations that a gradient needs for each token of sequences of `length` tokens."""
    heads, _, size = _heads(shape)
    layers, hidden = SHAPES[shape]["num_hidden_layers"], SHAPES[shape]["hidden_size"]
    tied = SHAPES[shape].get("tie_word_embeddings", False)
    products = num_parameters - (0 if tied else SHAPES[shape]["vocab_size"] * hidden)  # an embedding is no product
    scores = 2 * 2 * layers * heads * size * length / 2  # causal: half of the pairs; forward
    return (6 if trains_all else 4) * products + 3 * scores


def _heads(shape: str) -> tuple[int, int, int]:
    of = SHAPES[shape]
    return of["num_attention_heads"], of["num_key_value_heads"], of["hidden_size"] // of["num_attention_heads"]


def _matmul_flops() -> float:
    """Operations a second of a large matrix product in the training dtype."""
    size = 8192 if ON_GPU else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32) for _ in "ab")
    return 2 * size**3 / _seconds(lambda: a @ b, repeats=10)


def _seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Mean of `repeats` runs after as many that don't count."""
    for _ in range(repeats):
        run()
    _wait()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait()
    return (time.perf_counter() - started) / repeats


def _with_gradients(attend: Callable[[list[Tensor]], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of its weighted sum."""
    out = attend(leaves)
    weights = torch.linspace(-1.0, 1.0, out.shape[1], device=out.device, dtype=out.dtype)[None, :, None, None]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    mask = None
    if window is not None:
        mask = torch.ones(2 * query.shape[2:3], dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def _pinned(num_bytes: int) -> str:
    """The same number of bytes into pinned memory, through one buffer: the bound of a copy to the host."""
    if not ON_GPU:
        return ""
    block = 256 << 20
    source = torch.empty(block, dtype=torch.uint8, device=DEVICE)
    target = torch.empty(block, dtype=torch.uint8, pin_memory=True)
    _wait()
    started = time.perf_counter()
    for _ in range(-(-num_bytes // block)):
        target.copy_(source, non_blocking=True)
    _wait()
    seconds = time.perf_counter() - started
    return f"into pinned memory {seconds:.2f} s, {num_bytes / seconds / GIB:.1f} GiB/s"


def _fast_disk() -> str | None:
    """Memory as a disk, where there is enough of it for two checkpoints of 15 GB; else the usual place."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 32 * GIB else None


def _allocated() -> int:
    return int(torch.cuda.memory_allocated()) if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


# -- running them --------------------------------------------------------------------------------------------------------


def run_part(name: str, seconds: float) -> list[Row]:
    """The rows of one part, made in a process of its own within `seconds`; a failure is a row, too."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.gpu_first", "--only", name, "--rows", str(out)]
        try:
            done = subprocess.run(command, timeout=seconds, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return [Row(name, "failed", f"it wasn't done within {seconds:.0f} s")]
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return [Row(name, "failed", (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])]
        return [Row(**row) for row in json.loads(out.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; default: all")
    parser.add_argument("--seconds", type=float, default=570.0, help="after these seconds nothing runs any more")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file, too")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # in the process of one part
    args = parser.parse_args()
    if args.rows:
        args.rows.write_text(json.dumps([asdict(row) for name in args.only for row in PARTS[name]()]))
        return
    end = time.monotonic() + args.seconds
    lines = ["| Part | What | Measured | Beside |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    failed = False
    for name in args.only:
        left = end - time.monotonic()
        rows = run_part(name, left) if left > 0 else [Row(name, "failed", "no time was left for it")]
        failed |= any(row.what == "failed" for row in rows)
        new = [f"| {row.part} | {row.what} | {row.value} | {row.beside} |" for row in rows]
        print("\n".join(new), flush=True)
        lines += new
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
