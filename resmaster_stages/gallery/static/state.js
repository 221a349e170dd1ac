// The view: what is filtered, sorted and open. The address holds all of it, behind #, so a link shows the same view.

const LISTS = ['flag', 'range'];
const TEXTS = {
  q: '', verdict: '', rating: '', where: '', group: '', sort: 'bad', mode: '', at: '0', key: '', compare: '',
  scaled: '',
};
const FILTERS = ['q', 'flag', 'verdict', 'rating', 'range', 'where', 'group'];
const LISTED = [...FILTERS, 'sort', 'mode'];
const listeners = [];

function read() {
  const found = new URLSearchParams(location.hash.slice(1));
  const view = {};
  for (const name of LISTS) view[name] = found.getAll(name);
  for (const [name, usual] of Object.entries(TEXTS)) view[name] = found.get(name) ?? usual;
  return view;
}

/** The current view. Change it through `change` only. */
export let view = read();

function spelled(names, of = view) {
  const parameters = new URLSearchParams();
  for (const name of names) {
    if (LISTS.includes(name)) of[name].forEach(each => parameters.append(name, each));
    else if (of[name] !== (TEXTS[name] ?? '')) parameters.set(name, of[name]);
  }
  return parameters;
}

/** Parameters of the filters, but for those of the names in `without`. */
export const filters = (...without) => spelled(FILTERS.filter(name => !without.includes(name)));

/** Whether any filter is set. */
export const filtered = () => filters().size > 0;

/** Whether what is listed, or its order, depends on choices. */
export const followsChoices = () =>
  Boolean(view.verdict || view.rating || /\b(kept|rejected|verdict|rating)\b/.test(view.where));

function tell(before) {
  const names = [...LISTS, ...Object.keys(TEXTS)];
  const changed = new Set(names.filter(name => String(before[name]) !== String(view[name])));
  if (changed.size) listeners.forEach(listener => listener(changed));
}

/** Change the view. What is listed starts anew if it changes. push: whether the back button undoes the change. */
export function change(values, {push = false} = {}) {
  const before = view;
  view = {...view, ...values};
  if (!('at' in values) && LISTED.some(name => String(before[name]) !== String(view[name]))) view.at = '0';
  const address = `#${spelled([...LISTS, ...Object.keys(TEXTS)])}`;
  if (push) history.pushState({pushed: true}, '', address);
  else if (address !== (location.hash || '#')) history.replaceState(history.state, '', address);
  tell(before);
}

/** Call `listener(names)` after each change, with the names of what changed. */
export const onChange = listener => listeners.push(listener);

/** The range of a column's values that passes the filters: [low, high], either null; null without a filter. */
export function range(column) {
  const found = view.range.find(each => each.startsWith(`${column}:`));
  return found ? found.slice(column.length + 1).split(':').map(end => end === '' ? null : Number(end)) : null;
}

/** Let only values between low and high pass, either may be null; neither removes the filter. */
export function setRange(column, low, high) {
  const others = view.range.filter(each => !each.startsWith(`${column}:`));
  const none = low === null && high === null;
  change({range: none ? others : [...others, `${column}:${low ?? ''}:${high ?? ''}`]});
}

addEventListener('popstate', () => {
  const before = view;
  view = read();
  const {compare, scaled} = before;  // how images are shown is a habit, and not undone by the back button
  tell(before);
  change({compare, scaled});
});
