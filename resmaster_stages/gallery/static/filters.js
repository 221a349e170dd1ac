// The filters beside the list: search, flags, verdict, rating, an expression, and the metrics' histograms.

import {all, flagChips, make, one, shown} from './dom.js';
import {Histogram} from './histogram.js';
import {change, filtered, onChange, setRange, view} from './state.js';
import {count, counted, plain} from './words.js';

const TYPING_MS = 250;
const VERDICTS = {'': 'any', kept: 'kept', rejected: 'rejected', none: 'undecided'};

let histograms = [];
let columns = {};
let inSight = new Set();

/** Fill in the filters. dataset: the answer of api/dataset. */
export function setUp(dataset) {
  columns = Object.fromEntries(dataset.columns.map(column => [column.name, column]));
  flags(dataset);
  const measured = dataset.columns.filter(column => typeof column.min === 'number');
  sorts(measured);
  fields();
  metrics({...dataset, columns: measured});
  onChange(changed => {
    follow();
    if (['q', 'flag', 'verdict', 'rating', 'range', 'where', 'group'].some(name => changed.has(name))) reload();
  });
  follow();
}

function flags(dataset) {
  const choices = [['', 'any or none', null], ['*', 'flagged', null], ['-', 'not flagged', null],
    ...dataset.flags.map(({name, meaning, count: number}) => [name, name.replaceAll('_', ' '), {meaning, number}])];
  one('#flags').append(...choices.map(([name, label, known]) => make('button', {
    type: 'button', class: 'chip', value: name, title: known?.meaning,
    text: known ? `${label} ${count(known.number)}` : label,
    click: () => toggleFlag(name),
  })));
}

/** Several flags may be chosen: all of them must be there. */
function toggleFlag(name) {
  const single = ['', '*', '-'].includes(name);
  const others = view.flag.filter(flag => flag !== name && flag !== '*' && flag !== '-');
  const chosen = view.flag.includes(name);
  change({flag: single ? (name === '' || chosen ? [] : [name]) : (chosen ? others : [...others, name])});
}

function sorts(known) {
  const option = ([name, label]) => make('option', {value: name, text: label});
  one('#sort').append(
    ...[['bad', 'worst first'], ['-bad', 'best first'], ['index', 'dataset order']].map(option),
    ...known.map(column => make('optgroup', {label: column.label},
      option([column.name, `${column.label}, lowest first`]),
      option([`-${column.name}`, `${column.label}, highest first`]))));
  one('#sort').addEventListener('change', event => change({sort: event.target.value}));
}

function fields() {
  for (const [selector, name] of [['#find', 'q'], ['#where', 'where']]) {
    let timer;
    const field = one(selector);
    const set = () => { clearTimeout(timer); change({[name]: field.value.trim()}); };
    field.addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(set, TYPING_MS); });
    field.addEventListener('change', set);
    field.addEventListener('search', set);
  }
  one('#verdict').append(...Object.entries(VERDICTS).map(([name, label]) =>
    make('button', {type: 'button', value: name, text: label, click: () => change({verdict: name})})));
  one('#rating').append(...['', '1', '2', '3', '4', '5'].map(least =>
    make('button', {
      type: 'button', value: least, text: least ? `${least}+` : 'any', click: () => change({rating: least}),
      'aria-label': least ? `rating at least ${least}` : 'any rating or none'})));
  for (const button of all('.clear-all')) {
    button.addEventListener('click', clearAll);
  }
}

/** Remove every filter. */
export function clearAll() {
  change({q: '', flag: [], verdict: '', rating: '', range: [], where: '', group: ''});
}

function metrics(dataset) {
  one('#no-metrics').hidden = dataset.columns.length > 0;
  one('#brush-note').hidden = !dataset.columns.length;
  const observer = new IntersectionObserver(entries => {
    for (const {target, isIntersecting} of entries) {
      const histogram = histograms.find(each => each.element === target);
      inSight[isIntersecting ? 'add' : 'delete'](histogram);
      if (isIntersecting && histogram.stale) {
        if (histogram.stale === 'new') histogram.start();
        histogram.stale = false;
        histogram.load();
      }
    }
  });
  for (const column of dataset.columns) {
    const thresholds = dataset.thresholds.filter(each => each.column === column.name);
    const histogram = new Histogram(column, thresholds, dataset.samples);
    histogram.stale = 'new';
    histograms.push(histogram);
    one('#histograms').append(histogram.element);
    observer.observe(histogram.element);
  }
}

function reload() {
  for (const histogram of histograms) {
    histogram.stale ||= 'old';
    if (!inSight.has(histogram)) continue;
    histogram.stale = false;
    histogram.load();
  }
}

/** Show in the fields what the view holds. */
function follow() {
  for (const [selector, name] of [['#find', 'q'], ['#where', 'where'], ['#sort', 'sort']]) {
    const field = one(selector);
    if (document.activeElement !== field || name === 'sort') field.value = view[name];
  }
  const press = (selector, chosen) => all(`${selector} button`).forEach(button =>
    button.setAttribute('aria-pressed', chosen(button.value)));
  press('#flags', name => name === '' ? !view.flag.length : view.flag.includes(name));
  press('#verdict', name => view.verdict === name);
  press('#rating', least => view.rating === least);
  histograms.forEach(histogram => histogram.follow());
  chips();
}

/** Every active filter as a chip that removes it. */
function chips() {
  const active = [
    view.q && [`“${view.q}”`, {q: ''}],
    ...view.flag.map(name => [{'*': 'flagged', '-': 'not flagged'}[name] ?? name.replaceAll('_', ' '),
      {flag: view.flag.filter(flag => flag !== name)}]),
    view.verdict && [VERDICTS[view.verdict] ?? view.verdict, {verdict: ''}],
    view.rating && [`rated ${view.rating} or more`, {rating: ''}],
    ...view.range.map(each => {
      const [name, low, high] = each.split(':');
      const label = columns[name]?.label ?? name;
      const words = low === '' ? `${label} ≤ ${plain(high)}` : high === '' ? `${label} ≥ ${plain(low)}` :
        `${label} ${plain(low)} to ${plain(high)}`;
      return [words, {range: view.range.filter(other => other !== each)}];
    }),
    view.where && [view.where, {where: ''}],
    view.group && ['near-duplicates of one image', {group: ''}],
  ].filter(Boolean);
  one('#active').replaceChildren(...active.map(([words, values]) => make('button', {
    type: 'button', class: 'chip active', text: `${words} ✕`, 'aria-label': `remove the filter ${words}`,
    click: () => change(values),
  })));
  one('#chips').hidden = !filtered();
  one('#filter-count').textContent = active.length || '';
}

/** Show what is wrong with the expression; "" for nothing. */
export function whereError(message) {
  one('#where-error').textContent = shown(message);
  one('#where').setAttribute('aria-invalid', Boolean(message));
}
