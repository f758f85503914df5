// A client made of others' libraries: loads protos/ at run time, opens two sessions on one stream, runs them and
// prints what came back. Usage: node stream.mjs TARGET MODEL RUNS, RUNS a JSON array of two arrays of runs of tokens.
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const [target, model, runsText] = process.argv.slice(2);
const runs = JSON.parse(runsText);
const protos = path.join(path.dirname(fileURLToPath(import.meta.url)), '..', '..', 'protos');
const definition = protoLoader.loadSync('cellserve/v1/session_service.proto', {
  includeDirs: [protos],
  keepCase: true,
  longs: String, // positions and handles have 64 bits
  enums: String,
  arrays: true, // a column that is absent is empty
});
const { SessionService } = grpc.loadPackageDefinition(definition).cellserve.v1;
const client = new SessionService(target, grpc.credentials.createInsecure());
const deadline = new Date(Date.now() + 30_000);

const heard = { opened: [], answers: [], failures: [], done: [] };
const sessions = new Map(); // by number of the open request, which is the session's place plus one
let unanswered = 0;
let lastRequest = 2;

function floats(block) {
  const { buffer, byteOffset, length } = block.values;
  return Array.from({ length: length / 4 }, (_, place) => new DataView(buffer, byteOffset).getFloat32(4 * place, true));
}

function runEverything() {
  // One frame: both sessions' runs, with positions, so that many may be on their way at once.
  const positions = runs.map(() => 0);
  const commands = [];
  for (let turn = 0; turn < runs[0].length; turn += 1) {
    const rows = runs.map((ofSession) => ofSession[turn]);
    commands.push({
      run: {
        requests: rows.map(() => ++lastRequest),
        handles: rows.map((_, place) => sessions.get(place + 1).handle),
        counts: rows.map((row) => row.length),
        tokens: rows.flat(),
        positions: [...positions],
        outputs: { at: 'OUTPUT_AT_EVERY', next_token: true, top_k: 2, states: true },
      },
    });
    rows.forEach((row, place) => { positions[place] += row.length; });
    unanswered += rows.length;
  }
  // Somebody's mistake: a token out of range. It must not end the stream.
  commands.push({ run: { requests: [++lastRequest], handles: [sessions.get(1).handle], tokens: [1_000_000] } });
  unanswered += 1;
  stream.write({ commands });
}

function closeEverything() {
  const requests = [...sessions.values()].map(() => ++lastRequest);
  unanswered += requests.length;
  stream.write({ commands: [{ close: { requests, handles: [...sessions.values()].map(({ handle }) => handle) } }] });
  stream.end();
}

const stream = client.Stream({ deadline });
stream.on('data', ({ events }) => {
  for (const { opened, answers, failures, done } of events) {
    if (opened) {
      opened.requests.forEach((request, row) => {
        sessions.set(Number(request), { handle: opened.handles[row] });
        heard.opened.push({ request: Number(request), id: opened.session_ids[row], created: opened.created[row] });
      });
      unanswered -= opened.requests.length;
    } else if (answers) {
      heard.answers.push({
        requests: answers.requests.map(Number),
        positions: answers.positions.map(Number),
        counts: answers.counts,
        remaining: answers.remaining,
        next_tokens: answers.outputs.next_tokens,
        top_tokens: answers.outputs.top_tokens,
        top_logprobs: floats(answers.outputs.top_logprobs),
        states: floats(answers.outputs.states),
        shape: answers.outputs.states.shape,
      });
      const finished = answers.requests.filter((_, row) => !answers.remaining[row]);
      unanswered -= finished.length;
    } else if (failures) {
      heard.failures.push({ codes: failures.codes, reasons: failures.reasons, messages: failures.messages });
      unanswered -= failures.requests.length;
    } else if (done) {
      heard.done.push(done.requests.length);
      unanswered -= done.requests.length;
    }
  }
  if (unanswered) return;
  if (!heard.answers.length) runEverything();
  else if (!heard.done.length) closeEverything();
});
stream.on('error', (error) => {
  console.error(String(error));
  process.exitCode = 1;
});
stream.on('status', ({ code }) => {
  console.log(JSON.stringify({ ...heard, status: code }));
  client.close();
});

unanswered = 2;
stream.write({ commands: [{ open: { requests: [1, 2], model, mode: 'OPEN_MODE_CREATE' } }] });
