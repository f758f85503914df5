"""A model as a session uses it: reads tokens and output wishes, and knows how much can be sent."""

from __future__ import annotations

from typing import Final

from cellserve._info import ModelInfo, ServerLimits
from cellserve._ledger import Ledger
from cellserve._outputs import OutputSpec, Wishes, make_output_spec
from cellserve._tokens import BYTE_VALUES, TokenColumn, VectorColumn, token_column, vector_column

__all__ = ["ServedModel"]

_MAX_ID: Final = 2**32 - 1
# Room in a message for what a run needs beside its tokens.
_RUN_BYTES: Final = 1024
# What a sampled token takes where it is held: the token and its log-probability.
_SAMPLED_BYTES: Final = 8


class ServedModel:
    """A model and the server's limits.

    max_kept_tokens: how many tokens of one session the client keeps until they are safe in the server's store.
    """

    def __init__(self, info: ModelInfo, limits: ServerLimits, max_kept_tokens: int) -> None:
        self.info = info
        self.limits = limits
        self.max_kept_tokens = max_kept_tokens
        token_bytes = 4 * (info.input_size or 1)
        self._max_run_tokens = max(
            1,
            min(
                limits.max_run_tokens,
                limits.max_session_pending_tokens,
                max_kept_tokens,
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

    def max_generate_tokens(self, slice_tokens: int) -> int:
        """How many sampled tokens the server holds, where a held answer has slice_tokens of them at least."""
        limits = self.limits
        return max(1, min(limits.max_held_answers * slice_tokens, limits.max_held_answer_bytes // _SAMPLED_BYTES))

    def max_run_tokens(self, spec: OutputSpec) -> int:
        """How many tokens fit into one run, so that the server takes it and holds its answer for a repeat."""
        if spec.at != "every" or not spec.row_bytes:
            return self._max_run_tokens
        return max(1, min(self._max_run_tokens, self.limits.max_held_answer_bytes // spec.row_bytes))

    def has_room(self, ledger: Ledger, spec: OutputSpec, count: int) -> bool:
        """Whether a run can be sent behind those that have no answer yet: the server takes it and holds them all."""
        if not ledger.num_unanswered:
            return True
        limits = self.limits
        return (
            ledger.num_unanswered < limits.max_held_answers
            and ledger.next_position + count <= ledger.position + limits.max_session_pending_tokens
            and ledger.unanswered_bytes + spec.answer_bytes(count) <= limits.max_held_answer_bytes
        )

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
