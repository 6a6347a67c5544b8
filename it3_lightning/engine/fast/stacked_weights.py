"""Stacked weights: those of many samples as one tensor each, moved each by its own gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from it3_lightning.engine.fast.grad_sample import Product, squared_norms
from it3_lightning.engine.optimizers import (
    CHUNK,
    HALF,
    OPTIMIZERS,
    Updater,
    full_precision,
    optimizer_factory,
    rounded,
    write_first_step,
)
from it3_lightning.engine.passes import all_finite
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.types import Weights

_ELEMENTWISE = (  # each element moves by its own gradients alone, so stacking changes nothing
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.ASGD,
    optim.Rprop,
)


def optimizer_of_all(settings: Settings, stacked: Iterable[Any]) -> optim.Optimizer:
    """Return the optimizer that one sample would get, for the weights ``(B, *shape)`` of all.

    Args:
        settings: of the adaptation.
        stacked: parameters, the samples in front.

    Raises:
        NotImplementedError: it may mix the weights of different samples.

    >>> import torch
    >>> many = nn.Parameter(torch.ones(2, 3))
    >>> optimizer_of_all(Settings(optimizer="sgd", lr=0.1), [many]).param_groups[0]["lr"]
    0.1
    """
    many, rule = list(stacked), settings.rule
    if rule is not None and rule.length is not None:  # the gradients have the length of the step
        return OPTIMIZERS["sgd"].factory(many, 1.0)
    one = [nn.Parameter(weights.detach()[0]) for weights in many]  # shapes may decide
    optimizer = optimizer_factory(*settings.moves)(one if rule is None else many)
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    known = type(optimizer) in _ELEMENTWISE or (rule is not None and rule.elementwise)
    if not known or hooks:
        raise NotImplementedError(
            f"{type(optimizer).__name__} may mix the samples' weights, as optimizers of one's own "
            "and those with hooks may"
        )
    if rule is not None:
        return optimizer
    all_of = {id(alone): weights for alone, weights in zip(one, many, strict=True)}
    groups = [
        {**group, "params": [all_of[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    kind: Any = type(optimizer)
    made: optim.Optimizer = kind(groups)
    return made


_Made = tuple[Callable[..., Any], Any]


class Compiled:
    """Compiles a function for the first shapes that it is called with; others run as they are.

    Args:
        function: of nested tensors, to nested tensors; it must not look at their values.

    >>> doubled = Compiled(lambda x: {"y": 2 * x})
    >>> doubled.shapes is None
    True
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._made: _Made | None = None
        self.shapes: tuple[Any, ...] | None = None

    def __call__(self, *given: Any) -> Any:
        """Call the function.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        leaves, structure = tree_flatten(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = (structure, *((t.shape, t.dtype, t.device) for t in tensors))
        if self._made is None:
            self._made, self.shapes = self._compile(leaves, structure, tensors), shapes
        if shapes != self.shapes:
            return self._function(*given)
        run, result = self._made
        return tree_unflatten(run(*tensors), result)

    def _compile(self, leaves: list[Any], structure: Any, tensors: list[Tensor]) -> _Made:
        result: Any = None

        def flat(*its: Tensor) -> list[Any]:
            nonlocal result
            rest = iter(its)
            all_leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            values, result = tree_flatten(self._function(*tree_unflatten(all_leaves, structure)))
            return values

        try:
            run = torch.compile(make_fx(flat)(*tensors), dynamic=False)
            run(*tensors)
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise RuntimeError(
                f"compile=True: the adaptation step cannot be compiled here ({cause}). Leave "
                "compile out; the result is the same."
            ) from error
        return run, result


_OWN = 4  # tensors of a weight's size of an optimizer that is not known by name
_TRANSIENT = 2  # of what backward keeps: what it makes of it meanwhile
_LARGE = 1 << 15  # elements of a weight that does not stay in the cache until it is moved


class Stacked:
    """Adapted weights ``(B, *shape)`` of ``B`` samples, their optimizer and anchor.

    Args:
        parameters: the adapting parameters by name, with the source weights in them.
        settings: how to adapt.
        size: ``B``.
        memory: by name, of earlier samples' large weights; what is there is overwritten.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Settings,
        size: int,
        memory: Weights | None = None,
    ) -> None:
        self._memory: Weights = {} if memory is None else memory
        self._early: Weights = {}  # moved before all gradients are known
        self._sums: list[Tensor] = []
        self._products: dict[str, Product] = {}  # gradients of one position, never made whole
        self._settings = settings
        self.size = size
        self.source: Weights = {name: p.detach() for name, p in parameters.items()}
        rule = settings.rule
        self._length = None if rule is None else rule.length
        self._rule = OPTIMIZERS["sgd"] if self._length is not None else rule  # scaled by then
        self._once = settings.single_step
        self._lr = settings.moves[1] if self._length is None else 1.0
        self._updater: Updater | None = None
        self._average: Weights = {}
        self.weights = self.source
        self.dim: int | None = None
        self._moved = torch.zeros(size, dtype=torch.bool)

    @property
    def anchor(self) -> Weights | None:
        """The weights of the second pass; ``None`` where the adapted weights serve themselves."""
        if self._settings.anchor == "live":
            return None
        if not self._average:
            return self.source
        source = self.source
        return {
            name: rounded(a, source[name].dtype, source[name].shape)
            for name, a in self._average.items()
        }

    @property
    def anchor_dim(self) -> int | None:
        """Dimension of samples in the anchor: 0, or ``None`` where all share it."""
        return 0 if self._average else None

    @torch.no_grad()
    def use_up(self, name: str, product: Product) -> bool:
        """Move a large weight by its gradients as they are made, if one step is all there is."""
        weights = self.source[name]
        if not self._once or weights.numel() < _LARGE or weights.device.type != "cpu":
            return False
        if weights.dtype in HALF:  # rounded as a whole
            return False
        if self._length is not None:  # known only after all gradients
            if product.single:
                self._products[name] = product
            return product.single
        moved = self._early[name] = self._room(name)
        rows, source = moved.flatten(2), weights.flatten(1)
        for sample, part, gradient in product.pieces():
            self._write(source[part], gradient, out=rows[sample, part])
        self._sums.append(product.bound())
        return True

    def _room(self, name: str) -> Tensor:
        """Return memory ``(B, *shape)`` for moved weights."""
        weights, out = self.source[name], self._memory.get(name)
        if out is None or len(out) < self.size or out.dtype != weights.dtype:
            out = self._memory[name] = weights.new_empty(self.size, *weights.shape)
        return out[: self.size]

    def forget(self) -> None:
        """Forget what is used up."""
        self._early, self._sums, self._products = {}, [], {}

    @torch.no_grad()
    def step(self, gradients: Weights, active: Tensor, losses: Tensor) -> Tensor:
        """Move the active samples' weights; return ``(B,)`` on the CPU, whose are finite.

        Args:
            gradients: ``(B, *shape)``, of all weights that are not used up yet; overwritten.
            active: ``(B,)`` booleans on the CPU; the other samples' weights stay.
            losses: ``(B,)``, what the gradients are of.
        """
        self._moved |= active
        fresh = (~self._moved).nonzero()[:, 0].tolist()
        still = (self._moved & ~active).nonzero()[:, 0].tolist()
        before = {name: self.weights[name].detach()[still] for name in gradients if still}
        if self._once:
            total = self._move_once(gradients, losses)
        else:
            self._move(self._scaled(gradients, losses))
            total = torch.stack([_by_sample(w) for w in self.weights.values()]).sum(0)
        for name in self.weights if fresh else ():
            self.weights[name].data[fresh] = self.source[name]
        for name, rows in before.items():
            self.weights[name].data[still] = rows
        if self._settings.anchor == "ema" and self._updater is not None:
            self._follow(active)
        finite = total.isfinite().cpu() | ~active
        for row in (~finite).nonzero()[:, 0].tolist():  # or is it only the sum that overflows?
            finite[row] = all(all_finite(w[row]) for w in self.weights.values())
        return finite

    def back_to_source(self, failed: Tensor) -> None:
        """Give samples ``(B,)`` the source weights again."""
        if self.dim is None or not failed.any():
            return
        rows = failed.nonzero()[:, 0].tolist()
        for name, values in self.weights.items():
            values.data[rows] = self.source[name]

    def _move_once(self, gradients: Weights, losses: Tensor) -> Tensor:
        users = Counter(gradient.untyped_storage().data_ptr() for gradient in gradients.values())
        scale = None if self._length is None else -self._scale(gradients, losses)
        moved, sums = dict(self._early), list(self._sums)
        for name, gradient in gradients.items():
            source = self.source[name]
            shared = users[gradient.untyped_storage().data_ptr()] > 1 or 0 in gradient.stride()
            apart = shared or gradient.dtype != source.dtype
            moved[name] = torch.empty_like(gradient, dtype=source.dtype) if apart else gradient
            if scale is None:
                for rows, out in _in_pieces(gradient, moved[name]):
                    self._write(source, rows, out=out)
            elif source.dtype in HALF:
                full = full_precision(gradient)
                full = full_precision(source) + full * _like(scale, full)
                moved[name].copy_(rounded(full, source.dtype, source.shape))
            else:
                torch.addcmul(source, gradient, _like(scale, gradient), out=moved[name])
            sums.append(_by_sample(moved[name]))
        for name, product in self._products.items():
            assert scale is not None
            moved[name] = self._room(name)
            product.add_to(self.source[name], scale, moved[name])
            sums.append(product.bound() * scale)
        self.weights, self.dim = {name: moved[name] for name in self.source}, 0
        return torch.stack(sums).sum(0)

    def _write(self, weights: Tensor, gradients: Tensor, *, out: Tensor) -> None:
        """Write moved weights into ``out``, which may be the gradients, for one or several rows."""
        assert self._rule is not None
        write_first_step(self._rule, weights, gradients, self._lr, out)

    def _move(self, gradients: Weights) -> None:
        """Take a step of the optimizer; parameters without gradients have no influence."""
        if self._updater is None:
            stacked = {
                name: nn.Parameter(_repeated(w, self.size)) for name, w in self.source.items()
            }
            self._updater = Updater(
                list(stacked.values()),
                partial(optimizer_of_all, self._settings),
                None,
                stacked=True,
            )
            self.weights, self.dim = dict(stacked), 0
            if self._settings.anchor == "ema":
                self._average = {
                    name: full_precision(w.detach()).clone() for name, w in stacked.items()
                }
        self._updater.step([gradients.get(name) for name in self.weights])
        self.weights = {name: w.detach() for name, w in self.weights.items()}

    def _scaled(self, gradients: Weights, losses: Tensor) -> Weights:
        """Return gradients as the optimizer is to see them."""
        if self._length is None:
            return self._clipped(gradients)
        scale = self._scale(gradients, losses)
        return {name: full_precision(g) * _like(scale, g) for name, g in gradients.items()}

    def _scale(self, gradients: Weights, losses: Tensor) -> Tensor:
        """Return ``(B,)``, what each sample's gradients are to be multiplied by."""
        assert self._length is not None
        norms = [squared_norms(gradient) for gradient in gradients.values()]
        norms += [product.squares() for product in self._products.values()]
        squares = torch.stack(norms).sum(0)
        own = [w.detach() if self.dim == 0 else w.detach()[None] for w in self.weights.values()]
        weights = torch.stack([squared_norms(w) for w in own], 1).sum(1)
        return self._length(losses.to(squares), squares, weights.sqrt(), self._settings.moves[1])

    def _clipped(self, gradients: Weights) -> Weights:
        clip = self._settings.grad_clip
        if clip is None:
            return gradients
        norm = sum(squared_norms(gradient) for gradient in gradients.values())
        assert isinstance(norm, Tensor)
        scale = (clip / (norm.sqrt() + 1e-6)).clamp(max=1.0)
        return {name: full_precision(g) * _like(scale, g) for name, g in gradients.items()}

    def _follow(self, active: Tensor) -> None:
        """Let the anchors of the active samples follow their weights."""
        assert self._updater is not None
        for average, values in zip(self._average.values(), self._updater.values, strict=True):
            share = (1 - self._settings.ema_decay) * active.to(average)
            average.lerp_(values, _like(share, average))


