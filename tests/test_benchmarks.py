"""The benchmarks' contenders run and score every convolution; no time is asserted."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attrfast import data, models, ops
from benchmarks import (
    contenders,
    floor,
    fresh,
    gpu,
    gpu_picture,
    growth,
    machine,
    passes,
    recorder,
    report,
    whole,
)
from benchmarks.__main__ import app
from benchmarks.kernels import COPY, OURS, measure

LAYERS = {"features.0": 8, "features.3": 8, "features.7": 16, "features.10": 16}
SCORING = ("hooks", "captum", "torch_pruning", "signed_batch", "attrfast (call tier)", "attrfast")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Benchmarks set the number of threads; tests after these must not see it. One is enough for toys."""
    monkeypatch.setattr(machine, "THREADS", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.vgg_small(width=0.25).eval()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(2, 1, 8, 8), torch.tensor([3, 7])) for _ in range(2)]


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """Where results go; what would run in a fresh process runs in this one, which is not cleaned each time."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "_commit", lambda: "abc1234")
    monkeypatch.setattr(fresh, "call", lambda function, *args, fork=False: function(*args))
    return tmp_path


def _run(*arguments: str) -> None:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", SCORING)
def test_scoring_contenders_score_every_filter(name, model, batches):
    if name == "captum":
        pytest.importorskip("captum")
    scores = contenders.prepare(name, model, batches)()
    for layer, filters in LAYERS.items():
        assert scores[layer].shape == (filters,)
        assert bool((scores[layer] >= 0).all())
        assert float(scores[layer].detach().abs().sum()) > 0


@pytest.mark.parametrize("name", ["floor", "inference", "bare"])
def test_other_contenders_run(name, model, batches):
    contenders.prepare(name, model, batches)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_runs_convolutions_in_their_dtype_and_makes_no_gradient_for_the_images(
    dtype, model, batches
):
    ran = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append((func._schema.name, args[0].dtype))
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        run = floor.prepare(model, batches)
    with Watch():
        run()
    count = len(batches) * sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    assert ran.count(("aten::convolution", dtype)) == count
    assert ran.count(("aten::convolution_backward", dtype)) == count - len(batches)
    assert len(ran) == 2 * count - len(batches)


def test_passes_are_measured_case_by_case_and_resumed(results, monkeypatch):
    pytest.importorskip("captum")
    arguments = "passes --network vgg_small --rounds 1 --repeats 1 --patience 0".split()
    _run(*arguments, "--dtype", "bf16")
    _run(*arguments, "--dtype", "fp32")
    found = report.read("passes.json")
    assert list(found) == ["vgg_small fp32", "vgg_small bf16"]
    for case in found.values():
        assert set(case["contenders"]) == set(contenders.NAMES)
        assert {t["against"] for t in case["targets"]} == {"floor", "captum", "hooks"}
        assert all(
            (row["bytes"] is None) == (name == "floor") for name, row in case["contenders"].items()
        )
    table = (results / "README.md").read_text()
    assert "| VGG-small 4×1×28×28, bf16 |" in table
    assert (results / "passes.png").stat().st_size > 10_000

    monkeypatch.setattr(passes, "measure", lambda *_, **__: pytest.fail("measured again"))
    _run(*arguments, "--dtype", "fp32", "--resume")
    assert report.read("passes.json") == found


def test_growth_is_measured_in_samples_layers_scored_and_depth(results, monkeypatch):
    pytest.importorskip("captum")
    monkeypatch.setattr(growth, "SAMPLES", (64, 100, 130))
    monkeypatch.setattr(growth, "DEPTHS", (2, 4, 6))
    _run("growth", "--repeats", "1", "--patience", "0")
    series = report.read("growth.json")["series"]
    assert {key: one["points"] for key, one in series.items()} == {
        "samples": [64, 100, 130],
        "scored": [1, 2, 6],
        "depth": [2, 4, 6],
    }
    for one in series.values():
        for rows in one["contenders"].values():
            assert all(row["seconds"] > 0 for row in rows)
    assert set(series["depth"]["fits"][growth.BOUNDED]["verdicts"]) == {"time", "memory"}
    assert "| attrfast, memory_limit |" in (results / "growth.md").read_text()
    assert (results / "growth.png").stat().st_size > 10_000


def test_growth_is_told_by_an_exponent_and_the_spread_of_peaks():
    def rows(peaks):
        return [
            {"seconds": n * 1e-3, "bytes": b, "disturbed": False}
            for n, b in zip((10, 100, 1000), peaks, strict=True)
        ]

    series = growth.Series("samples", (10, 100, 1000), ("attrfast",), linear=True, flat=True)
    even = growth.fit(series, "attrfast", rows([50e6, 51e6, 50e6]))
    assert even["exponent"] == pytest.approx(1)
    assert even["verdicts"] == {"time": "held", "memory": "held"}
    rising = growth.fit(series, "attrfast", rows([50e6, 55e6, 100e6]))
    assert (rising["spread"], rising["verdicts"]["memory"]) == (2, "missed")


def test_the_first_layers_of_a_chain_are_scored_as_with_all_of_them():
    torch.manual_seed(0)
    model = growth.chain(5).eval()
    batches = list(growth.Images(6, (3, 16, 16), 4))
    assert [len(images) for images, _ in batches] == [4, 2]
    every = growth._prepared("attrfast", model, batches, None)()
    first = growth._prepared("attrfast", model, batches, 2)()
    assert list(first) == list(every)[:2]
    for name, scores in first.items():
        torch.testing.assert_close(scores, every[name], rtol=1e-5, atol=0)
    for name in ("hooks", "captum"):
        if name == "captum":
            pytest.importorskip("captum")
        assert set(growth._prepared(name, model, batches, 2)()) == set(first)


def test_a_whole_data_set_is_scored_in_three_ways(results, monkeypatch):
    monkeypatch.setattr(whole, "fashion_mnist", lambda seed: data.digits(batch_size=64))
    _run("whole", "--network", "vgg_small", "--epochs", "0", "--seeds", "1", "--patience", "0")
    found = report.read("whole.json")["vgg_small, seed 0"]
    assert 0 < found["read"][0] <= found["samples"]
    assert set(found["seconds"]) == {whole.HOOKS, whole.ALL, whole.CONFIDENT}
    assert "| vgg_small, seed 0 | 0 |" in (results / "README.md").read_text()


def test_both_tiers_are_measured_on_the_same_scores(model, batches):
    fast, slow = contenders.attrfast(model, batches), contenders.call_tier(model, batches)
    for layer in LAYERS:
        torch.testing.assert_close(fast[layer], slow[layer], rtol=1e-4, atol=1e-6)


def test_a_target_is_judged_by_ratios_within_quiet_rounds():
    rows = {
        "attrfast": {
            "all_seconds": [1.0, 4.0, 9.0, 90.0],
            "all_others": [0, 0, 0, 0.5],
            "all_bytes": [50, 70],
        },
        "bare": {"all_seconds": [2.0, 8.0, 10.0, 10.0], "all_others": [0] * 4, "all_bytes": []},
        "captum": {"all_seconds": [8.0] * 4, "all_others": [0.5, 0.5, 0.5, 0], "all_bytes": [100, 140]},
    }
    held = passes.judge(passes.Target("time", "bare", 0.5), rows)
    assert (held["ratio"], held["verdict"]) == (0.5, "held")
    assert passes.judge(passes.Target("time", "bare", 0.4), rows)["verdict"] == "missed"
    assert passes.judge(passes.Target("time", "captum", 9), rows)["verdict"] == "disturbed"
    assert passes.judge(passes.Target("memory", "captum", 0.5), rows)["verdict"] == "held"
    assert passes.judge(passes.Target("memory", "bare", 0.5), rows)["verdict"] == "not measured"


def test_kernels_are_measured_beside_a_copy_and_their_peers():
    result = measure(rounds=1, patience=0, shape=(1, 8, 8, 8), say=lambda _: None)
    assert all({OURS, COPY} < case["seconds"].keys() for case in result["cases"])
    assert len(result["targets"]) == 4


def test_the_gpu_benchmark_says_why_it_measures_nothing(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    gpu.main()
    assert (
        capsys.readouterr().out == "Nothing was measured: no GPU: torch.cuda.is_available() is False\n"
    )


def test_the_gpu_benchmark_on_the_cpu(tmp_path, monkeypatch):
    """Its measurements, tables and picture, on tensors so small that the figures mean nothing."""
    monkeypatch.setattr(gpu, "_compiled", lambda function, args: lambda: function(*args))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    ours = {"attrfast, cpu": ops.backend_for(torch.device("cpu"))}
    rows = gpu.measure_kernels(ours, "cpu", [(1, 8, 8, 8)], rounds=1)
    assert len(rows) == 82  # thirteen kernels in three dtypes and two memory formats, and two in some
    assert all({"attrfast, cpu", gpu.COMPILED, COPY} < row["seconds"].keys() for row in rows)
    passes = [
        gpu.measure_pass("vgg_small", 2, dtype, "cpu", rounds=1, batches=1) for dtype in ("fp32", "bf16")
    ]
    assert all(set(one["contenders"]) == set(contenders.NAMES) for one in passes)
    result = {"machine": machine.facts() | {"gpu": "none"}, "kernels": rows, "passes": passes}
    result["targets"] = [t for one in passes for t in gpu.judge_pass(one)]
    assert {(t["quantity"], t["against"]) for t in result["targets"]} == {("time", "bare")}
    report.write_markdown(gpu.sheets(result), "gpu.md", "# On a GPU\n", "gpu.png")
    gpu_picture.draw(result, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    table = (tmp_path / "gpu.md").read_text()
    assert "| VGG-small | 2 | fp32 | floor |" in table
    assert "torch.compile" in table


def test_the_recorder_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    result = recorder.measure("vgg_small", rounds=2, patience=0, say=lambda _: None)
    for row in result["formats"].values():
        assert len(row["all_plain"]) == len(row["all_recorded"]) == 2
        assert row["ratio"] > 0
        assert row["verdict"] in ("held", "missed", "disturbed")
    report.write_markdown([report.recorder_sheet(result)])
    assert "| channels_last |" in (tmp_path / "README.md").read_text()


def test_a_kernel_is_judged_by_its_worst_large_tensor():
    def row(size, ours, copy):
        return {"op": "k", "bytes": size, "seconds": {"a": ours, "b": 9.0, COPY: copy}}

    rows = [row(64 << 20, 1.0, 1.0), row(40 << 20, 1.2, 1.0), row(1 << 20, 5.0, 1.0)]
    (verdict,) = gpu.judge_kernels(rows, ["a", "b"])
    assert (verdict["ratio"], verdict["verdict"]) == (1.2, "missed")
    (verdict,) = gpu.judge_kernels(rows[:1], ["a", "b"])
    assert verdict["verdict"] == "held"
