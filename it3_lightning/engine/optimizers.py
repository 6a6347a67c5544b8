r"""Registry of optimizers, and one step of any of them: closed forms, clipping, float32 masters.

A name is a :class:`Rule` in :data:`OPTIMIZERS`; adding one there is all that a new optimizer needs.

Polyak's rule, the default, makes a step as long as the distance asks for: nothing to move, no step.
The idempotence distance cannot fall below 0, so
:math:`\theta \leftarrow \theta - \eta \frac{L}{\|\nabla L\|^2} \nabla L` lets it fall by its share
:math:`\eta`, to first order (Polyak, Introduction to Optimization, 1987). The step depends neither
on the units of the loss nor on those of the weights, and vanishes with the loss, whereas the first
step of Adam is as long on clean samples as on shifted ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from it3_lightning.utils.messages import unknown

OptimizerName = Literal["adam", "adamw", "sgd", "momentum", "rmsprop", "polyak"]
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]

HALF = (torch.float16, torch.bfloat16)
CHUNK = 1 << 17  # elements worked on at once, so that they stay in the cache

_MOST = 1e-3  # of the weights' norm: where the loss hardly depends on them, the rule overshoots
_TINY = 1e-30
_EPS = 1e-8  # torch's default, of Adam and RMSprop


@dataclass(frozen=True)
class Rule:
    """How a named optimizer moves weights.

    Args:
        factory: ``(parameters, lr) -> Optimizer``; without weight decay.
        first_step: ``(weights, gradients, lr) -> moved``, lists of tensors: its first step, from no
            moments, in closed form, each element by its own gradient; ``None``: there is none.
        moments: tensors of a weight's size that its state and its scratch take at most.
        length: ``(loss, squared norm of the gradients, norm of the weights, lr) -> factor`` of an
            optimizer whose step is this factor times the gradients, and nothing else; the optimizer
            itself has ``needs_loss = True`` and gets the loss as the closure of its step.
        elementwise: whether each element moves by its own gradients alone, so that the weights of
            many samples can be stacked; optimizers of torch are known.
        write: ``(weights, gradients, lr, out)``, the closed form of one tensor, written into
            ``out``, which may be the gradients; asked for where tensors are large.
    """

    factory: Callable[[list[Tensor], float], Optimizer]
    first_step: Callable[[list[Tensor], list[Tensor], float], list[Tensor]] | None = None
    moments: int = 4
    length: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None
    elementwise: bool = False
    write: Callable[[Tensor, Tensor, float, Tensor], object] | None = None


def polyak_length(loss: Tensor, square: Tensor, weights: Tensor, share: float) -> Tensor:
    """Return what gradients are to be multiplied by.

    Args:
        loss: to lower, a scalar, or ``(B,)`` as all others; nothing moves where it is below 0.
        square: squared norm of its gradients.
        weights: norm of the weights.
        share: of the loss, that it is to fall by.

    >>> loss, square = torch.tensor(1.0), torch.tensor(4.0)
    >>> polyak_length(loss, square, torch.tensor(1000.0), 0.5)
    tensor(0.1250)
    """
    step = share * loss.clamp_min(0) / (square + _TINY)
    return torch.minimum(step, _MOST * weights / (square.sqrt() + _TINY))


class Polyak(Optimizer):
    """Moves parameters by Polyak's rule, no further than a thousandth of their norm.

    Args:
        params: to move.
        lr: share of the loss that a step is to take away, to first order.

    >>> w = torch.nn.Parameter(torch.full((1,), 1000.0))
    >>> w.grad = torch.full((1,), 2.0)  # of a loss of 1
    >>> Polyak([w], lr=0.5).step(lambda: torch.tensor(1.0))
    >>> w.item()
    999.75
    """

    needs_loss = True  # handed over as the closure of a step

    def __init__(self, params: Iterable[Any], lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """Take a step.

        Args:
            closure: returns the loss whose gradients the parameters have.
        """
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if not moving:
                continue
            gradients = [p.grad for p in moving]
            square = torch.nn.utils.get_total_norm(gradients).square()
            weights = torch.nn.utils.get_total_norm(group["params"])
            loss = closure().to(square)
            scale = polyak_length(loss, square, weights, group["lr"])
            steps = [gradient * scale.to(gradient.device) for gradient in gradients]
            torch._foreach_sub_(moving, steps)


def _fused(kind: Any, parameters: list[Tensor], lr: float, **settings: Any) -> Optimizer:
    """Make an optimizer in its fastest form, fused where torch has it."""
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    made: Optimizer = kind(parameters, lr=lr, fused=fused, **settings)
    return made


def _sgd_step(weights: list[Tensor], gradients: list[Tensor], lr: float) -> list[Tensor]:
    """Return ``w - lr g``."""
    return list(torch._foreach_add(weights, gradients, alpha=-lr))


def _signed_step(
    share: float, weights: list[Tensor], gradients: list[Tensor], lr: float
) -> list[Tensor]:
    """Return ``w - lr g / (share |g| + eps)``, the first step of Adam (1) and RMSprop (0.1)."""
    sizes = list(torch._foreach_abs(gradients))
    if share != 1:
        torch._foreach_mul_(sizes, share)
    torch._foreach_add_(sizes, _EPS)
    return list(torch._foreach_addcdiv(weights, gradients, sizes, value=-lr))


def _write_sgd(weights: Tensor, gradients: Tensor, lr: float, out: Tensor) -> None:
    torch.add(weights, gradients, alpha=-lr, out=out)


def _write_signed(share: float, weights: Tensor, gradients: Tensor, lr: float, out: Tensor) -> None:
    size = gradients.abs()
    if share != 1:
        size.mul_(share)
    torch.addcdiv(weights, gradients, size.add_(_EPS), value=-lr, out=out)


_ADAM = Rule(  # AdamW without decay is Adam
    partial(_fused, optim.AdamW, weight_decay=0.0),
    partial(_signed_step, 1.0),
    2,
    write=partial(_write_signed, 1.0),
)

OPTIMIZERS: dict[str, Rule] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "sgd": Rule(partial(_fused, optim.SGD), _sgd_step, 0, write=_write_sgd),
    "momentum": Rule(partial(_fused, optim.SGD, momentum=0.9), _sgd_step, 1, write=_write_sgd),
    "rmsprop": Rule(
        lambda parameters, lr: optim.RMSprop(parameters, lr=lr, foreach=True),
        partial(_signed_step, 0.1),  # sqrt(1 - 0.99)
        2,
        write=partial(_write_signed, 0.1),
    ),
    "polyak": Rule(Polyak, moments=1, length=polyak_length),
}
"""Optimizers by name; add your own :class:`Rule` before you make settings with its name.

