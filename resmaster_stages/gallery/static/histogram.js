// The histogram of one metric, with a brush: a drag over it lets only values of the dragged range pass.

import {get} from './api.js';
import {copyable, make, one} from './dom.js';
import {change, filters, range, setRange, view} from './state.js';
import {count, plain, value} from './words.js';

const BINS = 40;
const HEIGHT_PX = 64;
const CLICK_PX = 4;  // a shorter drag is a click
const PAUSE_MS = 120;

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A series of bars, each as wide as its bin. */
function bars(name) {
  const paths = uPlot.paths.bars({size: [1], align: 1, gap: 1});
  return {fill: () => colour(name), width: 0, points: {show: false}, paths};
}

/** Square roots: bins of a few samples stay visible beside bins of thousands. */
const height = number => Math.sqrt(number);

export class Histogram {
  /** column: a row of api/dataset. thresholds: those of the column. total: samples of the dataset. */
  constructor(column, thresholds, total) {
    Object.assign(this, {column, total, plot: null, controller: null});
    this.low = this.end('least', 0);
    this.high = this.end('most', 1);
    this.area = make('div', {class: 'plot'});
    this.note = make('p', {class: 'note'});
    this.clear = make('button', {
      type: 'button', class: 'plain', text: 'Clear', click: () => setRange(column.name, null, null),
    });
    this.element = make('section', {class: 'histogram', 'aria-label': `Values of ${column.label}`},
      make('header', {}, make('h3', {title: column.meaning, text: column.heading}), this.clear),
      this.area,
      make('div', {class: 'ends'}, this.low, make('span', {text: 'to'}), this.high),
      this.note,
      ...thresholds.map(threshold => this.slider(threshold)));
    this.brush();
    this.follow();
  }

  end(word, place) {
    const set = event => {
      const ends = range(this.column.name) ?? [null, null];
      ends[place] = event.target.value === '' ? null : Number(event.target.value);
      setRange(this.column.name, ...ends);
    };
    return make('input', {
      type: 'number', step: 'any', 'aria-label': `${word} ${this.column.label}`, change: set,
      placeholder: plain(place ? this.column.max : this.column.min),
    });
  }

  /** Show the range that the view holds. */
  follow() {
    const ends = range(this.column.name);
    this.low.value = ends?.[0] ?? '';
    this.high.value = ends?.[1] ?? '';
    this.clear.hidden = !ends;
    this.element.classList.toggle('filtered', Boolean(ends));
    if (!this.plot) return;
    const [low, high] = ends ?? [null, null];
    const x = at => this.plot.valToPos(at, 'x');
    const left = low === null ? 0 : Math.max(0, x(low));
    const right = high === null ? this.plot.over.clientWidth : Math.min(this.plot.over.clientWidth, x(high));
    this.plot.setSelect(ends ? {left, width: Math.max(1, right - left), top: 0, height: HEIGHT_PX}
      : {left: 0, width: 0, top: 0, height: 0}, false);
  }

  /** Ask for the counts of the filtered samples, and draw them over those of all. Own ranges do not filter. */
  async load() {
    this.controller?.abort();
    this.controller = new AbortController();
    const parameters = filters('range');
    const others = view.range.filter(each => !each.startsWith(`${this.column.name}:`));
    others.forEach(each => parameters.append('range', each));
    parameters.set('column', this.column.name);
    parameters.set('bins', BINS);
    try {
      this.show(await get('histogram', parameters, this.controller.signal));
    } catch (error) {
      if (error.name !== 'AbortError') this.note.textContent = error.message;
    }
  }

