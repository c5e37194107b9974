"""The benchmarks' contenders run and score every convolution; no time is asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attrfast import models
from benchmarks import contenders, passes
from benchmarks.kernels import COPY, OURS, measure

LAYERS = {"features.0": 8, "features.3": 8, "features.7": 16, "features.10": 16}
SCORING = ("hooks", "captum", "torch_pruning", "signed_batch", "attrfast (call tier)", "attrfast")


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
    threads = torch.get_num_threads()
    try:
        result = measure(rounds=1, patience=0, shape=(1, 8, 8, 8), say=lambda _: None)
    finally:
        torch.set_num_threads(threads)
    assert all({OURS, COPY} < case["seconds"].keys() for case in result["cases"])
    assert len(result["targets"]) == 4
