"""The method in plain torch, deliberately naive: deepcopy, backward, torch.optim.

``y0 = f(x, None)`` is the first prediction, ``y1 = F(x, to_label(y0))`` the second.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Distance: TypeAlias = Literal["l2", "l1", "js", "kl", "cross_entropy"]
Reset: TypeAlias = Literal["batch", "weights", "never"] | int
Predict: TypeAlias = Callable[[nn.Module, Any, Tensor | None], Tensor]
Weights: TypeAlias = dict[str, Tensor]

EPS = 1e-12


class Polyak(torch.optim.Optimizer):
    """Takes theta <- theta - min(lr L / |g|^2, |theta| / (1000 |g|)) g, norms over all weights."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """Take a step; the closure returns the loss L."""
        (group,) = self.param_groups
        moving = [p for p in group["params"] if p.grad is not None]
        square = sum(float(p.grad.square().sum()) for p in moving)
        norm = sum(float(p.detach().square().sum()) for p in group["params"]) ** 0.5
        scale = min(group["lr"] * float(closure().detach()) / square, norm / square**0.5 / 1000)
        for p in moving:
            p.data -= scale * p.grad


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0),
    "rmsprop": torch.optim.RMSprop,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "polyak": Polyak,
}


def _log(p: Tensor) -> Tensor:
    """Take the logarithm of `p`, any shape, clamped at `EPS`."""
    return p.clamp(min=EPS).log()


def distance(name: Distance, p: Tensor, q: Tensor) -> Tensor:
    """Measure d(p, q) of two `(B, C, ...)` tensors, in nats where they are distributions: `(B,)`.

    All sum over dim 1 and average over what remains.
    """
    if name == "js":
        m = (p + q) / 2
        return 0.5 * distance("kl", p, m) + 0.5 * distance("kl", q, m)
    if name == "l2":
        terms = (p - q) ** 2
    elif name == "l1":
        terms = (p - q).abs()
    elif name == "kl":
        terms = p * (_log(p) - _log(q))
    elif name == "cross_entropy":
        terms = -q * _log(p)
    else:
        raise ValueError(f"expected the name of a distance, got {name!r}")
    return terms.sum(1).reshape(p.shape[0], -1).mean(1)


measure = distance  # for `adapt_stream`, whose own `distance` is a name


def reliable(p0: Tensor, p1: Tensor, confidence: float = 0.6) -> Tensor:
    """Say where argmax p0 = argmax p1 and max p0 > confidence, `(B, C)` in, `(B,)` bool out."""
    return (p0.argmax(1) == p1.argmax(1)) & (p0.max(1).values > confidence)


def _mean_over(values: Tensor, keep: Tensor) -> Tensor:
    """Average `values` `(B,)` where `keep` `(B,)` is true; exactly 0 where it never is."""
    return values[keep].mean() if keep.any() else values[keep].sum()


def _balance(p0: Tensor) -> Tensor:
    """Compute sum_k m_k log m_k, m the mean of all samples of `p0` `(B, C)`: a scalar."""
    m = p0.mean(0)
    return (m * _log(m)).sum()


def objective(
    p0: Tensor,
    p1: Tensor,
    name: Distance,
    filtered: bool,
    balance: float,
    confidence: float = 0.6,
    sharpen: float = 0.0,
) -> Tensor:
    """Average d(p0, p1), and any entropy, over the (reliable) samples; add the balance term."""
    d = distance(name, p0, p1)
    if filtered and sharpen:
        d = d - sharpen * (p0 * _log(p0)).sum(1)
    loss = _mean_over(d, reliable(p0, p1, confidence)) if filtered else d.mean()
    return loss + balance * _balance(p0) if balance else loss


def entropy_objective(p0: Tensor, confidence: float | None, balance: float) -> Tensor:
    """Average the entropy of the (confident) samples of `p0` `(B, C)`, add balance: a scalar."""
    entropy = -(p0 * _log(p0)).sum(1)
    confident = p0.max(1).values > (-1 if confidence is None else confidence)
    loss = _mean_over(entropy, confident)
    return loss + balance * _balance(p0) if balance else loss


@dataclass(frozen=True)
class Record:
    """What one batch came to; all tensors detached."""

    y0: Tensor  # (B, ...) outputs of the source model
    outputs: Tensor  # (B, ...) outputs after the last step
    distance_source: Tensor  # (B,) with the source in both passes
    distance_before: Tensor  # (B,) with the weights the batch starts from
    distance_after: Tensor  # (B,) with the final weights and the then-current anchor
    weights: Weights  # every parameter of the model after the last step
    anchor: Weights  # every parameter of the anchor after the last step


def _source(model: nn.Module, norm_stats: Literal["source", "batch"]) -> nn.Module:
    """Copy `model` in eval mode; "batch": without running statistics BatchNorm uses the batch's."""
    source = copy.deepcopy(model).eval().requires_grad_(False)
    for module in source.modules():
        if norm_stats == "batch" and isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None
    return source


