"""The draft's process: it answers commands, and guesses ahead while there are none.

```text
loop:  take all commands that have come (wait for one if there is nothing to build)
       then one step of the build that was begun last, of one stream after the other
       a build that is complete is sent at once, with all its entries; one that will be late, before the target asks
```
A command about a stream ends its build. The process ends when the link or its standard input does: when the target's
process is gone, in whatever way, nothing is left.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tilewise.hf
from tilewise import _core
from tilewise.hf.engine.builds import Branch, Build, Worth
from tilewise.hf.engine.guesser import Guesser
from tilewise.hf.engine.link import Link, ready
from tilewise.hf.engine.odds import Odds
from tilewise.hf.engine.rules import Law, Rule, Settings, rule_of
from tilewise.hf.runners import Runner, runners

_EARLY = 0.6
"""When the target is not expected yet: before this share of the usual time nothing is sent."""

__all__ = ["Worker", "main", "pack_model", "unpack_model"]


def pack_model(model: PreTrainedModel, threads: int) -> bytes:
    """A model as bytes, and the threads it shall compute with."""
    buffer = io.BytesIO()
    torch.save(
        {
            "config": model.config.to_json_string(use_diff=False),
            "attention": model.config._attn_implementation,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": model.state_dict(),
            "threads": threads,
        },
        buffer,
    )
    return buffer.getvalue()


def unpack_model(content: bytes) -> tuple[PreTrainedModel, int]:
    """What :func:`pack_model` packed."""
    found = torch.load(io.BytesIO(content), weights_only=True)
    tilewise.hf.register()
    fields = json.loads(found["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    dtype = getattr(torch, found["dtype"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=found["attention"], dtype=dtype)
    model.load_state_dict(found["weights"])
    return model.to(dtype).eval(), int(found["threads"])


class Worker:
    """The draft model behind a link.

    Args:
        model: the draft.
        link: to the target.
        name: of this worker; handles it gives out are unique among workers.
    """

    def __init__(self, model: PreTrainedModel, link: Link, name: int):
        self._start: Callable[[], Runner] = runners(model, rollback=True, lean=True)
        config = model.config.get_text_config(decoder=True)
        self._vocabulary = int(config.vocab_size)
        self._context = int(getattr(config, "max_position_embeddings", None) or 2**62)
        self._link, self._name = link, name
        self._streams: dict[int, Guesser] = {}
        self._building: list[int] = []
        self._spent: dict[int, float] = {}
        self._begun: dict[int, float] = {}
        self._usual = float("inf")
        self._asked: dict[int, float] = {}
        self._handles = 0
        self._published: dict[int, tuple[int, int, int]] = {}
        self._rule: Rule | None = None
        self._odds, self._worth = Odds(), Worth()
        self._out: list[Any] = []
        self._arrays: list[NDArray[Any]] = []

    def run(self) -> None:
        """Serve until the target says so or is gone."""
        self._link.send([["ready", self._vocabulary]])
        with torch.inference_mode():
            while True:
                if not self._building:
                    ready([self._link], None)
                while (message := self._link.receive()) is not None:
                    if not all(self._obey(command) for command in message[0]):
                        return
                if self._link.lost:
                    return
                self._flush()
                if self._building:
                    self._advance(self._building[0])
                    self._flush()

    def _obey(self, command: list[Any]) -> bool:
        kind, *rest = command
        if kind == "exit":
            return False
        getattr(self, f"_do_{kind}")(*rest)
        return True

    def _say(self, *event: Any) -> None:
        self._out.append(event)

    def _flush(self) -> None:
        if self._out:
            self._link.send(self._out, self._arrays)
            self._out, self._arrays = [], []

    def _do_settings(self, fields: dict[str, Any]) -> None:
        self._rule = rule_of(Settings(**fields), self._vocabulary)
        self._streams.clear()
        self._building.clear()

    def _do_worth(self, verified: float, drafted: float, branch: float, hit: float) -> None:
        worth = self._worth
        worth.verified, worth.drafted, worth.branch, worth.hit = verified, drafted, branch, hit

    def _do_open(self, stream: int, request: int, most: int, tokens: list[int]) -> None:
        assert self._rule is not None
        began = time.perf_counter()
        guesser = Guesser(self._start(), self._rule, request, most, self._context, self._odds, self._worth)
        guesser.open(tokens)
        self._drop(stream)
        self._streams[stream] = guesser
        self._say("opened", stream, time.perf_counter() - began)

    def _do_forget(self, stream: int) -> None:
        self._streams.pop(stream, None)
        self._drop(stream)

    def _do_stop(self, stream: int, number: int) -> None:
        """The build is of no use: what it made so far stays usable as the trunk it stands on."""
        if stream in self._building:
            self._finish(stream, publish=False)

    def _drop(self, stream: int) -> None:
        if stream in self._building:
            self._building.remove(stream)
        self._published = {handle: known for handle, known in self._published.items() if known[0] != stream}

    def _do_outcome(self, stream: int, number: int, start: int, tokens: list[int], handle: int) -> None:
        """A round came out; `handle` is the entry that is verified now, or -1."""
        if stream not in self._streams:
            return
        known = self._published.get(handle)  # before settling, which forgets what the round published
        self._settle(stream, number, start, tokens, known[2] if known is not None else 0)

    def _settle(self, stream: int, number: int, start: int, tokens: list[int], length: int) -> Branch | None:
        """The trunk follows what was committed since; nothing if the draft was told already."""
        guesser = self._streams[stream]
        if not tokens:
            return None
        asked = self._asked.pop(stream, None)
        if asked is not None:
            waited = time.perf_counter() - asked
            self._usual = waited if self._usual == float("inf") else self._usual + (waited - self._usual) / 8
        rank = guesser.rank(len(tokens) - 1, tokens[-1])
        if rank is not None:
            self._say("rank", stream, number, rank)
        if stream in self._building:
            self._finish(stream, publish=False)
        self._drop(stream)
        return guesser.settle(start, tokens, length)

    def _do_draft(self, stream: int, number: int, start: int, tokens: list[int], length: int) -> None:
        """A round came out, and the target waits for a chain."""
        guesser = self._streams.get(stream)
        if guesser is None:
            return
        began = time.perf_counter()
        branch = self._settle(stream, number, start, tokens, length)
        laws = branch.laws[:length] if branch is not None else []
        held = len(guesser.chain)
        share = guesser.draft(length, laws)
        chain = guesser.chain
        handle = self._handle()
        content = self._content(chain, laws, share)
        self._say("drafted", stream, number, len(chain), handle, time.perf_counter() - began, held, content)

    def _do_build(
        self, stream: int, number: int, start: int, tokens: list[int], given: list[int] | None, behind: list[int],
        fan_out: list[int], depth: int,
    ) -> None:  # fmt: skip
        """The target verifies the chain in round `number`: `given`, or the draft's own and `behind` it."""
        guesser = self._streams.get(stream)
        if guesser is None:
            return
        began = time.perf_counter()
        self._settle(stream, number - 1, start, tokens, 0)
        if given is not None:
            guesser.give(given)
        elif behind:
            guesser.extend(behind)
        guesser.begin(number, fan_out, depth)
        self._spent[stream], self._begun[stream] = time.perf_counter() - began, began
        if guesser.settled:  # reading a prompt takes another time
            self._asked[stream] = began
        self._building.append(stream)

    def _advance(self, stream: int) -> None:
        guesser = self._streams[stream]
        build = guesser.build
        assert build is not None
        began = time.perf_counter()
        if not build.done:
            guesser.step()
        now = time.perf_counter()
        self._spent[stream] += now - began
        if build.done:
            self._finish(stream, publish=True)
            return
        # The target asks about as late after a build's command as it did before. As that time comes near, what there
        # is goes out after every step: the outcome then finds a short chain instead of none. Only the time decides.
        elapsed = now - self._begun[stream]
        if elapsed > _EARLY * self._usual:
            self._publish(stream, build, elapsed)
        self._building.append(self._building.pop(0))

    def _finish(self, stream: int, publish: bool) -> None:
        """The build is over; its branches stay until the outcome is known."""
        self._building.remove(stream)
        build = self._streams[stream].build
        assert build is not None
        elapsed = time.perf_counter() - self._begun.pop(stream)
        if publish:
            self._publish(stream, build, elapsed)
        rows = round(build.fed / max(1, build.steps))
        self._say("built", stream, build.round, self._spent.pop(stream), build.steps, rows, elapsed)

    def _publish(self, stream: int, build: Build, elapsed: float) -> None:
        """Sends what the branches have so far."""
        entries = []
        for branch in build.branches:
            # As deep as asked is no end: had more been asked for, there might be more.
            ended = branch.ended and len(branch.tokens) < build.depth
            if len(branch.tokens) > branch.sent or (ended and branch.tokens and not branch.sent_end):
                branch.sent, branch.sent_end = len(branch.tokens), ended
                handle = self._handle()
                self._published[handle] = (stream, build.round, len(branch.tokens))
                entry = (branch.accepted, branch.token, len(branch.tokens), handle, ended)
                entries.append((entry, self._content(branch.tokens, branch.laws, branch.share)))
        self._say("entries", stream, build.round, entries, elapsed)

    def _handle(self) -> int:
        self._handles += 1
        return self._handles * 1024 + self._name

    def _content(self, tokens: list[int], laws: list[Law], share: float) -> tuple[list[int], int, float]:
        """A chain as it is sent: its tokens, where its laws are, and the chance that all of it is kept."""
        index = -1
        if laws:
            index = len(self._arrays)
            self._arrays += [np.stack([law[0] for law in laws]), np.stack([law[1] for law in laws])]
        return tokens, index, share


def _watch(stream: Any) -> None:
    """End with the target: its death closes our standard input."""
    while stream.read(4096):
        pass
    os._exit(0)


def main() -> None:
    """The process: read where to call, the key and the model; call, serve."""
    source = sys.stdin.buffer
    port, name = (int.from_bytes(source.read(4), "little") for _ in range(2))
    key = source.read(32)
    model, threads = unpack_model(source.read(int.from_bytes(source.read(8), "little")))
    threading.Thread(target=_watch, args=(source,), daemon=True).start()
    torch.set_num_threads(threads)
    _core.set_num_threads(threads)
    Worker(model, Link(Client(("127.0.0.1", port), authkey=key)), name).run()
    os._exit(0)  # a thread still waits for our standard input to close, which would hold up an orderly end
