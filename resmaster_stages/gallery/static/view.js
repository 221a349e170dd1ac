// Starts the page: its parts, its keys, and what the address says.

import {get} from './api.js';
import {choiceOf, choose, onChoice, undo, undoable, unsaved, unsavedCsv} from './choices.js';
import {all, copyable, make, one, shown} from './dom.js';
import {failed as failures} from './failed.js';
import * as filtersPart from './filters.js';
import {grid, mark} from './grid.js';
import {groups} from './groups.js';
import {listen} from './keys.js';
import {SamplePage} from './sample.js';
import {change, filtered, followsChoices, onChange, view} from './state.js';
import {count, counted, quoted} from './words.js';

const SCROLL_REST_MS = 200;
const REFRESH_MS = 300;
const AGAIN_MS = 5000;

let dataset, lists, page;
let opener = null;  // what had the focus before a sample was opened

const list = () => lists[view.mode] ?? lists[''];
const small = matchMedia('(max-width: 60rem)');

async function start() {
  try {
    dataset = await get('dataset');
  } catch (error) {
    one('#says').textContent = shown(error.message);
    one('#says').hidden = false;
    return;
  }
  texts();
  const common = {
    counted: said, failed: refused, moved, scrolled,
  };
  lists = {
    '': grid(one('#grid'), dataset, (index, sample) => openAt(index, sample.key), common),
    duplicates: groups(one('#groups'), key => change({key}, {push: true}), common),
    failed: failures(one('#failures'), common),
  };
  page = new SamplePage(one('#sample'), dataset, {
    next: () => step(1), previous: () => step(-1), close, choose: decide, rate, undo: takeBack,
  });
  filtersPart.setUp(dataset);
  onChange(follow);
  onChoice(chosen);
  buttons();
  keyboard();
  show();
  setTimeout(again, AGAIN_MS);
  await list().restart(Number(view.at) || 0);
  if (view.key) await openSample();
}

/** What the server finds out in the background: captions that can be searched, and what is wrong with the dataset. */
async function again() {
  let waiting = true;
  try {
    const news = await get('dataset');
    notes(news);
    waiting = !news.captions.error && news.captions.indexed < news.captions.shards;
  } catch (error) {
    one('#notes').replaceChildren(make('p', {text: error.message}));
  }
  if (waiting) setTimeout(again, AGAIN_MS);
}

function notes({note: stale, failed_error: unread, captions}) {
  const {indexed, shards, error} = captions;
  const missing = indexed < shards ?
    `So far, captions of ${count(indexed)} of ${counted(shards, 'shard')} are searched.` : '';
  one('#find-note').textContent = shown(error || missing);
  one('#notes').replaceChildren(...[stale, unread].filter(Boolean).map(text => make('p', {text})));
}

function texts() {
  document.title = `${shown(dataset.name)}: all samples`;
  one('#modes [value=""]').textContent = `All ${count(dataset.samples)}`;
  one('#modes [value=duplicates]').textContent = `Near-duplicates ${count(dataset.near_duplicate_groups)}`;
  one('#modes [value=failed]').textContent = `Failed ${count(dataset.failed)}`;
  one('#modes [value=duplicates]').hidden = !dataset.near_duplicate_groups && view.mode !== 'duplicates';
  one('#modes [value=failed]').hidden = !dataset.failed && view.mode !== 'failed';
  one('#modes').hidden = all('#modes button:not([hidden])').length < 2;
  one('#facts').replaceChildren(...Object.entries(dataset.facts).map(([name, fact]) =>
    make('div', {}, make('dt', {text: name}), make('dd', {text: fact}))));
  tally(dataset.choices);
  notes(dataset);
}

/** Commands to copy, for this dataset and for the expression that filters. */
function nextSteps() {
  const root = quoted(dataset.url);
  one('#next-commands').replaceChildren(...[
    ['Publish, with an index and shards of what nobody rejected:', `resmaster publish ${root} --curated`],
    ['Make the rejected samples anew, with a new seed (save choices.csv first):',
      `resmaster repair ${root} --redo choices.csv`],
    ['Build from the same prompts, without the rejected samples:', 'resmaster run CONFIG --exclude choices.csv'],
    ['Export what was kept as plain files:', `resmaster export ${root} FOLDER --as folder --where kept`],
    ...(view.where ? [['Reject all that the expression finds:',
      `resmaster curate ${root} --reject ${quoted(view.where)}`]] : []),
    ['List the rejected samples:', `resmaster status ${root} --list rejected`],
  ].flatMap(([words, command]) => [make('p', {text: words}), copyable(command)]));
}

