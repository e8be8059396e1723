"""Pictures, one module a room; :mod:`tilewise.plot` has the ones of arrays. Needs matplotlib, when drawing.

* :mod:`tilewise.plots.planning`: cost over time of planning policies, and the calls of one episode.
"""
