// Groups of near-duplicates, one per row: keep one, reject the others.

import {get} from './api.js';
import {choiceOf, choose, onChoice} from './choices.js';
import {copyOf, make, one} from './dom.js';
import {mark, small} from './grid.js';
import {List} from './list.js';
import {change} from './state.js';
import {counted} from './words.js';

const ROW_PX = 300;
const LARGEST_GROUP = 200;

/** Keep one sample of a group and reject the others. */
function keepOne(samples, kept) {
  choose(samples, sample => sample.key === kept.key ? {verdict: 'kept'} :
    {verdict: 'rejected', reason: choiceOf(sample).reason || `near-duplicate of ${kept.key}`});
}

/** The list of groups. opened(key): called for the sample that is clicked. other: further options of a List. */
export function groups(scroller, opened, other) {
  function member(samples, sample) {
    const element = copyOf('member');
    small(one('img', element), sample, 'high');
    one('.open', element).addEventListener('click', () => opened(sample.key));
    one('.keep-one', element).addEventListener('click', () => keepOne(samples, sample));
    element.dataset.key = sample.key;
    mark(element, sample);
    return element;
  }

  function draw(group) {
    const row = copyOf('group');
    const controller = new AbortController();
    one('h3', row).textContent = counted(group.keys.length, 'near-duplicate');
    one('.as-list', row).addEventListener('click', () => change({mode: '', group: group.first}, {push: true}));
    row.addEventListener('dropped', () => controller.abort());
    get('samples', {group: group.first, sort: 'index', limit: LARGEST_GROUP}, controller.signal).then(({samples}) => {
      row.samples = samples;
      one('.members', row).append(...samples.map(sample => member(samples, sample)));
    }, error => {
      if (error.name !== 'AbortError') one('.members', row).append(make('p', {class: 'none', text: error.message}));
    });
    return row;
  }

  const list = new List(scroller, {
    gap: 12,
    limit: 50,
    cell: () => ({columns: 1, height: ROW_PX}),
    async load(offset, limit, signal) {
      const {total, groups: items} = await get('near_duplicates', {offset, limit}, signal);
      return {total, items: items.map(group => ({...group, key: group.first}))};
    },
    draw,
    blank: () => copyOf('blank'),
    ...other,
  });

  onChoice(({keys}) => {
    for (const row of list.drawn.values()) {
      for (const element of row.querySelectorAll('.member')) {
        const {key} = element.dataset;
        if (keys.includes(key)) mark(element, row.samples.find(sample => sample.key === key));
      }
    }
  });

  /** Keep the first of the current group, reject the others, and go to the next group. */
  list.keepFirst = () => {
    const {samples} = list.drawn.get(list.current) ?? {};
    if (!samples?.length) return;
    keepOne(samples, samples[0]);
    list.select(list.current + 1);
  };
  return list;
}
