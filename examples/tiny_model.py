"""The trainable twin of the default pair: MiniMax-M3's text architecture, written for CPU training.

The module tree and its parameter names repeat `MiniMaxM3VLForCausalLM` of transformers, so a state
dict moves across by name alone (experts are kept as one matrix each, which the Muon optimiser wants,
and are stacked on export). Three things differ from the inference model, all of them about training:

1. Experts run as one operation, `tilewise.torch.moe.experts`, over the stacked matrices; or, to compare
   with, as torch's products grouped by expert over the matrices themselves.
2. The indexer learns by the KL rule of MiniMax Sparse Attention: the student is its softmax over the
   visible keys, the teacher the mean over a group's heads of the attention probabilities; both sides
   are detached from the language-model loss, and so is the indexer's input. A few query rows of each
   sequence carry the loss: the rule is a mean over rows, so a sample of rows is an unbiased estimate.
3. Expert load is balanced by the selection bias alone (no auxiliary loss touches the weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewise.torch as twt


@dataclass(frozen=True)
class Shape:
    """Sizes of the target, under the names transformers uses."""

    vocab_size: int = 256
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    dense_intermediate_size: int = 512
    intermediate_size: int = 112
    shared_intermediate_size: int = 128
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    routed_scaling_factor: float = 1.0
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    index_n_heads: int = 2
    index_head_dim: int = 32
    index_block_size: int = 32
    index_topk_blocks: int = 8
    index_local_blocks: int = 1
    dense_attention_layers: int = 2
    dense_mlp_layers: int = 1
    experts: str = "tilewise"  # or "torch"


class RMSNorm(nn.Module):
    """Gemma-style norm: the stored weight is the distance from one."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), 1.0 + self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading `cos.shape[-1]` channels, split-half convention; the rest passes through."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


def swiglu_oai(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1.0) * (gate * torch.sigmoid(gate * alpha))


class DenseMLP(nn.Module):
    def __init__(self, shape: Shape, width: int):
        super().__init__()
        self.shape = shape
        self.gate_up_proj = nn.Linear(shape.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu_oai(self.gate_up_proj(x), self.shape.swiglu_alpha, self.shape.swiglu_limit))


