"""The same model with its loss as one would tune it in PyTorch: what bench.py sets ours beside.

One matmul for q, k and v and one for gate and up; SDPA on full rows, FlexAttention with the window
as a block mask on GPUs (its CPU version has no backward pass: a boolean mask there); cross-entropy
over chunks of tokens whose logits are made again in the backward pass. To be compiled whole.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from tiny_aya_jax.model.transformer import BLOCKS

CHUNK = 4096  # tokens whose logits exist at a time: 4 GiB of fp32 at V 262,144


class Tuned(nn.Module):
  """(token_BT, target_BT) -> mean cross-entropy; holds the numbers of our parameter tree."""

  def __init__(self, cfg, params, T, dtype, device):
    super().__init__()
    self.cfg, self.dtype = cfg, dtype
    window = _window(cfg, T, device) if cfg.window < T else None  # of no effect on shorter rows
    self.embed_VD = _parameter(params["embedding_VD"])
    self.norm_D = _parameter(params["norm_D"])
    self.layers = nn.ModuleList(
        Layer(cfg, {name: stack[period] for name, stack in params["periods"][block].items()},
              block != "full", None if block == "full" else window)
        for period in range(cfg.L) for block in BLOCKS
    )
    angle_TR = torch.arange(T)[:, None] * cfg.rope_theta ** (-torch.arange(0, cfg.H, 2) / cfg.H)
    self.register_buffer("turn_2TR", torch.stack([angle_TR.cos(), angle_TR.sin()]))
    self.to(device)

  def forward(self, token_BT, target_BT):
    x_BTD = F.embedding(token_BT, self.embed_VD).to(self.dtype)
    for layer in self.layers:
      x_BTD = layer(x_BTD, self.turn_2TR)
    hidden_BTD = _norm(x_BTD, self.norm_D, self.cfg) * self.cfg.logit_scale
    head_VD = self.embed_VD.to(self.dtype)
    sums = [
        checkpoint(_nats, hidden_RD, head_VD, target_R, use_reentrant=False)
        for hidden_RD, target_R in zip(
            hidden_BTD.flatten(0, 1).split(CHUNK), target_BT.flatten().split(CHUNK))
    ]
    return sum(sums) / target_BT.numel()


class Layer(nn.Module):
  """One parallel block. rotary: it is a sliding one; window: its mask, None where all is seen."""

  def __init__(self, cfg, block, rotary, window):
    super().__init__()
    self.cfg, self.rotary, self.window = cfg, rotary, window
    rows = {name: weight.reshape(cfg.D, -1).T for name, weight in block.items() if name != "norm_D"}
    self.norm_D = _parameter(block["norm_D"])
    self.qkv_RD = _parameter(np.concatenate([rows[name] for name in ("q_DNH", "k_DKH", "v_DKH")]))
    self.up_RD = _parameter(np.concatenate([rows["gate_DF"], rows["up_DF"]]))
    self.o_DR = _parameter(block["o_NHD"].reshape(-1, cfg.D).T)
    self.down_DF = _parameter(block["down_FD"].T)

  def forward(self, x_BTD, turn_2TR):
    cfg = self.cfg
    y_BTD = _norm(x_BTD, self.norm_D, cfg)
    qkv_BTNH = F.linear(y_BTD, self.qkv_RD.to(y_BTD.dtype)).unflatten(-1, (-1, cfg.H))
    q_BNTH, k_BKTH, v_BKTH = qkv_BTNH.transpose(1, 2).split((cfg.N, cfg.K, cfg.K), dim=1)
    if self.rotary:
      q_BNTH, k_BKTH = _rotate(q_BNTH, turn_2TR), _rotate(k_BKTH, turn_2TR)
    a_BNTH = _attend(q_BNTH, k_BKTH, v_BKTH, self.window)
    a_BTD = F.linear(a_BNTH.transpose(1, 2).flatten(2), self.o_DR.to(y_BTD.dtype))
    gate_BTF, up_BTF = F.linear(y_BTD, self.up_RD.to(y_BTD.dtype)).chunk(2, dim=-1)
    f_BTD = F.linear(F.silu(gate_BTF) * up_BTF, self.down_DF.to(y_BTD.dtype))
    return x_BTD + a_BTD + f_BTD


def _window(cfg, T, device):
  """What _attend takes: a block mask on a GPU, elsewhere a boolean [T, T]."""
  def seen(_b, _n, query, key):
    return (key <= query) & (query - key < cfg.window)

  if device == "cuda":
    return flex_attention.create_block_mask(seen, None, None, T, T, device=device)
  place_T = torch.arange(T)
  return seen(0, 0, place_T[:, None], place_T)


def _attend(q_BNTH, k_BKTH, v_BKTH, window):
  if window is None:
    return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=True)
  if q_BNTH.is_cuda:
    return flex_attention.flex_attention(
        q_BNTH, k_BKTH, v_BKTH, block_mask=window, enable_gqa=True)
  return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, attn_mask=window, enable_gqa=True)


def _parameter(value):
  return nn.Parameter(torch.tensor(np.ascontiguousarray(value)))


def _norm(x_BTD, norm_D, cfg):
  return F.layer_norm(x_BTD.float(), (cfg.D,), norm_D, None, cfg.norm_epsilon).to(x_BTD.dtype)


def _rotate(x_BNTH, turn_2TR):
  """Pairs (x[2i], x[2i+1]) turned, in fp32."""
  even, odd = x_BNTH.float().unflatten(-1, (-1, 2)).unbind(-1)
  cosine, sine = turn_2TR
  turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
  return turned.flatten(-2).to(x_BNTH.dtype)


def _nats(hidden_RD, head_VD, target_R):
  return F.cross_entropy(F.linear(hidden_RD, head_VD).float(), target_R, reduction="sum")
