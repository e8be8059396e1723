"""Pictures of one room each, in the manner of :mod:`tilewise.plot`: every function draws into axes and returns them.

* :mod:`tilewise.plots.confidence`: traces, thresholds and votes;
* :mod:`tilewise.plots.planning`: cost over time of planning policies, and the calls of one episode;
* :mod:`tilewise.plots.speculation`: speed-ups, acceptance over time, fan-out.
"""