class Router(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.num_local_experts, shape.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.num_local_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(F.linear(x.to(self.weight.dtype), self.weight))
        chosen = torch.topk(scores + self.e_score_correction_bias, self.shape.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(dim=-1, keepdim=True)


class Experts(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        count, d, n = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
        self.gate_up_proj = nn.ParameterList(torch.empty(2 * n, d) for _ in range(count))
        self.down_proj = nn.ParameterList(torch.empty(d, n) for _ in range(count))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.bincount(chosen.reshape(-1), minlength=self.shape.num_local_experts)
        if self.shape.experts == "torch":
            return self._by_torch(x, chosen, weights, counts), counts
        up, down = torch.stack(list(self.gate_up_proj)), torch.stack(list(self.down_proj))
        options = {"alpha": self.shape.swiglu_alpha, "limit": self.shape.swiglu_limit}
        return twt.moe.experts(x, chosen, weights, up, down, activation="swiglu_clamped", **options), counts

    def _by_torch(self, x: Tensor, chosen: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        picks = chosen.shape[1]
        order = torch.argsort(chosen.reshape(-1), stable=True)
        rows = x.index_select(0, order // picks).split(counts.tolist())
        # Over the matrices themselves, so that autograd never builds a gradient of all experts for each of them.
        outputs = [
            F.linear(swiglu_oai(F.linear(part, up), self.shape.swiglu_alpha, self.shape.swiglu_limit), down)
            for part, up, down in zip(rows, self.gate_up_proj, self.down_proj, strict=True)
        ]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        routed = torch.cat(outputs).index_select(0, back).view(x.shape[0], picks, -1)
        return (routed * weights.to(routed.dtype).unsqueeze(-1)).sum(dim=1)


class SparseMLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.gate = Router(shape)
        self.experts = Experts(shape)
        self.shared_experts = DenseMLP(shape, shape.shared_intermediate_size)
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights = self.gate(flat)
        routed, self.load = self.experts(flat, chosen, weights)
        return (routed * self.shape.routed_scaling_factor + self.shared_experts(flat)).view_as(x)


class Indexer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        width = shape.index_head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.index_n_heads * width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.q_norm = RMSNorm(width, shape.rms_norm_eps)
        self.k_norm = RMSNorm(width, shape.rms_norm_eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, -1, self.shape.index_head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, 1, self.shape.index_head_dim)).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    @torch.no_grad()
    def keep(self, q: Tensor, k: Tensor, causal: Tensor) -> Tensor:
        """Boolean `[batch, index_heads, length, length]`: which keys each query may attend."""
        size, length = self.shape.index_block_size, q.shape[2]
        scores = (q.float() @ k.float().transpose(-1, -2)).masked_fill(~causal, float("-inf"))
        blocks = F.pad(scores, (0, -length % size), value=float("-inf"))
        blocks = blocks.view(*blocks.shape[:-1], -1, size).amax(dim=-1)
        own = torch.arange(length) // size
        blocks.scatter_(-1, own.view(1, 1, -1, 1).expand(*blocks.shape[:3], 1), float("inf"))
        best = blocks.topk(min(self.shape.index_topk_blocks, blocks.shape[-1]), dim=-1).indices
        chosen = torch.zeros(blocks.shape, dtype=torch.bool).scatter_(-1, best, True)
        return chosen.repeat_interleave(size, dim=-1)[..., :length] & causal


class Attention(nn.Module):
    def __init__(self, shape: Shape, sparse: bool):
        super().__init__()
        self.shape = shape
        d, width = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(d, shape.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(d, shape.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(d, shape.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * width, d, bias=False)
        self.q_norm = RMSNorm(width, shape.rms_norm_eps)
        self.k_norm = RMSNorm(width, shape.rms_norm_eps)
        self.indexer = Indexer(shape) if sparse else None
        self.index_loss: Tensor | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, causal: Tensor, select: bool, rows: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        per_head = (batch, length, -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(per_head)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(per_head)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(per_head).transpose(1, 2)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        keep = None
        if self.indexer is not None:
            index_q, index_k = self.indexer.project(x.detach(), cos, sin)
            if select:
                keep = self.indexer.keep(index_q, index_k, causal)
            if rows is not None:
                self.index_loss = self._index_loss(q, k, index_q, index_k, causal if keep is None else keep, rows)
        if keep is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill_(~keep, float("-inf"))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat_interleave(group, dim=1))
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def _index_loss(self, q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
        dropped = ~keep[..., rows, :]
        groups = self.shape.num_key_value_heads
        with torch.no_grad():
            scores = (q[:, :, rows].float() @ k.float().transpose(-1, -2)) * self.shape.head_dim**-0.5
            scores = scores.unflatten(1, (groups, -1))
            teacher = scores.masked_fill(dropped.unsqueeze(2), float("-inf")).softmax(dim=-1).mean(dim=2)
        student = (index_q[:, :, rows].float() @ index_k.float().transpose(-1, -2)) * self.shape.index_head_dim**-0.5
        student = student.masked_fill(dropped, -1e30).log_softmax(dim=-1)
        return F.kl_div(student, teacher, reduction="none").sum(dim=-1).mean()


class Layer(nn.Module):
    def __init__(self, shape: Shape, index: int):
        super().__init__()
        self.self_attn = Attention(shape, sparse=index >= shape.dense_attention_layers)
        dense = index < shape.dense_mlp_layers
        self.mlp = DenseMLP(shape, shape.dense_intermediate_size) if dense else SparseMLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Body(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class TinyTarget(nn.Module):
    """MiniMax-M3's text model, sized by `Shape`; `forward` returns logits `[batch, length, vocab]`."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = 0.02 if "embed" in name else parameter.shape[-1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    std /= (2 * shape.num_hidden_layers) ** 0.5
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor, *, select: bool = True, index_rows: Tensor | None = None) -> Tensor:
        """`select` attends the chosen blocks only (dense otherwise); `index_rows` asks for the indexer's loss."""
        shape, length = self.shape, tokens.shape[1]
        width = int(shape.head_dim * shape.partial_rotary_factor)
        speeds = shape.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = (torch.arange(length, dtype=torch.float32)[:, None] * speeds).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, causal, select, index_rows)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.model.norm(x))

    def index_loss(self) -> Tensor:
        return sum(m.index_loss for m in self.modules() if isinstance(m, Attention) and m.index_loss is not None)

    @torch.no_grad()
    def balance(self, rate: float) -> float:
        """Nudge every selection bias towards even load; return the largest load over the mean."""
        worst = 1.0
        for module in self.modules():
            if isinstance(module, SparseMLP) and module.load is not None:
                load = module.load.float()
                module.gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)
                worst = max(worst, float(load.max() / load.mean()))
        return worst

    def export(self) -> dict[str, Tensor]:
        """State dict under transformers' names: the matrices of the experts stacked into one tensor."""
        state: dict[str, Tensor] = {}
        stacks: dict[str, list[Tensor]] = {}
        for name, tensor in self.state_dict().items():
            head, _, last = name.rpartition(".")
            if last.isdigit():
                stacks.setdefault(head, []).append(tensor)
            else:
                state[name] = tensor
        return state | {name: torch.stack(parts) for name, parts in stacks.items()}
