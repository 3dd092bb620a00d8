// The live stream of the coordinator: one connection for each visible page. It comes back by itself, and says so, so that
// the page can ask anew for what it missed. A page that nobody sees lets go of its connection: browsers allow few of them
// to one host, and other pages need theirs.

/** Wait between attempts after the coordinator refused or is gone. */
const RETRY_MS = 1000;
/** A page hidden for longer than this lets go, and looks from time to time instead, for its title. */
const HIDDEN_MS = 20_000;
/** The coordinator says something at least every 10 s; a stream that is silent for longer is dead. */
const SILENCE_MS = 25_000;

const EVENTS = ['cluster', 'runs', 'steps', 'eval', 'timeline', 'sample', 'reload'];

/** The page's connection to the coordinator. */
export class Live {
  #source = null;
  #runs = null;
  #retry = 0;
  #hiding = 0;
  #heard = 0;
  #handlers;

  /**
   * @param {{event: (kind: string, data: *) => void, open: (first: boolean) => void, lost: () => void, glance: () => void}} handlers
   *   `open` is called whenever a connection is new: unless it is the first, what was shown before may be old
   */
  constructor(handlers) {
    this.#handlers = handlers;
    document.addEventListener('visibilitychange', () => this.#visibility());
    setInterval(() => this.#check(), 5000);
  }

  /** Whether the stream flows. */
  get connected() {
    return this.#source?.readyState === EventSource.OPEN;
  }

  /** Connects for these runs, unless it is connected for them already. @param {string[]} runs */
  watch(runs) {
    const same = this.#source && this.#runs.join() === runs.join();
    this.#runs = runs;
    if (!same) this.#connect(true);
  }

  /** Stops for good, until it watches again. */
  stop() {
    this.#runs = null;
    this.close();
  }

  /** Lets go. */
  close() {
    clearTimeout(this.#retry);
    this.#source?.close();
    this.#source = null;
  }

  #connect(first = false) {
    this.close();
    const query = new URLSearchParams(this.#runs.map((run) => ['run', run]));
    const source = new EventSource(`/api/live?${query}`);
    this.#source = source;
    this.#heard = performance.now();
    source.addEventListener('open', () => {
      this.#heard = performance.now();
      this.#handlers.open(first);
    });
    source.addEventListener('error', () => this.#failed(source));
    for (const kind of EVENTS) {
      source.addEventListener(kind, (message) => {
        this.#heard = performance.now();
        this.#handlers.event(kind, JSON.parse(message.data));
      });
    }
  }

  #failed(source) {
    if (source !== this.#source) return;
    this.#handlers.lost();
    // What is missed is asked for anew, so there is nothing to continue; and a browser's own wait is long.
    source.close();
    this.#source = null;
    clearTimeout(this.#retry);
    this.#retry = setTimeout(() => this.#connect(), RETRY_MS);
  }

  #check() {
    const silent = this.connected && performance.now() - this.#heard > SILENCE_MS;
    if (silent) this.#failed(this.#source);
  }

  #visibility() {
    clearInterval(this.#hiding);
    if (document.hidden) {
      this.#hiding = setInterval(() => {
        this.close();
        this.#handlers.glance();
      }, HIDDEN_MS);
    } else if (!this.#source && this.#runs !== null) this.#connect();
  }
}
