// One sample: both images with zoom, captions under the pointer, metrics, choices and commands.

import {file, get} from './api.js';
import {choiceOf, choose, onChoice} from './choices.js';
import {all, copyOf, copyable, flagChips, make, one, shown} from './dom.js';
import {mark} from './grid.js';
import {change, view} from './state.js';
import {count, counted, value} from './words.js';
import {Zoom, firstTile} from './zoom.js';

const WIDE = 1.8;  // wider images lie below each other, not side by side
const NOTES = {replaced: "a neighbour's caption", fallback: 'global prompt', empty: 'no answer: global prompt'};

function facts(values) {
  return Object.entries(values).filter(([, fact]) => fact !== null && fact !== undefined && fact !== '')
    .map(([name, fact]) => make('div', {}, make('dt', {text: name.replaceAll('_', ' ')}),
      make('dd', {text: typeof fact === 'object' ? JSON.stringify(fact) : fact})));
}

export class SamplePage {
  /** element: the page's part for one sample. acts: {next, previous, close, choose(verdict), rate(rating), undo} */
  constructor(element, dataset, acts) {
    Object.assign(this, {element, dataset, acts, sample: null, patches: [], controller: null});
    this.meanings = Object.fromEntries(dataset.flags.map(({name, meaning}) => [name, meaning]));
    this.zoom = new Zoom(one('.pair', element), {
      hovered: (x, y) => this.hover(x, y), left: () => this.point(null),
      zoomed: scale => { one('.scale', element).textContent = `${Math.round(100 * scale)}%`; },
      failed: side => this.says(`A tile of the ${side}-res image could not be read.`),
    });
    this.buttons();
    this.curtain();
    onChoice(({keys}) => { if (this.sample && keys.includes(this.sample.key)) this.chosen(); });
  }

  buttons() {
    const click = (name, act) => one(`[data-act=${name}]`, this.element).addEventListener('click', act);
    click('close', () => this.acts.close());
    click('next', () => this.acts.next());
    click('previous', () => this.acts.previous());
    click('undo', () => this.acts.undo());
    click('fit', () => this.zoom.fit());
    click('one', () => this.zoom.oneToOne());
    click('swap', () => this.swap());
    click('curtain', () => change({compare: this.curtained ? 'pair' : 'curtain'}));
    click('smooth', () => change({scaled: view.scaled === 'pixels' ? '' : 'pixels'}));
    for (const button of all('.verdicts button', this.element)) {
      button.addEventListener('click', () => this.acts.choose(button.value));
    }
    for (const button of all('.rating button', this.element)) {
      button.addEventListener('click', () => {
        const rating = Number(button.value);
        this.acts.rate(choiceOf(this.sample).rating === rating ? null : rating);
      });
    }
    one('.reason', this.element).addEventListener('change', event => {
      choose([this.sample], {reason: event.target.value});
    });
  }

