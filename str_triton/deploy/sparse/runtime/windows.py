"""The window of each convolution and pool, and the phases in which it writes its image."""

import math
from collections import defaultdict
from collections.abc import Callable, Container, Mapping

from str_triton.deploy.sparse.graph.nodes import Call, Convolution, Graph, Pair
from str_triton.deploy.sparse.graph.pools import AvgPool, MaxPool, Mean
from str_triton.deploy.sparse.graph.quantized import Quantize, QuantizedGate
from str_triton.deploy.sparse.runtime.layout import PIXEL, PLAIN, Window
from str_triton.deploy.sparse.runtime.trial import Trial

# A layer that writes phases itself: the pixels of a row of a phase at least, and the taps of all phases at most.
LEAST_COLUMNS, MOST_TAPS = 24, 2**15


def windows(
    graph: Graph,
    written: Container[str],
    pads: Mapping[str, tuple[str, Pair]],
    trial: Trial,
    needs_copy: Callable[[Convolution | MaxPool | AvgPool], bool],
) -> dict[str, Window]:
    """Return the window of each convolution and pool, found from the last: readers decide a value's phases.

    Args:
        graph: the network.
        written: the values that kernels make as images.
        pads: the calls that put zeros around an image for convolutions alone: image, rows above and columns left.
        trial: the shapes of the values.
        needs_copy: whether a node reads a copy in any case, because it expects another border around the image.
    """
    wanted: dict[str, set[Pair]] = defaultdict(set)
    found = {}
    for node in reversed(graph.nodes):
        if isinstance(node, Mean):
            wanted[node.inputs[0]].add(PLAIN)
        if node.name not in written:
            continue
        found[node.name] = PIXEL
        phases = next(iter(wanted[node.name])) if len(wanted[node.name]) == 1 else PLAIN
        if isinstance(node, Quantize):
            found[node.name] = Window(PLAIN, PLAIN, (0, 0), PLAIN, phases)
        elif isinstance(node, Call | QuantizedGate):
            for name in node.inputs:
                wanted[name].add(PLAIN)
        elif isinstance(node, Convolution | MaxPool | AvgPool):
            if not isinstance(node, Convolution) or not _writes(node, phases, trial):
                phases = PLAIN
            image, (above, left) = pads.get(node.inputs[0], (node.inputs[0], (0, 0)))
            padding = node.padding[0] + above, node.padding[1] + left
            window = Window(node.kernel, node.stride, padding, node.dilation, phases)
            found[node.name] = window
            wanted[image].add(PLAIN if needs_copy(node) else window.reads)
            for residual in node.inputs[1:]:
                wanted[residual].add(phases)
    return found


def _writes(node: Convolution, phases: Pair, trial: Trial) -> bool:
    """Check whether a layer writes its image in the phases that its readers want, which saves a copy.

    A pointwise layer may. Another layer then reads as many times more phases, and has taps for each of them. In float32
    that is worth while for as long as planes are large: their rows end in padding, which is computed, too.
    """
    planes = math.prod(phases)
    if len(node.inputs) > 1 or planes == 1 or node.is_pointwise:
        return len(node.inputs) == 1
    if node.name in trial.codes:
        return False
    columns = trial.shapes[node.name][3] // phases[1]
    return columns >= LEAST_COLUMNS and planes * int(node.weight.count_nonzero()) <= MOST_TAPS
