"""Agents that plan speculatively: asyncio around :mod:`tilewise.scheduler.planning`.

* :mod:`.planner`: :class:`SpeculativePlanner` and its stream of steps;
* :mod:`.result`: what it gives back;
* :mod:`.supervise`: one call with time-outs, retries and a bounded end;
* :mod:`.tools`: tools, their side effects, and the guard;
* :mod:`.agreement`: agreement that is not equality;
* :mod:`.learning`: training beside planning;
* :mod:`.torch_predictor`: any torch encoder as the predictor's model (imports torch; not loaded here).
"""

from __future__ import annotations

from tilewise.agents.agreement import similar
from tilewise.agents.planner import PlanStream, SpeculativePlanner
from tilewise.agents.result import OrphanedCallWarning, PlanResult, Problem, Timings
from tilewise.agents.supervise import Retry, report_tokens
from tilewise.agents.tools import Tool, Toolbox
from tilewise.scheduler.planning import TERMINATE, Caps, Reply, State, Step
from tilewise.scheduler.planning.predictor import FixedPredictor, ValuePredictor

__all__ = [
    "TERMINATE",
    "Caps",
    "FixedPredictor",
    "OrphanedCallWarning",
    "PlanResult",
    "PlanStream",
    "Problem",
    "Reply",
    "Retry",
    "SpeculativePlanner",
    "State",
    "Step",
    "Timings",
    "Tool",
    "Toolbox",
    "ValuePredictor",
    "report_tokens",
    "similar",
]