def _in_pieces(rows: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split rows and what they are written to, so that what is worked on stays in the cache."""
    at_once = CHUNK // 4 if out.dtype in HALF else CHUNK  # those have float32 copies meanwhile
    size = max(1, at_once * len(rows) // max(1, rows.numel()))
    return zip(rows.split(size), out.split(size), strict=True)  # type: ignore[no-untyped-call]


def _repeated(weights: Tensor, size: int) -> Tensor:
    """Return copies ``(B, *shape)``, contiguous: of others, torch.func finds wrong gradients."""
    return weights.expand(size, *weights.shape).clone(memory_format=torch.contiguous_format)


def _by_sample(values: Tensor) -> Tensor:
    """Sum over everything but the samples, in full precision: ``(B, ...) -> (B,)``."""
    dtype = torch.float32 if values.dtype in HALF else None
    return values.reshape(len(values), -1).sum(1, dtype=dtype)


def _like(values: Tensor, other: Tensor) -> Tensor:
    """Shape ``(B,)`` so that it broadcasts over ``(B, ...)``."""
    return values.reshape(-1, *[1] * (other.ndim - 1))


def samples_at_once(settings: Settings, parameters: Iterable[Tensor], activations: int) -> int:
    """Return how many samples the memory of the settings allows.

    Args:
        settings: of the adaptation.
        parameters: that adapt.
        activations: bytes that one sample's passes keep for backward.
    """
    weights, copies = bytes_of_weights(parameters), copies_of_weights(settings)
    return samples_within(settings.memory, weights=weights, activations=activations, copies=copies)


def samples_within(memory: int, *, weights: int, activations: int, copies: int) -> int:
    r"""Return the number of samples, at least one: :math:`\lfloor M / (c\,W + 2A) \rfloor`.

    Args:
        memory: ``M``, bytes that may be used.
        weights: ``W``, bytes of the adapting weights.
        activations: ``A``, bytes that one sample's passes keep for backward.
        copies: ``c``, of the weights that a sample has, see :func:`copies_of_weights`.

    >>> samples_within(1000, weights=100, activations=25, copies=2)
    4
    """
    return max(1, memory // max(1, copies * weights + _TRANSIENT * activations))


def copies_of_weights(settings: Settings) -> int:
    """Return how many copies of the adapting weights a sample has at most.

    A single step needs the gradient, which becomes the weights, and scratch; several need weights,
    gradient, moments, and the weights of samples that stand still; an EMA anchor, clipping and a
    live anchor, whose two passes make a gradient each, need one more.

    >>> copies_of_weights(Settings(lr=1e-4)), copies_of_weights(Settings())  # Adam, Polyak
    (2, 3)
    """
    live, rule = settings.anchor == "live", settings.rule
    if settings.single_step:  # a length is known after the whole gradient only
        return 2 + live + (rule is not None and rule.length is not None)
    moments = _OWN if rule is None else rule.moments
    return 3 + moments + live + (settings.anchor == "ema") + (settings.grad_clip is not None)


def bytes_of_weights(parameters: Iterable[Tensor]) -> int:
    """Return the bytes of adapting weights; those in half precision have a float32 master.

    >>> bytes_of_weights([torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)])
    30
    """
    return sum(p.numel() * (p.element_size() + 4 * (p.dtype in HALF)) for p in parameters)


def bytes_kept(run: Callable[[], Any], module: nn.Module) -> int:
    """Return the bytes that autograd keeps for a backward pass, the module's own tensors aside.

    >>> layer, x = nn.Linear(2, 2), torch.zeros(8, 2)
    >>> bytes_kept(lambda: layer(x).square().sum(), layer)  # x and layer(x), in float32
    128
    """
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, _never):
        result = run()
    del result
    dense = [t for t in kept if t.layout == torch.strided]  # others have no storage of their own
    storages = [tensor.untyped_storage() for tensor in dense]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())


def _never(_: Any) -> Any:
    raise AssertionError("Nothing goes back through passes that are only measured.")
