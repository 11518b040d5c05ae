"""A divergence of one's own: the squared Hellinger distance, which no built-in covers.

``H^2(q, p) = sum((sqrt(q) - sqrt(p))^2) / 2 = 1 - sum(sqrt(q p))``, between 0 and 1.

Run ``python examples/squared_hellinger.py``: it checks the slope, the limits and every path that
this machine has, and trains a row of logits towards the teacher's.
"""

import torch

from distill_ops import check_divergence, declare_divergence, distillation_loss
from distill_ops.language import tl


@declare_divergence
def squared_hellinger(log_q, log_p, q, p):
    """``sum((sqrt(q) - sqrt(p))**2) / 2``: bounded by 1, finite wherever probabilities are 0."""
    root = tl.exp(0.5 * (log_q + log_p))
    return 0.5 * (q + p) - root, 0.5 * (q - root)


def main() -> None:
    print(check_divergence(squared_hellinger()))
    torch.manual_seed(0)
    teacher = torch.randn(8, 1000)
    student = torch.zeros(8, 1000, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for step in range(101):
        loss = distillation_loss(student, teacher, divergence=squared_hellinger())
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.2e}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
