"""Dynamic speculative planning: a cheap agent guesses steps ahead, a strong one confirms them.

The plan is the strong one's, whatever arrives when.

* :mod:`.trajectory`: steps, states and replies; what is learnt from;
* :mod:`.events`: events with times go in, commands come out;
* :mod:`.window`: speculated steps, calls in flight, caps;
* :mod:`.episode`: the machine of one episode;
* :mod:`.ledger`: tokens by role, kind and fate;
* :mod:`.predictor`: how many steps to speculate, fixed or learnt; :mod:`.model`: a value model in NumPy.

Nothing here reads a clock, sleeps or spawns. :mod:`tilewise.agents` drives the machine with asyncio.
"""

from __future__ import annotations

from tilewise.scheduler.planning.episode import Episode
from tilewise.scheduler.planning.events import (
    Abandoned,
    Ask,
    CallApproximate,
    CallTarget,
    Cancel,
    Cancelled,
    Command,
    Commit,
    Event,
    Execute,
    Executed,
    Failed,
    Finish,
    Finished,
    Predicted,
    Record,
    Spent,
    Started,
    Stop,
)
from tilewise.scheduler.planning.ledger import Ledger
from tilewise.scheduler.planning.model import HashedModel, ValueModel
from tilewise.scheduler.planning.predictor import FixedPredictor, Predictor, ValuePredictor, lambda_return
from tilewise.scheduler.planning.trajectory import TERMINATE, Handling, Reply, State, Step, Trajectory, exact
from tilewise.scheduler.planning.window import CallRecord, Caps

__all__ = [
    "TERMINATE",
    "Abandoned",
    "Ask",
    "CallApproximate",
    "CallRecord",
    "CallTarget",
    "Cancel",
    "Cancelled",
    "Caps",
    "Command",
    "Commit",
    "Episode",
    "Event",
    "Execute",
    "Executed",
    "Failed",
    "Finish",
    "Finished",
    "FixedPredictor",
    "Handling",
    "HashedModel",
    "Ledger",
    "Predicted",
    "Predictor",
    "Record",
    "Reply",
    "Spent",
    "Started",
    "State",
    "Step",
    "Stop",
    "Trajectory",
    "ValueModel",
    "ValuePredictor",
    "exact",
    "lambda_return",
]