function tally({kept, rejected, rated}) {
  one('#tally').textContent = kept + rejected + rated ?
    `${count(kept)} kept · ${count(rejected)} rejected · ${count(rated)} rated` : 'nothing chosen yet';
}

/** Show the mode's list, and press its button. */
function show() {
  for (const [mode, each] of Object.entries(lists)) each.scroller.hidden = each !== list();
  all('#modes button').forEach(button => button.setAttribute('aria-pressed', lists[button.value] === list()));
  document.body.dataset.mode = view.mode || 'all';
}

const LISTED = ['q', 'flag', 'verdict', 'rating', 'range', 'where', 'group', 'sort', 'mode'];

async function follow(changed) {
  if (LISTED.some(name => changed.has(name))) {
    show();
    filtersPart.whereError('');
    await list().restart(Number(view.at) || 0);
  }
  if (['compare', 'scaled'].some(name => changed.has(name)) && view.key) page.follow();
  if (!changed.has('key')) return;
  if (view.key) await openSample();
  else closed();
}

function said(total) {
  const noun = {duplicates: 'group', failed: 'failed sample'}[view.mode] ?? 'sample';
  const part = !view.mode && filtered();
  one('#count').textContent = part ? `${count(total)} of ${count(dataset.samples)}` : counted(total, noun);
  const nothing = total === 0;
  one('#empty').hidden = !nothing;
  if (!nothing) return;
  one('#empty p').textContent = view.mode === 'failed' ? 'No sample failed.' :
    view.mode === 'duplicates' ? 'No near-duplicates were found.' :
      dataset.samples ? 'No sample passes the filters.' : nobody();
  one('#empty .clear-all').hidden = !part;
  list().clear();
  list().spread();
}

function nobody() {
  const failed = dataset.failed ? ` ${counted(dataset.failed, 'sample')} failed.` : '';
  return `No sample has passed every stage yet.${failed}`;
}

function refused(error) {
  if (error.status === 400 && view.where) {
    filtersPart.whereError(error.message);
    one('#count').textContent = 'the expression cannot be read';
    list().clear();
    return;
  }
  note('unsaved', error.message);
}

function note(state, message) {
  one('#saved').dataset.state = state;
  one('#saved span').textContent = shown(message);
  one('#unsaved-csv').hidden = !unsaved() || state !== 'unsaved';
}

let resting;
function scrolled(first) {
  clearTimeout(resting);
  resting = setTimeout(() => { if (!view.key) change({at: String(first)}); }, SCROLL_REST_MS);
}

function moved(index) {
  if (view.key) return;
  clearTimeout(resting);
  change({at: String(index)});
}

// ---------------------------------------------------------------------------------------------------------------------
// one sample

function openAt(index, key) {
  list().mark(index);
  change({key, at: String(index)}, {push: !view.key});
}

async function openSample() {
  if (!document.body.classList.contains('opened')) opener = document.activeElement;
  document.body.classList.add('opened');
  one('#lists').inert = true;
  one('#sample').hidden = false;
  one('#sample').focus({preventScroll: true});
  list().pause();
  const index = Number(view.at) || 0;
  const inGrid = !view.mode;
  const known = inGrid ? lists[''].known(index) : undefined;
  const shownNumber = inGrid && known?.key === view.key ? lists[''].total : 0;
  await page.open(view.key, known, index, shownNumber);
  if (inGrid) page.expect(lists[''].known(index + 1));
}

function closed() {
  document.body.classList.remove('opened');
  one('#lists').inert = false;
  page.close();
  list().select(list().current);
  (opener?.isConnected && opener !== document.body ? opener : list().scroller).focus({preventScroll: true});
}

function close() {
  if (history.state?.pushed) history.back();
  else change({key: ''});
}

async function step(by) {
  if (!view.key) return list().select(list().current + by);
  if (view.mode) return undefined;
  const index = (Number(view.at) || 0) + by;
  const sample = await list().item(index);
  if (!sample) return page.says(`This is the ${by > 0 ? 'last' : 'first'} sample of the list.`);
  list().mark(index);
  list().show(index);
  return change({key: sample.key, at: String(index)});
}

// ---------------------------------------------------------------------------------------------------------------------
// choices

/** The sample that a key is about: the open one, or the current one of the grid. */
function current() {
  if (view.key) return page.sample;
  return view.mode ? null : lists[''].known(lists[''].current);
}

