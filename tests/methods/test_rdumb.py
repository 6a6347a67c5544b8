"""RDumb against its published code in plain torch: ETA, and a reset every so many batches.

The published code (github.com/oripress/CCC) agrees, but for its predictions, those before the step.
torch-ttt 0.0.2 has no RDumb.
"""

import math
from typing import Any

import pytest
import torch
from helpers.method_runs import batches, from_yaml
from helpers.online import (
    LR,
    adapter_of,
    assert_close,
    entropies,
    network,
    of_batches,
    outputs_of,
    plain_module,
    predicted,
    run,
)
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning import EATA, RDumb, TestTimeCallback

EPSILON = 0.9
MARGIN = 0.8


def by_hand(source: nn.Module, stream: list[Tensor], every: int) -> list[Tensor]:
    """RDumb as published, with ``d_margin`` for few classes; outputs are those after the step."""
    e_margin, outputs = MARGIN * math.log(3), []
    for total_steps, x in enumerate(stream):
        if total_steps % every == 0:
            net, weights = of_batches(source)
            optimizer = torch.optim.SGD(weights, lr=LR, momentum=0.9)
            mean: Tensor | None = None
        logits = net(x)
        entropy, p = entropies(logits), logits.softmax(1).detach()
        kept = entropy < e_margin
        if mean is not None:
            kept = kept & (F.cosine_similarity(mean[None], p, dim=1).abs() < EPSILON)
        if kept.any():
            chosen = entropy[kept]
            optimizer.zero_grad()
            torch.autograd.backward((chosen / (chosen.detach() - e_margin).exp()).mean())
            optimizer.step()
            new = p[kept].mean(0)
            mean = new if mean is None else 0.9 * mean + (1 - 0.9) * new
        outputs.append(net(x).detach())
    return outputs


@pytest.mark.parametrize("every", [2, 3, 1000])
def test_a_stream_is_adapted_to_as_published_and_begins_anew(every: int) -> None:
    stream, net = batches(7), network()
    method = RDumb(margin=MARGIN, epsilon=EPSILON)
    expected = by_hand(net, stream, every)
    assert_close(outputs_of(method, net, stream, reset=every), expected)
    assert not torch.equal(expected[-1], by_hand(net, stream, 4)[-1])


def test_an_untouched_module_adapts_as_published_and_is_left_as_it_was() -> None:
    stream, module = batches(), plain_module()
    callback = TestTimeCallback(RDumb(margin=MARGIN, epsilon=EPSILON), lr=LR, reset=2)
    assert_close(predicted(callback, module, stream), by_hand(module.net, stream, 2))


def test_its_papers_settings_are_its_defaults() -> None:
    method: Any = RDumb()
    assert method.margin * math.log(1000) == pytest.approx(math.log(1000) / 2 - 1)
    assert (method.epsilon, method.fisher_weight, method.needs_source) == (0.05, 0.0, False)
    settings = TestTimeCallback(method).settings
    assert settings.moves == ("momentum", 2.5e-4)
    assert (settings.parameters, settings.norm_stats, settings.reset) == ("norm", "batch", 1000)
    assert EATA.defaults["reset"] == "never"


def test_a_configuration_names_it() -> None:
    method = from_yaml("RDumb", epsilon=0.4)
    assert (type(method), method.epsilon, method.needs_source) == (RDumb, 0.4, False)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="margin > 0"):
        RDumb(margin=-1)
    net = nn.Conv2d(1, 3, 1).double()
    with pytest.raises(ValueError, match=r"needs one class vector .* got maps"):
        run(adapter_of(RDumb(), net, parameters="all"), net, batches(1))
