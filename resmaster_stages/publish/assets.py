"""Style and script of the report page, as text, so that the page is one file that opens anywhere. Knows nothing about data.

Invariants: nothing is loaded from outside; the page is complete and readable without the script.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f5f1; --card: #fffefb; --ink: #22241f; --soft: #6d6f66; --line: #dfddd3;
  --accent: #2f6b57; --warn: #9a4a12; --warn-paper: #fbeadb; --shadow: 0 1px 2px #0000000d, 0 8px 24px #0000000a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161714; --card: #1f211d; --ink: #e9e8e1; --soft: #9c9e93; --line: #34372f;
    --accent: #86c9b0; --warn: #f0b382; --warn-paper: #3a2818; --shadow: none;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
main, .top, footer { max-width: 1560px; margin: 0 auto; padding: 0 clamp(1rem, 3vw, 2.5rem); }
.top { padding-top: clamp(1.75rem, 4vw, 3.25rem); }
h1 { margin: 0; font: 500 clamp(1.8rem, 3.6vw, 2.7rem)/1.15 Georgia, "Iowan Old Style", "Noto Serif", serif; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font: 500 1.35rem/1.3 Georgia, "Iowan Old Style", "Noto Serif", serif; }
.lead { margin: .5rem 0 0; color: var(--soft); max-width: 46rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .9rem 2rem; margin: 1.6rem 0 0; padding: 1.1rem 0; border-block: 1px solid var(--line); }
.facts div { min-width: 0; }
dt { color: var(--soft); font-size: .78rem; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.bar { display: none; flex-wrap: wrap; gap: .6rem .9rem; align-items: center; margin: 0 -.5rem; padding: .8rem .5rem; background: var(--paper); border-bottom: 1px solid var(--line); font-size: .9rem; }
.js .bar { display: flex; }
@media (min-width: 48rem) and (min-height: 40rem) { .bar { position: sticky; top: 0; z-index: 5; } }
.bar label { display: flex; gap: .45rem; align-items: center; color: var(--soft); }
.bar input, .bar select { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .34rem .6rem; }
.bar input { width: 15rem; max-width: 60vw; }
.switch { display: inline-flex; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; background: var(--card); }
.switch button { font: inherit; padding: .34rem .8rem; border: 0; background: none; color: var(--soft); cursor: pointer; }
.switch button[aria-pressed=true] { background: var(--accent); color: var(--paper); }
.count { margin-left: auto; color: var(--soft); font-variant-numeric: tabular-nums; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 31rem), 1fr)); gap: 1.5rem; margin: 1.5rem 0 0; align-items: start; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.1rem; box-shadow: var(--shadow); min-width: 0; }
.pair, .zoom { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
.zoom { margin-top: .6rem; }
figure { margin: 0; min-width: 0; }
.frame { position: relative; display: block; overflow: hidden; border-radius: 8px; background: var(--line); }
.frame img { display: block; width: 100%; height: 100%; object-fit: cover; }
figcaption { margin-top: .25rem; color: var(--soft); font-size: .78rem; }
.mark { position: absolute; border: 1.5px solid #fff; outline: 1.5px solid #0009; border-radius: 2px; pointer-events: none; }
.reveal { display: none; }
.slide .pair { grid-template-columns: 1fr; }
.slide .pair figure { grid-area: 1 / 1; }
.slide .pair .low { z-index: 1; pointer-events: none; }
.slide .pair .low .frame { clip-path: inset(0 calc(100% - var(--at, 50%)) 0 0); border-radius: 8px 0 0 8px; }
.slide .pair .high figcaption { text-align: right; }
.slide .reveal { display: block; position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.slide .high .frame::after { content: ""; position: absolute; z-index: 2; inset: 0 auto 0 var(--at, 50%); width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 0 1px #0005; pointer-events: none; }
.slide .high:has(.reveal:focus-visible) .frame { outline: 2px solid var(--accent); outline-offset: 2px; }
.js body:not(.slide) .high img { cursor: zoom-in; }
.prompt { margin: .9rem 0 0; font: 1.08rem/1.45 Georgia, "Iowan Old Style", "Noto Serif", serif; overflow-wrap: anywhere; }
.key { color: var(--soft); font: .74rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.flags { display: flex; flex-wrap: wrap; gap: .35rem; margin: .5rem 0 0; padding: 0; list-style: none; }
.flags li { padding: .08rem .6rem; border-radius: 99px; background: var(--warn-paper); color: var(--warn); font-size: .8rem; }
.metrics { display: grid; grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); gap: .5rem .9rem; margin: .9rem 0 0; }
details { margin-top: .9rem; border-top: 1px solid var(--line); padding-top: .6rem; }
summary { cursor: pointer; color: var(--soft); font-size: .88rem; }
.patches { margin: .5rem 0 0; padding: 0; list-style: none; font-size: .88rem; max-height: 21rem; overflow: auto; }
.patches li { display: grid; grid-template-columns: 3.2rem 1fr; gap: .5rem; padding: .22rem .3rem; border-radius: 6px; overflow-wrap: anywhere; }
.patches li:hover { background: var(--paper); }
.patches span { color: var(--soft); font-variant-numeric: tabular-nums; }
.patches em { color: var(--warn); font-style: normal; font-size: .78rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; }
td:nth-child(-n+3) { white-space: nowrap; }
td:first-child { font: .8rem ui-monospace, "DejaVu Sans Mono", monospace; }
.command { display: flex; gap: .5rem; align-items: baseline; margin-top: .7rem; color: var(--soft); font-size: .78rem; }
.command code { font: .74rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; user-select: all; min-width: 0; }
.command button { display: none; font: inherit; color: var(--accent); background: none; border: 0; padding: 0 .2rem; cursor: pointer; }
.js .command button { display: inline; }
.none { padding: 3rem 0; color: var(--soft); }
footer { padding-block: 2.5rem; color: var(--soft); font-size: .85rem; }
dialog { border: 0; padding: 0; background: none; max-width: 98vw; max-height: 98vh; overflow: auto; }
dialog img { display: block; cursor: zoom-out; }
dialog::backdrop { background: #000c; }
[hidden] { display: none !important; }
@media print { .bar { display: none !important; } .card { break-inside: avoid; box-shadow: none; } }
"""

