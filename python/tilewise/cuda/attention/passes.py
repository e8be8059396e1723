"""The launches: forward with decode, and backward. Arguments and meaning are those of the native core's functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilewise.cuda.attention import kernels
from tilewise.cuda.attention.problem import Problem, beside, multiple, output, rows_together
from tilewise.cuda.launch import DeviceArray, architecture, describe, empty, launch, warpgroups_wanted
from tilewise.errors import ArgumentError, UnsupportedError

__all__ = ["backward", "forward"]


def forward(query: Any, key: Any, value: Any, out: Any, lse: Any, rules: Any) -> None:
    """Attention on the caller's current stream; fills `out` and `lse` and returns at once.

    Args:
        query: ``[B, Hq, Sq, D]``, float16, bfloat16 or float32, on a GPU; any strides, D from 1 to 256. A last axis
            that is not contiguous is copied.
        key: ``[B, Hk, Sk, D]``; with ``rules.block_table`` ``[pages, Hk, page_size, D]``.
        value: as `key`, of its own width.
        out: ``[B, Hq, Sq, Dv]`` of the type of `query`, its last axis contiguous.
        lse: ``[B, Hq, Sq]``, float32.
        rules: a :class:`tilewise.attention.rules.Rules`, its arrays on the same GPU. ``sequences``, ``block_table`` and
            block lists may lie on the host, which costs a copy.

    A row that sees nothing gives 0 and -inf, or its sink. Rows outside all sequences are not written. Few rows over
    many keys (all rows of a head group fit into 64) are computed in parts of 512 keys, or in ``rules.splits``.

    Raises:
        ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError: as they say.
        KernelError, MissingExtraError: see :func:`tilewise.cuda.launch.launch`.
    """
    problem = Problem.checked(query, key, value, rules)
    q, a = problem.query, problem.argument
    batches, heads, queries, _ = q.shape
    dv = problem.value.shape[3]
    result = output("out", out, q, (batches, heads, queries, dv), q.dtype)
    logs = beside("lse", lse, q, (batches, heads, queries), "float32")
    if 0 in (batches, heads, queries):
        return
    problem.point("out", result)
    problem.point("lse", logs)
    a["out_aligned"] = multiple([result], 4)
    mod, arrays = problem.mod(gradient=False)
    rows = (int(a["query_block"]) or queries) * int(a["pack"])
    features = problem.features
    parts = problem.parts if problem.few else 1
    if parts > 1:
        features |= kernels.SPLIT
        problem.point("partial", empty(q, (parts, batches, heads, queries, dv), "float32"))
        problem.point("partial_lse", empty(q, (parts, batches, heads, queries), "float32"))
    warpgroups = warpgroups_wanted() and rows > 64 and architecture(q) == "sm_90a"
    shape = kernels.forward_shape(q.dtype, *problem.widths, features, mod, spread=rows <= 16, warpgroups=warpgroups)
    grid = (problem.row_tiles(shape.rows) * problem.head_parts * problem.copies, parts, 1)
    block = (32 * shape.warps, 1, 1)
    launch(kernels.forward(shape, features, mod), grid, block, (a, problem.captures(mod, arrays)), q)
    if parts > 1:
        grid = (-(-batches * heads * queries // kernels.ROW_WARPS), 1, 1)
        launch(kernels.combine(q.dtype), grid, (32 * kernels.ROW_WARPS, 1, 1), (a,), q)


def _turn(problem: Problem) -> None:
    """Lists of key blocks a query block, as lists of query blocks a key block."""
    a, q = problem.argument, problem.query
    lists = int(a["list_batches"]) * int(a["list_heads"])
    rows, columns = int(a["query_blocks"]), int(a["key_blocks"])
    marks = empty(q, (lists, rows, columns), "uint8")
    counts, turned = empty(q, (lists, columns), "int32"), empty(q, (lists, columns, rows), "int32")
    threads = (32 * kernels.BLOCK_WARPS, 1, 1)
    launch(kernels.mark_blocks(), (-(-lists * rows // kernels.BLOCK_WARPS), 1, 1), threads, (a, marks), q)
    grid = (-(-lists * columns // kernels.BLOCK_WARPS), 1, 1)
    launch(kernels.turn_blocks(), grid, threads, (a, marks, counts, turned), q)
    problem.held.append(marks)
    problem.point("turned_count", counts)
    problem.point("turned_list", turned)


def backward(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    grad_out: Any,
    grad_lse: Any | None,
    grad_query: Any | None,
    grad_key: Any | None,
    grad_value: Any | None,
    grad_sinks: Any | None,
    grad_captures: Sequence[Any | None],
    rules: Any,
    *,
    deterministic: bool = False,
) -> None:
    """Gradients of :func:`forward` on the caller's current stream; returns at once.

    Args:
        query, key, value, rules: as in :func:`forward`; no pages.
        out, lse: what it returned.
        grad_out: ``[B, Hq, Sq, Dv]``, of the type of `query`, any strides.
        grad_lse: ``[B, Hq, Sq]``, float32, or ``None``.
        grad_query, grad_key, grad_value: arrays to overwrite, of the shapes and type of the inputs, with a contiguous
            last axis; ``None`` for those not wanted. Rows outside all sequences are not written; sequences may not
            share keys.
        grad_sinks: float32 ``[Hq]`` or ``None``.
        grad_captures: for each capture of the score program a contiguous float32 array of its shape, overwritten, or
            ``None``.
        deterministic: refuse gradients of captures, which are summed by atomics in the machine's order. All others have
            one order of every sum.

    Raises:
        ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError: as they say.
        KernelError, MissingExtraError: see :func:`tilewise.cuda.launch.launch`.
    """
    problem = Problem.checked(query, key, value, rules)
    if problem.features & kernels.PAGED:
        raise UnsupportedError("keys in pages have no gradient; gather them (key[block_table]) to differentiate")
    q, a = problem.query, problem.argument
    batches, heads, queries, _ = q.shape
    shape = (batches, heads, queries, problem.value.shape[3])
    result = output("out", out, q, shape, q.dtype)
    logs = beside("lse", lse, q, shape[:3], "float32")
    upstream = rows_together(beside("grad_out", grad_out, q, shape, q.dtype))
    wanted: dict[str, DeviceArray] = {}
    for name, array, like in (
        ("grad_query", grad_query, q),
        ("grad_key", grad_key, problem.key),
        ("grad_value", grad_value, problem.value),
    ):
        if array is not None:
            wanted[name] = output(name, array, q, like.shape, q.dtype)
    totals: list[DeviceArray | None] = []
    for number, (array, capture) in enumerate(zip(grad_captures, rules.score_captures, strict=True)):
        if array is None:
            totals.append(None)
            continue
        name = f"grad_captures[{number}]"
        total = output(name, array, q, describe(name, capture).shape, "float32")
        if total.contiguous() is not total:
            raise ArgumentError(f"{name}: expected a contiguous array, got strides {total.strides}")
        if deterministic:
            raise UnsupportedError(
                f"{name}: gradients of captured arrays are summed by atomics on CUDA, whose order is not fixed; "
                "pass deterministic=False, or compute them on the CPU"
            )
        total.array.fill_(0) if total.is_torch else total.array.fill(0)
        totals.append(total)
    if grad_lse is not None:
        problem.point("grad_lse", beside("grad_lse", grad_lse, q, shape[:3], "float32"))
    if grad_sinks is not None:
        if rules.sinks is None:
            raise ArgumentError("grad_sinks: expected None without sinks, got an array")
        sums = output("grad_sinks", grad_sinks, q, (heads,), "float32")
        problem.point("grad_sinks", sums)
    for name, array in (("out", result), ("lse", logs), ("grad_out", upstream), *wanted.items()):
        problem.point(name, array)
    if a["aligned"]:
        a["aligned"] = multiple([upstream], 16)
    a["out_aligned"] = multiple(list(wanted.values()), 4) if wanted else 0

    if 0 not in (batches, heads, queries):
        problem.point("delta", empty(q, shape[:3], "float32"))
        threads = (32 * kernels.ROW_WARPS, 1, 1)
        launch(kernels.delta(q.dtype), (-(-batches * heads * queries // kernels.ROW_WARPS), 1, 1), threads, (a,), q)
    if grad_sinks is not None:
        launch(kernels.sink_gradient(), (heads, 1, 1), (32 * kernels.SINK_WARPS, 1, 1), (a,), q)
    mod, arrays = problem.mod(gradient=True)
    tile = kernels.backward_shape(q.dtype, *problem.widths)
    threads = (32 * tile.warps, 1, 1)
    captures = problem.captures(mod, arrays, totals)
    if "grad_query" in wanted or any(total is not None for total in totals):
        grid = (problem.row_tiles(tile.rows) * problem.head_parts * problem.copies, 1, 1)
        launch(kernels.query_gradient(tile, problem.features, mod), grid, threads, (a, captures), q)
    what = kernels.GRAD_KEY * ("grad_key" in wanted) | kernels.GRAD_VALUE * ("grad_value" in wanted)
    if not what:
        return
    if problem.features & kernels.LISTS:
        _turn(problem)
    grid = (problem.key_tiles(tile.rows) * problem.key.shape[1] * problem.copies, 1, 1)
    whats = [what] if tile.together else [part for part in (kernels.GRAD_KEY, kernels.GRAD_VALUE) if what & part]
    for part in whats:
        launch(kernels.key_gradient(tile, part, problem.features, mod), grid, threads, (a, captures), q)