  show({edges, counts, all, missing}) {
    this.note.textContent = missing ? `${count(missing)} without a value` : '';
    if (!counts.length) return;
    const x = [...edges];
    const data = [x, [...all.map(height), null], [...counts.map(height), null]];
    const most = Math.max(1, ...data[1]);
    this.edges = edges;
    if (this.plot) {
      this.plot.setData(data, false);
      this.plot.setScale('y', {min: 0, max: most});
      this.plot.setScale('x', {min: x[0], max: x.at(-1)});
    } else {
      this.plot = new uPlot({
        width: this.area.clientWidth || 240, height: HEIGHT_PX, padding: [0, 0, 0, 0], legend: {show: false},
        cursor: {show: false}, select: {show: true}, axes: [{show: false}, {show: false}],
        scales: {x: {time: false, range: [x[0], x.at(-1)]}, y: {range: (plot, low, high) => [0, high || 1]}},
        series: [{}, bars('--bar'), bars('--accent')],
      }, data, this.area);
      matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.plot.redraw());
      new ResizeObserver(() => {
        const width = this.area.clientWidth;
        if (width) this.plot.setSize({width, height: HEIGHT_PX});
      }).observe(this.area);
    }
    this.follow();
  }

  brush() {
    let from = null;
    const at = event => {
      const {left, width} = this.plot.over.getBoundingClientRect();
      return Math.max(0, Math.min(width, event.clientX - left));
    };
    this.area.addEventListener('pointerdown', event => {
      if (!this.plot || event.button !== 0) return;
      from = at(event);
      this.area.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    this.area.addEventListener('pointermove', event => {
      if (from === null) return;
      const to = at(event);
      this.plot.setSelect({left: Math.min(from, to), width: Math.abs(to - from), top: 0, height: HEIGHT_PX}, false);
    });
    this.area.addEventListener('pointerup', event => {
      if (from === null) return;
      const ends = [from, at(event)].sort((a, b) => a - b);
      from = null;
      if (ends[1] - ends[0] < CLICK_PX) setRange(this.column.name, null, null);
      else setRange(this.column.name, ...ends.map(end => Number(plain(this.plot.posToVal(end, 'x')))));
      this.follow();
    });
    this.area.addEventListener('pointercancel', () => { from = null; this.follow(); });
  }

  /** A threshold as a slider that says what it would flag. */
  slider(threshold) {
    const {field, side, flag} = threshold;
    const {min, max} = this.column;
    const [low, high] = [Math.min(min ?? 0, threshold.value), Math.max(max ?? 1, threshold.value)];
    const step = 10 ** Math.floor(Math.log10((high - low || 1) / 100));
    const input = make('input', {
      type: 'range', min: low, max: high, step: 'any', value: threshold.value, 'aria-label': field,
    });
    const says = make('output', {class: 'note'});
    const show = make('button', {type: 'button', class: 'plain', text: 'Show them'});
    const line = copyable('');
    let timer, controller, at = threshold.value;
    const where = () => `${this.column.name} ${side === 'below' ? '<' : '>'} ${at}`;
    const ask = async () => {
      controller?.abort();
      controller = new AbortController();
      try {
        const {total} = await get('count', {where: where()}, controller.signal);
        says.textContent = `${field} ${at} would flag ${count(total)} of ${count(this.total)}`;
      } catch (error) {
        if (error.name !== 'AbortError') says.textContent = error.message;
      }
    };
    const moved = () => {
      const exact = Number(input.value);
      at = exact === threshold.value ? exact : Number(plain(Math.round(exact / step) * step));
      says.textContent = `${field} ${at} would flag …`;
      one('code', line).textContent = `quality: {${field}: ${at}}`;
      input.setAttribute('aria-valuetext', value(at, this.column.form));
      clearTimeout(timer);
      timer = setTimeout(ask, PAUSE_MS);
    };
    input.addEventListener('input', moved);
    show.addEventListener('click', () => change({where: where()}));
    const element = make('div', {class: 'threshold', title: `${side} this value a sample gets the flag ${flag}`},
      input, says, make('div', {class: 'row'}, show, line));
    element.start = moved;
    return element;
  }

  /** Ask for what the thresholds flag, once the histogram is in sight. */
  start() {
    for (const element of this.element.querySelectorAll('.threshold')) element.start();
  }
}
