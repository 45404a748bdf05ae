"""Every kernel in plain torch: the definition of what it computes, and what runs on devices without a native kernel.

Works on any device; norms, softmax and sampling are computed in fp32 and rounded to the dtype of the output. The
arguments and their shapes are those of the functions of the same name in `evener.kernels`.
"""

import torch

BLOCK_TOKENS = 16
"""Tokens in a KV block."""

_MASK32 = 0xFFFFFFFF


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""
    x32 = x.float()
    scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    out.copy_(scaled * weight_H.float())


def add_rms_norm(
    residual_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_TH: torch.Tensor
) -> None:
    """residual += x, in place; out = rms_norm(residual)."""
    residual_TH.add_(x_TH)
    rms_norm(residual_TH, weight_H, eps, out_TH)


def _rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split convention: element i of the first half pairs with element i of the second."""
    a, b = x_THD.float().chunk(2, dim=-1)
    cos, sin = cos_TD.float().unsqueeze(1), sin_TD.float().unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_write_kv(
    qkv_TC: torch.Tensor,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    positions_T: torch.Tensor,
    kv_slot_T: torch.Tensor,
    k_slab: torch.Tensor,
    v_slab: torch.Tensor,
    n_q: int,
    n_kv: int,
    q_out_TQD: torch.Tensor,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Split, norm per head (optional), rotate, and write Q to `q_out_TQD`, K and V to their slots."""
    dim = q_out_TQD.shape[-1]
    heads = qkv_TC.reshape(-1, n_q + 2 * n_kv, dim)
    q, k, v = heads[:, :n_q], heads[:, n_q : n_q + n_kv], heads[:, n_q + n_kv :]
    if q_norm_D is not None:
        q, given = torch.empty_like(q), q
        rms_norm(given, q_norm_D, eps, q)
    if k_norm_D is not None:
        k, given = torch.empty_like(k), k
        rms_norm(given, k_norm_D, eps, k)
    cos_TD, sin_TD = cos_PD[positions_T.long()], sin_PD[positions_T.long()]
    q_out_TQD.copy_(_rotate(q, cos_TD, sin_TD))
    kept = kv_slot_T >= 0
    slot = kv_slot_T[kept].long()
    block, offset = slot // BLOCK_TOKENS, slot % BLOCK_TOKENS
    k, v = _rotate(k, cos_TD, sin_TD)[kept], v[kept]
    if k_slab.dtype is torch.int8:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        for slab, scale in ((k_slab, k_scale), (v_slab, v_scale)):
            _scales(slab, dim).permute(1, 2, 0)[block, offset] = scale
        for slab, places, values in ((k_slab, key_places(dim).T, k), (v_slab, value_places(dim), v)):
            slab.transpose(0, 1)[block[:, None], :, places[offset]] = values.transpose(1, 2)
        return
    # Two index tensors around a slice: the indexed dimensions come first, so values are [tokens, n_kv, D].
    k_slab[:, block, :, offset] = k.to(k_slab.dtype)
    v_slab.permute(1, 2, 0, 3)[block, offset] = v.to(v_slab.dtype)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 over the last dimension, symmetric, and its fp32 scale: x is about value * scale."""
    scale = x.float().abs().amax(-1) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return (x.float() * inverse.unsqueeze(-1)).round().to(torch.int8), scale


def key_places(dim: int) -> torch.Tensor:
    """[D, 16]: where the elements of K are in an int8 block, [D / 4][16][4]; the last run may be shorter than 4."""
    d, t = torch.arange(dim).unsqueeze(1), torch.arange(BLOCK_TOKENS)
    run = d // 4 * 4
    return run * BLOCK_TOKENS + t * (dim - run).clamp_max(4) + d % 4


def value_places(dim: int) -> torch.Tensor:
    """[16, D]: where the elements of V are in an int8 block, [16 / 4][D][4]."""
    t, d = torch.arange(BLOCK_TOKENS).unsqueeze(1), torch.arange(dim)
    return (t // 4 * dim + d) * 4 + t % 4


def _scales(slab: torch.Tensor, dim: int) -> torch.Tensor:
    """The scales of an int8 slab, [n_kv, blocks, 16]."""
    return slab[..., BLOCK_TOKENS * dim :].view(torch.float32)


def keys_of(k_slab: torch.Tensor, blocks: torch.Tensor, dim: int) -> torch.Tensor:
    """K of these blocks as numbers, [n_kv, blocks, D, 16]."""
    k = k_slab[:, blocks]
    if k.dtype is not torch.int8:
        return k
    return k[..., key_places(dim)].float() * _scales(k_slab, dim)[:, blocks].unsqueeze(-2)


def values_of(v_slab: torch.Tensor, blocks: torch.Tensor, dim: int) -> torch.Tensor:
    """V of these blocks as numbers, [n_kv, blocks, 16, D]."""
    v = v_slab[:, blocks]
    if v.dtype is not torch.int8:
        return v
    return v[..., value_places(dim)].float() * _scales(v_slab, dim)[:, blocks].unsqueeze(-1)


def silu_mul(gate_up_T2F: torch.Tensor, out_TF: torch.Tensor) -> None:
    """out = gate * sigmoid(gate) * up (SwiGLU, Shazeer, arXiv:2002.05202)."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    out_TF.copy_(torch.nn.functional.silu(gate.float()) * up.float())


