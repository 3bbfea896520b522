"""Records that are left out: counted, listed, capped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from anyres_vlm.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that is left out, and why."""

    id: str
    reason: str


def report_rejects(source: str, rejects: Sequence[Reject], total: int, max_bad_fraction: float) -> None:
    """Log what is left out. Raises `DataError` when it is more than the allowed share, or everything."""
    if not rejects:
        return
    shown = "; ".join(reject.reason for reject in rejects[:3])
    count = f"{len(rejects)} of {total} records are bad ({shown}{'; ...' if len(rejects) > 3 else ''})"
    if len(rejects) > max_bad_fraction * total:
        raise DataError(f"{source}: {count}: mend them or raise max_bad_fraction above {max_bad_fraction:g}")
    if len(rejects) == total:
        raise DataError(f"{source}: {count}: none is left")
    logger.warning("%s: %s", source, count)
