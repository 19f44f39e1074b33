"""`python -m unlocked` is the command `unlocked`."""

from unlocked.launch.console import run

run()
