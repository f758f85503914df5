"""Sampling on the server: a generate is a run whose tokens the model draws itself, a slice of them at each tick.

Every slice becomes a held answer, so that a repeat of a broken call gives the same tokens again and goes on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.core import Core, Generation
from cellserve_service.digests import digest_settings
from cellserve_service.errors import Refusal, invalid
from cellserve_service.messages import Generated, SubmitGenerate
from cellserve_service.replay import since_last_reset
from cellserve_service.runs import Batch, Kind, Status
from cellserve_service.scheduling import choose_sessions, leave_tick
from cellserve_service.served import ServedModel
from cellserve_service.sessions import Durability
from cellserve_service.stepping import FloatArray, GenerateResult, IntArray, TokenArray

MAX_TOKENS = 1_000_000
MAX_STOP_TOKENS = 256

_AGAIN = Refusal(ErrorReason.ERROR_REASON_RUN_CANCELLED, "the same generate was asked for again")


@dataclass(frozen=True, slots=True)
class GenerateTick:
    """A batch of generates on its way through the stepper."""

    served: ServedModel
    rows: IntArray  # (B,) session rows
    ticket: Any
    begun_at: float


def submit_generate(core: Core, command: SubmitGenerate) -> None:
    """Accept a generate, answer it from what is held, or refuse it."""
    row = core.sessions.resolve_id(command.session_id)
    refusal = row if isinstance(row, Refusal) else _consider(core, command, row)
    if refusal is not None:
        core.refuse(command.stream, [command.request], [refusal])
    elif not isinstance(row, Refusal):
        core.go_on_with(row)


def _consider(core: Core, command: SubmitGenerate, row: int) -> Refusal | None:
    info = core.model_of(row).info
    if not core.model_of(row).can_generate:
        message = f"model {info.name} cannot generate: it needs an output head over its vocabulary"
        return Refusal(ErrorReason.ERROR_REASON_OUTPUT_UNSUPPORTED, message, field="session_id")
    for token in command.stop_tokens:
        if token >= (info.vocab_size or 0):
            return invalid(f"stop token {token} is not in [0, {info.vocab_size})", "stop_tokens")
    current, digest = core.generations.get(row), _digest(command)
    if current is not None:
        refusal = _cannot_follow(core, command, row, current, digest)
        if refusal is not None:
            return refusal
        # The same call again: its connection was lost. The earlier one ends, this one takes up where it stopped.
        core.break_off_generation(row, _AGAIN)
        if row in core.generations:
            current.successor = command
            return None
    return _admit(core, command, row, digest)


def _cannot_follow(core: Core, command: SubmitGenerate, row: int, current: Generation, digest: int) -> Refusal | None:
    """Why a generate does not take the place of the one under way, if it does not."""
    accepted = int(core.sessions.accepted[row])
    if command.position is None or command.position > accepted or current.digest != digest:
        return Refusal(ErrorReason.ERROR_REASON_SESSION_BUSY, "a generate is under way on the session")
    if core.is_draining:
        return no_more_runs()
    if command.position < accepted:
        held = _held_tokens(core, row, command, command.position, digest)
        return held if isinstance(held, Refusal) else None
    return None


def _digest(command: SubmitGenerate) -> int:
    return digest_settings(command.temperature, command.top_k, command.top_p, command.seed, command.stop_tokens)


def _admit(core: Core, command: SubmitGenerate, row: int, digest: int) -> Refusal | None:
    """Give what is held of the generate, if it was asked for before, and go on where that ends."""
    accepted = int(core.sessions.accepted[row])
    position = accepted if command.position is None else command.position
    if position > accepted:
        message = f"the generate is for position {position}, the session stands at {accepted}"
        return Refusal(ErrorReason.ERROR_REASON_POSITION_GAP, message, position=accepted, field="position")
    remaining = command.max_tokens
    if position < accepted:
        held = _held_tokens(core, row, command, position, digest)
        if isinstance(held, Refusal):
            return held
        tokens, logprobs = held
        remaining -= len(tokens)
        stopped = int(tokens[-1]) in command.stop_tokens
        finished = stopped or remaining == 0
        if not finished and position + len(tokens) != accepted:
            message = "the generate was broken off and other tokens have run since"
            return Refusal(ErrorReason.ERROR_REASON_POSITION_CONFLICT, message, position=accepted)
        if not finished and (refusal := _cannot_run(core, row)) is not None:
            return refusal
        core.statistics.runs_deduplicated += 1
        _tell(core, row, command, tokens, logprobs, position + len(tokens), finished, stopped)
        if finished:
            return None
    refusal = _cannot_run(core, row)
    if refusal is None:
        _accept(core, command, row, digest, remaining)
    return refusal


def no_more_runs() -> Refusal:
    return Refusal(ErrorReason.ERROR_REASON_DRAINING, "the server is draining and takes no more runs")


def _cannot_run(core: Core, row: int) -> Refusal | None:
    """Why no more tokens are sampled for the session, if none are."""
    if core.is_draining:
        return no_more_runs()
    is_sync = core.sessions.durability[row] == Durability.SYNC
    return core.keeping.unavailable() if core.keeping is not None and is_sync else None


def _accept(core: Core, command: SubmitGenerate, row: int, digest: int, remaining: int) -> None:
    """Put an entry for the generate at the end of the session's chain; it stays there until the generate ends."""
    sessions, table = core.sessions, core.model_of(row).runs
    runs = table.allocate(1, Kind.GENERATE)
    table.session[runs] = row
    table.ask(runs, command.stream, command.request, core.now, np.inf)
    table.append(np.array([row], np.int64), runs)
    core.generations[row] = Generation(command, int(runs[0]), remaining, digest)
    sessions.is_generating[row] = True
    sessions.last_used[row] = core.now


