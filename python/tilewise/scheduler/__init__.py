"""Schedulers: deterministic machines that take events with times and give commands; no clock, no thread, no I/O.

* :mod:`tilewise.scheduler.planning`: dynamic speculative planning of agents.
"""
