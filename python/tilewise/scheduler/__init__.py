"""Who runs when, as state machines without I/O: events with times go in, commands come out.

The real engine, the simulator (virtual time) and the tests (adversarial orders) drive the same machine. Nothing in this
package reads a clock, sleeps, spawns or touches a file, and all of it runs with NumPy alone.

* :mod:`tilewise.scheduler.rounds`: :class:`Rounds`, the rounds of speculative decoding with drafts made ahead;
* :mod:`tilewise.scheduler.simulation`: :func:`simulate`, the same machine in virtual time;
* :mod:`tilewise.scheduler.sweeps`: simulated speed-ups over one quantity, and the published table;
* :mod:`tilewise.scheduler.formulas`: what speculation gives on average, in closed form;
* :mod:`tilewise.scheduler.plans`: :func:`plan`, from measured times to what to run;
* :mod:`tilewise.scheduler.planning`: dynamic speculative planning of agents;
* :mod:`tilewise.scheduler.confidence`: how sure a model was along a reasoning trace;
* :mod:`tilewise.scheduler.voting`, :mod:`tilewise.scheduler.stopping`: the answer of many traces, ending weak ones;
* :mod:`tilewise.scheduler.confidence_study`: the same on traces of known reliability;
* :mod:`tilewise.scheduler.paths`: parallel reasoning paths and their summary.
"""

from __future__ import annotations

from tilewise.scheduler import formulas
from tilewise.scheduler.plans import Measurements, Plan, plan
from tilewise.scheduler.rounds import Rounds
from tilewise.scheduler.simulation import Simulation, Times, Toy, simulate

__all__ = ["Measurements", "Plan", "Rounds", "Simulation", "Times", "Toy", "formulas", "plan", "simulate"]