def _held_tokens(
    core: Core, row: int, command: SubmitGenerate, position: int, digest: int
) -> tuple[TokenArray, FloatArray] | Refusal:
    """Tokens and log-probabilities held from a position on, as far as the same call went."""
    runs = core.model_of(row).runs
    accepted = int(core.sessions.accepted[row])
    pieces: list[Any] = []
    expected = position
    for run in since_last_reset(core, core.model_of(row), row):
        start, count = int(runs.start[run]), int(runs.count[run])
        if runs.status[run] != Status.HELD or start + count <= expected:
            continue
        if start > expected:
            break
        if runs.kind[run] != Kind.GENERATE or int(runs.digest[run]) != digest:
            if pieces:
                break
            message = f"other tokens, or a generate with other settings, have run at position {position}"
            return Refusal(ErrorReason.ERROR_REASON_POSITION_CONFLICT, message, position=accepted)
        pieces.append(runs.held_answer(run).reshape(2, count)[:, expected - start :])
        expected = start + count
    if not pieces:
        message = f"the tokens generated at position {position} are no longer held"
        return Refusal(ErrorReason.ERROR_REASON_ANSWER_NOT_HELD, message, position=accepted)
    words = np.concatenate(pieces, axis=1)[:, : command.max_tokens]
    # What follows a stop token is of a later call with the same settings.
    stops = np.flatnonzero(np.isin(words[0], np.array(command.stop_tokens, np.uint32)))
    if len(stops):
        words = words[:, : stops[0] + 1]
    return words[0], np.ascontiguousarray(words[1]).view(np.float32)


def begin_generate_tick(core: Core, served: ServedModel) -> GenerateTick | None:
    """Choose a batch of generates and submit it; None when no session is ready for one."""
    sessions, runs = core.sessions, served.runs
    rows = choose_sessions(core, served, Batch.GENERATES)
    if not len(rows):
        return None
    runs.status[sessions.next_run[rows]] = Status.STARTED
    generations = [core.generations[row] for row in rows.tolist()]
    commands = [generation.command for generation in generations]
    num_slice = served.pace.slice_tokens(core.now, len(rows))
    remaining = np.array([generation.remaining for generation in generations])
    most_stops = max(len(command.stop_tokens) for command in commands)
    stop_tokens = np.full((len(rows), most_stops), -1, np.int64)
    for place, command in enumerate(commands):
        stop_tokens[place, : len(command.stop_tokens)] = command.stop_tokens
    ticket = served.stepper.submit_generate(
        sessions.slot[rows].astype(np.int64),
        np.minimum(remaining, num_slice),
        sessions.position[rows],
        np.array([command.seed for command in commands], np.uint64),
        np.array([command.temperature for command in commands], np.float32),
        np.array([command.top_k for command in commands], np.int64),
        np.array([command.top_p for command in commands], np.float32),
        stop_tokens,
    )
    core.statistics.models[served.index].batch_size.observe_one(len(rows))
    return GenerateTick(served, rows, ticket, core.now)


