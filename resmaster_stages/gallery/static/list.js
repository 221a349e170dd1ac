// A list of any length in an element that scrolls: it draws what is in sight, and asks for pages as they come there.

const TALLEST_PX = 12_000_000;  // browsers cut taller elements; a longer list scrolls in proportion
const SPARE_ROWS = 2;
const KEPT_PAGES = 40;
const RETRY_MS = 3000;
const PAUSE_MS = 60;  // a page that is flung past is not asked for

export class List {
  /**
   * scroller: the element that scrolls. options:
   *   load(offset, limit, signal) -> {total, items}; draw(item, index) -> element; blank() -> element
   *   cell(width) -> {columns, height}: how many fit, and how high one is with its gap; gap: px
   *   counted(total), failed(error), moved(index): called with what happened
   */
  constructor(scroller, options) {
    Object.assign(this, {scroller, options, pages: new Map(), drawn: new Map(), total: null, current: 0});
    this.space = scroller.appendChild(document.createElement('div'));
    this.space.className = 'space';
    this.frame = 0;
    this.width = 0;
    scroller.addEventListener('scroll', () => this.later());
    new ResizeObserver(() => this.resized()).observe(scroller);
  }

  get limit() { return this.options.limit ?? 100; }
  get rows() { return Math.ceil((this.total ?? 0) / this.columns); }
  get tall() { return this.rows * this.height; }
  get inside() { return this.scroller.clientHeight; }

  measure() {
    const {columns, height} = this.options.cell(this.space.clientWidth);
    Object.assign(this, {columns, height, width: this.space.clientWidth});
  }

  /** Start anew with the item of number `at` in sight. */
  async restart(at = 0) {
    this.stop();
    this.total = null;
    this.measure();
    this.current = at;
    const start = Math.floor(at / this.limit) * this.limit;
    const page = await this.page(start / this.limit);
    if (!page) return;
    this.clear();
    this.current = Math.max(0, Math.min(at, this.total - 1));
    this.spread();
    this.show(this.current, 'top');
    this.draw();
  }

  /** Forget the pages and ask for what is in sight again. The item with the key stays in its place on the screen. */
  async refresh(key) {
    const before = this.top();
    const was = this.current;
    this.stop();
    const first = Math.max(0, Math.floor((was - this.limit) / this.limit));
    let found = -1;
    for (let number = first; found < 0 && number <= Math.floor(was / this.limit); number += 1) {
      const page = await this.page(number);
      if (!page) return;
      const place = page.items.findIndex(item => item.key === key);
      if (place >= 0) found = number * this.limit + place;
    }
    this.current = Math.max(0, Math.min(found >= 0 ? found : was, this.total - 1));
    this.clear();
    this.spread();
    const moved = Math.floor(this.current / this.columns) - Math.floor(was / this.columns);
    this.scrollTo(before + moved * this.height);
    this.draw();
    this.options.moved?.(this.current);
  }

  stop() {
    for (const page of this.pages.values()) page.controller?.abort();
    for (const page of this.pages.values()) clearTimeout(page.timer);
    this.pages.clear();
  }

  clear() {
    for (const element of this.drawn.values()) this.drop(element);
    this.drawn.clear();
  }

  drop(element) {
    for (const image of element.querySelectorAll('img')) image.removeAttribute('src');  // ends its request
    element.dispatchEvent(new Event('dropped'));
    element.remove();
  }

  /** Let images that are still on their way wait: requests for something else go first. */
  pause() {
    for (const [index, element] of this.drawn) {
      if ([...element.querySelectorAll('img[src]')].every(image => image.complete)) continue;
      this.drop(element);
      this.drawn.delete(index);
    }
  }

  /** The item of number `index`, or null if there is none. */
  async item(index) {
    if (index < 0 || (this.total !== null && index >= this.total)) return null;
    const page = await this.page(Math.floor(index / this.limit));
    return page?.items[index % this.limit] ?? null;
  }

  /** The item of number `index` if it is there already. */
  known(index) { return this.pages.get(Math.floor(index / this.limit))?.items?.[index % this.limit]; }

  page(number) {
    const known = this.pages.get(number);
    if (known?.answer) return known.answer;
    clearTimeout(known?.timer);
    const controller = new AbortController();
    const page = {controller};
    page.answer = this.options.load(number * this.limit, this.limit, controller.signal).then(answer => {
      page.items = answer.items;
      page.controller = null;
      if (this.total !== answer.total) {
        this.total = answer.total;
        this.options.counted?.(answer.total);
        if (this.drawn.size) this.spread();
      }
      return page;
    }).catch(error => {
      if (this.pages.get(number) === page) this.pages.delete(number);
      if (error.name === 'AbortError') return null;
      this.options.failed?.(error);
      if (error.status === 0) setTimeout(() => this.draw(), RETRY_MS);
      return null;
    });
    this.pages.set(number, page);
    return page.answer;
  }

