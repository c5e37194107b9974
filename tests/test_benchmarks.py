"""The benchmarks' contenders run and score every convolution; no time is asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attrfast import models, ops
from benchmarks import contenders, gpu, gpu_picture, machine, passes, recorder, report
from benchmarks.kernels import COPY, OURS, measure

LAYERS = {"features.0": 8, "features.3": 8, "features.7": 16, "features.10": 16}
SCORING = ("hooks", "captum", "torch_pruning", "signed_batch", "attrfast (call tier)", "attrfast")


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set the number of threads; tests after these must not see it."""
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
    assert len(rows) == 60  # ten kernels, three dtypes, two memory formats
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
