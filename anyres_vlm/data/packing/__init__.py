"""From lengths to packs and optimizer steps. `plan` holds the planner; only it and its kernels import numba."""

from anyres_vlm.data.packing.first_fit import Pack, pack_steps

__all__ = ["Pack", "pack_steps"]
