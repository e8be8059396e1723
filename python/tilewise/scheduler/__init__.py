"""Who runs when, as state machines without I/O: events with times go in, commands come out.

The real engine, the simulator (virtual time) and the tests (adversarial orders) drive the same machine. Nothing in this
package reads a clock, sleeps, spawns or touches a file, and all of it runs with NumPy alone.

* :mod:`tilewise.scheduler.rounds`: :class:`Rounds`, the rounds of speculative decoding with drafts made ahead.
"""

from __future__ import annotations

from tilewise.scheduler.rounds import Rounds

__all__ = ["Rounds"]
