// Requests to the server. Addresses are relative: they carry the page's token.

/** The server's answer was an error; the message is its sentence. `status` is 0 if the server gave no answer. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(address, options) {
  let answer;
  try {
    answer = await fetch(address, {cache: 'no-store', ...options});
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refused('the server does not answer: is `resmaster view` still running?', 0);
  }
  if (answer.ok) return answer.json();
  const said = await answer.json().catch(() => ({}));
  const unknown = `the server answered ${answer.status}: open the address that it prints`;
  throw new Refused(said.error || unknown, answer.status);
}

/** GET api/NAME. parameters: a URLSearchParams or an object. */
export function get(name, parameters = {}, signal = undefined) {
  const query = new URLSearchParams(parameters).toString();
  return ask(`api/${name}${query && `?${query}`}`, {signal});
}

/** POST api/NAME with a JSON body. */
export function post(name, body) {
  return ask(`api/${name}`, {
    method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body),
  });
}

const image = (sample, side) => `image/${encodeURIComponent(sample.key)}/${side}`;
const version = sample => `?v=${encodeURIComponent(sample.v ?? '')}`;

export const thumb = (sample, side, px) => `${image(sample, side)}/thumb/${px}${version(sample)}`;
export const file = (sample, side) => `${image(sample, side)}/file${version(sample)}`;
export const tile = (sample, side, level, x, y) => `${image(sample, side)}/tile/${level}/${x}_${y}${version(sample)}`;
