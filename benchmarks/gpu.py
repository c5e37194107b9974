"""The command `python -m benchmarks.gpu`: attrfast on a GPU, beside PyTorch and other packages.

Kernels beside PyTorch's eager ops, `torch.compile` of the op's definition, and a copy of the same bytes.
Whole passes beside what else computes scores. Times are taken by the GPU's own clock, interleaved, with
the cache emptied before each; memory is what PyTorch's allocator handed out at most. Without a GPU it says
so and measures nothing.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any

import torch
import typer

from benchmarks import contenders, gpu_picture, kernels, machine, report
from benchmarks.networks import FORMATS, NETWORKS, load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the tensor that is read first. 32 MB of fp32 and more are held to the target.
SHAPES = ((64, 64, 32, 32), (64, 64, 56, 56), (64, 256, 56, 56), (64, 64, 112, 112), (256, 512, 7, 7))
PASSES = ("vgg16_bn_224", "resnet50")
SAMPLES = (64, 128, 256, 512)
BATCHES = 4
COMPILED = "torch.compile"
LARGE = 32 << 20  # bytes

KERNEL_TARGET = 1 / 0.9  # of the time of a copy of the same bytes
PASS_TARGETS = (("time", "bare", 0.60), ("memory", "bare", 0.50))

Runs = Mapping[str, Callable[[], object]]


def why_not() -> str:
    """Why nothing can be measured here, or nothing."""
    return "" if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"


def seconds(runs: Runs, rounds: int, device: str) -> dict[str, float]:
    """Median time of each run over interleaved rounds, after one that does not count.

    On a GPU by its events; the cache is overwritten before each run, outside the time.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    on_gpu = torch.device(device).type == "cuda"
    cache = torch.empty(256 << 20 if on_gpu else 1, dtype=torch.uint8, device=device)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            cache.zero_()
            if on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                taken = start.elapsed_time(end) / 1000
            else:
                begin = time.perf_counter()
                run()
                taken = time.perf_counter() - begin
            if turn:
                found[name].append(taken)
    return {name: statistics.median(values) for name, values in found.items()}


@torch.no_grad()
def measure_kernels(
    backends: Mapping[str, Any], device: str, shapes: Any = SHAPES, rounds: int = 20
) -> list[dict[str, Any]]:
    """Every kernel of every backend, on every shape, dtype and memory format.

    Args:
        backends: by name.
    """
    rows = []
    for shape in shapes:
        for title, dtype in DTYPES.items():
            for layout in FORMATS:
                report.say(f"kernels on {'×'.join(map(str, shape))}, {title}, {layout}")
                made = {
                    name: kernels.cases(layout, shape, backend=backend, device=device, dtype=dtype)
                    for name, backend in backends.items()
                }
                for number, case in enumerate(next(iter(made.values()))):
                    runs: dict[str, Callable[[], object]] = {
                        kernels.COPY: kernels.copy_of(case.bytes, device)
                    }
                    runs |= {name: cases[number].ours for name, cases in made.items()}
                    runs |= case.peers | {COMPILED: _compiled(*case.definition)}
                    rows.append(
                        {
                            "op": case.op,
                            "shape": list(shape),
                            "dtype": title,
                            "format": layout,
                            "bytes": case.bytes,
                            "seconds": seconds(runs, rounds, device),
                        }
                    )
    return rows


def _compiled(function: Callable[..., object], args: tuple[Any, ...]) -> Callable[[], object]:
    torch._dynamo.reset()
    made = torch.compile(function)
    return lambda: made(*args)


def judge_kernels(rows: list[dict[str, Any]], names: Any) -> list[dict[str, Any]]:
    """For every kernel: the best backend's worst time over a copy's, among tensors of 32 MB and more."""
    found: dict[str, float] = {}
    for row in rows:
        if row["bytes"] >= LARGE:
            best = min(row["seconds"][name] for name in names) / row["seconds"][kernels.COPY]
            found[row["op"]] = max(found.get(row["op"], 0.0), best)
    return [_verdict(op, "time", kernels.COPY, KERNEL_TARGET, ratio) for op, ratio in found.items()]


def measure_pass(
    network: str,
    samples: int,
    dtype: str,
    device: str,
    rounds: int = 5,
    batches: int = BATCHES,
    names: tuple[str, ...] = contenders.NAMES,
) -> dict[str, Any]:
    """Time and peak memory of every contender's pass, in the memory format that suits each."""
    title = NETWORKS[network].title
    report.say(f"{title}, {samples} images a batch, {dtype}")
    amp = None if dtype == "fp32" else DTYPES[dtype]
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, dict[str, Callable[[], object]]] = {}
    loaded = {form: load(network, form, batches, samples=samples, device=device) for form in FORMATS}
    for name in names:
        for form, (model, data) in loaded.items():
            with suppress(torch.OutOfMemoryError):  # then it is left out
                one = contenders.prepare(name, model, data[:1], amp)
                taken = seconds({name: one}, 2, device)[name]
                if name not in rows or taken < rows[name]["trial"]:
                    peak = _peak(contenders.prepare(name, model, data[:1], amp), device)
                    rows[name] = {"format": form, "trial": taken, "bytes": peak}
                    ready[name] = {name: contenders.prepare(name, model, data, amp)}
            _clean(model)
    whole = {name: run for one in ready.values() for name, run in one.items()}
    for name, taken in seconds(whole, rounds, device).items():
        rows[name]["seconds"] = taken
    return {"network": title, "samples": samples, "dtype": dtype, "contenders": rows}


