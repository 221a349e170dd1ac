// What is chosen: kept, rejected, rated. Shown at once, sent at once, and kept until the server has it.

import {post, Refused} from './api.js';
import {counted} from './words.js';

const LARGEST_BATCH = 200;
const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 15_000;

const latest = new Map();  // key -> the choice that counts
const waiting = new Map();  // key -> the choice that the server does not have yet
const history = [];  // [[key, the choice before], ...] of each step, for undo
const listeners = [];
let sending = null;  // the batch on its way
let timer = 0;
let pause = FIRST_PAUSE_MS;

/** Call `listener({keys, tally, state, message})` after every change. keys: whose choices changed. */
export const onChoice = listener => listeners.push(listener);

const tell = news => listeners.forEach(listener => listener({keys: [], ...news}));

/** The choice about a sample: {verdict, rating, reason}; as the server gave it, unless it was changed here. */
export function choiceOf(sample) {
  const {verdict, rating, reason} = latest.get(sample.key) ?? sample;
  return {verdict: verdict || 'none', rating: rating ?? null, reason: reason ?? ''};
}

/** Choose about samples, as one step that `undo` takes back. values: verdict, rating, reason; absent ones stay. */
export function choose(samples, values) {
  const valuesOf = typeof values === 'function' ? values : () => values;
  const changes = samples.map(sample => [sample.key, choiceOf(sample), {...choiceOf(sample), ...valuesOf(sample)}])
    .filter(([, before, after]) => JSON.stringify(before) !== JSON.stringify(after));
  if (!changes.length) return;
  history.push(changes.map(([key, before]) => [key, before]));
  put(changes.map(([key, , after]) => [key, after]));
}

/** Take back the last step. Returns the keys of its samples; none if there is no step left. */
export function undo() {
  const step = history.pop() ?? [];
  put(step);
  return step.map(([key]) => key);
}

/** Whether there is a step to take back. */
export const undoable = () => history.length > 0;

/** Whether the server lacks a choice. */
export const unsaved = () => waiting.size > 0;

/** What the server lacks, as a CSV for `resmaster curate --import`. */
export function unsavedCsv() {
  const cell = value => `"${String(value ?? '').replaceAll('"', '""')}"`;
  const rows = [...waiting].map(([key, choice]) =>
    [key, choice.verdict, choice.rating, choice.reason].map(cell).join(','));
  return ['key,verdict,rating,reason', ...rows, ''].join('\n');
}

function put(pairs) {
  for (const [key, choice] of pairs) {
    latest.set(key, choice);
    waiting.set(key, choice);
  }
  tell({keys: pairs.map(([key]) => key), state: 'saving', message: 'saving'});
  clearTimeout(timer);
  send();
}

async function send() {
  if (sending || !waiting.size) return;
  sending = [...waiting].slice(0, LARGEST_BATCH);
  const batch = sending;
  let answer, error;
  try {
    answer = await post('choices', {choices: batch.map(([key, choice]) => ({key, ...choice}))});
  } catch (refused) {
    error = refused;
  }
  sending = null;
  if (error instanceof Refused && error.status === 400) return refuse(batch, error);
  if (error) return later(error);
  pause = FIRST_PAUSE_MS;
  settle(batch);
  tell({
    tally: answer.choices, saved: batch.map(([key]) => key),
    ...(waiting.size ? {state: 'saving', message: 'saving'} : {state: 'saved', message: 'saved'}),
  });
  return send();
}

/** The server has these choices, or refused them for good. */
function settle(batch) {
  for (const [key, choice] of batch) if (waiting.get(key) === choice) waiting.delete(key);
}

function later(error) {
  const missing = `${counted(waiting.size, 'choice')} not saved, will be tried again`;
  tell({state: 'unsaved', message: `${missing}: ${error.message}`});
  clearTimeout(timer);
  timer = setTimeout(send, pause);
  pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
}

/** One choice that cannot be saved must not hold up the others: each is sent alone, and the culprit is named. */
async function refuse(batch, error) {
  const messages = [];
  sending = batch;
  for (const pair of batch) {
    try {
      const answer = await post('choices', {choices: [{key: pair[0], ...pair[1]}]});
      settle([pair]);
      tell({tally: answer.choices, saved: [pair[0]], state: 'saving', message: 'saving'});
    } catch (refused) {
      if (refused.status !== 400) continue;
      settle([pair]);
      latest.delete(pair[0]);
      messages.push(refused.message);
    }
  }
  sending = null;
  tell({keys: batch.map(([key]) => key), state: 'unsaved', message: `not saved: ${messages[0] ?? error.message}`});
  if (waiting.size) later(error);
}

addEventListener('beforeunload', event => { if (waiting.size) event.preventDefault(); });
addEventListener('online', () => { clearTimeout(timer); send(); });