SCRIPT = """
document.documentElement.classList.add('js');
const all = (s, e = document) => [...e.querySelectorAll(s)], one = (s, e = document) => e.querySelector(s);
const cards = all('.card'), grid = one('.cards'), count = one('.count');
const text = new Map(cards.map(c => [c, all('.prompt, .key, .flags, .patches', c).map(e => e.textContent).join(' ').toLowerCase()]));
function show() {
  const words = one('#find').value.toLowerCase().split(/\\s+/).filter(Boolean), flag = one('#flag').value;
  let n = 0;
  for (const c of cards) {
    const flags = c.dataset.flags.split(' ').filter(Boolean);
    const ok = words.every(w => text.get(c).includes(w)) && (!flag || (flag === '-' ? !flags.length : flag === '*' ? flags.length : flags.includes(flag)));
    c.hidden = !ok; n += ok;
  }
  count.textContent = n === cards.length ? n + (n === 1 ? ' sample' : ' samples') : n + ' of ' + cards.length;
}
function sort() {
  const [name, sign] = one('#sort').value.split(' ');
  const value = c => c.dataset[name] === '' ? Infinity : sign * c.dataset[name];
  cards.sort((a, b) => value(a) - value(b) || a.dataset.index - b.dataset.index).forEach(c => grid.append(c));
}
function mode(slide) {
  document.body.classList.toggle('slide', slide);
  all('.switch button').forEach(b => b.setAttribute('aria-pressed', (b.value === 'slide') === slide));
}
all('.command button').forEach(b => b.addEventListener('click', () => {
  getSelection().selectAllChildren(b.previousElementSibling);
  if (document.execCommand('copy')) b.textContent = 'Copied';
}));
if (grid) {
  one('#find').addEventListener('input', show);
  one('#flag').addEventListener('change', show);
  one('#sort').addEventListener('change', sort);
  all('.switch button').forEach(b => b.addEventListener('click', () => mode(b.value === 'slide')));
  all('.reveal').forEach(r => r.addEventListener('input', () => r.closest('.pair').style.setProperty('--at', r.value + '%')));
  all('.patches li').forEach(li => {
    const marks = all('.pair .mark', li.closest('.card'));
    li.addEventListener('mouseenter', () => marks.forEach(m => { m.dataset.home ??= m.style.cssText; m.style.cssText = li.dataset.box; }));
    li.addEventListener('mouseleave', () => marks.forEach(m => { m.style.cssText = m.dataset.home; }));
  });
  const dialog = one('dialog');
  all('.high img').forEach(img => img.addEventListener('click', () => { one('img', dialog).src = img.src; dialog.showModal(); }));
  dialog.addEventListener('click', () => dialog.close());
  show();
}
"""
