"""The page of a run says what the run found, holds all it shows, and looks right in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import look
from families import lived_in
from small_networks import CLASSES, Plain
from typer.testing import CliRunner

import attrfast
from attrfast import cli
from attrfast.errors import InputError
from attrfast.map_pictures import extreme_maps
from attrfast.reports.gathered import gather
from attrfast.reports.page import render
from attrfast.runs.folder import Figures, RunFolder
from attrfast.runs.phases import Phase

pytest.importorskip("matplotlib")
runner = CliRunner()
EVIL = '<script>alert("1")</script>&'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as `attrfast prune` leaves it, its names full of markup."""
    root = tmp_path_factory.mktemp("runs") / "a <b>bold & run"
    folder = RunFolder(root)
    torch.manual_seed(0)
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % CLASSES
    model = lived_in(Plain())
    folder.begin(f"[prune]\nmodel = {json.dumps(EVIL)}\n")
    scores = attrfast.attribute(model, [(images, labels)], "attribution", progress=False)
    folder.save_scores(scores)
    layers = [layer.name for layer in scores.units.layers if layer.frozen is None][:2]
    folder.save_maps(images[0], extreme_maps(model, scores, layers, images[0], count=3))
    result = attrfast.prune(model, [(images, labels)], max_macs=0.6, finetune=0, progress=False)
    result.save(root)
    figures = Figures(
        command=["attrfast", "prune", EVIL, "--max-macs", "0.6"],
        environment={"torch": EVIL},
        classes=[{"name": f"{EVIL}{i}", "images": 20, "before": 18, "after": 15 + i} for i in range(3)],
        phases=[Phase("training", 75.0, 512_000_000), Phase("pruning", 12.5, 1_600_000_000)],
        image_class=EVIL,
    )
    folder.save_figures(figures)
    return root


def test_the_page_tells_all_parts_and_holds_all_it_shows(made: Path) -> None:
    page = attrfast.report(made)
    assert page == made / "report.html"
    text = page.read_text()
    last = gather(made).history[-1]
    for expected in (
        f"{last.macs / gather(made).history[0].macs:.1%}",
        "80.00%",  # of the test images after
        "90.00% before (−10.00 points)",
        "<h2>Accuracy and size</h2>",
        "1 min 15 s · 512 MB",
        "12.5 s · 1.60 GB",
        "most important",
        "least important",
        "--max-macs 0.6",
    ):
        assert expected in text
    for gate in gather(made).gates.values():
        assert f"{int(gate.sum())} of {len(gate)}" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert not re.findall(r"url\(|@import|<script", text)
    assert all("alt=" in image for image in re.findall(r"<img[^>]*>", text))
    written = {path.name for path in (made / "report").iterdir()}
    assert written >= {f"{name}.png" for name in (
        "trade_off", "kept_filters", "score_distributions", "class_accuracy", "time_and_memory",
    )}  # fmt: skip
    assert sum(name.startswith("maps-") for name in written) == 2


def test_names_are_text_and_never_markup(made: Path) -> None:
    text = render(gather(made))
    assert "&lt;script&gt;alert" in text
    assert "a &lt;b&gt;bold &amp; run" in text


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (400, False)])
def test_the_page_in_a_browser(made: Path, tmp_path: Path, width: int, dark: bool) -> None:
    seen = look(attrfast.report(made, tmp_path / "page.html"), tmp_path, width=width, dark=dark)
    assert seen.console == []
    assert seen.asked == []
    corner = seen.pixels[3, 3].mean()
    assert corner < 0.2 if dark else corner > 0.9
    # Every stretch of the page has something on it, up to its end.
    filled = [part.std() > 0.02 for part in seen.pixels[:1800].reshape(18, -1)]
    assert all(filled)
    blue = (seen.pixels[..., 2] - seen.pixels[..., 0]) > 0.35
    assert blue.mean() > 0.002  # bars and the curve


def test_the_browser_would_tell_of_a_fault(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://attrfast.invalid/x.png"><script>console.error("boo")</script>')
    seen = look(page, tmp_path, width=300, height=200)
    assert any("boo" in line for line in seen.console)
    assert "http://attrfast.invalid/x.png" in seen.asked


def test_what_a_folder_does_not_hold_is_left_out_with_a_word(tmp_path: Path) -> None:
    """Of a run from Python there is the result alone, or the last step of one that is not done."""
    torch.manual_seed(0)
    batch = torch.randn(8, 3, 16, 16), torch.arange(8) % CLASSES
    result = attrfast.prune(
        lived_in(Plain()),
        [batch],
        max_macs=0.5,
        finetune=0,
        progress=False,
        output_dir=tmp_path / "steps",
    )
    unfinished = render(gather(tmp_path / "steps"))
    assert "Not done yet:" in unfinished
    result.save(tmp_path / "saved")
    text = attrfast.report(tmp_path / "saved").read_text()
    assert "Pruned by <b>attribution</b>" in text
    for missing in ("no scores", "single classes fare", "no maps", "started from Python"):
        assert missing in text
        assert missing in unfinished
    assert {p.name for p in (tmp_path / "saved/report").iterdir()} == {
        "trade_off.png",
        "kept_filters.png",
    }


def test_a_model_that_does_not_classify_has_a_page_too(made: Path, tmp_path: Path) -> None:
    found = gather(made)
    rows = [attrfast.Step(**{**vars(row), "top1": float("nan")}) for row in found.history]
    text = render(type(found)(**{**vars(found), "history": rows, "figures": Figures()}))
    assert "does not classify" in text
    assert "nan" not in text.lower()


@pytest.mark.parametrize("content", [None, "", "{"])
def test_folders_without_a_run_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is None:
        with pytest.raises(InputError, match="there is no folder"):
            attrfast.report(tmp_path / "gone")
        return
    if content:
        (tmp_path / "figures.json").write_text(content)
        (tmp_path / "pruning.json").write_text(json.dumps({"history": [], "gates": {}}))
    with pytest.raises(InputError, match="can't be read" if content else "holds no step of a run"):
        attrfast.report(tmp_path)


def test_the_command_names_what_it_wrote(made: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return runner.invoke(
            cli.app, ["report", str(made), "--out", str(tmp_path / "p.html"), *arguments]
        )

    lines = run().stdout.splitlines()
    assert lines[0] == str(tmp_path / "p.html")
    told = json.loads(run("--json").stdout)
    assert [told["report"], *told["pictures"]] == lines
    assert all(Path(line).stat().st_size > 1000 for line in lines)
