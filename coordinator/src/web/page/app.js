// The page as a whole: which part is shown for an address, the stream that feeds it, colours, and the way back after the
// coordinator was gone. The parts know each other only by what `show` and `feed` call.

import { getRuns, session, signOut } from './api.js';
import { ComparePage } from './compare.js';
import { h, setText, toast } from './dom.js';
import { Live } from './live.js';
import { RunPage } from './run.js';
import { RunsPage } from './runs.js';
import { SignIn } from './signin.js';

const main = document.getElementById('main');
const banner = document.getElementById('banner');
const link = document.getElementById('link');

/** What the parts may use: the cluster and the runs as last heard, the coordinator's clock, and ways to go elsewhere. */
const app = {
  cluster: null,
  runs: null,
  skew: 0,
  now: () => Date.now() + app.skew,
  go: (address) => {
    history.pushState(null, '', address);
    show();
  },
  rewatch: () => live.watch(page.runs),
  retitle: () => {
    const title = `${page.title()} – Cohort`;
    if (document.title !== title) document.title = title;
  },
};

let page = null;
let lost = false;
/** The first answers for the page that is shown. */
let settling = null;

const live = new Live({ event: feed, open: streaming, lost: disconnected, glance });

// --- pages

/** The part of the page for an address. */
function pageFor({ pathname, search }) {
  const run = pathname.match(/^\/runs\/([^/]+)\/?$/);
  if (run) return new RunPage(app, decodeURIComponent(run[1]));
  if (pathname === '/compare') return new ComparePage(app, [...new Set(new URLSearchParams(search).getAll('run'))]);
  return new RunsPage(app);
}

/** Shows the part that the address names. */
function show(next = pageFor(location)) {
  const first = page === null;
  page?.dispose();
  page = next;
  main.replaceChildren(page.element);
  for (const anchor of document.querySelectorAll('.top nav a')) {
    const here = anchor.getAttribute('href') === location.pathname;
    if (here) anchor.setAttribute('aria-current', 'page');
    else anchor.removeAttribute('aria-current');
  }
  app.retitle();
  if (!first) {
    scrollTo(0, 0);
    page.element.querySelector('h1')?.focus({ preventScroll: true });
  }
  if (page.runs === null) {
    live.stop();
    page.open();
    return;
  }
  // What is known already does not wait for the stream.
  settling = opened();
  if (app.cluster) page.event('cluster', app.cluster);
  if (app.runs) page.event('runs', app.runs);
  live.watch(page.runs);
}

addEventListener('popstate', () => show());
document.addEventListener('click', (e) => {
  const anchor = e.target.closest?.('a[href^="/"]');
  if (!anchor || e.button !== 0 || e.metaKey || e.ctrlKey || e.shiftKey || e.altKey) return;
  e.preventDefault();
  app.go(anchor.getAttribute('href'));
});

// --- the stream

/** The stream is new. Unless nothing can have changed, what was shown before may be old by now. @param {boolean} first */
async function streaming(first) {
  const shown = page;
  if (first) await settling;
  if (page !== shown) return;
  if (first && page.rests()) connected();
  else await opened();
}

async function opened() {
  const shown = page;
  try {
    await shown.open();
    if (live.connected) connected();
  } catch (error) {
    if (page === shown) await troubled(error);
  }
}

function connected() {
  lost = false;
  banner.hidden = true;
  document.body.dataset.link = 'live';
  showLink('live');
  app.retitle();
}

/** A request failed although the stream was open. */
async function troubled(error) {
  if (error.status === 401) return check();
  if (error.status === 404) {
    live.stop();
    link.replaceChildren();
    main.replaceChildren(h('article', {}, h('h1', { tabindex: '-1' }, 'Not here'), h('p', { class: 'error' }, error.message), h('p', {}, h('a', { href: '/' }, 'All runs'))));
    return;
  }
  say(`Something could not be read: ${error.message}. Trying again…`);
  setTimeout(opened, 1000);
}

/** Nobody sees the page; only its title is kept true. */
function glance() {
  if (page.runs !== null) getRuns().then((runs) => feed('runs', runs), () => {});
}

/** The stream is gone; it tries again by itself. */
function disconnected() {
  document.body.dataset.link = 'lost';
  showLink('no connection');
  if (lost) return;
  lost = true;
  say('The coordinator does not answer. What you see is as it was; this page goes on by itself when it is back.');
  check();
}

/** Says how the connection is, beside the dot. */
function showLink(text) {
  link.replaceChildren(h('span', { class: 'long' }, text));
}

function say(text) {
  banner.hidden = false;
  setText(banner, text);
}

function feed(kind, data) {
  if (kind === 'cluster') {
    app.cluster = data;
    app.skew = data.now_ms - Date.now();
  }
  if (kind === 'runs') app.runs = data;
  page.event(kind, data);
}

// --- the session

const out = document.getElementById('sign-out');
out.addEventListener('click', async () => {
  try {
    await signOut();
  } catch (error) {
    return toast(`Signing out: ${error.message}`, 'bad');
  }
  Object.assign(app, { cluster: null, runs: null });
  history.pushState(null, '', '/');
  return check();
});

/** Asks whether a token is wanted, and shows the form if so. @returns {Promise<boolean>} whether the page may go on */
async function check() {
  try {
    const { required, signed_in: signedIn, may_act: mayAct } = await session();
    out.hidden = !required || !signedIn;
    // Who only looks on has no buttons.
    document.documentElement.classList.toggle('onlooker', !mayAct);
    if (!required || signedIn) return true;
  } catch {
    // It is gone altogether; the stream waits for it.
    return true;
  }
  banner.hidden = true;
  link.replaceChildren();
  lost = false;
  if (!(page instanceof SignIn)) {
    show(new SignIn(async () => {
      if (await check()) show();
    }));
  }
  return false;
}

// --- colours

const themes = ['auto', 'light', 'dark'];
const themeButton = document.getElementById('theme');
const root = document.documentElement;

function colour(theme) {
  if (theme === 'auto') delete root.dataset.theme;
  else root.dataset.theme = theme;
  setText(themeButton.lastChild, theme);
  page?.recolor();
}

themeButton.addEventListener('click', () => {
  const next = themes[(themes.indexOf(root.dataset.theme ?? 'auto') + 1) % themes.length];
  try {
    localStorage.setItem('cohort-theme', next);
  } catch {
    // Storage may be forbidden; the choice holds for this page then.
  }
  colour(next);
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => page?.recolor());

colour(root.dataset.theme ?? 'auto');
if (await check()) show();
