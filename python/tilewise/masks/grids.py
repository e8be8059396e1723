"""Masks of images and video, whose tokens lie on a grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewise.errors import ArgumentError, ShapeError
from tilewise.expr import abs as absolute
from tilewise.expr import array, clip
from tilewise.masks._check import MaskMod, integers, named, pair, whole

__all__ = [
    "natten", "natten_morton", "natten_tiled", "sliding_tile", "stand_alone", "svg_spatial", "svg_temporal",
    "video_sparse",
]  # fmt: skip


def _neighbourhood(places: Any, canvas: tuple[int, ...], kernel: tuple[int, ...]) -> Any:
    """Keys within the kernel around each query, its centre moved so that the kernel stays on the canvas."""
    for size, extent in zip(kernel, canvas, strict=True):
        if size % 2 == 0 or size > extent:
            raise ArgumentError(f"kernel: expected odd sizes that fit the canvas {canvas}, got {kernel}")

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        kept = None
        for mine, other, extent, size in zip(places(q), places(k), canvas, kernel, strict=True):
            centre = clip(mine, size // 2, extent - 1 - size // 2)
            near = absolute(centre - other) <= size // 2
            kept = near if kept is None else kept & near
        return kept

    return mask


def natten(canvas: tuple[int, int], kernel: tuple[int, int]) -> MaskMod:
    """Neighbourhood attention: the ``kernel`` window around a pixel, moved inside at the edges; rows of pixels.

    ``|clip(y_q, r, H - 1 - r) - y_k| <= r`` and the same for x, with ``r = kernel // 2``.

    Args:
        canvas: (height, width).
        kernel: (height, width), odd, not larger than the canvas.

    Source: Hassani et al. 2023 (NATTEN), arXiv 2204.07143.

    Example:
        >>> from tilewise.attention import create_mask
        >>> import numpy as np
        >>> q, k = np.ogrid[:9, :9]
        >>> natten((3, 3), (3, 3))(0, 0, q, k).all()
        np.True_
    """
    canvas, kernel = pair("canvas", canvas), pair("kernel", kernel)  # type: ignore[assignment]
    width = canvas[1]
    return named(_neighbourhood(lambda i: (i // width, i % width), canvas, kernel), f"natten({canvas}, {kernel})")


def _tile_places(index: Any, canvas: tuple[int, int], tile: tuple[int, int]) -> tuple[Any, Any]:
    """(y, x) of a token where tiles of pixels are contiguous."""
    area, across = tile[0] * tile[1], canvas[1] // tile[1]
    number, inside = index // area, index % area
    return number // across * tile[0] + inside // tile[1], number % across * tile[1] + inside % tile[1]


def natten_tiled(canvas: tuple[int, int], kernel: tuple[int, int], tile: tuple[int, int]) -> MaskMod:
    """:func:`natten` where tokens are ordered by tiles of pixels, so that blocks are squares and more are empty.

    Args:
        canvas: (height, width), whole tiles.
        kernel: (height, width), odd.
        tile: (height, width).

    Source: Hassani et al. 2025 (Generalized NATTEN), arXiv 2504.16922; attention-gym.

    Example:
        >>> from tilewise import expr
        >>> expr.trace(natten_tiled((8, 8), (3, 3), (4, 4))).kind
        'mask'
    """
    canvas, kernel, tile = pair("canvas", canvas), pair("kernel", kernel), pair("tile", tile)  # type: ignore[assignment]
    if any(extent % size for extent, size in zip(canvas, tile, strict=True)):
        raise ArgumentError(f"tile: expected sizes that divide the canvas {canvas}, got {tile}")
    return named(
        _neighbourhood(lambda i: _tile_places(i, canvas, tile), canvas, kernel),
        f"natten_tiled({canvas}, {kernel}, {tile})",
    )


def _even_bits(code: Any) -> Any:
    """Bits 0, 2, 4 ... of a code of up to 32 bits, moved together."""
    code = code & 0x55555555
    for shift, kept in ((1, 0x33333333), (2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        code = (code | (code >> shift)) & kept
    return code


def natten_morton(canvas: tuple[int, int], kernel: tuple[int, int]) -> MaskMod:
    """:func:`natten` where tokens are in Morton (Z) order: x in the even bits of the index, y in the odd ones.

    Args:
        canvas: (height, width), equal powers of two up to 65536.
        kernel: (height, width), odd.

    Source: Morton 1966; attention-gym.

    Example:
        >>> import numpy as np
        >>> natten_morton((2, 2), (1, 1))(0, 0, *np.ogrid[:4, :4]).astype(int).trace()
        np.int64(4)
    """
    canvas, kernel = pair("canvas", canvas), pair("kernel", kernel)  # type: ignore[assignment]
    if canvas[0] != canvas[1] or canvas[0] & (canvas[0] - 1) or canvas[0] > 65536:
        raise ArgumentError(f"canvas: expected two equal powers of two up to 65536, got {canvas}")
    return named(
        _neighbourhood(lambda i: (_even_bits(i >> 1), _even_bits(i)), canvas, kernel),
        f"natten_morton({canvas}, {kernel})",
    )


def stand_alone(width: int, radius: int) -> MaskMod:
    """A square window of pixels, cut off at the edges: ``|y_q - y_k| <= radius and |x_q - x_k| <= radius``.

    Args:
        width: of the image, tokens in rows.
        radius: at least 0.

    Source: Ramachandran et al. 2019 (stand-alone self-attention), arXiv 1906.05909.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(stand_alone(8, 1)))
        (abs(q // 8 - k // 8) <= 1) & (abs(q % 8 - k % 8) <= 1)
    """
    width, radius = whole("width", width, 1), whole("radius", radius)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (absolute(q // width - k // width) <= radius) & (absolute(q % width - k % width) <= radius)

    return named(mask, f"stand_alone({width}, {radius})")


def sliding_tile(canvas: tuple[int, ...], kernel: tuple[int, ...], tile: tuple[int, ...], text: int = 0) -> MaskMod:
    """Sliding tile attention: a window of whole tiles around the query's tile, and text that sees and is seen by all.

    Tokens are ordered by tiles of a 2-D image or a 3-D video; ``text`` tokens follow them. The window of
    ``kernel / tile`` tiles on each axis is moved inside at the edges, so every query sees as many.

    Args:
        canvas: (height, width) or (time, height, width), whole tiles.
        kernel: the window on each axis, whole tiles.
        tile: of tokens on each axis.
        text: tokens after the image.

    Source: Zhang et al. 2025 (STA), arXiv 2502.04507.

    Example:
        >>> from tilewise import expr
        >>> expr.trace(sliding_tile((4, 8, 8), (4, 4, 4), (2, 2, 2), text=16)).kind
        'mask'
    """
    ranks = (2, 3)
    canvas = pair("canvas", canvas, ranks=ranks)
    kernel, tile = pair("kernel", kernel, ranks=(len(canvas),)), pair("tile", tile, ranks=(len(canvas),))
    text = whole("text", text)
    for name, sizes in (("canvas", canvas), ("kernel", kernel)):
        if any(size % part for size, part in zip(sizes, tile, strict=True)):
            raise ArgumentError(f"{name}: expected whole tiles of {tile}, got {sizes}")
    tiles = tuple(size // part for size, part in zip(canvas, tile, strict=True))
    window = tuple(size // part for size, part in zip(kernel, tile, strict=True))
    if any(wide > extent for wide, extent in zip(window, tiles, strict=True)):
        raise ArgumentError(f"kernel: expected sizes up to the canvas {canvas}, got {kernel}")
    image, area = math.prod(canvas), math.prod(tile)

    def places(index: Any) -> list[Any]:
        number, found = index // area, []
        for extent in reversed(tiles):
            found.append(number % extent)
            number = number // extent
        return found[::-1]

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        near = (q < image) & (k < image)
        for mine, other, extent, wide in zip(places(q), places(k), tiles, window, strict=True):
            first = clip(mine - wide // 2, 0, extent - wide)
            near = near & (other >= first) & (other < first + wide)
        return near | ((k >= image) & (k < image + text)) | ((q >= image) & (k < image + text))

    return named(mask, f"sliding_tile({canvas}, {kernel}, {tile}, {text})")


def video_sparse(selected: Any, tile: int, tiles: int | None = None) -> MaskMod:
    """Video sparse attention's fine pass: each tile of queries sees its selected tiles of keys.

    Args:
        selected: integers ``[batch, heads, query tiles, slots]``, the chosen key tiles; negative ones are unused.
        tile: tokens of a tile.
        tiles: how many key tiles there are; up to the largest chosen if not given.

    Source: Zhang et al. 2025 (VSA), arXiv 2505.13389.

    Example:
        >>> import numpy as np
        >>> mask = video_sparse(np.array([[[[0, 1], [1, -1]]]]), tile=2)
        >>> print(mask(0, 0, *np.ogrid[:4, :4]).astype(int))
        [[1 1 1 1]
         [1 1 1 1]
         [0 0 1 1]
         [0 0 1 1]]
    """
    chosen, tile = integers("selected", selected, 4).numpy(), whole("tile", tile, 1)
    count = int(chosen.max(initial=-1)) + 1 if tiles is None else whole("tiles", tiles, 1)
    if chosen.size and chosen.max() >= count:
        raise ArgumentError(f"selected: expected key tiles below {count}, got {chosen.max()}")
    if 0 in chosen.shape[:3] or not count:
        raise ShapeError(f"selected: expected at least one tile, got {list(chosen.shape)}")
    table = np.zeros((*chosen.shape[:3], count), bool)
    *where, _ = np.nonzero(chosen >= 0)
    table[(*where, chosen[chosen >= 0])] = True
    seen = array(table, "selected")
    return named(lambda b, h, q, k: seen[b, h, q // tile, k // tile], f"video_sparse({tile})")


def svg_spatial(prompt: int, frame: int, frames: int = 2, *, first_frame: bool = False, multiple: int = 128) -> MaskMod:
    """Sparse VideoGen's spatial heads: near tokens, and the prompt: ``|q - k| < w or q < prompt or k < prompt``.

    Args:
        prompt: text tokens in front.
        frame: tokens of a frame.
        frames: how many frames wide the band is; ``w = frames * frame`` rounded down to ``multiple``.
        first_frame: all see the first frame too (``k < prompt + frame``).
        multiple: of the band's width.

    Source: Xi et al. 2025 (Sparse VideoGen), arXiv 2502.01776.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(svg_spatial(2, 14, 2, multiple=4)))
        (k < 2) | (q < 2) | (abs(q - k) < 28)
    """
    prompt, frame, frames = whole("prompt", prompt), whole("frame", frame, 1), whole("frames", frames)
    width = frames * frame // whole("multiple", multiple, 1) * multiple
    column = prompt + (frame if first_frame else 0)
    return named(
        lambda b, h, q, k: (k < column) | (q < prompt) | (absolute(q - k) < width), f"svg_spatial({prompt}, {frame})"
    )


def svg_temporal(prompt: int, frame: int, frames: int, width: int = 2) -> MaskMod:
    """Sparse VideoGen's temporal heads: the same place in all frames, and the prompt.

    ``|(q - prompt) % frame - (k - prompt) % frame| < width * frame // frames or q < prompt or k < prompt``.

    Args:
        prompt: text tokens in front.
        frame: tokens of a frame.
        frames: of the video.
        width: as many frames' worth of tokens as the spatial head sees.

    Source: Xi et al. 2025 (Sparse VideoGen), arXiv 2502.01776.

    Example:
        >>> from tilewise import expr
        >>> print(expr.trace(svg_temporal(2, 14, 10)))
        (k < 2) | (q < 2) | (abs((q - 2) % 14 - (k - 2) % 14) < 2)
    """
    prompt, frame, frames = whole("prompt", prompt), whole("frame", frame, 1), whole("frames", frames, 1)
    near = whole("width", width) * frame // frames

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        apart = absolute((q - prompt) % frame - (k - prompt) % frame)
        return (k < prompt) | (q < prompt) | (apart < near)

    return named(mask, f"svg_temporal({prompt}, {frame}, {frames})")
