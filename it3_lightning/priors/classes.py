"""The prior of classification: class probabilities."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.priors.positions import SeriesLayout, channels_first, laid_out_as
from it3_lightning.priors.prior import Context, Neutral, Prior, finite

OutputKind = Literal["logits", "probabilities"]
Frequencies = Literal["mean", "em"]


class ClassPrior(Prior):
    r"""Class probabilities: one-hot labels, softmax outputs.

    Perturbed: :math:`r \cdot onehot(y) + (1 - r) \cdot onehot(random\ class)`, ``r ~ U(0, 1)``.

    Args:
        num_classes: number of classes ``C``.
        outputs: what the network puts out: ``"logits"`` or ``"probabilities"``.
        neutral: see :class:`Prior`.
        neutral_value: see :class:`Prior`.
        ignore_index: the label that the loss ignores, such as -100: such samples see the neutral
            prior.
        context: ``"batch"``: beside its own prior each sample sees how frequent the classes are in
            its batch, as its first predictions say. The second pass learns how far to trust it;
            train it with ``DualPass(own_share=1.0, unequal_share=0.75)`` on batches about as large
            as those at test time, and with their ``norm_stats``. A sample's second prediction then
            depends on the others of its batch, and so on batch size, order, padding, and the number
            of processes; samples that are not finite have no part in it. Not with
            ``scope="sample"``.
            ``"stream"``: the same along the stream, of its own and those of earlier batches, for
            batches of one or a few samples and ``scope="sample"``: a prediction depends on those
            before it. Each dataloader begins anew; batches that are skipped do not count.
        frequencies: how a context tells them: ``"em"``, by EM in the first predictions (Saerens et
            al., 2002; in a stream earlier samples count as they were adjusted then); ``"mean"``,
            by the mean of the first predictions, which errors draw together.
        layout: ``"BC"``: each sample has one label. ``"BTC"``, ``"BCT"``: each is a sequence of
            labels (tokens), and outputs have their classes last or first. A prior of tokens enters
            where a layer has tokens, too.
        window: how many samples, about, the mean along a stream is made of.

    Shapes:
        targets ``(B,)`` or ``(B, 1)`` indices, or ``(B, C)`` probabilities; outputs ``(B, C)``. Of
        sequences, targets ``(B, T)`` indices, or probabilities in the layout of the outputs.
        Where ``num_classes=2``, floating targets ``(B,)`` and ``(B, 1)`` are probabilities of class
        1, and outputs of those shapes its logits.

    Raises:
        ValueError: fewer than 2 classes, an unknown name, or a target or output that does not fit.

    >>> ClassPrior(3).from_target(torch.tensor([2]))
    tensor([[0., 0., 1.]])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        outputs: OutputKind = "logits",
        neutral: Neutral = "zeros",
        neutral_value: float = -1.0,
        ignore_index: int | None = None,
        context: Context | None = None,
        frequencies: Frequencies = "em",
        layout: SeriesLayout = "BC",
        window: int = 30,
    ) -> None:
        if frequencies not in get_args(Frequencies):
            raise ValueError(f"Expected frequencies 'mean' or 'em', got {frequencies!r}.")
        if layout not in get_args(SeriesLayout) or (context is not None and layout != "BC"):
            raise ValueError(
                "Expected layout 'BC', 'BTC' or 'BCT', and 'BC' with a context, got "
                f"{layout!r} and context={context!r}."
            )
        super().__init__(
            num_classes,
            neutral=neutral,
            neutral_value=neutral_value,
            presence_flag=False,
            context=context,
            window=window,
        )
        self._window, self.frequencies = window, frequencies
        if num_classes < 2:
            raise ValueError(f"Expected at least 2 classes, got {num_classes}.")
        check_outputs(outputs)
        self.outputs: OutputKind = outputs
        self.ignore_index = ignore_index
        self.layout: SeriesLayout = layout
        self.averaged, self.positions = layout == "BC", layout != "BC"

    def from_target(self, target: Tensor) -> Tensor:
        """Return ``(B, C)`` or ``(B, C, T)`` one-hot vectors, or the given probabilities."""
        if self.layout != "BC" and target.ndim != 2:
            return distributions(self._first(target))
        if self.layout != "BC":
            return one_hot(target, self.channels, self.ignore_index)
        if target.ndim == 2 and target.shape[1] == self.channels:
            return distributions(target)
        if not is_single(target):
            raise ValueError(
                f"ClassPrior({self.channels}) expected a target of shape (B,) or "
                f"(B, {self.channels}), got {tuple(target.shape)}. MaskPrior takes maps of "
                "classes; sequences of labels (B, T) need layout='BTC' or 'BCT', as outputs are."
            )
        if self.channels == 2 and target.is_floating_point():
            return both(shares(target.reshape(-1, 1), self.ignore_index))
        return one_hot(target.flatten(), self.channels, self.ignore_index)

    def known(self, target: Tensor) -> Tensor | None:
        """Return which samples, or tokens, have a label that is not ignored; ``None``: all."""
        if self.layout != "BC":
            return counted(target, self.ignore_index) if target.ndim == 2 else None
        return counted(target.flatten(), self.ignore_index) if is_single(target) else None

    def from_output(self, output: Tensor) -> Tensor:
        """Return ``(B, C)`` or ``(B, C, T)`` probabilities."""
        return probabilities(self._first(output), self.channels, self.outputs)

    def check_output(self, prior: Tensor) -> None:
        """Refuse outputs that were said to be probabilities and do not add up to 1."""
        if self.outputs == "probabilities":
            distributions(prior, NOT_LOGITS)

    def mean_output(self, first: Tensor, second: Tensor) -> Tensor:
        """Return outputs, logits or probabilities, of the mean of both probabilities.

        >>> both = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
        >>> ClassPrior(2).mean_output(*both).softmax(1)
        tensor([[0.6250, 0.3750]])
        """
        pair = self._first(first), self._first(second)
        return self._back(mean_outputs(*pair, self.outputs, single=self._single(first)), first)

    def to_output(self, prediction: Tensor, like: Tensor) -> Tensor:
        """Return logits or probabilities, shaped like an output of the network."""
        single, first = self._single(like), self._first(like)
        return self._back(outputs_of(prediction, self.outputs, first, single=single), like)

    def neutral_input(self, batch_size: int, like: Tensor) -> Tensor:
        """Return the neutral prior ``(B, C)``, or ``(B, C, 1)``, which broadcasts over tokens."""
        values = super().neutral_input(batch_size, like)
        return values if self.layout == "BC" else values.unsqueeze(2)

    def perturb(self, prior: Tensor) -> Tensor:
        """Mix each sample with a random class, of each token, by a random share."""
        drawn = (prior.shape[0], *prior.shape[2:])
        other = torch.randint(self.channels, drawn, device=prior.device)
        sizes = (prior.shape[0], *[1] * (prior.ndim - 1))
        share = torch.rand(sizes, device=prior.device, dtype=prior.dtype)
        random = F.one_hot(other, self.channels).movedim(-1, 1).to(prior.dtype)
        return share * prior + (1 - share) * random

    def context_of(self, prior: Tensor) -> Tensor:
        r"""Return how frequent the classes are, ``(1, C)`` or ``(B, C)``.

        By EM, from equal ones: :math:`\pi \leftarrow \bar z`,
        :math:`z_b \propto p_b \circ \pi`, with the mean of :meth:`Prior.context_of`.
        """
        if self.frequencies == "mean":
            return super().context_of(prior)
        rows, counts = finite(prior)
        found = prior.new_full((1, self.channels), 1 / self.channels)
        for _ in range(_ITERATIONS):
            found = self.mean_of(adjusted(rows, found), counts)
        return found

    def context_rows(self, prior: Tensor) -> Tensor:
        """Return the predictions ``(B, C)`` that the context is the mean of."""
        return prior if self.frequencies == "mean" else adjusted(prior, self.context_of(prior))

    def as_context(self, context: Tensor) -> Tensor:
        r"""Return frequencies as :math:`\log \frac{C m + 0.02}{1.02}`, 0 where all are the same.

        Odds are multiplied by ratios of frequencies, so that their logarithms add to logits.
        """
        return (self.channels * context + _RARE).log() - math.log1p(_RARE)

    def weights(self, prior: Tensor) -> Tensor:
        """Return the weights of samples by random weights of their classes."""
        return random_weights(prior)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {"num_classes": self.channels, "outputs": self.outputs}
        context = {"context": self.context, "frequencies": self.frequencies, "window": self._window}
        other = {"ignore_index": self.ignore_index, "layout": self.layout}
        return {**own, **super().init_args(), **other, **context}

    def _single(self, output: Tensor) -> bool:
        """Whether an output is that of class 1 of two classes alone."""
        return self.layout == "BC" and is_single(output)

    def _first(self, values: Tensor) -> Tensor:
        """Return sequences with their classes first, ``(B, C, T)``; all else as it is."""
        if self.layout == "BC":
            return values
        if values.ndim != 3 or values.shape[self.layout.index("C")] != self.channels:
            expected = ", ".join(self.layout).replace("C", str(self.channels))
            raise ValueError(
                f"ClassPrior({self.channels}, layout={self.layout!r}) expected labels (B, T) and "
                f"outputs ({expected}), got {tuple(values.shape)}. Give the layout and the number "
                "of classes that the network puts out."
            )
        return channels_first(values, self.layout)

    def _back(self, values: Tensor, like: Tensor) -> Tensor:
        """Return sequences in the layout of outputs; all else as it is."""
        return values if self.layout == "BC" else laid_out_as(values, self.layout, like)


