"""One small all_gather for everything the ranks of a stage must tell each other."""

from collections.abc import Sequence

import numpy as np
import torch

from evener.execute.live.transport.base import Group

_NUMPY = {torch.float32: np.float32, torch.int32: np.int32, torch.float64: np.float64}


class Exchange:
    """Packs tensors into one message and gathers it; without a group (one rank) nothing is sent."""

    def __init__(self, group: Group | None) -> None:
        self.group = group
        self.size = group.size if group else 1

    def gather(self, parts: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Every rank's `parts` (fp32, fp64 or int32; the same shapes on every rank), each as [R, *shape] on the host.

        Every rank gets the same bits in the same order, so that decisions taken on them agree. Raises WorkerLost.
        """
        packed = torch.cat([p.contiguous().view(torch.int32).reshape(-1) for p in parts])
        if self.group is not None:
            out = torch.empty((self.size, packed.numel()), dtype=torch.int32, device=packed.device)
            self.group.all_gather(packed, out)
        else:
            out = packed.unsqueeze(0)
        host = out.cpu().numpy()
        got, at = [], 0
        for p in parts:
            dtype = np.dtype(_NUMPY[p.dtype])
            n = p.numel() * dtype.itemsize // 4
            got.append(np.ascontiguousarray(host[:, at : at + n]).view(dtype).reshape(self.size, *p.shape))
            at += n
        return got
