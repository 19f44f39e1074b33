"""The pictures are what the script draws from the simulator, and say what it found."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
NAMES = ("memory", "pipelines", "queues", "seams", "traced")


def test_the_kept_pictures_are_the_drawn_ones() -> None:
    pinned = re.search(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if importlib.metadata.version("matplotlib") != pinned[1]:
        pytest.skip(f"another matplotlib than {pinned[1]} places its lines elsewhere")
    command = [sys.executable, str(ROOT / "scripts" / "pictures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "all as drawn\n"), done.stderr[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_stands_alone_and_in_any_scheme(name: str) -> None:
    for form in (name, f"{name}-narrow"):
        svg = (IMAGES / f"{form}.svg").read_text()
        assert 'xmlns="http://www.w3.org/2000/svg"' in svg
        assert "@media (prefers-color-scheme: dark)" in svg
        assert re.search(r'aria-label="[^"]{40,}"', svg)
        used = set(re.findall(r"var\((--[\w-]+)\)", svg))
        defined = set(re.findall(r"(--[\w-]+):", svg))
        assert used <= defined
        # Colours are left to the scheme; matplotlib would write one of its own as #rrggbb.
        assert re.findall(r"(?:fill|stroke): #\w+", svg) == []


def test_the_pictures_say_what_the_simulator_found() -> None:
    told = {name: re.search(r'aria-label="([^"]+)"', (IMAGES / f"{name}.svg").read_text()) for name in NAMES}
    texts = {name: found[1] for name, found in told.items() if found}
    # Two units a micro-batch from the third unit on, against two steps of four, by hand: (42 - 3) // 2 and 2 * 4.
    assert "learns from 19 micro-batches by a local rule" in texts["pipelines"]
    assert "from 8 by backpropagation" in texts["pipelines"]
    assert "no stage waits: 0 units" in texts["seams"]
    for depth in (1, 2, 4):
        assert f"depth {depth}: at most {depth} micro-batches in flight" in texts["queues"]
    # Three outputs of a block, 16 x 16 x 16 x 16 float32 numbers each.
    assert f"BP {3 * 16**4 * 4 / 1024:.0f}" in texts["memory"]
    assert "LLS 0.00 KiB per block" in texts["memory"]
