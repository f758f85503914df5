"""A model as a session uses it: reads tokens and output wishes, and knows how much one run can hold."""

from __future__ import annotations

from typing import Final

from cellserve._info import ModelInfo, ServerLimits
from cellserve._outputs import OutputSpec, Wishes, make_output_spec
from cellserve._tokens import BYTE_VALUES, TokenColumn, VectorColumn, token_column, vector_column

__all__ = ["ServedModel"]

_MAX_ID: Final = 2**32 - 1
# Room in a message for what a run needs beside its tokens.
_RUN_BYTES: Final = 1024


class ServedModel:
    """A model and the server's limits. max_run_tokens: tokens of one run that fits them all."""

    def __init__(self, info: ModelInfo, limits: ServerLimits) -> None:
        self.info = info
        self.limits = limits
        self.max_pending_tokens = limits.max_session_pending_tokens
        token_bytes = 4 * (info.input_size or 1)
        self.max_run_tokens = max(
            1,
            min(
                limits.max_run_tokens,
                limits.max_session_pending_tokens,
                (limits.max_message_bytes - _RUN_BYTES) // token_bytes,
            ),
        )
        self.no_outputs = make_output_spec(info, "none", None, 0, False, None, False, False)
        self.specs: dict[Wishes, OutputSpec] = {}

    def output_spec(self, wishes: Wishes) -> OutputSpec:
        """The spec of these wishes: the same object for the same wishes, which is kept in `specs`."""
        spec = self.specs.get(wishes)
        if spec is None:
            spec = self.specs[wishes] = make_output_spec(self.info, *wishes)
        return spec

    def read_tokens(self, tokens: object) -> int | TokenColumn | VectorColumn:
        """Tokens as they travel: a column, or the number itself for a single id. Raises TypeError and ValueError."""
        vocab_size = self.info.vocab_size
        if vocab_size is None:
            assert self.info.input_size is not None
            return vector_column(tokens, self.info.input_size)
        if type(tokens) is int and 0 <= tokens <= _MAX_ID:
            return tokens
        if type(tokens) is bytes and len(tokens) == 1 and vocab_size == BYTE_VALUES:
            return tokens[0]
        return token_column(tokens, vocab_size)
