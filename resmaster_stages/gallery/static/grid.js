// All samples that pass the filters, as a grid of small images.

import {get, thumb} from './api.js';
import {choiceOf, choose} from './choices.js';
import {copyOf, flagChips, one, shown} from './dom.js';
import {List} from './list.js';
import {filters, view} from './state.js';
import {value} from './words.js';

const GAP_PX = 12;
const SMALLEST_PX = 210;
const SMALLEST_PHONE_PX = 150;
const WORDS_PX = 92;

/** Put the verdict and the rating of a sample on an element that shows it. */
export function mark(element, sample) {
  const {verdict, rating} = choiceOf(sample);
  element.dataset.verdict = verdict;
  const badge = one('.badge', element);
  if (badge) badge.textContent = {kept: '✓ kept', rejected: '✕ rejected'}[verdict] ?? '';
  const stars = one('.stars', element);
  if (stars) stars.textContent = rating ? '★'.repeat(rating) : '';
  for (const button of element.querySelectorAll('button[value=kept], button[value=rejected]')) {
    button.setAttribute('aria-pressed', button.value === verdict);
  }
}

/** A small image of a sample. */
export function small(image, sample, side, px = 256) {
  image.src = thumb(sample, side, px);
  image.alt = side === 'high' ? shown(sample.prompt || sample.key) : '';
}

/** The grid. opened(index, sample): called for the sample that is clicked. other: further options of a List. */
export function grid(scroller, dataset, opened, other) {
  const columns = Object.fromEntries(dataset.columns.map(column => [column.name, column]));
  const meanings = Object.fromEntries(dataset.flags.map(({name, meaning}) => [name, meaning]));

  function draw(sample, index) {
    const card = copyOf('tile');
    small(one('.high', card), sample, 'high');
    one('.high', card).addEventListener('error', () => card.classList.add('broken'));
    card.addEventListener('pointerenter', event => {
      if (event.pointerType === 'mouse') small(one('.low', card), sample, 'low');
    });
    one('.prompt', card).textContent = shown(sample.prompt) || 'no prompt';
    one('.prompt', card).title = shown(sample.prompt);
    one('.flags', card).append(...flagChips(sample.flags, meanings));
    const sorted = columns[view.sort.replace(/^-/, '')];
    one('.value', card).textContent = sorted ? `${sorted.label} ${value(sample.quality[sorted.name], sorted.form)}` :
      `${sample.width} × ${sample.height}`;
    card.addEventListener('click', event => {
      const button = event.target.closest('button');
      if (!button) return opened(index, sample);
      choose([sample], {verdict: button.value === choiceOf(sample).verdict ? 'none' : button.value});
      return list.mark(index);
    });
    mark(card, sample);
    return card;
  }

  const list = new List(scroller, {
    gap: GAP_PX,
    cell(width) {
      const least = width < 600 ? SMALLEST_PHONE_PX : SMALLEST_PX;
      const fit = Math.max(1, Math.floor(width / (least + GAP_PX)));
      return {columns: fit, height: Math.round(width / fit - GAP_PX) + WORDS_PX + GAP_PX};
    },
    async load(offset, limit, signal) {
      const parameters = filters();
      parameters.set('sort', view.sort);
      parameters.set('offset', offset);
      parameters.set('limit', limit);
      const {total, samples} = await get('samples', parameters, signal);
      return {total, items: samples};
    },
    draw,
    blank: () => copyOf('blank'),
    ...other,
  });
  return list;
}