def _clean(model: torch.nn.Module) -> None:
    model.zero_grad()
    gc.collect()


def _peak(run: Callable[[], object], device: str) -> int | None:
    """Bytes at most in a pass over what was there before; None where nobody counts them."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def judge_pass(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether attrfast's pass holds its targets; contenders that did not fit are not compared."""
    rows = result["contenders"]
    what = f"{result['network']}, {result['samples']}, {result['dtype']}"
    found = []
    for quantity, base, limit in PASS_TARGETS:
        key = {"time": "seconds", "memory": "bytes"}[quantity]
        ours, other = (rows.get(name, {}).get(key) for name in ("attrfast", base))
        if ours is not None and other:
            found.append(_verdict(what, quantity, base, limit, ours / other))
    return found


def _verdict(what: str, quantity: str, against: str, limit: float, ratio: float) -> dict[str, Any]:
    verdict = "held" if ratio <= limit else "missed"
    return {
        "what": what, "quantity": quantity, "against": against, "limit": limit, "ratio": ratio,
        "verdict": verdict,
    }  # fmt: skip


def sheets(result: dict[str, Any]) -> list[report.Sheet]:
    """Tables of all that was measured."""
    about = f"{result['machine']['gpu']}; {machine.one_line(result['machine'])}"
    made = report.Sheet(
        "Kernels", ["", "tensor", "dtype", "format", "run", "time", "GB/s", "× copy"], [about]
    )
    for row in result["kernels"]:
        start = [row["op"], "×".join(map(str, row["shape"])), row["dtype"], row["format"]]
        for name, taken in row["seconds"].items():
            rate = f"{row['bytes'] / taken / 1e9:.0f}"
            over = f"{taken / row['seconds'][kernels.COPY]:.2f}"
            made.rows.append([*start, name, f"{1e6 * taken:.0f} µs", rate, over])
            start = ["", "", "", ""]
    passes = report.Sheet(
        "Passes of 4 batches",
        ["", "images", "dtype", "run", "format", "time", "× bare", "peak memory", "× bare"],
        [about, "A run that is missing did not fit into memory."],
    )
    for one in result["passes"]:
        start = [one["network"], str(one["samples"]), one["dtype"]]
        bare = one["contenders"].get("bare", {})
        for name, row in one["contenders"].items():
            over = [
                f"{row[key] / bare[key]:.2f}" if row.get(key) and bare.get(key) else ""
                for key in ("seconds", "bytes")
            ]
            memory = f"{row['bytes'] / 1e6:.0f} MB" if row["bytes"] is not None else ""
            taken = f"{1000 * row['seconds']:.1f} ms"
            passes.rows.append([*start, name, row["format"], taken, over[0], memory, over[1]])
            start = ["", "", ""]
    targets = report.Sheet("Targets", ["", "quantity", "against", "at most", "found", ""])
    targets.rows += [
        [
            t["what"],
            t["quantity"],
            t["against"],
            f"× {t['limit']:.2f}",
            f"{t['ratio']:.2f}",
            t["verdict"],
        ]
        for t in result["targets"]
    ]
    return [made, passes, targets]


def main(
    quick: Annotated[bool, typer.Option(help="One shape, one batch size.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
) -> None:
    """Measure attrfast on a GPU: about half an hour, or five minutes with --quick."""
    reason = why_not()
    if reason:
        print(f"Nothing was measured: {reason}")
        return
    from attrfast import _backend

    found = {name: _backend.find(name) for name in ("cuda", "triton")}
    backends = {f"attrfast, {n}": one.backend for n, one in found.items() if one.backend is not None}
    for name, one in found.items():
        if one.backend is None:
            print(f"The backend {name} is left out: {one.reason}")
    result: dict[str, Any] = {
        "machine": machine.facts() | {"gpu": torch.cuda.get_device_name()},
        "kernels": [],
        "passes": [],
    }
    if backends:
        result["kernels"] = measure_kernels(
            backends, "cuda", SHAPES[1:2] if quick else SHAPES, 4 * rounds
        )
    result["passes"] = [
        measure_pass(network, samples, dtype, "cuda", rounds)
        for network in PASSES
        for samples in (SAMPLES[:1] if quick else SAMPLES)
        for dtype in DTYPES
    ]
    result["targets"] = judge_kernels(result["kernels"], backends)
    result["targets"] += [t for one in result["passes"] for t in judge_pass(one)]
    made = sheets(result)
    report.show(made)
    report.write("gpu.json", result)
    report.write_markdown(made, "gpu.md", "# On a GPU\n\nWritten by `make gpu`.\n", "gpu.png")
    gpu_picture.draw(result, report.RESULTS / "gpu.png")


if __name__ == "__main__":
    typer.run(main)
