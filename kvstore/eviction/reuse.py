"""How likely a block is used again, learned from those that were and from those that still wait.

Blocks of one class (how often they have been hit, and whether sequences end with them) are taken to come back alike. Of
each class is counted, by age since the last use, how often blocks came back at that age and for how long blocks of that
age were watched: one divided by the other is the hazard, and blocks that never came back count with the time they were
watched for. Nothing is assumed about the shape of it: in chats a pause of a minute is likelier than one of a second.

`densities` turns hazards into what a place is worth: hits per second of a block of that class and age, if it is kept
for as long as is best. That is the hit density of LHD (Beckmann et al., NSDI'18) with the time of eviction chosen
instead of observed, which makes it a Gittins index (1979).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

#: Two ages an octave, from one second to twelve days; older is as old as that.
_PER_OCTAVE = 2
_OCTAVES = 20
EDGES_S: Floats = np.concatenate(([0.0], 2.0 ** (np.arange(_OCTAVES * _PER_OCTAVE + 1) / _PER_OCTAVE)))
WIDTHS_S: Floats = np.diff(EDGES_S)
NUM_AGES = len(WIDTHS_S)

#: Hits are told apart by octave: 0, 1, 2-3, 4-7, ..., 32 and more.
_HIT_CLASSES = 7
NUM_CLASSES = 2 * _HIT_CLASSES

#: What nothing has been seen of is taken to come back with this probability in each octave of age: as likely at once
#: as late, which is LRU.
_PRIOR_PER_OCTAVE = 0.05
#: Weight of what is assumed beside what was seen, in hits. Blocks of one prompt come back together, so this is about
#: one prompt.
_PRIOR_HITS = 16.0


def ages(ages_s: Floats) -> Ints:
    """Number of each age; from 0 on, ascending."""
    octaves = np.log2(np.maximum(ages_s, 2.0 ** (-1 / _PER_OCTAVE)))
    octaves *= _PER_OCTAVE
    np.floor(octaves, out=octaves)
    octaves += 1
    numbers: Ints = np.minimum(octaves, NUM_AGES - 1).astype(np.int64)
    return numbers


def classes(hits: NDArray[np.integer], is_inner: NDArray[np.bool_]) -> Ints:
    """Number of each class."""
    # The exponent of 1 is 1 here, of 2 and 3 it is 2; of 0 it is 0.
    octaves = np.frexp(hits)[1].astype(np.int64)
    numbers: Ints = 2 * np.minimum(octaves, _HIT_CLASSES - 1) + is_inner
    return numbers


class ReuseModel:
    """Learns from one tier. `forget_after`: what was learned counts half once so many uses came since."""

    def __init__(self, forget_after: float) -> None:
        self._forget_after = forget_after
        #: By class and age: how often blocks came back, and for how many seconds blocks were watched.
        self._hits = np.zeros((NUM_CLASSES, NUM_AGES))
        self._watched_s = np.zeros((NUM_CLASSES, NUM_AGES))
        self.densities = densities(hazards(self._hits, self._watched_s))

    def reused(self, class_numbers: Ints, ages_s: Floats, weight: float = 1.0) -> None:
        """Blocks of these classes came back at these ages. `weight`: how many blocks each of them stands for."""
        numbers = class_numbers * NUM_AGES + ages(ages_s)
        counts = np.bincount(numbers, minlength=NUM_CLASSES * NUM_AGES).reshape(self._hits.shape)
        self._hits += weight * counts
        self.watched(class_numbers, ages_s, weight)

    def watched(self, class_numbers: Ints, ages_s: Floats, weight: float = 1.0) -> None:
        """Blocks did not come back before these ages, and are not watched any more; part of `reused`."""
        self._watched_s += weight * watched_s(class_numbers, ages_s)

    def learn(self, waiting_s: Floats, num_uses: int) -> None:
        """Brings `densities` up to date; `waiting_s` is `watched_s` of what is watched still, `num_uses` came since
        the last time."""
        self.densities = densities(hazards(self._hits, self._watched_s + waiting_s))
        kept = 0.5 ** (num_uses / self._forget_after)
        self._hits *= kept
        self._watched_s *= kept


def watched_s(class_numbers: Ints, ages_s: Floats) -> Floats:
    """By class and age, for how many seconds blocks that have come to these ages were of that age."""
    bins = ages(ages_s)
    numbers = class_numbers * NUM_AGES + bins
    size = NUM_CLASSES * NUM_AGES
    ended = np.bincount(numbers, minlength=size).reshape(NUM_CLASSES, NUM_AGES)
    partly_s = np.bincount(numbers, np.minimum(ages_s, EDGES_S[-1]) - EDGES_S[bins], size)
    # Those that ended later were of this age for all of its width.
    later = ended[:, ::-1].cumsum(axis=1)[:, ::-1] - ended
    total_s: Floats = partly_s.reshape(NUM_CLASSES, NUM_AGES) + later * WIDTHS_S
    return total_s


def hazards(hits: Floats, watched: Floats) -> Floats:
    """Probability per second to come back, by class and age.

    A class of which little was seen is taken to be like all together, up to a factor; all together, like the prior.
    """
    prior = _PRIOR_PER_OCTAVE / _PER_OCTAVE / WIDTHS_S
    # The first age, which is wider, is no less likely.
    prior[0] = prior[1]
    common = (hits.sum(axis=0) + 1.0) / (watched.sum(axis=0) + 1.0 / prior)
    factors = (hits.sum(axis=1) + _PRIOR_HITS) / (watched @ common + _PRIOR_HITS)
    expected = np.outer(factors, common)
    found: Floats = (hits + _PRIOR_HITS) / (watched + _PRIOR_HITS / expected)
    return found


def densities(hazard: Floats) -> Floats:
    """By class and age, the largest of P(it comes back within t) / E[time that it stays until then, at most t]."""
    stays = np.exp(-hazard * WIDTHS_S)
    comes = 1.0 - stays
    # Of those that are there when an age begins, the mean time that they stay in it.
    stay_s = comes / hazard
    best = np.empty_like(hazard)
    for age in range(NUM_AGES):
        survive = np.ones((len(hazard), NUM_AGES - age))
        np.cumprod(stays[:, age:-1], axis=1, out=survive[:, 1:])
        hits = (survive * comes[:, age:]).cumsum(axis=1)
        held_s = (survive * stay_s[:, age:]).cumsum(axis=1)
        best[:, age] = (hits / held_s).max(axis=1)
    return best
