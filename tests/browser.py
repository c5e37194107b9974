"""A page in a real browser, without a network: what it looks like, says and asks for."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page.

    Attributes:
        pixels: (height, width, 3) of the screenshot, from 0 to 1.
        console: what the page and the browser said about it.
        asked: addresses outside the page that it asked for.
    """

    pixels: np.ndarray
    console: list[str]
    asked: list[str]


def look(page: Path, folder: Path, *, width: int, height: int = 3000, dark: bool = False) -> Seen:
    """Opens a file in headless Chromium; skips the test where there is none."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no browser: apt-get install chromium-headless-shell (or chromium)")
    from matplotlib.image import imread

    picture, log = folder / "screenshot.png", folder / "net.json"
    done = subprocess.run(
        [
            found,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            f"--log-net-log={log}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},{height}",
            f"--screenshot={picture}",
            page.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.exists(), done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = re.findall(r'"url":"((?:https?|ws|ftp)[^"]*)"', log.read_text())
    return Seen(imread(picture)[..., :3], console, asked)
