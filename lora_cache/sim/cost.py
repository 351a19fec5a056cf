"""What moving an adapter costs, as the simulator reckons it."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of the adapter that the default costs were measured with: rank 16 on every linear layer
#: of an 8B Llama, in bfloat16.
TYPICAL_NBYTES = 84_000_000


@dataclass(frozen=True, slots=True)
class TransferCost:
    """A fixed time for each hop, and the rest by bandwidth.

    The defaults are stock vLLM 0.26 on an H100 (medians; Llama-8B shapes, adapters of 84 MB, file
    in the page cache).  A cold ``add_lora`` took 205 ms, of which 16.5 ms brought the adapter from
    host memory into a slot: some 900 small copies.  The same bytes in one copy took 1.62 ms, so
    16.5 − 1.62 ms is the fixed cost of that hop.  What remains, 188.5 ms to read, to page-lock and
    to pack, is work on bytes, at 446 MB/s.  Other hosts differ by a factor of two: measure yours.

    Attributes:
        disk_fixed_s, disk_bytes_per_s: from disk to host memory.
        slot_fixed_s, slot_bytes_per_s: from host memory into a slot.
    """

    disk_fixed_s: float = 0.0
    disk_bytes_per_s: float = TYPICAL_NBYTES / 0.1885
    slot_fixed_s: float = 0.0165 - 0.00162
    slot_bytes_per_s: float = TYPICAL_NBYTES / 0.00162

    def disk_to_host_s(self, nbytes: int) -> float:
        """Seconds to bring `nbytes` from disk into host memory."""
        return self.disk_fixed_s + nbytes / self.disk_bytes_per_s

    def host_to_slot_s(self, nbytes: int) -> float:
        """Seconds to bring `nbytes` from host memory into a slot."""
        return self.slot_fixed_s + nbytes / self.slot_bytes_per_s


#: The resident engine, measured in the same way (``benchmarks/results/arrivals_h100.json``): 3.4 ms
#: from host memory, of which 1.74 are the copy and the scatter; 33.3 ms from disk for an adapter
#: that was never seen, of which 26.2 go to digest and packing.  Not reckoned: one whose packed
#: image is still on disk comes in 13, and several that are packed at once share the packer's
#: threads.
RESIDENT = TransferCost(
    disk_fixed_s=0.0333 - 0.0034 - 0.0262,
    disk_bytes_per_s=TYPICAL_NBYTES / 0.0262,
    slot_fixed_s=0.0034 - 0.00174,
    slot_bytes_per_s=TYPICAL_NBYTES / 0.00174,
)