def one_hot(target: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """Return class indices as one-hot vectors along dimension 1: ``(B, ...) -> (B, C, ...)``.

    Args:
        target: class indices.
        classes: their number ``C``.
        ignore_index: an index of no class; it becomes ``1 / C`` of each.

    Raises:
        ValueError: an index is out of range, or not a whole number.

    >>> one_hot(torch.tensor([1]), 3)
    tensor([[0., 1., 0.]])
    """
    indices = target.long()
    if target.is_floating_point() and not torch.equal(indices.to(target.dtype), target):
        raise ValueError(
            f"Expected whole class indices in 0..{classes - 1}, got fractions in a target of "
            f"shape {tuple(target.shape)}. Give whole numbers, or probabilities of shape (B, C)."
        )
    ignored = torch.zeros_like(indices, dtype=torch.bool)
    if ignore_index is not None:
        ignored = indices == ignore_index
        indices = indices.masked_fill(ignored, 0)
    check_range(indices, 0, classes - 1, f"Set num_classes to the labels' number of classes{_OR}.")
    vectors = F.one_hot(indices, classes).movedim(-1, 1).to(torch.get_default_dtype())
    return vectors.masked_fill(ignored.unsqueeze(1), 1 / classes)


def counted(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Return where labels are not ignored; ``None``: everywhere.

    >>> counted(torch.tensor([1, 255]), 255), counted(torch.tensor([1, 0]), 255)
    (tensor([ True, False]), None)
    """
    if ignore_index is None:
        return None
    found = target != ignore_index
    return None if bool(found.all()) else found


def adjusted(p: Tensor, ratio: Tensor) -> Tensor:
    """Return predictions ``(B, C)`` by Bayes' rule under other class frequencies.

    Args:
        p: predictions.
        ratio: by what the frequency of each class is multiplied, ``(C,)`` or ``(B, C)``.

    >>> adjusted(torch.tensor([[0.5, 0.5]]), torch.tensor([3.0, 1.0]))
    tensor([[0.7500, 0.2500]])
    """
    return F.normalize(p * ratio, p=1, dim=1)


_ITERATIONS = 20  # of EM
_RARE = 0.02  # of the frequency that classes have on average: less is all the same
_CONCENTRATIONS = 0.01, 10.0  # of class frequencies: from a single class to nearly equal ones


def random_weights(prior: Tensor) -> Tensor:
    """Return for each sample the mean weight of its classes, drawn from a Dirichlet distribution.

    Its concentration is drawn too, log-uniformly from 0.01 to 10, so that batches of any kind come
    about as often: of one class, of a few, of all.

    Args:
        prior: shares of classes, ``(B, C, ...)``; of one map, the second of two classes.

    Returns:
        ``(B,)``, positive.

    >>> random_weights(torch.eye(3)[[0, 0, 2]]).unique().numel()
    2
    """
    shares = prior.reshape(*prior.shape[:2], -1).mean(2)
    shares = both(shares) if shares.shape[1] == 1 else shares
    low, high = map(math.log, _CONCENTRATIONS)
    concentration = torch.full_like(shares[0], torch.empty(()).uniform_(low, high).exp().item())
    return shares @ torch.distributions.Dirichlet(concentration).sample() + 1e-6


_OR = ", or ignore_index to the label that the loss ignores"
_BINARY = f"Give a binary mask of 0 and 1, or labels of 0 and 1; or set num_classes{_OR}."


def shares(target: Tensor, ignore_index: int | None = None, advice: str = "") -> Tensor:
    """Return shares of the second of two classes as floating numbers; what is ignored is 1/2.

    Args:
        target: labels or probabilities.
        ignore_index: a label that says nothing.
        advice: what to do, in the error.

    Raises:
        ValueError: one lies outside [0, 1].

    >>> shares(torch.tensor([1, 255]), ignore_index=255)
    tensor([1.0000, 0.5000])
    """
    values = floating(target)
    if ignore_index is not None:
        values = values.masked_fill(target == ignore_index, 0.5)
    if values.numel() and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"Expected labels or probabilities in 0..1, got {values.min():g} to {values.max():g}. "
            f"{advice or _BINARY}"
        )
    return values


_SUM = 1e-2  # how far probabilities in half precision may be from adding up to 1


NOT_LOGITS = "Scores before a softmax or a sigmoid are outputs='logits'. "


def distributions(target: Tensor, advice: str = "") -> Tensor:
    """Return probabilities ``(B, C, ...)`` as floating numbers.

    Args:
        target: probabilities.
        advice: what to do, in the error.

    Raises:
        ValueError: some are negative, or do not add up to 1 over the classes.
    """
    values = floating(target)
    sums = values.sum(1)
    if values.numel() and not (values.min() >= 0 and (sums - 1).abs().max() <= _SUM):
        count, maps = values.shape[1], values.ndim > 2
        other = "they have no prior for maps" if maps else f"LabelsPrior({count}) takes them"
        raise ValueError(
            f"Expected probabilities of {count} classes, which add up to 1, got values from "
            f"{values.min():g} to {values.max():g} with sums from {sums.min():g} to "
            f"{sums.max():g}. {advice}Labels that are independent of each other (multi-label) are "
            f"no distribution over classes: {other}."
        )
    return values


def probabilities(output: Tensor, classes: int, kind: OutputKind) -> Tensor:
    """Return outputs as probabilities ``(B, C, ...)``; a single logit is that of class 1 of two.

    Raises:
        ValueError: the output has another number of channels.

    >>> probabilities(torch.zeros(1), 2, "logits")
    tensor([[0.5000, 0.5000]])
    """
    if classes == 2 and is_single(output):
        one = unrounded(output.reshape(-1, 1))
        return both(one.sigmoid() if kind == "logits" else one)
    if output.ndim < 2 or output.shape[1] != classes:
        raise ValueError(
            f"Expected an output of shape (B, {classes}, ...), got {tuple(output.shape)}. Give the "
            "prior as many classes as the network has outputs."
        )
    values = unrounded(output)
    return values.softmax(dim=1) if kind == "logits" else values


def unrounded(output: Tensor) -> Tensor:
    """Return outputs of half precision as float32, others as they are.

    What is computed of them stays so: rounded again, probabilities would not add up to 1, and
    distances of less than a few thousandths between them would be rounding, even below 0.

    >>> unrounded(torch.zeros(1, dtype=torch.bfloat16)).softmax(0)
    tensor([1.])
    """
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def mean_outputs(first: Tensor, second: Tensor, kind: OutputKind, *, single: bool) -> Tensor:
    r"""Return outputs of the mean of the probabilities of two outputs, in their shape.

    Of logits :math:`z, z'` the logarithm :math:`\log \frac{1}{2}(p + p')`, itself logits of the
    mean, computed without leaving the logarithms.

    Args:
        first: outputs.
        second: outputs of the same shape.
        kind: what they are.
        single: whether an output is that of class 1 of two classes alone.

    >>> first, second = torch.tensor([0.0]), torch.tensor([3.0]).log()
    >>> mean_outputs(first, second, "logits", single=True).sigmoid()
    tensor([0.6250])
    """
    if kind == "probabilities":
        return (first + second) / 2
    if not single:
        return torch.logaddexp(first.log_softmax(1), second.log_softmax(1)) - math.log(2)
    one = torch.logaddexp(F.logsigmoid(first), F.logsigmoid(second))
    other = torch.logaddexp(F.logsigmoid(-first), F.logsigmoid(-second))
    return one - other


def outputs_of(prediction: Tensor, kind: OutputKind, like: Tensor, *, single: bool) -> Tensor:
    r"""Return outputs of given probabilities; as logits :math:`\log p`, finite ones.

    Args:
        prediction: probabilities ``(B, C, ...)``, or ``(B, 1, ...)`` of class 1 alone.
        kind: what outputs are.
        like: an output of the network, for shape and data type.
        single: whether an output is that of class 1 of two classes alone.

    Raises:
        ValueError: there are not as many samples as in ``like``.

    >>> outputs_of(torch.tensor([[0.25, 0.75]]), "logits", torch.zeros(1), single=True).exp()
    tensor([3.])
    """
    if len(prediction) != len(like):
        raise ValueError(
            f"Expected a forward pass on the {len(prediction)} samples that were predicted, got "
            f"one on {len(like)}. Call self(...) once, on the whole batch."
        )
    tiny = torch.finfo(prediction.dtype).tiny
    one = prediction[:, -1:] if single else prediction
    if kind == "logits":
        rest = (1 - one).clamp_min(tiny).log() if single else 0.0
        one = one.clamp_min(tiny).log() - rest
    return one.reshape(like.shape).to(like.dtype)


def floating(target: Tensor) -> Tensor:
    """Return a target as floating numbers; one that has them is returned as it is."""
    return target if target.is_floating_point() else target.to(torch.get_default_dtype())


def is_single(values: Tensor) -> bool:
    """Whether there is one value per sample: ``(B,)`` or ``(B, 1)``."""
    return values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)


def both(one: Tensor) -> Tensor:
    """Return the probabilities of both classes from that of class 1: ``(B, 1) -> (B, 2)``."""
    return torch.cat([1 - one, one], dim=1)


def check_range(values: Tensor, low: int, high: int, advice: str) -> None:
    """Check that all values lie between two bounds.

    Raises:
        ValueError: one does not.
    """
    if values.numel() == 0:
        return
    smallest, largest = values.min().item(), values.max().item()
    if smallest < low or largest > high:
        raise ValueError(
            f"Expected class indices in {low}..{high}, got {smallest:g} to {largest:g}. {advice}"
        )


def check_outputs(kind: str) -> None:
    """Check the name of what a network puts out.

    Raises:
        ValueError: it is unknown.
    """
    if kind not in ("logits", "probabilities"):
        raise ValueError(f"Expected outputs 'logits' or 'probabilities', got {kind!r}.")