  /** A curtain between both images, moved by its handle or by the arrow keys. */
  curtain() {
    const pair = one('.pair', this.element);
    const range = one('.curtain', this.element);
    const move = at => {
      range.value = at;
      pair.style.setProperty('--at', `${at}%`);
    };
    const handle = one('.handle', this.element);
    handle.addEventListener('pointerdown', event => {
      handle.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    handle.addEventListener('pointermove', event => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const {left, width} = pair.getBoundingClientRect();
      move(Math.max(0, Math.min(100, 100 * (event.clientX - left) / width)));
    });
    range.addEventListener('input', () => move(range.value));
    move(50);
  }

  get curtained() {
    return (view.compare || (matchMedia('(max-width: 48rem)').matches ? 'curtain' : 'pair')) === 'curtain';
  }

  /** Show the images as the view says: curtain or side by side, smooth or pixelated. */
  follow() {
    const pair = one('.pair', this.element);
    if (pair.classList.contains('slide') !== this.curtained) {
      this.zoom.resize(() => pair.classList.toggle('slide', this.curtained));
    }
    one('[data-act=curtain]', this.element).setAttribute('aria-pressed', this.curtained);
    one('[data-act=smooth]', this.element).setAttribute('aria-pressed', view.scaled === 'pixels');
    this.zoom.smoothing(view.scaled !== 'pixels');
  }

  fit() { this.zoom.fit(); }

  swap() { one('.pair', this.element).classList.toggle('swapped'); }

  /** Show the sample of a key. known: its row of the list, if it is there; number, total: its place in the list. */
  async open(key, known, number, total) {
    this.element.hidden = false;
    this.controller?.abort();
    this.controller = new AbortController();
    one('.place', this.element).textContent = total ? `${count(number + 1)} of ${count(total)}` : '';
    this.follow();
    if (known?.key === key) this.fill(known);
    try {
      const sample = await get(`sample/${encodeURIComponent(key)}`, {}, this.controller.signal);
      if (this.sample?.key !== key || this.sample.v !== sample.v) this.fill(sample);
      this.sample = sample;
      this.more(sample);
    } catch (error) {
      if (error.name !== 'AbortError') this.says(error.message);
    }
  }

  close() {
    this.controller?.abort();
    this.element.hidden = true;
    this.sample = null;
    this.zoom.close();
  }

  says(message) { one('.says', this.element).textContent = shown(message); }

  fill(sample) {
    this.sample = sample;
    this.says('');
    this.point(null);
    one('.pair', this.element).classList.toggle('stacked', sample.width > WIDE * sample.height);
    this.zoom.open(sample);
    const text = (selector, words) => { one(selector, this.element).textContent = shown(words); };
    text('.low figcaption span', `low-res, ${sample.low_width} × ${sample.low_height}`);
    text('.high figcaption span', `high-res, ${sample.width} × ${sample.height}`);
    for (const side of ['low', 'high']) one(`.${side} figcaption a`, this.element).href = file(sample, side);
    text('.prompt', sample.prompt || 'no prompt');
    text('.negative', sample.negative_prompt ? `negative prompt: ${sample.negative_prompt}` : '');
    text('.key', sample.key);
    one('.flags', this.element).replaceChildren(...flagChips(sample.flags, this.meanings));
    one('.flag-meanings', this.element).replaceChildren(...sample.flags.map(name => make('p', {
      text: `${name.replaceAll('_', ' ')}: ${this.meanings[name] ?? 'not a flag of this version'}`,
    })));
    this.metrics(sample);
    this.patches = [];
    for (const part of ['.patches', '.of-high', '.of-low', '.commands', '.near']) {
      one(part, this.element).replaceChildren();
    }
    one('.caption-count', this.element).textContent = '';
    this.chosen();
  }

  metrics(sample) {
    const measured = this.dataset.columns.filter(column => sample.quality[column.name] !== undefined);
    one('.metrics', this.element).replaceChildren(...measured.map(column => {
      const part = copyOf('metric-part');
      part.title = shown(column.meaning);
      one('dt', part).textContent = shown(column.heading);
      one('dd', part).textContent = value(sample.quality[column.name], column.form);
      return part;
    }));
  }

  chosen() {
    mark(this.element, this.sample);
    const {rating, reason, verdict} = choiceOf(this.sample);
    one('.reason', this.element).value = reason;
    for (const button of all('.verdicts button', this.element)) {
      button.setAttribute('aria-pressed', button.value === verdict);
    }
    for (const button of all('.rating button', this.element)) {
      button.setAttribute('aria-pressed', Number(button.value) === rating);
      button.classList.toggle('on', Number(button.value) <= (rating ?? 0));
    }
  }

  /** What only the sample's own request tells. */
  more(sample) {
    this.captions(sample);
    one('.of-high', this.element).replaceChildren(...facts({'dataset index': sample.index, shard: sample.shard,
      replica: sample.replica || null, source: sample.source, ...sample.facts}));
    one('.of-low', this.element).replaceChildren(...facts(sample.low_facts ?? {}));
    one('.commands', this.element).replaceChildren(...Object.values(sample.commands ?? {}).map(copyable));
    const others = (sample.group ?? []).filter(key => key !== sample.key);
    one('.near', this.element).replaceChildren(...(others.length ? [make('button', {
      type: 'button', class: 'plain', text: `${counted(others.length, 'near-duplicate')} of this image`,
      click: () => change({mode: '', key: '', group: sample.group[0], at: '0'}, {push: true}),
    })] : []));
  }

  captions(sample) {
    const {captions: rows = [], captions_width: width, captions_height: height} = sample;
    this.patches = rows.map(row => ({
      row,
      box: {x: row.x0 / width, y: row.y0 / height, width: (Math.min(row.x1, width) - row.x0) / width,
        height: (Math.min(row.y1, height) - row.y0) / height},
    }));
    for (const patch of this.patches) {
      const {row, col, caption, status, fit} = patch.row;
      const part = copyOf('patch-part');
      one('span', part).textContent = shown(`${row}, ${col}`);
      one('div', part).append(shown(caption), ' ', make('em', {text: status === 'ok' ? '' : NOTES[status] ?? status}));
      part.title = typeof fit === 'number' ? `how well it fits the patch: ${fit.toFixed(1)}` : '';
      part.tabIndex = 0;
      for (const name of ['pointerenter', 'focus', 'click']) part.addEventListener(name, () => this.point(patch));
      for (const name of ['pointerleave', 'blur']) part.addEventListener(name, () => this.point(null));
      patch.element = part;
    }
    one('.patches', this.element).replaceChildren(...this.patches.map(patch => patch.element));
    one('.caption-count', this.element).textContent = rows.length ?
      `${counted(rows.length, 'patch caption')} (row, column)` : 'no patch captions';
  }

  /** Of the patches under a place of the image (patches overlap), the one whose centre is nearest. */
  hover(x, y) {
    const distance = ({box}) => Math.hypot(box.x + box.width / 2 - x, box.y + box.height / 2 - y);
    const inside = ({box}) => x >= box.x && y >= box.y && x < box.x + box.width && y < box.y + box.height;
    const under = this.patches.filter(inside);
    this.point(under.sort((a, b) => distance(a) - distance(b))[0] ?? null);
  }

  /** Outline a patch in both images and show its caption; null for none. */
  point(patch) {
    if (patch === this.pointed) return;
    this.pointed?.element?.classList.remove('on');
    this.pointed = patch;
    patch?.element.classList.add('on');
    const line = one('.under', this.element);
    line.hidden = !patch;
    line.textContent = patch ? shown(patch.row.caption) : '';
    this.zoom?.box(patch?.box ?? null);
  }

  /** Ask for the first tiles of a sample that is likely to be opened next. */
  expect(sample) {
    if (sample) this.expected = ['low', 'high'].map(side => Object.assign(new Image(), {src: firstTile(sample, side)}));
  }
}
