"""Small batches of sequences: masks with padding anywhere, numbers of each token, and NaN where nothing counts."""

import pytest
import torch

INF, NAN = float("inf"), float("nan")
MASKS = {
    "all": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "right": [[1, 1, 1, 1], [1, 1, 0, 0]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1]],
    "a row of none": [[1, 1, 1, 0], [0, 0, 0, 0]],
    "none": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "one token": [[1]],
    "no tokens": [[], []],
}


def mask_of(name: str) -> torch.Tensor:
    return torch.tensor(MASKS[name]).bool()


masks = pytest.mark.parametrize("name", MASKS)


def numbers(mask: torch.Tensor, n: int, seed: int = 0, scale: float = 1.0) -> list[torch.Tensor]:
    """Several of each token, float32."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(n, *mask.shape, generator=generator) * scale)


def log_probs(mask: torch.Tensor, n: int = 2, seed: int = 0) -> list[torch.Tensor]:
    return [-x.abs() - 0.1 for x in numbers(mask, n, seed)]


def spoilt(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """With NaN and infinities where the mask has nothing."""
    wrong = torch.tensor([NAN, INF, -INF]).to(x.dtype).repeat(mask.numel())[: mask.numel()]
    return torch.where(mask, x, wrong.view(mask.shape))


def doubled(*tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]