  spread() {
    this.space.style.height = `${Math.min(this.tall, TALLEST_PX)}px`;
  }

  /** Where the top of the sight is, in px of the whole list. */
  top() {
    const most = Math.min(this.tall, TALLEST_PX) - this.inside;
    if (this.tall <= TALLEST_PX || most <= 0) return this.scroller.scrollTop;
    return this.scroller.scrollTop / most * (this.tall - this.inside);
  }

  scrollTo(top) {
    const most = Math.min(this.tall, TALLEST_PX) - this.inside;
    this.scroller.scrollTop = this.tall <= TALLEST_PX ? top : top / (this.tall - this.inside) * most;
  }

  /** Scroll as far as it takes to see the item; place `top` puts its row first. */
  show(index, place = 'near') {
    const y = Math.floor(index / this.columns) * this.height;
    const top = this.top();
    if (place === 'top') this.scrollTo(y);
    else if (y < top) this.scrollTo(y);
    else if (y + this.height > top + this.inside) this.scrollTo(y + this.height - this.inside);
  }

  /** Make the item of number `index` the current one, and see that it is in sight. */
  select(index) {
    if (!this.total) return;
    this.mark(Math.max(0, Math.min(index, this.total - 1)));
    this.show(this.current);
    this.draw();
    this.options.moved?.(this.current);
  }

  mark(index) {
    this.current = index;
    for (const [number, element] of this.drawn) element.setAttribute('aria-selected', number === index);
    this.scroller.setAttribute('aria-activedescendant', `${this.scroller.id}-${index}`);
  }

  /** The number of the first item in sight. */
  first() {
    const last = Math.max(0, (this.total ?? 1) - 1);
    return Math.min(Math.ceil((this.top() - 1) / this.height) * this.columns, last);
  }

  later() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
      if (this.total !== null && this.inside) this.options.scrolled?.(this.first());
    });
  }

  resized() {
    if (this.total === null || !this.space.clientWidth || this.space.clientWidth === this.width) return this.later();
    const first = this.first();
    this.measure();
    this.clear();
    this.spread();
    this.show(first, 'top');
    return this.draw();
  }

  draw() {
    if (this.total === null || !this.height || !this.inside) return;
    const top = this.top();
    const shift = top - this.scroller.scrollTop;
    const from = Math.max(0, Math.floor(top / this.height) - SPARE_ROWS) * this.columns;
    const to = Math.min(this.total, (Math.ceil((top + this.inside) / this.height) + SPARE_ROWS) * this.columns);
    for (const [index, element] of this.drawn) {
      if (index >= from && index < to && (element.filled || !this.known(index))) continue;
      this.drop(element);
      this.drawn.delete(index);
    }
    for (let index = from; index < to; index += 1) {
      const element = this.drawn.get(index) ?? this.add(index);
      element.style.top = `${Math.floor(index / this.columns) * this.height - shift}px`;
    }
    this.want(Math.floor(from / this.limit), Math.floor(Math.max(from, to - 1) / this.limit));
  }

  add(index) {
    const item = this.known(index);
    const element = item ? this.options.draw(item, index) : this.options.blank();
    element.filled = Boolean(item);
    element.id = `${this.scroller.id}-${index}`;
    element.setAttribute('aria-setsize', this.total);
    element.setAttribute('aria-posinset', index + 1);
    element.setAttribute('aria-selected', index === this.current);
    element.style.left = `${100 * (index % this.columns) / this.columns}%`;
    element.style.width = `calc(${100 / this.columns}% - ${this.options.gap}px)`;
    element.style.height = `${this.height - this.options.gap}px`;
    this.drawn.set(index, element);
    this.space.append(element);
    return element;
  }

  /** Draw the item of number `index` anew, if it is drawn. */
  redraw(index) {
    const element = this.drawn.get(index);
    if (!element) return;
    this.drop(element);
    this.drawn.delete(index);
    this.draw();
  }

  want(first, last) {
    for (const [number, page] of this.pages) {
      if (number >= first - 1 && number <= last + 1) continue;
      page.controller?.abort();
      clearTimeout(page.timer);
      if (!page.items || this.pages.size > KEPT_PAGES) this.pages.delete(number);
    }
    for (let number = first; number <= last && this.total; number += 1) {
      if (this.pages.has(number)) continue;
      const page = {};
      page.timer = setTimeout(() => {
        this.page(number).then(answer => answer && this.draw());
      }, PAUSE_MS);
      this.pages.set(number, page);
    }
  }
}