def paged_attention(
    q_TQD: torch.Tensor,
    k_slab: torch.Tensor,
    v_slab: torch.Tensor,
    cu_R: torch.Tensor,
    start_R: torch.Tensor,
    tables_RM: torch.Tensor,
    kv_of_head: torch.Tensor,
    scale: float,
    out_TQD: torch.Tensor,
) -> None:
    """Softmax attention of every row over its sequence's keys 0..position; rows beyond cu_R[-1] are left alone."""
    heads, dim = kv_of_head.long(), q_TQD.shape[-1]
    cu, starts = cu_R.tolist(), start_R.tolist()
    for r, start in enumerate(starts):
        rows = slice(cu[r], cu[r + 1])
        count = cu[r + 1] - cu[r]
        if count == 0:
            continue
        keys = start + count
        blocks = tables_RM[r, : -(-keys // BLOCK_TOKENS)].long()
        k_HKD = keys_of(k_slab, blocks, dim).permute(0, 1, 3, 2).flatten(1, 2)[:, :keys]
        v_HKD = values_of(v_slab, blocks, dim).flatten(1, 2)[:, :keys]
        q_HTD = q_TQD[rows].transpose(0, 1).float()
        scores_HTK = q_HTD @ k_HKD[heads].float().mT * scale
        position_T1 = start + torch.arange(count, device=q_TQD.device).unsqueeze(1)
        hidden_TK = torch.arange(keys, device=q_TQD.device) > position_T1
        weights_HTK = scores_HTK.masked_fill(hidden_TK, -torch.inf).softmax(-1)
        out_TQD[rows] = (weights_HTK @ v_HKD[heads].float()).transpose(0, 1).to(out_TQD.dtype)


def _shift(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical shift right of 64-bit words held as int64."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """One step of SplitMix64 (Steele, Lea and Flood 2014) on int64 words."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words, held as int64 (C. Wellons, hash-prospector, "lowbias32")."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def random_bits(key_S: torch.Tensor, index_SC: torch.Tensor) -> torch.Tensor:
    """32 random bits per (key, index), as int64 [S, C]: the counter-based generator behind the Gumbel noise.

    With lo and hi the halves of SplitMix64(key), the bits are mix32(mix32(index ^ lo) + hi), modulo 2**32.
    `key_S` is int64 or uint64 (the same 64 bits), `index_SC` int64 in [0, 2**32).
    """
    mixed = _mix64(key_S.view(torch.int64)).unsqueeze(1)
    low, high = mixed & _MASK32, _shift(mixed, 32)
    return _mix32((_mix32((index_SC & _MASK32) ^ low) + high) & _MASK32)


def uniform(key_S: torch.Tensor, index_SC: torch.Tensor) -> torch.Tensor:
    """w in (0, 1), fp32 [S, C]: (bits // 2 + 1/2) / 2**31, rounded to fp32 and kept below 1.

    The native kernels have the same bits of w, on every instruction set.
    """
    half = (random_bits(key_S, index_SC) >> 1).to(torch.float32)
    return ((half + 0.5) * 2.0**-31).clamp_max(1 - 2.0**-24)


def choose_rows(
    logits_SV: torch.Tensor, inv_temperature_S: torch.Tensor, key_S: torch.Tensor, greedy_S: torch.Tensor,
    vocab_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `evener.kernels.choose_rows`."""
    floor_S = torch.full_like(inv_temperature_S, -torch.inf)
    best_S, top_S = argmax_rows(logits_SV)
    drawn_S, score_S = gumbel_argmax(logits_SV, inv_temperature_S, key_S, vocab_offset, floor_S)
    return torch.where(greedy_S, best_S, drawn_S), torch.where(greedy_S, top_S, score_S)


def gumbel_noise(key_S: torch.Tensor, index_SC: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise -log(-log(u)), fp32 [S, C], with u = 1 - w: fp32 resolves w best where the noise is large.

    A pure function of (key, index), so a choice depends neither on the batch nor on how the vocabulary is split.
    """
    return -torch.log(-torch.log1p(-uniform(key_S, index_SC)))


def gumbel_argmax(
    logits_SV: torch.Tensor,
    inv_temperature_S: torch.Tensor,
    key_S: torch.Tensor,
    vocab_offset: int,
    floor_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Argmax of logits / temperature + noise among logits >= floor: an exact sample of that softmax (Gumbel 1954)."""
    index_V = torch.arange(logits_SV.shape[1], device=logits_SV.device) + vocab_offset
    noise_SV = gumbel_noise(key_S, index_V.unsqueeze(0))
    score_SV = logits_SV.float() * inv_temperature_S.unsqueeze(1) + noise_SV
    return argmax_rows(score_SV.masked_fill(logits_SV < floor_S.unsqueeze(1), -torch.inf))


def argmax_rows(logits_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest value of each row and its lowest index."""
    value_S = logits_SV.float().amax(1)
    index_S = (logits_SV.float() == value_S.unsqueeze(1)).to(torch.int8).argmax(1)
    return index_S, value_S


def logsumexp_rows(logits_SV: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))) of each row."""
    return torch.logsumexp(logits_SV.float(), dim=1)


def top_candidates(logits_SV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row in descending order; of equals the lowest index first."""
    value_SV, index_SV = logits_SV.float().sort(dim=1, descending=True, stable=True)
    return value_SV[:, :k].contiguous(), index_SV[:, :k].contiguous()
