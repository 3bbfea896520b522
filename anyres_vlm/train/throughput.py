"""How fast a stage runs: tokens, tiles and, where the device's peak is known, the share of it that is used (MFU)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from anyres_vlm.flops import Flops, training_flops
from anyres_vlm.train.engine.engine import StepResult

# Dense bf16 TFLOP/s with accumulation in fp32, by what the device's name holds: the makers' data sheets.
PEAKS = {
    "B200": 2250, "MI300X": 1307.4, "H200": 989.4, "H100 PCIe": 756, "H100 NVL": 835.5, "H100": 989.4, "H800": 989.4,
    "A100": 312, "A800": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165.2,
}  # fmt: skip


def device_peak() -> float | None:
    """FLOP/s in bf16 of this rank's device; None on a CPU or a device that the table does not have."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().replace("-", " ").split()
    return next((peak * 1e12 for name, peak in PEAKS.items() if _holds(words, name.split())), None)


def _holds(words: list[str], name: list[str]) -> bool:
    return any(words[first : first + len(name)] == name for first in range(len(words)))


@dataclass(frozen=True)
class Throughput:
    """Turns steps into rates; MFU needs the model's `flops` and the `device_peak`."""

    flops: Flops | None
    trained: Collection[str]  # parts of the model
    peak: float | None
    world_size: int

    def rates(self, result: StepResult, seconds: float) -> dict[str, float]:
        """Of one optimizer step over all ranks that took so long, data wait included."""
        seconds = max(seconds, 1e-9)
        rates = {
            "time/tokens_per_s": round(result.tokens / seconds, 1),
            "time/tiles_per_s": round(result.tiles / seconds, 2),
        }
        if self.flops is not None and self.peak is not None:
            done = training_flops(
                self.flops,
                self.trained,
                tokens=result.tokens,
                supervised_tokens=result.supervised_tokens,
                pairs=result.pairs,
                tiles=result.tiles,
            )
            rates["time/mfu"] = done / (seconds * self.world_size * self.peak)
        return rates
