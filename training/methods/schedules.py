"""Rival schedules of the text model's layers, in letters: which of them are full, the others being cross layers."""

import random
from collections.abc import Sequence


def full_where(chosen: Sequence[int], layers: int) -> str:
    """A schedule whose `chosen` layers are full and whose others are cross layers."""
    return "".join("F" if number in chosen else "C" for number in range(layers))


def evenly(count: int, layers: int) -> str:
    """Full layers evenly spaced, the first one among them (VISOR)."""
    return full_where([number * layers // max(count, 1) for number in range(count)], layers)


def shortest(count: int, updates: Sequence[float]) -> str:
    """Full layers where the updates of visual tokens matter most, each left out alone (ShortV)."""
    order = sorted(range(len(updates)), key=lambda number: -updates[number])
    return full_where(order[:count], len(updates))


def at_random(count: int, layers: int, seed: int = 0) -> str:
    """Full layers drawn at random: the control of every ranking."""
    return full_where(random.Random(seed).sample(range(layers), count), layers)
