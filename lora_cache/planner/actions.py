"""What the planner tells its driver to do, and what an engine tells the planner.

Frozen records, no behaviour: the planner returns a list of actions from every call, the driver
(`AsyncLoraCache`, the simulator, a test) carries them out in order.  What is made for every
request is a tuple: a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import NamedTuple

from lora_cache.errors import LoraCacheError
from lora_cache.key import AdapterKey
from lora_cache.state import Tier


class Want(Enum):
    """What a ticket asks for."""

    LEASE = "lease"  #: a slot, for as long as the ticket is held; waits its turn
    PIN_GPU = "pin gpu"  #: a slot, until unpinned; waits its turn
    PIN_HOST = "pin host"  #: host memory, until unpinned; waits its turn
    STAGE = "stage"  #: host memory, if there is room; waits its turn, never for others to leave

    def __init__(self, text: str) -> None:
        #: The tier that the copy must be ready in.
        self.tier = Tier.GPU if text in ("lease", "pin gpu") else Tier.HOST


class Transition(NamedTuple):
    """One indivisible change of residency, for the engine to carry out.

    The planner has already set everything aside: nothing named here is leased or pinned.  The
    engine first makes `load` ready in `to`; only when that has succeeded are the others gone.

    Attributes:
        op: number of the transition, unique in the planner's life.
        load: the newcomer, or None when copies are only dropped.
        to: the tier that `load` must be ready in, when done (a slot implies host memory).
        demote: keys that give up their slots and stay in host memory, unless also in `drop`.
        drop: keys that leave host memory; none of them keeps a slot.
        urgent: somebody waits for a slot for it; it comes before what nobody waits for.
    """

    op: int
    load: AdapterKey | None = None
    to: Tier | None = None
    demote: tuple[AdapterKey, ...] = ()
    drop: tuple[AdapterKey, ...] = ()
    urgent: bool = False

    @property
    def involved(self) -> frozenset[AdapterKey]:
        """Every key that this transition moves."""
        load = () if self.load is None else (self.load,)
        return frozenset((*load, *self.demote, *self.drop))


class Granted(NamedTuple):
    """The ticket has what it asked for.

    Attributes:
        served_from: the tier that the adapter was found in: ``GPU`` for a slot hit, ``HOST`` or
            ``DISK`` when it had to be brought in from there.
    """

    ticket: int
    served_from: Tier


class Refused(NamedTuple):
    """The ticket is void; `error` says why."""

    ticket: int
    error: LoraCacheError


class Choice(NamedTuple):
    """Why a victim was chosen, in the policy's words, from the moment in which it was.

    Attributes:
        tier: where it loses its copy.
        runner_up: who would have been next; None if nobody else could have left.
        runner_up_reason: the policy's words for that one, or "".
    """

    tier: Tier
    victim: AdapterKey
    reason: str
    runner_up: AdapterKey | None
    runner_up_reason: str


class Start(NamedTuple):
    """Begin a transition; answer with `Planner.completed` or `Planner.failed`.

    Attributes:
        choices: one for each victim, if the planner was told to give reasons.
    """

    transition: Transition
    choices: tuple[Choice, ...] = ()


class Resized(NamedTuple):
    """The host budget has changed under memory pressure; nothing is to be done.

    Attributes:
        before, after: in bytes; None: what is configured.
    """

    before: int | None
    after: int | None


Action = Granted | Refused | Start | Resized

# The same as the classes, of a tuple of all their fields: for the planner, which makes one or more
# for every request.  They are filled in C, in half the time.
make_transition: Callable[[tuple[object, ...]], Transition] = partial(tuple.__new__, Transition)
make_granted: Callable[[tuple[int, Tier]], Granted] = partial(tuple.__new__, Granted)
make_start: Callable[[tuple[Transition, tuple[Choice, ...]]], Start] = partial(tuple.__new__, Start)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What an engine really holds.

    Attributes:
        slots: slot index → key.
        host: keys in host memory, those in slots included.
    """

    slots: Mapping[int, AdapterKey] = field(default_factory=dict)
    host: frozenset[AdapterKey] = frozenset()


#: A default for `Limits.drain_after_s`: about as long as an answer takes.  Until then slots fall
#: free by themselves; to refuse new leases sooner makes many wait, and the one who waits is hardly
#: served sooner by it (`benchmarks/README.md` has figures).
DRAIN_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How much there is to plan with.

    Attributes:
        slots: GPU slots.
        host_entries: adapters in host memory, those in slots included; at least `slots`.
        host_bytes: bytes of host memory, or None for no limit but `host_entries`.
        stages_without_slot: the engine can bring an adapter into host memory without a slot.
        max_in_flight: transitions that the engine works on at a time, or None.  Where it is one,
            every decision waits for the last one's outcome, which costs nothing: the engine
            would queue it.
        max_speculative: of those that nobody waits for, how many at a time, or None.
        drain_after_s: seconds that the oldest waiter waits before a victim takes no new leases.
        retry_s: seconds before a failed load is tried again; doubles with each failure.
        retry_max_s: upper bound of that.
        shrink_every_s: seconds between two steps by which host memory shrinks under pressure.
    """

    slots: int
    host_entries: int
    host_bytes: int | None = None
    stages_without_slot: bool = True
    max_in_flight: int | None = None
    max_speculative: int | None = None
    drain_after_s: float = DRAIN_AFTER_S
    retry_s: float = 1.0
    retry_max_s: float = 60.0
    shrink_every_s: float = 10.0


@dataclass(slots=True)
class Counters:
    """Monotonic counts since the planner was made.

    Attributes:
        slot_hits, host_hits, disk_hits: leases granted, by where the adapter was found; a lease
            that shares another one's load counts as that load does.
        disk_loads: adapters that an engine read from disk.
        activations: adapters that were written into a slot.
        gpu_evictions: copies that gave up a slot for another one.
        host_evictions: copies that left host memory for another one.
        unloads: adapters dropped on request.
        load_failures: transitions that the engine could not carry out.
        drains: victims that took no new leases because somebody had waited too long.
        drift: copies that `reconcile` found missing, or unasked for.
        given_back: copies that left host memory because memory was scarce, for no other copy.
        given_back_bytes: what they were charged.
        prefetches_refused, pins_refused: what was not begun because memory was scarce.
    """

    slot_hits: int = 0
    host_hits: int = 0
    disk_hits: int = 0
    disk_loads: int = 0
    activations: int = 0
    gpu_evictions: int = 0
    host_evictions: int = 0
    unloads: int = 0
    load_failures: int = 0
    drains: int = 0
    drift: int = 0
    given_back: int = 0
    given_back_bytes: int = 0
    prefetches_refused: int = 0
    pins_refused: int = 0