>>> OPTIMIZERS["sgd"].factory([nn.Parameter(torch.ones(1))], 0.1).param_groups[0]["lr"]
0.1
"""


def rule_of(optimizer: str | OptimizerFactory) -> Rule | None:
    """Return the rule of a named optimizer, ``None`` of a callable.

    Raises:
        ValueError: the name is unknown.
    """
    if callable(optimizer):
        return None
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", optimizer, OPTIMIZERS))
    return OPTIMIZERS[optimizer]


def optimizer_factory(optimizer: str | OptimizerFactory, lr: float) -> OptimizerFactory:
    """Return a function that makes the optimizer for given parameters.

    Args:
        optimizer: a name (no weight decay, whatever torch's default), or a callable such as
            ``lambda p: torch.optim.SGD(p, lr=1e-3)``, whose own learning rate counts.
        lr: learning rate of a named optimizer; of ``"polyak"``, the share of the loss that a step
            is to take away.

    Raises:
        ValueError: the name is unknown or ``lr`` is negative.

    >>> optimizer_factory("sgd", 0.1)([nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
    0.1
    """
    if callable(optimizer):
        return optimizer
    rule = rule_of(optimizer)
    assert rule is not None
    if lr < 0:
        raise ValueError(f"Expected lr >= 0, got {lr}.")
    return lambda parameters: rule.factory(list(parameters), lr)


_SCALES = (2.0**16, 2.0**8, 1.0)


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a loss by the names of the parameters that it depends on.

    In float16 the loss is scaled, see :func:`scaled_gradients`.

    >>> w = nn.Parameter(torch.ones(1))
    >>> gradients_of(2 * w.sum(), {"w": w, "unused": nn.Parameter(torch.ones(1))})
    {'w': tensor([2.])}
    """
    given = list(parameters.values())
    in_float16 = _in_float16(given)

    def find(scale: float) -> dict[str, Tensor]:
        scaled = loss.float() * scale if in_float16 else loss
        found = torch.autograd.grad(scaled, given, allow_unused=True, retain_graph=in_float16)
        return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}

    if not in_float16:
        return find(1.0)
    one = scaled_gradients(lambda scale: {n: g[None] for n, g in find(scale).items()})
    return {name: gradient[0] for name, gradient in one.items()}


def scaled_gradients(find: Callable[[float], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the gradients ``(B, *shape)`` of the losses of ``B`` samples in float16, as float32.

    What a mean over samples and positions divides falls below the smallest number there. So losses
    are scaled, as in training, each as far as no gradient of its sample overflows by it.

    Args:
        find: returns the gradients of the losses times a number.

    >>> losses = torch.tensor([1e-9, 1.0, 1e4])  # each as its own gradient
    >>> found = scaled_gradients(lambda scale: {"w": (losses * scale).half()})["w"]
    >>> [f"{gradient:.2g}" for gradient in found.tolist()]
    ['1e-09', '1', '1e+04']
    """
    gradients: dict[str, Tensor] = {}
    overflown: Tensor | None = None
    for scale in _SCALES:
        scaled = {n: full_precision(g) / scale for n, g in find(scale).items()}
        for name, gradient in scaled.items():
            if overflown is None:
                gradients[name] = gradient
            else:
                rows = overflown.to(gradient.device)
                gradients[name][rows] = gradient[rows]
        finite = [g[..., None].isfinite().flatten(1).all(1).cpu() for g in gradients.values()]
        overflown = ~torch.stack(finite).all(0) if finite else torch.zeros(0, dtype=torch.bool)
        if not overflown.any():
            break
    return gradients


def _in_float16(parameters: Sequence[Tensor]) -> bool:
    kind = parameters[0].device.type
    mixed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return mixed or any(parameter.dtype == torch.float16 for parameter in parameters)


def write_first_step(
    rule: Rule, weights: Tensor, gradients: Tensor, lr: float, out: Tensor
) -> None:
    """Write weights after the first step of a rule into ``out``, which may be the gradients."""
    if rule.write is not None and out.dtype not in HALF:
        rule.write(weights, gradients, lr, out)
        return
    assert rule.first_step is not None
    given = [full_precision(weights)], [full_precision(gradients)]
    out.copy_(rounded(rule.first_step(*given, lr)[0], out.dtype, weights.shape))


class OnlyStep:
    """A step from no moments, where no other follows: neither a copy nor an optimizer is made.

    On the CPU moved weights are kept in memory that the next step overwrites, and are written piece
    by piece, in the cache.

    Args:
        rule: with a closed form of its first step, or with a length.
        lr: learning rate.

    >>> w = nn.Parameter(torch.ones(1))
    >>> OnlyStep(OPTIMIZERS["sgd"], 0.5).backward(w.sum(), {"w": w})
    ({'w': tensor([0.5000])}, tensor(0.5000))
    """

    def __init__(self, rule: Rule, lr: float) -> None:
        self._rule = rule
        self._lr = lr
        self._memory: dict[str, Tensor] = {}

    def backward(
        self, loss: Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Go back from the loss; return the moved weights of the parameters that it depends on.

        Returns:
            The weights by name, and a sum over them, which is finite if they are.
        """
        gradients = gradients_of(loss, parameters)
        return self._moved(loss, parameters, gradients) if gradients else ({}, loss)

    @torch.no_grad()
    def _moved(
        self, loss: Tensor, source: Mapping[str, Tensor], gradients: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the weights moved by gradients, which are used up, and a sum over them."""
        if self._rule.first_step is None:
            moved = self._by_length(source, gradients, loss)
            return moved, norm_of([*moved.values()])
        sums: list[Tensor] = []
        moved = {
            name: self._in_pieces(name, source[name], gradients.pop(name), sums)
            for name in [name for name, gradient in gradients.items() if _is_large(gradient)]
        }
        if gradients:
            rest = [source[name] for name in gradients]
            stepped = self._at_once(rest, list(gradients.values()), sums)
            moved |= zip(gradients, stepped, strict=True)
        sums = [each.to(sums[0].device) for each in sums]
        return {n: moved[n] for n in source if n in moved}, torch.stack(sums).sum()

    def _at_once(
        self, source: list[Tensor], gradients: list[Tensor], sums: list[Tensor]
    ) -> Sequence[Tensor]:
        """Return moved weights; small ones of one kind in a row, so that a call moves them all."""
        assert self._rule.first_step is not None
        weights, full = list(map(full_precision, source)), list(map(full_precision, gradients))
        if not _in_a_row(source):
            stepped = self._rule.first_step(weights, full, self._lr)
            moved = [rounded(m, w.dtype) for m, w in zip(stepped, source, strict=True)]
            sums.append(norm_of(moved))
            return moved
        row = [_flat(weights)], [_flat(full)]
        (one,) = self._rule.first_step(*row, self._lr)
        sums.append(one.sum())
        parts: Sequence[Tensor] = torch._C._nn.unflatten_dense_tensors(one, weights)
        return parts

    def _in_pieces(
        self, name: str, weights: Tensor, gradient: Tensor, sums: list[Tensor]
    ) -> Tensor:
        """Write moved weights piece by piece, so that what is worked on stays in the cache."""
        out = self._memory.get(name)
        if out is None or (out.dtype, out.stride()) != (weights.dtype, weights.stride()):
            out = self._memory[name] = torch.empty_like(weights)
        for weight, part, into in _pieces(weights, gradient, out):
            write_first_step(self._rule, weight, part, self._lr, into)
            sums.append(into.sum())
        return out

    def _by_length(
        self, source: Mapping[str, Tensor], gradients: dict[str, Tensor], loss: Tensor
    ) -> dict[str, Tensor]:
        """Return weights moved by gradients of a length that depends on every weight's norm.

        The gradients become the weights, so that no other memory is needed.
        """
        assert self._rule.length is not None
        full = [full_precision(gradient) for gradient in gradients.values()]
        norm = norm_of(full)
        size = norm_of([full_precision(w) for w in source.values()]).to(norm)
        factor = -self._rule.length(loss.to(norm), norm.square(), size, self._lr)
        memory = [gradient.untyped_storage().data_ptr() for gradient in full]
        users = Counter(memory)
        moved = {}
        for name, gradient, pointer in zip(gradients, full, memory, strict=True):
            shared = users[pointer] > 1 or 0 in gradient.stride()
            own = gradient.clone(memory_format=torch.contiguous_format) if shared else gradient
            stepped = own.mul_(factor.to(own.device)).add_(full_precision(source[name]))
            moved[name] = rounded(stepped, source[name].dtype)
        return moved


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors together, on the device of the first.

    >>> norm_of([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    norms = torch._foreach_norm(list(tensors))
    found: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return found


def _in_a_row(weights: list[Tensor]) -> bool:
    """Whether tensors on the CPU can be laid one behind the other, and keep their layout."""
    kind = weights[0].dtype
    fits = kind not in HALF and weights[0].device.type == "cpu"
    return fits and all(
        w.dtype == kind and w.device.type == "cpu" and w.is_contiguous() for w in weights
    )


def _flat(tensors: list[Tensor]) -> Tensor:
    """Return all elements in a row."""
    flat: Tensor = torch._C._nn.flatten_dense_tensors(tensors)
    return flat


def _is_large(gradient: Tensor) -> bool:
    """Whether a tensor moves by itself, into memory that is kept."""
    plain = gradient.layout == torch.strided and gradient.dtype not in HALF
    return plain and gradient.device.type == "cpu" and gradient.numel() >= CHUNK // 8


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of large tensors of one shape that lie in memory alike; else the whole."""
    first = tensors[0]
    if first.numel() <= 4 * CHUNK:  # the parts would cost more than they save
        yield tensors
        return
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    flat = [tensor.permute(order) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in flat):
        yield tensors
        return
    parts: list[tuple[Tensor, ...]] = [tensor.view(-1).split(CHUNK) for tensor in flat]  # type: ignore[no-untyped-call]
    yield from zip(*parts, strict=True)


def full_precision(tensor: Tensor) -> Tensor:
    """Return a float32 copy of a half-precision tensor, any other tensor itself.

    Sparse ones, as the gradients of some embeddings are, are made dense.
    """
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.float() if tensor.dtype in HALF else tensor


_BITS = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}  # of the mantissa; smallest exponent
_GOLDEN = -1640531527  # 2^32 / golden ratio: its multiples, in 32 bits, lie evenly there


def rounded(values: Tensor, dtype: torch.dtype, shape: torch.Size | None = None) -> Tensor:
    r"""Return moved weights in a data type; in half precision their movement outlives the rounding.

    The source lies on the grid of half precision, so that steps of less than half a unit of it
    would all be rounded away, where weights in float32 under autocast move in their share. So each
    weight is rounded at a threshold of its own, spread evenly over the weights:
    :math:`\lfloor w / u + t_i \rfloor u`, with :math:`t_i` in (0, 1) a multiple of the golden
    ratio. On the mean the movement is what it was; nothing is drawn, and what lies on the grid
    stays there.

    Args:
        values: in full precision, ``shape`` or ``(B, *shape)``.
        dtype: of the weights.
        shape: of one sample's weights; default: that of the values.

    >>> moved = torch.full((1000,), 1 + 2**-7 / 4)  # a quarter of the way to the next bfloat16
    >>> moved.bfloat16().mean().item()
    1.0
    >>> round((rounded(moved, torch.bfloat16).float().mean().item() - 1) * 2**7, 2)
    0.25
    """
    if dtype not in HALF or values.dtype in HALF:
        return values.to(dtype)
    count = (values.shape if shape is None else shape).numel()
    out = values.new_empty(values.shape, dtype=dtype)
    if not count:
        return out
    rows, into = values.reshape(-1, count), out.view(-1, count)
    at_once = CHUNK // 8 if values.device.type == "cpu" else 2**24
    piece = max(1, at_once // max(1, len(rows)))
    for start in range(0, count, piece):
        part = slice(start, min(start + piece, count))
        into[:, part] = _rounded(rows[:, part], dtype, start + 1)
    return out


def _rounded(values: Tensor, dtype: torch.dtype, first: int) -> Tensor:
    """Round values ``(B, N)`` of weights with these numbers on."""
    bits, least = _BITS[dtype]
    number = torch.arange(first, first + values.shape[1], device=values.device, dtype=torch.int32)
    share = number.mul_(_GOLDEN).to(values.dtype).mul_((1 - 2**-20) / 2**32)  # within half a unit
    exponent = (torch.frexp(values).exponent - bits).clamp_min_(least)
    offset = torch.ldexp(torch.ones_like(values), exponent).mul_(share)
    nearest = values.to(dtype)
    on_grid = nearest.to(values.dtype) == values
    return torch.where(on_grid, nearest, offset.add_(values).to(dtype))


class Updater:
    """Moves parameters by an optimizer of its own.

    Half-precision parameters are moved through float32 masters: a step of 5e-6 would otherwise be
    lost in their rounding.

    Args:
        parameters: to move.
        factory: makes the optimizer.
        clip: largest total gradient norm, or ``None``.
        stacked: whether these are weights ``(B, *shape)`` of many samples.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        factory: OptimizerFactory,
        clip: float | None,
        *,
        stacked: bool = False,
    ) -> None:
        self._shapes = [p.shape[1:] if stacked else p.shape for p in parameters]
        self._parameters = parameters
        self._masters = [_master(p) for p in parameters]
        self.optimizer = factory(self._masters)
        self._needs_loss = getattr(self.optimizer, "needs_loss", False)
        self._clip = clip

    @property
    def values(self) -> list[Tensor]:
        """The present values in full precision."""
        return [master.detach() for master in self._masters]

    def step(self, gradients: Sequence[Tensor | None], loss: Tensor | None = None) -> None:
        """Apply one step to the parameters; ``loss`` is what the gradients are of."""
        full = [None if g is None else full_precision(g) for g in gradients]
        if self._clip is not None:  # not in place: gradients may share memory
            norm = torch.nn.utils.get_total_norm([g for g in full if g is not None])
            scale = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            full = [None if g is None else g * scale.to(g.device) for g in full]
        for master, gradient in zip(self._masters, full, strict=True):
            master.grad = None if gradient is None else _laid_out(gradient, master)
        if self._needs_loss:
            assert loss is not None
            self.optimizer.step(loss.detach)  # type: ignore[arg-type]
        else:
            self.optimizer.step()
        self._write()

    def assign(self, values: Sequence[Tensor | None]) -> None:
        """Give the parameters other values; ``None``: they stay.

        Elements that are given what they are keep what lies beneath their rounding.
        """
        for parameter, master, value in zip(self._parameters, self._masters, values, strict=True):
            if value is not None and master is not parameter:
                master.data.copy_(torch.where(value == parameter, master, value))
            elif value is not None:
                master.data.copy_(value)
        self._write()

    def pull(self, towards: Sequence[Tensor], share: float) -> None:
        """Move the parameters by a share of their way towards other values."""
        values = [full_precision(value) for value in towards]
        torch._foreach_lerp_([master.data for master in self._masters], values, share)
        self._write()

    def _write(self) -> None:
        """Write masters into their parameters, rounded."""
        pairs = zip(self._parameters, self._masters, self._shapes, strict=True)
        for parameter, master, shape in pairs:
            master.grad = None
            if master is not parameter:
                parameter.data.copy_(rounded(master.data, parameter.dtype, shape))

    def state(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Return a copy of the optimizer's state and of the masters, for :meth:`load`."""
        optimizer: dict[str, Any] = _cloned(self.optimizer.state_dict())
        return optimizer, [value.clone() for value in self._own()]

    def load(self, state: tuple[dict[str, Any], list[Tensor]]) -> None:
        """Go back to a state; parameters that have no master are put back by their owner."""
        optimizer, masters = state
        self.optimizer.load_state_dict(optimizer)
        for master, value in zip(self._own(), masters, strict=True):
            master.copy_(value)

    def _own(self) -> list[Tensor]:
        """Return the masters that are not the parameters themselves."""
        pairs = zip(self._parameters, self._masters, strict=True)
        return [master.data for parameter, master in pairs if master is not parameter]


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float()) if parameter.dtype in HALF else parameter


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient that lies in memory as its parameter does: fused optimizers rely on it."""
    if gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like, requires_grad=False).copy_(gradient)


def _cloned(value: Any) -> Any:
    """Copy nested state: tensors are cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cloned(item) for item in value]
    return value
