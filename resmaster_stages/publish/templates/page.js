// The page is complete without this script, which adds sorting, filters, the slider, full size and Copy.
document.documentElement.classList.add('js');

const all = (selector, element = document) => [...element.querySelectorAll(selector)];
const one = (selector, element = document) => element.querySelector(selector);
const cards = all('.card');
const searched = new Map(cards.map(card => {
  const texts = all('.prompt, .key, .flags, .patches', card).map(element => element.textContent);
  return [card, texts.join(' ').toLowerCase()];
}));

function show() {
  const words = one('#find').value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = one('#flag').value;
  let shown = 0;
  for (const card of cards) {
    const flags = card.dataset.flags.split(' ').filter(Boolean);
    const flagged = {'': true, '*': flags.length > 0, '-': !flags.length}[wanted] ?? flags.includes(wanted);
    card.hidden = !(flagged && words.every(word => searched.get(card).includes(word)));
    shown += !card.hidden;
  }
  const noun = cards.length === 1 ? 'sample' : 'samples';
  one('.count').textContent = shown === cards.length ? `${shown} ${noun}` : `${shown} of ${cards.length}`;
}

function sort() {
  const [name, sign] = one('#sort').value.split(' ');
  const value = card => card.dataset[name] === '' ? Infinity : sign * card.dataset[name];  // unknown: last
  cards.sort((a, b) => value(a) - value(b) || a.dataset.index - b.dataset.index);
  one('.cards').append(...cards);
}

function view(name) {
  document.body.classList.toggle('slide', name === 'slide');
  all('.switch button').forEach(button => button.setAttribute('aria-pressed', button.value === name));
}

function copy(button) {
  getSelection().selectAllChildren(button.previousElementSibling);
  if (document.execCommand('copy')) button.textContent = 'Copied';  // navigator.clipboard: not in a file
}

all('.command button').forEach(button => button.addEventListener('click', () => copy(button)));

if (cards.length) {
  one('#find').addEventListener('input', show);
  one('#flag').addEventListener('change', show);
  one('#sort').addEventListener('change', sort);
  all('.switch button').forEach(button => button.addEventListener('click', () => view(button.value)));

  all('.reveal').forEach(range => range.addEventListener('input', () => {
    range.closest('.pair').style.setProperty('--at', `${range.value}%`);
  }));

  // Under the pointer, a patch caption moves its sample's marks from the most detailed place to the patch.
  all('.patches li').forEach(patch => {
    const marks = all('.pair .mark', patch.closest('.card'));
    patch.addEventListener('mouseenter', () => marks.forEach(mark => {
      mark.dataset.home ??= mark.style.cssText;
      mark.style.cssText = patch.dataset.box;
    }));
    patch.addEventListener('mouseleave', () => marks.forEach(mark => { mark.style.cssText = mark.dataset.home; }));
  });

  const dialog = one('dialog');
  const enlarge = image => {
    one('img', dialog).src = image.src;
    dialog.showModal();
  };
  all('.high img').forEach(image => image.addEventListener('click', () => enlarge(image)));
  all('.reveal').forEach(range => range.addEventListener('dblclick', () => enlarge(one('img', range.parentElement))));
  dialog.addEventListener('click', () => dialog.close());
  show();
}
