// Elements of the page. Texts become text nodes, never HTML, and characters that act unseen become visible escapes.

export const one = (selector, element = document) => element.querySelector(selector);
export const all = (selector, element = document) => [...element.querySelectorAll(selector)];

const JOINED = '\\u0590-\\u1fff\\u2190-\\u2bff\\u2e80-\\ud7ff\\uf900-\\ufefc\\u{10000}-\\u{10ffff}';
const UNSEEN = new RegExp(
  '[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u206f' +
  '\\xad\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b\\u2060-\\u2065\\u3164\\ufeff\\uffa0\\ufff0-\\ufffb' +
  '\\u{1bca0}-\\u{1bca3}\\u{1d173}-\\u{1d17a}\\u{e0000}-\\u{e0fff}]' +
  `|(?<![${JOINED}])[\\u200c\\u200d]|[\\u200c\\u200d](?![${JOINED}])`, 'gu');  // as in redaction.py

function spelled(character) {
  const code = character.codePointAt(0);
  if (code < 0x100) return `\\x${code.toString(16).padStart(2, '0')}`;
  return code < 0x10000 ? `\\u${code.toString(16).padStart(4, '0')}` : `\\U${code.toString(16).padStart(8, '0')}`;
}

/** `value` as readers see it: tabs and line breaks are blanks, and what acts unseen is a visible escape. */
export function shown(value) {
  return String(value ?? '').replace(/[\t\n\r]/g, ' ').replace(UNSEEN, spelled);
}

/** A new element. Attributes are set as text; `text`, `class` and functions (listeners) by their names. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'text') element.textContent = shown(value);
    else if (typeof value === 'function') element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, shown(value));
  }
  element.append(...children);
  return element;
}

/** The first element of the page's template `id`, as a new copy. */
export function copyOf(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

/** A command or another line with its Copy button. */
export function copyable(line) {
  const element = copyOf('command-part');
  one('code', element).textContent = shown(line);
  return element;
}

/** Names of flags as chips. meanings: name -> what the flag says. */
export function flagChips(names, meanings) {
  return names.map(name => {
    const chip = copyOf('flag-part');
    chip.textContent = shown(name).replaceAll('_', ' ');
    chip.title = shown(meanings[name] ?? '');
    return chip;
  });
}

document.addEventListener('click', async event => {
  const button = event.target.closest?.('.command button');
  if (!button) return;
  getSelection().selectAllChildren(button.previousElementSibling);
  const copied = await navigator.clipboard?.writeText(button.previousElementSibling.textContent).then(
    () => true, () => false) || document.execCommand('copy');
  if (!copied) return;
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 2000);
});
