"""The engine of speculative speculative decoding: a target here, its drafts in processes of their own.

* :mod:`.generator`: :class:`SpeculativeGenerator`, what users call;
* :mod:`.loop`: carries out what the scheduler says, and tells it what happened;
* :mod:`.requests`: one sequence: tokens, stops, what was read of it;
* :mod:`.rules`: the two exact rules by which drafts are made and judged;
* :mod:`.drafts`, :mod:`.processes`, :mod:`.link`: the drafts' processes, and messages to and from them;
* :mod:`.worker`: the draft's process; :mod:`.guesser`: one sequence in it; :mod:`.builds`: which branches grow next;
  :mod:`.odds`: how probable a guess is; :mod:`.rows`: many branches in one step;
* :mod:`.stats`: counters; :mod:`.measure`: times and acceptance of a pair, for ``tilewise plan``;
* :mod:`.custom`: transformers' ``custom_generate``.
"""

from tilewise.hf.engine.custom import custom_generate
from tilewise.hf.engine.generator import SpeculativeGenerator
from tilewise.hf.engine.measure import measure
from tilewise.hf.engine.processes import serve_draft
from tilewise.hf.engine.requests import Generated
from tilewise.hf.engine.stats import EngineStats, RoundRecord

__all__ = [
    "EngineStats",
    "Generated",
    "RoundRecord",
    "SpeculativeGenerator",
    "custom_generate",
    "measure",
    "serve_draft",
]
