"""Speculative planning with scripted agents and real latencies.

    python examples/speculative_planning.py --tasks 16 --scale 0.002

The agents stand for language models: the target takes some 8.5 s a step at --scale 1, the approximation 1.2 s, and it
says the same thing where the task is easy. One tool has side effects: it runs once for each confirmed step, never
for a guess. Prints the time beside the target alone, the token ledger, and what the calls of one episode were used for.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from tilewise.agents import (
    FixedPredictor,
    PlanResult,
    Reply,
    SpeculativePlanner,
    State,
    Tool,
    Toolbox,
    ValuePredictor,
    report_tokens,
)
from tilewise.scheduler.planning import Ledger
from tilewise.scheduler.planning.scenario import Scenario, SimulatedTask


class Script:
    """Two agents that play a drawn task, with sleeps for latencies; and a tool that counts its runs."""

    def __init__(self, tasks: dict[str, SimulatedTask], scale: float) -> None:
        self.tasks, self.scale, self.bookings = tasks, scale, 0

    async def _call(self, role: str, state: State) -> Reply:
        task = self.tasks[state.task]
        reply = task.reply(role, state)
        report_tokens(prompt=reply.prompt_tokens)  # billed even if this call is cancelled
        await asyncio.sleep(self.scale * task.latency(role, state))
        return reply

    async def approximate(self, state: State) -> Reply:
        return await self._call("approximate", state)

    async def target(self, state: State) -> Reply:
        return await self._call("target", state)

    async def look(self, action: Any, state: State) -> str:
        return f"result of {action}"

    async def decide(self, action: Any, state: State) -> str:
        self.bookings += 1
        return f"done: {action}"

    async def rehearse(self, action: Any, state: State) -> str:
        return f"done: {action}"  # what it would say, without doing it

    def toolbox(self) -> Toolbox:
        look = Tool(self.look, "pure")
        decide = Tool(self.decide, "effects", dry=self.rehearse)
        return Toolbox({"lookup": look, "compute": look, "other": look, "decide": decide})


async def play(script: Script, predictor: Any, names: list[str]) -> tuple[float, Ledger, list[PlanResult]]:
    """All tasks, one after another, with one predictor."""
    planner = SpeculativePlanner(script.approximate, script.target, predictor, tools=script.toolbox())
    ledger, results, begin = Ledger(), [], time.perf_counter()
    for name in names:
        result = await planner.run(name)
        assert result.ledger.balances() and result.lossless
        assert tuple(result.actions) == script.tasks[name].actions  # the target's own plan
        ledger.add(result.ledger)
        results.append(result)
    seconds = time.perf_counter() - begin
    planner.close()
    return seconds, ledger, results


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--scale", type=float, default=0.002, help="seconds of real time for a second of the script")
    parser.add_argument("--plot", help="write a picture of the last episode (needs matplotlib)")
    options = parser.parse_args(arguments)

    scenario = Scenario()
    drawn = [scenario.task(1, number) for number in range(options.tasks)]
    tasks = {f"{task.text} (number {task.number})": task for task in drawn}
    alone = options.scale * sum(task.alone for task in drawn)
    found: dict[str, Any] = {"alone": alone}
    print(f"{options.tasks} tasks; the target alone sleeps {alone:.2f} s in all")
    results: list[PlanResult] = []
    for name, predictor in (("k = 1", 1), ("k = 4", FixedPredictor(4)), ("learnt", ValuePredictor(tau=0.9, offset=1))):
        script = Script(tasks, options.scale)
        seconds, ledger, results = asyncio.run(play(script, predictor, list(tasks)))
        confirmed = sum(action.startswith("decide") for task in drawn for action in task.actions)
        assert script.bookings == confirmed  # once for each confirmed step, and never for a guess
        cost = ledger.cost(scenario.prices)
        wasted = 1.0 - ledger.cost(scenario.prices, fate="kept") / cost
        found[name] = {"seconds": seconds, "cost": cost, "wasted": wasted, "bookings": script.bookings}
        print(f"\n{name}: {seconds:.2f} s, {alone / seconds:.2f}x the target alone; ${cost:.4f}, {wasted:.0%} wasted")
        for role in ("approximate", "target"):
            fates = {fate: ledger.total(role=role, fate=fate) for fate in ("kept", "completed", "cancelled")}
            print(f"  {role:11} tokens: " + ", ".join(f"{count} {fate}" for fate, count in fates.items()))
    last = results[-1]
    print(f"\nlast episode: budgets {last.rounds}, agreed {last.agreed}, most calls at once {last.peak}")
    if options.plot:
        from tilewise.plots.planning import timeline

        timeline(last.records).figure.savefig(options.plot)
        print(f"picture: {options.plot}")
    return found


if __name__ == "__main__":
    main()
