// The keyboard. Keys never act while somebody types into a field.

const NAMES = {ArrowDown: 'down', ArrowUp: 'up', ArrowLeft: 'left', ArrowRight: 'right'};
const FIELDS = 'input:not([type=range]):not([type=checkbox]), textarea, select, [contenteditable]';

/** Call actions[name]() for keys: letters, digits, `Enter`, `Escape`, `/`, `?`, `down`, `up`, `left`, `right`. */
export function listen(actions) {
  addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (event.target.matches?.(FIELDS)) {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    if (document.querySelector('dialog[open]')) return;
    if (event.key === 'Enter' && event.target.matches?.('a, button, summary, [role=option] *')) return;
    if (event.target.matches?.('input[type=range]') && event.key in NAMES) return;
    const action = actions[NAMES[event.key] ?? (event.key.length === 1 ? event.key.toLowerCase() : event.key)];
    if (!action || action() === false) return;
    event.preventDefault();
  });
}
