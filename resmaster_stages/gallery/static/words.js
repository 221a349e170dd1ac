// Numbers and commands as words.

const WHOLE = new Intl.NumberFormat('en');

/** `100,000` */
export const count = number => WHOLE.format(number);

/** `1 sample`, `311 samples` */
export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? '' : 's'}`;

/** A metric's value by its column's Python format, such as `{:.1f} dB` or `{:.2%}`; a dash if there is none. */
export function value(number, form) {
  if (typeof number !== 'number' || !Number.isFinite(number)) return '–';
  return form.replace(/\{:\.(\d+)([f%])\}/, (_, digits, kind) =>
    kind === '%' ? `${(100 * number).toFixed(digits)}%` : number.toFixed(digits));
}

/** `number` with four significant digits and no needless zeros. */
export const plain = number => String(Number(Number(number).toPrecision(4)));

/** A word of a shell's command line. */
export const quoted = word => /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
