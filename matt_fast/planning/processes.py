"""What several processes take, each of them: memory, and what it sends to the others in a step."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from matt_fast.model.layers import decoder_layers
from matt_fast.planning.simulation import Step, Vocabulary
from matt_fast.training.objectives import layer_passes, trains_output
from matt_fast.training.options import TrainingOptions

BANDWIDTH = 25.0  # GB a second that a process sends, where nobody said: a network of 200 Gbit/s


@dataclass(frozen=True)
class Layout:
    """How several processes share the work, and what that takes.

    Attributes:
        name: "whole", where each process has all layers, or "sharded", where each has a part of every weight.
        step: memory of each process at its peak, and its work.
        rows, layers: bytes that each process sends in a step: ids and gradients of rows, and weights of layers.
        seconds: what that takes at the bandwidth, if nothing else went on meanwhile.
    """

    name: str
    step: Step
    rows: int
    layers: int
    seconds: float

    @property
    def sent(self) -> int:
        return self.rows + self.layers


def layouts(
    run: Callable[[TrainingOptions], Step],
    outline: PreTrainedModel,
    vocabulary: Vocabulary,
    training: TrainingOptions,
    *,
    tokens: int,
    n_layers: int,
    processes: int,
    bandwidth: float,
) -> tuple[Layout, ...]:
    """The layouts that go with the options.

    Counted is what a process sends in the usual algorithms, over a ring: 2(N-1)/N of a tensor whose mean is taken,
    (N-1)/N of one that is gathered.

    Args:
        run: gives the step under some options.
        outline: the model of a step, on the meta device.
        vocabulary: how many rows there are.
        training: see `TrainingOptions`; `shard` is not read.
        tokens: of a batch of each process, on either side.
        n_layers: the target layer, counted from 1.
        processes: that train together, two or more.
        bandwidth: 10⁹ bytes that a process sends in a second.
    """
    names, share = training.objectives(), (processes - 1) / processes
    weight, head = outline.get_input_embeddings().weight, outline.get_output_embeddings()
    each = tokens * training.accumulation
    whole, of_tokens = vocabulary.trainable, min(vocabulary.trainable, each * processes)
    tables = [whole] if trains_output(names) else [of_tokens]  # an output row has a gradient at each step
    tables += [of_tokens] if trains_output(names) and head.weight is not weight else []
    gradients = sum(tables) * weight.shape[1] * 4
    rows = round(share * (2 * gradients + 8 * each * processes))
    passed = decoder_layers(outline)[: None if trains_output(names) else n_layers]
    gathered = sum(x.nbytes for layer in passed for x in layer.parameters())
    layers = round(share * gathered * layer_passes(names) * training.accumulation)
    found = [("whole", False, 0)]
    if training.quantization is None and training.offload is None and not training.compile:
        found.append(("sharded", True, layers))
    return tuple(
        Layout(name, run(replace(training, shard=shard)), rows, more, (rows + more) / (bandwidth * 1e9))
        for name, shard, more in found
    )
