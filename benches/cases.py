"""Frozen cases: what is measured, under names that results of different days share. Add cases; never change one."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ATTENTION", "ATTENTION_TRAINING", "DECODE", "DTYPES", "FLEX", "GEMM", "MOE", "MOE_TRAINING", "Attention", "Flex",
    "Gemm", "Moe", "by_name",
]  # fmt: skip

#: Element types that are measured.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Attention:
    """Forward attention. `key_heads` divides `query_heads`; causal is aligned to the bottom right corner."""

    name: str
    batch: int
    query_heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool
    training: bool = False
    #: Keys in a page of the cache; 0 is a contiguous one.
    page: int = 0

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products; causal counts the half it needs, training 3.5 times."""
        pairs = self.queries * self.keys
        if self.causal:
            pairs -= self.queries * (self.queries - 1) // 2
        return (3.5 if self.training else 1.0) * 4.0 * self.batch * self.query_heads * self.head_dim * pairs

    def bytes_read(self, element_size: int) -> int:
        """Keys and values, read once."""
        return 2 * self.batch * self.key_heads * self.keys * self.head_dim * element_size


@dataclass(frozen=True)
class Flex:
    """Self-attention of `length` tokens under a mask or a score function; `visited` is the share of blocks of 128."""

    name: str
    rule: str
    visited: float
    heads: int = 8
    length: int = 4096
    head_dim: int = 64

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products over the visited blocks."""
        return 4.0 * self.heads * self.length**2 * self.head_dim * self.visited


@dataclass(frozen=True)
class Moe:
    """One expert layer with SwiGLU: `tokens` of `width` d through `top_k` of `experts` with hidden size `hidden`."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    training: bool = False
    #: Exponent of a Zipf law over the experts; 0 is uniform.
    zipf: float = 0.0

    @property
    def flops(self) -> float:
        """Multiplications and additions of the three matrices of every token's experts; three times that to train."""
        return (18.0 if self.training else 6.0) * self.tokens * self.top_k * self.width * self.hidden


@dataclass(frozen=True)
class Gemm:
    """``[m, k] @ [k, n]``."""

    name: str
    m: int
    k: int
    n: int

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.m * self.k * self.n


ATTENTION = (
    Attention("prefill 1x8x4096x128 causal", 1, 8, 8, 4096, 4096, 128, True),
    Attention("prefill 1x8x2048x64 causal", 1, 8, 8, 2048, 2048, 64, True),
    Attention("prefill 1x8x2048x64", 1, 8, 8, 2048, 2048, 64, False),
    Attention("prefill 1x32/8x1024x128 causal", 1, 32, 8, 1024, 1024, 128, True),
    Attention("decode 1 of 8192, 32/8 heads of 128", 1, 32, 8, 1, 8192, 128, True),
    Attention("decode 4 of 8192, 32/8 heads of 128", 1, 32, 8, 4, 8192, 128, True),
)

#: Forward and backward.
ATTENTION_TRAINING = tuple(
    Attention(
        f"attention training 1x{heads}x{length}x128{' causal' if causal else ''}",
        *(1, heads, heads, length, length, 128),
        causal,
        training=True,
    )
    for heads, length in ((8, 2048), (8, 4096), (1, 4096))
    for causal in (True, False)
)

#: One token over a long cache: contiguous, and in shuffled pages.
DECODE = tuple(
    Attention(
        f"decode 1 of {keys}, 32/8 heads of 128{f', pages of {page}' if page else ''}",
        *(1, 32, 8, 1, keys, 128),
        False,
        page=page,
    )
    for keys in (8192, 32768, 131072)
    for page in (0, 16, 128)
)

#: torch's flex_attention; the blocks that are visited follow from the rule (32 blocks of queries and of keys).
FLEX = (
    Flex("flex 1x8x4096x64 dense", "dense", 1.0),
    Flex("flex 1x8x4096x64 causal", "causal", 528 / 1024),
    Flex("flex 1x8x4096x64 window 256", "window", 93 / 1024),
    Flex("flex 1x8x4096x64 documents of 512", "documents", 80 / 1024),
    Flex("flex 1x8x4096x64 ALiBi", "alibi", 1.0),
    Flex("flex 1x8x4096x64 softcap", "softcap", 1.0),
)

MOE = (
    Moe("moe 2048,1024,512,64,8", 2048, 1024, 512, 64, 8),
    Moe("moe 4096,768,256,64,8", 4096, 768, 256, 64, 8),
    Moe("moe 1,1024,512,64,8", 1, 1024, 512, 64, 8),
    Moe("moe 16,1024,512,64,8", 16, 1024, 512, 64, 8),
    Moe("moe 1024,2048,768,128,8", 1024, 2048, 768, 128, 8),
)

#: Forward and backward.
MOE_TRAINING = (
    Moe("moe training 4096,768,256,64,8", 4096, 768, 256, 64, 8, True),
    Moe("moe training 2048,1024,512,64,8", 2048, 1024, 512, 64, 8, True),
    Moe("moe training 1024,2048,768,128,8", 1024, 2048, 768, 128, 8, True),
    Moe("moe training 4096,768,256,64,8 zipf 1.2", 4096, 768, 256, 64, 8, True, 1.2),
)

GEMM = (
    Gemm("gemm 2048^3", 2048, 2048, 2048),
    Gemm("gemm 1x4096x4096", 1, 4096, 4096),
    Gemm("gemm 16x2048x2048", 16, 2048, 2048),
)


def by_name(name: str) -> Attention | Flex | Moe | Gemm:
    """The case of that name.

    Raises:
        KeyError: there is none.
    """
    every = (*ATTENTION, *ATTENTION_TRAINING, *DECODE, *FLEX, *MOE, *MOE_TRAINING, *GEMM)
    return {case.name: case for case in every}[name]
