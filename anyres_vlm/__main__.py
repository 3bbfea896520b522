"""`python -m anyres_vlm`, which is what launchers such as torchrun start."""

from anyres_vlm.cli.main import run

run()
