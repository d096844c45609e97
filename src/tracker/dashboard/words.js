// Numbers, times and names as people read them, and the making of elements. Names and addresses come from strangers:
// they become text nodes and attribute values, never markup, and what nobody could see in them is spelled out.

const UNITS = ['KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB'];

// As the command line writes sizes: binary, one decimal from 1 KiB up.
export function size(bytes) {
  if (bytes < 1024) return `${Math.round(bytes)} B`;
  let unit = 1024;
  for (const name of UNITS) {
    const tenths = Math.floor((bytes * 10 + unit / 2) / unit);
    if (tenths < 10240 || name === 'EiB') return `${Math.floor(tenths / 10)}.${tenths % 10} ${name}`;
    unit *= 1024;
  }
}

export const rate = (bytes) => `${size(bytes)}/s`;
export const whole = (n) => n.toLocaleString('en-US');
export const count = (n, thing, many = `${thing}s`) => `${whole(n)} ${n === 1 ? thing : many}`;
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString('en-GB');
export const date = (seconds) => new Date(seconds * 1000).toLocaleString('en-GB', { dateStyle: 'medium', timeStyle: 'short' });

// The two largest units, as the command line writes spans.
export function span(seconds) {
  let rest = Math.max(0, Math.round(seconds));
  const units = [['d', 86400], ['h', 3600], ['min', 60], ['s', 1]];
  const first = Math.max(0, units.findIndex(([, length]) => rest >= length || length === 1));
  const parts = units.slice(first, first + 2).map(([unit, length]) => {
    const n = Math.floor(rest / length);
    rest %= length;
    return [n, unit];
  });
  return parts.filter(([n], i) => i === 0 || n > 0).map(([n, unit]) => `${whole(n)} ${unit}`).join(' ');
}

// A word as a shell wants it.
export const quoted = (word) => (/^[\w./:=@%+,-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

// Controls, directions, unassigned and invisible characters.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}\u034f\u115f\u1160\u3164\uffa0]/gu;
const spelled = (c) => `\\u{${c.codePointAt(0).toString(16)}}`;

export const plain = (text) => text.replace(UNSEEN, spelled);

// A stranger's text as an element of its own direction.
export function name(text, attributes = {}) {
  const shown = element('bdi', attributes);
  let from = 0;
  for (const found of text.matchAll(UNSEEN)) {
    shown.append(text.slice(from, found.index), element('span', { class: 'ctl' }, spelled(found[0])));
    from = found.index + found[0].length;
  }
  shown.append(text.slice(from));
  return shown;
}

function made(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value === true ? '' : value);
  }
  node.append(...children);
  return node;
}

export const element = (tag, attributes = {}, ...children) => made(document.createElement(tag), attributes, children);
export const drawn = (tag, attributes = {}, ...children) =>
  made(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);
export const the = (id) => document.getElementById(id);

// Sets a text only if it differs, so that screen readers and selections are left alone.
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A bar of `part` in 0..1.
export function bar(part, kind, width = 56) {
  const full = Math.round(Math.min(1, Math.max(0, part)) * width * 10) / 10;
  return drawn('svg', { class: 'bar', width, height: 6, 'aria-hidden': true },
    drawn('rect', { width, height: 6, rx: 3 }),
    drawn('rect', { width: full, height: 6, rx: 3, class: kind }));
}