function decide(verdict, {advance = false} = {}) {
  const sample = current();
  if (!sample) return;
  choose([sample], {verdict: !advance && choiceOf(sample).verdict === verdict ? 'none' : verdict});
  if (advance) step(1);
}

function rate(rating) {
  const sample = current();
  if (sample) choose([sample], {rating});
}

function clearChoice() {
  const sample = current();
  if (sample) choose([sample], {verdict: 'none', rating: null, reason: ''});
}

async function takeBack() {
  const [key] = undo();
  if (!key) return note('saved', 'nothing to undo');
  const [index] = [...lists[''].drawn.keys()].filter(number => lists[''].known(number)?.key === key);
  if (view.key && !view.mode) change({key, ...(index === undefined ? {} : {at: String(index)})});
  else if (!view.mode && index !== undefined) lists[''].select(index);
  return undefined;
}

let refreshing;
function chosen({keys, tally: counts, state, message, saved}) {
  if (counts) tally(counts);
  one('#undo').hidden = !undoable();
  if (state) note(state, message);
  for (const [index, element] of lists[''].drawn) {
    const sample = lists[''].known(index);
    if (sample && keys.includes(sample.key)) mark(element, sample);
  }
  if (saved && followsChoices() && !view.mode) {
    clearTimeout(refreshing);
    refreshing = setTimeout(refresh, REFRESH_MS);
  }
}

/** The list follows choices: what does not belong there any more leaves it, and the current sample stays current. */
async function refresh() {
  const key = view.key || lists[''].known(lists[''].current)?.key;
  await lists[''].refresh(key);
  if (view.key && lists[''].known(lists[''].current)?.key === view.key) change({at: String(lists[''].current)});
}

// ---------------------------------------------------------------------------------------------------------------------
// buttons and keys

function buttons() {
  for (const button of all('#modes button')) {
    button.addEventListener('click', () => change({mode: button.value, key: ''}, {push: true}));
  }
  const fold = open => {
    document.body.classList.toggle('filtering', open);
    one('#filters-button').setAttribute('aria-expanded', open);
  };
  one('#filters-button').addEventListener('click', () => fold(!document.body.classList.contains('filtering')));
  one('#filters-close').addEventListener('click', () => fold(false));
  one('#help-button').addEventListener('click', () => one('#help').showModal());
  one('#next-button').addEventListener('click', () => {
    nextSteps();
    one('#next').showModal();
  });
  for (const dialog of all('dialog')) {
    dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
    one('.close', dialog).addEventListener('click', () => dialog.close());
  }
  one('#undo').addEventListener('click', () => takeBack());
  one('#unsaved-csv').addEventListener('click', () => {
    const href = URL.createObjectURL(new Blob([unsavedCsv()], {type: 'text/csv'}));
    make('a', {href, download: 'choices-not-saved.csv'}).click();
    setTimeout(() => URL.revokeObjectURL(href), 10_000);
  });
}

function keyboard() {
  const across = by => view.key ? step(by) : list().select(list().current + by);
  const open = () => {
    if (view.key) return false;
    if (view.mode === 'failed') return false;
    const item = list().known(list().current);
    if (item) openAt(list().current, item.key);
    return undefined;
  };
  const escape = () => {
    if (view.key) return close();
    if (small.matches && document.body.classList.contains('filtering')) return one('#filters-close').click();
    return false;
  };
  listen({
    j: () => step(1), k: () => step(-1), right: () => across(1), left: () => across(-1),
    down: () => view.key ? step(1) : list().select(list().current + list().columns),
    up: () => view.key ? step(-1) : list().select(list().current - list().columns),
    x: () => decide('rejected', {advance: true}),
    a: () => view.mode === 'duplicates' && !view.key ? list().keepFirst() : decide('kept', {advance: true}),
    u: takeBack, 0: clearChoice,
    ...Object.fromEntries([1, 2, 3, 4, 5].map(number => [number, () => rate(number)])),
    Enter: open, Escape: escape,
    '/': () => {
      if (view.key) return false;
      if (small.matches) document.body.classList.add('filtering');
      return one('#find').focus();
    },
    f: () => view.key ? page.zoom.fit() : false,
    z: () => view.key ? page.zoom.oneToOne() : false,
    s: () => view.key ? page.swap() : false,
    c: () => view.key ? change({compare: page.curtained ? 'pair' : 'curtain'}) : false,
    '?': () => one('#help').showModal(),
  });
}

start();
