"""Log-probabilities of given tokens over a split vocabulary: raw distribution, natural logarithm."""

from collections.abc import Sequence

import numpy as np
import torch

from evener.engine.batch import TokenLogprobs
from evener.execute.live.sampling.exchange import Exchange
from evener.execute.live.sampling.local import padded_candidates
from evener.kernels import logsumexp_rows

_WIDTH = 32
"""Candidates exchanged at least: the chosen token is mostly among them, and then its rank needs no second message."""


def token_logprobs(
    exchange: Exchange,
    logits_PV: torch.Tensor,
    tokens: Sequence[int],
    top: int,
    offset: int,
    vocab_size: int,
) -> list[TokenLogprobs]:
    """`tokens[p]` under `logits_PV[p]`, with the `top` most likely tokens of each row.

    `logits_PV` is fp32 over the vocabulary interval [offset, offset + V). The rank counts tokens strictly more
    likely, plus one. All ranks must call this with the same tokens; all get the same answer. One exchange, and a
    second one if some token is not among the best candidates. Raises WorkerLost.
    """
    a, b = offset, offset + logits_PV.shape[1]
    token_P = np.asarray(tokens, np.int64)
    n_rows, device = len(token_P), logits_PV.device
    own = torch.full((n_rows,), -torch.inf, device=device)
    mine = np.flatnonzero((token_P >= a) & (token_P < b))
    if len(mine):
        row = torch.from_numpy(mine).to(device)
        own[row] = logits_PV[row, torch.from_numpy(token_P[mine] - a).to(device)]
    width = min(max(_WIDTH, top + 1), vocab_size + 1)
    value, index = padded_candidates(logits_PV, width, a)
    parts = [value, index.to(torch.int32), logsumexp_rows(logits_PV), own]
    value_R, index_R, lse_R, own_R = exchange.gather(parts)

    floor_P = value_R[:, :, -1].max(axis=0)
    values = value_R.transpose(1, 0, 2).reshape(n_rows, -1)
    indices = index_R.transpose(1, 0, 2).reshape(n_rows, -1)
    logit_P = own_R.max(axis=0)
    norm_P = np.logaddexp.reduce(lse_R.astype(np.float64), axis=0)
    rank_P = (values > logit_P[:, None]).sum(axis=1)
    deep = np.flatnonzero(logit_P < floor_P)
    if len(deep):
        at = torch.from_numpy(deep).to(device)
        above = (logits_PV[at] > torch.from_numpy(logit_P[deep]).to(device)[:, None]).sum(dim=1, dtype=torch.int32)
        rank_P[deep] = exchange.gather([above])[0].sum(axis=0)

    order = np.lexsort((indices, -values), axis=-1)[:, : min(top, vocab_size)]
    top_index = np.take_along_axis(indices, order, axis=1).tolist()
    top_logprob = (np.take_along_axis(values, order, axis=1) - norm_P[:, None]).tolist()
    logprob_P = (logit_P - norm_P).tolist()
    return [
        TokenLogprobs(
            int(token_P[p]),
            logprob_P[p],
            int(rank_P[p]) + 1,
            list(zip(top_index[p], top_logprob[p], strict=True)),
        )
        for p in range(n_rows)
    ]
