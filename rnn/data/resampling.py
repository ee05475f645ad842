"""Resampling of a stream of samples from any rate to any other, by a polyphase filter, in constant memory."""

import math

import torch
from torch import Tensor

CROSSINGS = 64  # zero crossings of the sinc on each side
BETA = 9.0  # of the Kaiser window: frequencies that would alias are attenuated by 90 dB
PASSBAND = 0.955  # the middle of the transition, as a share of the lower Nyquist frequency; the transition ends there
MOST_WEIGHTS = 2**20  # the largest number of the filter's weights to keep; others are computed for each call


class StreamResampler:
    """A resampler of a stream. Call it with the next samples, floating-point [any], to get those that are now complete.

    Output n lies at the time n * source / target, in input samples, and is sum_k x[k] h(time - k) with a windowed sinc
    h(t) = c sinc(c t) kaiser(t / width). Its cutoff c is 0.955 times the lower of the two Nyquist frequencies. Before
    the beginning and after the end the input is zero. The outputs of all calls together do not depend on how the
    stream is divided, except for rounding; `end` returns the last ones. N input samples make
    round(N * target / source) outputs.
    """

    def __init__(self, source: int, target: int) -> None:
        common = math.gcd(source, target)
        self.up, self.down = target // common, source // common
        self.cutoff = PASSBAND * min(1.0, target / source)
        self.width = CROSSINGS / self.cutoff
        self.half = math.ceil(self.width)
        taps = 2 * self.half + 1
        self._table = self._compute(torch.arange(self.up)) if self.up * taps <= MOST_WEIGHTS else None
        self._kept = torch.zeros(self.half, dtype=torch.float64)
        self._first = -self.half  # the index of the first kept sample in the stream
        self._received = self._next = 0  # numbers of input samples and of outputs so far

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the outputs, float64 [any], that the samples so far determine."""
        self._received += len(samples)
        last = self._received - 1 - self.half  # the last time, rounded down, whose inputs are all here
        return self._advance(samples.double(), (last + 1) * self.up // self.down + 1 if last >= 0 else 0, last)

    def end(self) -> Tensor:
        """Return the outputs that the end of the stream completes."""
        count = round(self._received * self.up / self.down)
        return self._advance(torch.zeros(2 * self.half + 2, dtype=torch.float64), count, self._received + self.half)

    def _advance(self, samples: Tensor, stop: int, last: int) -> Tensor:
        """Append samples and return the outputs from the next to `stop` whose time is at most `last`, rounded down."""
        sound = torch.cat([self._kept, samples])
        steps = torch.arange(self._next, max(self._next, stop)) * self.down
        steps = steps[steps.div(self.up, rounding_mode="floor") <= last]
        whole, phases = steps.div(self.up, rounding_mode="floor"), steps % self.up
        self._next += len(steps)
        begins = whole - self.half - self._first
        windows = sound[begins[:, None] + torch.arange(2 * self.half + 1)]
        weights = self._compute(phases) if self._table is None else self._table[phases]
        drop = max(0, self._next * self.down // self.up - self.half - self._first)
        self._kept, self._first = sound[drop:].clone(), self._first + drop
        return (windows * weights).sum(1)

    def _compute(self, phases: Tensor) -> Tensor:
        """Return the filter's weights for outputs at these phases, float64 [phases, taps]."""
        taps = torch.arange(-self.half, self.half + 1, dtype=torch.float64)
        time = phases[:, None].double() / self.up - taps
        inside = (1 - (time / self.width).square()).clamp_min(0)
        beta = torch.tensor(BETA, dtype=torch.float64)
        window = torch.special.i0(beta * inside.sqrt()) / torch.special.i0(beta)
        return self.cutoff * torch.sinc(self.cutoff * time) * window * (inside > 0)