def _weights(model: nn.Module) -> Weights:
    """Copy every parameter of `model`, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _follow(anchor: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the anchor, a <- decay a + (1 - decay) theta, in the weights that train in `net`."""
    with torch.no_grad():
        for a, theta in zip(anchor.parameters(), net.parameters(), strict=True):
            if theta.requires_grad:
                a.copy_(decay * a + (1 - decay) * theta)


def adapt_stream(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    predict: Predict,
    to_label: Callable[[Tensor], Tensor],
    lr: float,
    steps: int = 1,
    optimizer: str = "sgd",
    distance: Distance = "l2",
    filtered: bool = False,
    confidence: float = 0.6,
    balance: float = 0.0,
    sharpen: float = 0.0,
    anchor: Literal["frozen", "ema", "live"] = "frozen",
    ema_decay: float = 0.99,
    reset: Reset = "batch",
    parameters: Callable[[str], bool] = lambda _: True,
    norm_stats: Literal["source", "batch"] = "source",
    grad_clip: float | None = None,
) -> list[Record]:
    """Adapt a copy of `model` to each batch `(B, ...)` in turn: one record a batch."""

    def pair(net: nn.Module, second: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        p0 = to_label(predict(net, x, None))
        return p0, to_label(predict(second, x, p0))

    source = _source(model, norm_stats)
    records = []
    for index, x in enumerate(batches):
        if index == 0 or reset == "batch" or (isinstance(reset, int) and index % reset == 0):
            net = copy.deepcopy(source)
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(parameters(name))
            selected = [p for p in net.parameters() if p.requires_grad]
            second = net if anchor == "live" else copy.deepcopy(source)
            opt = OPTIMIZERS[optimizer](selected, lr=lr)
        elif reset == "weights":  # and the optimizer goes on
            with torch.no_grad():
                for mine, first in zip(net.parameters(), source.parameters(), strict=True):
                    mine.copy_(first)
        before = measure(distance, *pair(net, second, x)).detach()
        for _ in range(steps):
            p0, p1 = pair(net, second, x)
            if filtered and balance == 0 and not reliable(p0, p1, confidence).any():
                continue
            opt.zero_grad()
            loss = objective(p0, p1, distance, filtered, balance, confidence, sharpen)
            torch.autograd.backward(loss)  # loss.backward(), which torch leaves untyped
            if grad_clip is not None:
                nn.utils.clip_grad_norm_(selected, grad_clip)
            opt.step(lambda loss=loss: loss)  # type: ignore[misc]
            if anchor == "ema":
                _follow(second, net, ema_decay)
        after = measure(distance, *pair(net, second, x)).detach()
        y0, outputs = predict(source, x, None).detach(), predict(net, x, None).detach()
        zero = measure(distance, *pair(source, source, x)).detach()
        records.append(Record(y0, outputs, zero, before, after, _weights(net), _weights(second)))
    return records


class ToyNet(nn.Module):
    """A tiny conditioned net on images `(B, 1, 4, 4)`; the prior is `(B, classes)` or None."""

    def __init__(self, classes: int = 3, hidden: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, kernel_size=3)
        self.bn = nn.BatchNorm2d(2)
        self.dense = nn.Linear(2 * 2 * 2, hidden)
        self.embed = nn.Linear(classes, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        """Map images `(B, 1, 4, 4)` to logits `(B, classes)`."""
        features: Tensor = self.dense(self.bn(self.conv(x)).relu().flatten(1))
        if prior is not None:
            features = features + self.embed(prior)
        logits: Tensor = self.head(features.relu())
        return logits


def forward_predict(model: nn.Module, x: Tensor, prior: Tensor | None) -> Tensor:
    """Call a model whose forward takes the prior as its second argument: `(B, ...)`."""
    outputs: Tensor = model(x, prior)
    return outputs


def softmax_label(outputs: Tensor) -> Tensor:
    """Turn logits `(B, C, ...)` into distributions over dim 1."""
    return outputs.softmax(1)
