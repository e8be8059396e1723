"""Who runs when: schedulers as state machines. Nothing here does I/O, reads a clock or spawns.

* :mod:`~tilewise.scheduler.confidence`: how sure a model was along a reasoning trace;
* :mod:`~tilewise.scheduler.voting`: the answer of many traces;
* :mod:`~tilewise.scheduler.stopping`: ending weak traces early, and the vote once it is decided;
* :mod:`~tilewise.scheduler.confidence_study`: the same on traces of known reliability;
* :mod:`~tilewise.scheduler.paths`: parallel reasoning paths and their summary.
"""
