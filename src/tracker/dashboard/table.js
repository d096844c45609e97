// A table whose rows the tracker searches, sorts and cuts into pages: the same for ten rows and for a million.

import { count, element, put, the, whole } from './words.js';

const ROWS = 25;
const TYPING = 200;
const AGAIN = 2000;

// Tells a screen reader what somebody's own doing changed; what changes by itself is not told.
export function say(text) {
  the('said').textContent = text;
}

export class Table {
  // `of`: its name in ids and in the URL; `thing`: what a row is; `make` gives a row's cells, `keep` what may change.
  constructor(of, thing, { key, make, update }) {
    Object.assign(this, { of, thing, key, make, update, offset: 0, total: 0, matching: 0, asked: 0, shown: '' });
    this.form = the(`${of}-form`);
    this.table = the(`${of}-table`);
    this.body = this.table.tBodies[0];
    this.rows = new Map();
    this.form.addEventListener('submit', (event) => event.preventDefault());
    this.form.addEventListener('input', () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.turn(0), TYPING);
    });
    for (const button of this.table.querySelectorAll('th button')) {
      button.addEventListener('click', () => this.sort(button));
    }
    this.pager();
  }

  sort(button) {
    const head = button.closest('th');
    const order = head.getAttribute('aria-sort') === 'ascending' ? 'descending' : 'ascending';
    for (const other of this.table.querySelectorAll('th[aria-sort]')) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', order);
    this.turn(0);
  }

  query(offset) {
    const head = this.table.querySelector('th[aria-sort]');
    const query = new URLSearchParams({ limit: ROWS, offset, sort: head.querySelector('button').dataset.sort });
    if (head.getAttribute('aria-sort') === 'descending') query.set('descending', 'true');
    for (const [name, value] of new FormData(this.form)) if (value !== '') query.set(name, value);
    return query;
  }

  pager() {
    const button = (text, step) => {
      const made = element('button', { type: 'button' }, text);
      made.addEventListener('click', () => this.turn(this.offset + step * ROWS));
      return made;
    };
    this.back = button('Previous', -1);
    this.next = button('Next', 1);
    this.page = element('input', { type: 'number', min: 1, inputmode: 'numeric', 'aria-label': `Page of ${this.of}` });
    this.page.addEventListener('change', () => this.turn((Number(this.page.value) - 1) * ROWS));
    this.pages = element('span');
    this.found = element('span');
    the(`${this.of}-pager`).append(this.back, this.next, element('label', {}, 'Page ', this.page), this.pages, this.found);
  }

  // Goes to a page because somebody asked for it, or to the last: which that is, the tracker knows.
  async turn(offset) {
    clearTimeout(this.typing);
    if (!(await this.load(Math.max(0, offset || 0)))) return;
    const page = this.offset / ROWS + 1;
    this.page.value = page;
    say(`${count(this.matching, this.thing)}, page ${page} of ${whole(Math.max(1, Math.ceil(this.matching / ROWS)))}`);
  }

  // Looks again now and then.
  tick() {
    if (performance.now() - this.asked > AGAIN && !this.busy) this.load();
  }

  // True if it came to show the answer.
  async load(offset = this.offset) {
    this.asked = performance.now();
    this.asking?.abort();
    this.asking = new AbortController();
    this.busy = true;
    try {
      const answer = await fetch(`/api/${this.of}?${this.query(offset)}`, { signal: this.asking.signal });
      if (!answer.ok) throw new Error(await answer.text());
      this.show(await answer.text());
      this.busy = false;
      return true;
    } catch (error) {
      if (error.name === 'AbortError') return false;
      this.busy = false;
      put(this.found, `not answered: ${error.message.trim()}`);
      return false;
    }
  }

  show(text) {
    if (text === this.shown) return;
    this.shown = text;
    const { rows, total, matching, offset } = JSON.parse(text);
    Object.assign(this, { total, matching, offset });
    this.fill(rows);
    const pages = Math.max(1, Math.ceil(matching / ROWS));
    if (document.activeElement !== this.page) this.page.value = this.offset / ROWS + 1;
    this.page.max = pages;
    put(this.pages, `of ${whole(pages)}`);
    put(this.found, matching === total ? count(total, this.thing) : `${whole(matching)} of ${count(total, this.thing)} match`);
    this.back.disabled = this.offset === 0;
    this.next.disabled = this.offset + ROWS >= matching;
  }

  // Keeps the rows that are still there, so that focus and selection stay.
  fill(rows) {
    const kept = new Map();
    let at = this.body.firstChild;
    for (const row of rows) {
      const key = this.key(row);
      const tr = this.rows.get(key) ?? this.make(row);
      this.update(tr, row);
      kept.set(key, tr);
      for (const node of [tr, tr.detail]) {
        if (!node) continue;
        if (node === at) at = at.nextSibling;
        else this.body.insertBefore(node, at);
      }
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
    if (rows.length === 0) this.body.append(element('tr', {}, element('td', { colspan: this.table.tHead.rows[0].cells.length, class: 'quiet' }, 'Nothing matches.')));
    this.rows = kept;
  }
}
