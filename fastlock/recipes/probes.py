"""Logistic regressions of many heads at once, each head's own: scikit-learn's, solved by Newton's method.

What `LogisticRegression()` minimises over the weights w, [head_dim], and the intercept b of one head, with y = ±1:

    Σ log(1 + exp(−y (x · w + b))) + ½ |w|²

It is strictly convex: every solver that comes to its end finds the same w and b.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from fastlock.errors import DamagedError

# Newton's decrement, an estimate of twice the distance of the objective from its minimum, as a share of the objective.
# The last step squares it.
TOLERANCE = 1e-12
MAX_STEPS = 200
_MAX_HALVINGS = 40
_ENOUGH = 1e-4  # Armijo's constant: the share of the expected decrease that a step must bring


def accuracies(x: torch.Tensor, y: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """The mean of train and validation accuracy of a logistic regression on each head.

    Args:
        x: [heads, vectors, head_dim] float64.
        y: the class of each vector, [vectors] bool.
        train: which vectors train, [vectors] bool; both classes are among them. The others validate.

    Returns:
        The accuracies, [heads] float64.

    Raises:
        DamagedError: as for `fit`.
    """
    w, b = fit(x[:, train], y[train])
    correct = (_times(x, w) + b[:, None] > 0) == y
    return (correct[:, train].double().mean(dim=1) + correct[:, ~train].double().mean(dim=1)) / 2


def fit(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and the intercept of each head's logistic regression.

    By Newton's method with a backtracking line search, as in Boyd and Vandenberghe, Convex Optimization, 9.5.

    Args:
        x: [heads, vectors, head_dim] float64.
        y: the class of each vector, [vectors] bool; both classes are there.

    Returns:
        w, [heads, head_dim] float64, and b, [heads] float64.

    Raises:
        DamagedError: the numbers are so large that float64 cannot tell them apart.
    """
    shift = x.mean(dim=1)  # the intercept is not penalised: a shift of x changes nothing else
    x = x - shift[:, None]
    sign = torch.where(y, 1.0, -1.0).to(x)
    w, b = x.new_zeros(x.shape[0], x.shape[2]), x.new_zeros(x.shape[0])
    for _ in range(MAX_STEPS):
        z = _times(x, w) + b[:, None]
        step_w, step_b, decrement = _newton(x, sign, z, w)
        before = _objective(z, sign, w)
        size = _step_size(before, z, _times(x, step_w) + step_b[:, None], sign, w, step_w, decrement)
        w, b = w + size[:, None] * step_w, b + size * step_b
        if (decrement <= TOLERANCE * before).all():
            return w, b - (w * shift).sum(dim=1)
    raise DamagedError(
        f"a logistic regression on numbers of up to {float(x.abs().max()):.0e} does not converge. The model's weights "
        "are damaged, or overflow in this dtype: load it again, in bfloat16 or float32."
    )


def _newton(
    x: torch.Tensor, sign: torch.Tensor, z: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Newton step of w, [heads, head_dim], and b, [heads], at z = x · w + b, [heads, vectors]; its decrement.

    The intercept is eliminated: what is left of the Hessian is the covariance of x, weighted with the curvature of
    each loss, plus the penalty's identity.
    """
    slope = -sign * torch.sigmoid(-sign * z)  # of each loss; not probability - y, which loses what is small
    curvature = torch.sigmoid(z) * torch.sigmoid(-z)
    total = curvature.sum(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    mean = _summed(curvature, x) / total[:, None]
    gradient_w, gradient_b = _summed(slope, x) + w, slope.sum(dim=1)
    root = (x - mean[:, None]) * curvature.sqrt()[..., None]
    hessian = root.transpose(1, 2) @ root
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    # The second term is what rounding could take from the first.
    diagonal += 1 + torch.finfo(x.dtype).eps * x.shape[2] * diagonal.sum(dim=1, keepdim=True)
    reduced = gradient_w - gradient_b[:, None] * mean
    step_w = -torch.cholesky_solve(reduced[..., None], torch.linalg.cholesky(hessian))[..., 0]
    step_b = -gradient_b / total - (mean * step_w).sum(dim=1)
    return step_w, step_b, -(gradient_w * step_w).sum(dim=1) - gradient_b * step_b


def _objective(z: torch.Tensor, sign: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What is minimised, [heads], at z = x · w + b, [heads, vectors]."""
    return w.square().sum(dim=1) / 2 - logsigmoid(sign * z).sum(dim=1)


def _step_size(
    before: torch.Tensor,
    z: torch.Tensor,
    step_z: torch.Tensor,
    sign: torch.Tensor,
    w: torch.Tensor,
    step_w: torch.Tensor,
    decrement: torch.Tensor,
) -> torch.Tensor:
    """What share of its step each head takes, [heads]: 1, or 1 halved until it descends from `before`."""
    size = torch.ones_like(decrement)
    rounding = torch.finfo(z.dtype).eps * z.shape[1] * before
    for _ in range(_MAX_HALVINGS):
        after = _objective(z + size[:, None] * step_z, sign, w + size[:, None] * step_w)
        too_far = after > before - _ENOUGH * size * decrement + rounding
        if not too_far.any():
            break
        size = torch.where(too_far, size / 2, size)
    return size


def _times(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x · w of every vector: [heads, vectors]."""
    return (x @ w[..., None])[..., 0]


def _summed(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Σ weight · x over the vectors: [heads, head_dim]."""
    return (weights[:, None] @ x)[:, 0]
