"""Read and tokenise samples by their position in an index."""

from __future__ import annotations

from dataclasses import dataclass

from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.table import Index
from anyres_vlm.data.sources import Source
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Tiling, plan_tiles
from anyres_vlm.schema import Sample


@dataclass(frozen=True)
class IndexedSamples:
    """Samples of an indexed source. Positions are rows of the index, rejects included."""

    source: Source
    index: Index
    conversation: ConversationTokenizer
    tiling: Tiling

    def sample(self, position: int) -> Sample:
        """Read and tokenise one record; its tile plans follow from the sizes in the index.

        Raises `DataError` if the record cannot be read or its length has changed since it was indexed.
        """
        record = self.source.record(int(self.index.row[position]))
        (encoded,) = self.conversation.encode([record])
        if isinstance(encoded, DataError):
            raise encoded
        plans = tuple(plan_tiles(size, self.tiling) for size in self.index.sizes(position))
        sample = Sample(record.id, *encoded, record.images, plans)
        if len(plans) != len(record.images) or sample.length != self.index.tokens[position]:
            raise DataError(
                f"record {record.id}: {sample.length} tokens, expected {self.index.tokens[position]} as indexed: "
                "the data has changed; index it again"
            )
        return sample