def finish_generate_tick(core: Core, tick: GenerateTick, result: GenerateResult) -> None:
    """Stream what was sampled, hold it, and go on with the sessions."""
    sessions, served = core.sessions, tick.served
    leave_tick(core, served, tick.rows)
    sessions.position[tick.rows] += result.counts
    sessions.accepted[tick.rows] += result.counts
    statistics = core.statistics.models[served.index]
    num_sampled = int(result.counts.sum())
    statistics.steps_generated += num_sampled
    served.pace.took(Batch.GENERATES, num_sampled, result.compute_seconds)
    statistics.count_tick(result, core.now - tick.begun_at)
    _hold(core, served, tick.rows, result)
    _count_pauses(core, served, tick.rows, result.counts)
    for place, (row, count) in enumerate(zip(tick.rows.tolist(), result.counts.tolist(), strict=True)):
        _take_slice(core, served, row, result.tokens[place, :count], result.logprobs[place, :count])
    if core.keeping is not None:
        core.keeping.advanced(served, tick.rows, tick.rows)
    core.go_on(served, tick.rows)


def _take_slice(core: Core, served: ServedModel, row: int, tokens: TokenArray, logprobs: FloatArray) -> None:
    generation, command = core.generations[row], core.generations[row].command
    position = int(core.sessions.position[row])
    generation.remaining -= len(tokens)
    stopped = int(tokens[-1]) in command.stop_tokens
    finished = stopped or generation.remaining == 0
    if not generation.is_lost:
        _tell(core, row, command, tokens, logprobs, position, finished, stopped)
    if finished or generation.broken_off is not None:
        if generation.broken_off is not None and (generation.is_lost or not finished):
            core.refuse_in_turn(row, command.stream, command.request, generation.broken_off)
        served.runs.remove_first(row)
        core.end_generation(row)
        if generation.successor is not None:
            refusal = _consider(core, generation.successor, row)
            if refusal is not None:
                core.refuse(generation.successor.stream, [generation.successor.request], [refusal])


def _hold(core: Core, served: ServedModel, rows: IntArray, result: GenerateResult) -> None:
    """Keep each slice as a held answer of its session, the tokens and then their log-probabilities."""
    table, limits, counts = served.runs, core.limits, result.counts
    runs = table.allocate(len(rows), Kind.GENERATE)
    table.session[runs] = rows.astype(np.int32)
    table.start[runs] = core.sessions.position[rows] - counts
    table.count[runs] = counts
    table.digest[runs] = np.array([core.generations[row].digest for row in rows.tolist()], np.uint64)
    words = table.hold(runs, 2 * counts)
    places = np.arange(result.tokens.shape[1])
    is_sampled = places < counts[:, None]  # the others come after a stop token, or beyond what was left
    starts = (2 * (counts.cumsum() - counts))[:, None] + places
    words[starts[is_sampled]] = result.tokens[is_sampled]
    words[(starts + counts[:, None])[is_sampled]] = result.logprobs[is_sampled].view(np.uint32)
    table.insert_held(rows, runs)
    table.release_beyond(rows, limits.max_held_answers, limits.max_held_answer_bytes // 4)


def _count_pauses(core: Core, served: ServedModel, rows: IntArray, counts: IntArray) -> None:
    """Count the seconds before each token; those of a generate's first slice have none before them."""
    generations = [core.generations[row] for row in rows.tolist()]
    last = np.array([np.nan if one.last_token_at is None else one.last_token_at for one in generations])
    pauses = np.repeat((core.now - last) / counts, counts)
    core.statistics.models[served.index].inter_token.observe(pauses[~np.isnan(pauses)])
    for generation in generations:
        generation.last_token_at = core.now


def _tell(
    core: Core,
    row: int,
    command: SubmitGenerate,
    tokens: TokenArray,
    logprobs: FloatArray,
    position: int,
    finished: bool,
    stopped: bool,
) -> None:
    event = Generated(command.stream, command.request, tokens, logprobs, position, finished, stopped, command.seed)
    core.give(row, position, event)
