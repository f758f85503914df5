"""The output specs in use on a model, as numbers, so that ticks can look them up by arrays."""

import numpy as np

from cellserve_service.errors import Refusal
from cellserve_service.outputs import NO_OUTPUTS, At, OutputLayout, OutputSpec
from cellserve_service.stepping import ModelInfo


class SpecTable:
    """Numbers for output specs; columns give what a tick must know of each."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._number_by_spec: dict[OutputSpec, int] = {}
        self.specs: list[OutputSpec] = []
        self.layouts: list[OutputLayout] = []
        self.wants_every = np.zeros(0, np.uint8)  # bits at each token
        self.wants_last = np.zeros(0, np.uint8)  # bits at the last token
        self.top_k = np.zeros(0, np.int64)
        self.row_bytes = np.zeros(0, np.int64)  # of one output row
        self.max_row_bytes = 0
        self.is_every = np.zeros(0, np.bool_)
        self.has_outputs = np.zeros(0, np.bool_)
        self._add(NO_OUTPUTS)

    def number(self, spec: OutputSpec, max_answer_bytes: int) -> int | Refusal:
        """The number of a spec, given at first use, or why the model cannot give it.

        To ask for nothing is the same at every token and at none.
        """
        known = self._number_by_spec.get(spec)
        if known is not None:
            return known
        if not spec.wants:
            return 0
        return spec.check(self._model, max_answer_bytes) or self._add(spec)

    def _add(self, spec: OutputSpec) -> int:
        layout = OutputLayout.of(spec, self._model)
        every, wants = spec.at is At.EVERY, int(spec.wants)
        self.specs.append(spec)
        self.layouts.append(layout)
        self.wants_every = np.append(self.wants_every, np.uint8(wants if every else 0))
        self.wants_last = np.append(self.wants_last, np.uint8(wants))
        self.top_k = np.append(self.top_k, spec.top_k)
        self.row_bytes = np.append(self.row_bytes, 4 * layout.row_words)
        self.max_row_bytes = max(self.max_row_bytes, 4 * layout.row_words)
        self.is_every = np.append(self.is_every, every)
        self.has_outputs = np.append(self.has_outputs, wants != 0)
        self._number_by_spec[spec] = len(self.layouts) - 1
        return len(self.layouts) - 1
