// Samples that failed: at which stage, why, and the command that tells more.

import {get} from './api.js';
import {copyOf, copyable, one, shown} from './dom.js';
import {List} from './list.js';

const ROW_PX = 190;
const PHONE_ROW_PX = 260;

function draw(failure) {
  const row = copyOf('failure');
  one('.prompt', row).textContent = shown(failure.prompt) || 'no prompt';
  one('.key', row).textContent = shown(`${failure.key} · ${failure.stage} · attempt ${failure.attempt_number}`);
  one('.class', row).textContent = shown(failure.error_class);
  one('.message', row).textContent = shown(failure.message);
  if (failure.command) row.append(copyable(failure.command));
  return row;
}

/** The list of failed samples. other: further options of a List. */
export function failed(scroller, other) {
  return new List(scroller, {
    gap: 12,
    limit: 100,
    cell: width => ({columns: 1, height: width < 600 ? PHONE_ROW_PX : ROW_PX}),
    async load(offset, limit, signal) {
      const {total, samples} = await get('failed', {offset, limit}, signal);
      return {total, items: samples};
    },
    draw,
    blank: () => copyOf('blank'),
    ...other,
  });
}
