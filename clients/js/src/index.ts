/**
 * What the user of a page may do, as Gatehouse enforces it.
 *
 * `createPermissions` fetches the user's permission list, keeps it current and answers `can` from it. What the
 * list does not say is denied: while it loads, after an error, after it has expired, for an unknown word. The
 * list decides what a page shows; what a request may do is decided where the request is.
 *
 * @module
 */

/**
 * The place for the types of a tenant's catalogue. Declarations that `gatehouse-permissions-types` writes extend
 * it, and then `can` accepts no other words.
 */
// biome-ignore lint/suspicious/noEmptyInterface: it is extended by declarations
export interface Register {}

/** Actions by resource type; any strings, unless `Register` is extended. */
export type Catalog = Register extends { catalog: infer C } ? C : Record<string, string>;

export type TypeOf<C> = keyof C & string;
export type ActionOf<C, T extends TypeOf<C>> = C[T] & string;

/** One resource of a type. */
export interface Instance<T extends string = string> {
  readonly type: T;
  readonly id: string;
}

/** A type as a whole, or one resource of it. */
export type Resource<T extends string = string> = T | Instance<T>;

/** A question about one resource. */
export type Item<C = Catalog> = {
  [T in TypeOf<C>]: { readonly action: ActionOf<C, T>; readonly resource: Instance<T> };
}[TypeOf<C>];

/** The permission list, as the server sends it. */
export interface List {
  readonly version: string;
  readonly tenant?: string;
  readonly subject: { readonly type: string; readonly id: string };
  readonly revision?: unknown;
  /** Some questions could not be answered; what they ask is denied. */
  readonly incomplete?: boolean;
  /** What is allowed: actions by type. */
  readonly permissions: Readonly<Record<string, readonly string[]>>;
}

/** An immutable picture of what is known. */
export interface State {
  /**
   * - `loading`: nothing is known yet.
   * - `ready`: the list is there.
   * - `stale`: the server cannot be asked; the last good list holds until it expires.
   * - `denied`: there is no list. The credential was refused, the list has expired, or there never was one.
   */
  readonly status: "loading" | "ready" | "stale" | "denied";
  readonly list: List | null;
  /** Why the last request failed. */
  readonly error: Error | null;
}

/** What `dehydrate` gives and `hydrate` takes: plain JSON. */
export interface Dehydrated {
  readonly list: List;
  readonly etag: string;
  /** Milliseconds since 1970. */
  readonly expires: number;
  readonly answers: readonly (readonly [string, boolean])[];
}

/** What is used of an `EventSource`. */
export interface EventStream {
  onopen: ((event: Event) => void) | null;
  onerror: ((event: Event) => void) | null;
  addEventListener(type: string, listener: (event: MessageEvent) => void): void;
  close(): void;
}

/** Names and values. */
export type HeaderMap = Readonly<Record<string, string>>;

export interface Options {
  /** Of the list: `/t/orders/v1/me/permissions`. Relative to the page. */
  url: string | URL;
  /** Sent with each request, for example `authorization`. A function is called for each. */
  headers?: HeaderMap | (() => HeaderMap | Promise<HeaderMap>);
  /** As for `fetch`; `include` where the server is of another origin and reads a cookie. Default: `same-origin`. */
  credentials?: RequestCredentials;
  /** Default: the global one. */
  fetch?: typeof fetch;
  /**
   * Opens the stream of events. Default: the global `EventSource`, which sends cookies and no headers; see
   * `fetchStream` for one that sends them. `false`: no stream, the list is asked for when the page is shown again.
   */
  eventSource?: false | ((url: string) => EventStream);
  /** How long the last good list holds, in milliseconds, where the server does not say. Default: five minutes. */
  keep?: number;
  /** What `dehydrate` gave on the server. */
  initial?: Dehydrated | null;
}

export interface Permissions<C = Catalog> {
  /** The same object until something changes. */
  readonly state: State;
  /** Resolves when the first request is answered or has failed. It is never rejected. */
  readonly ready: Promise<void>;
  /**
   * Reports whether the user may. About a type the list answers; about one resource the last answer to a `check`
   * that asked it does, and until there is one the answer is no.
   */
  can<T extends TypeOf<C>>(action: ActionOf<C, T>, resource: Resource<T>): boolean;
  /**
   * Asks the server about single resources; `false` where it could not be asked. Calls of one turn are one request.
   * The answers are remembered for `can`, and asked again when the list changes.
   */
  check(items: readonly Item<C>[]): Promise<boolean[]>;
  /** Calls the listener after each change, until the function that it returns is called. */
  subscribe(listener: () => void): () => void;
  /** Asks for the list now. Resolves when it is there or has failed. */
  refresh(): Promise<void>;
  /** What a page rendered on a server hands to its browser; `null` while there is no list. */
  dehydrate(): Dehydrated | null;
  hydrate(from: Dehydrated): void;
  /** Ends the stream and all requests to come. From then on everything is denied. */
  close(): void;
}

/** The server answered with this status, and not with a list. */
export class StatusError extends Error {
  constructor(readonly status: number) {
    super(`the server answered with status ${status}`);
  }
}

const TIMEOUT = 10_000; // of a request
const HIDDEN = 30_000; // a page hidden for so long leaves the stream
const QUIET = 2_000; // a stream that does not say the version by then has its list asked for
const BATCH = 100; // questions in a request
const REMEMBERED = 1_000; // answers about single resources
const LONGEST = 2 ** 31 - 1; // that a timer can wait

/** About half a second, then twice as long each time, up to a minute; never in step with other pages. */
const backoff = (tries: number) => Math.min(60_000, 1_000 * 2 ** tries) * (0.5 + Math.random() / 2);

/** A timer that keeps no process alive. */
const later = (f: () => void, ms: number) => {
  const timer: unknown = setTimeout(f, Math.min(ms, LONGEST));
  (timer as { unref?(): void }).unref?.();
  return timer as number;
};

const keyOf = (action: string, of: Instance) => JSON.stringify([action, of.type, of.id]);

const listOf = (value: unknown): List => {
  const list = value as List;
  if (
    typeof list?.version !== "string" ||
    typeof list.subject?.id !== "string" ||
    typeof list.permissions !== "object" ||
    !Object.values(list.permissions ?? [0]).every(Array.isArray)
  )
    throw new TypeError("the answer is not a permission list");
  return list;
};

export function createPermissions<C = Catalog>(options: Options): Permissions<C> {
  const { headers, credentials = "same-origin", keep = 300_000 } = options;
  const page: Document | undefined = globalThis.document;
  const origin = globalThis.location?.origin;
  const address = new URL(options.url, globalThis.location?.href);
  const below = (name: string) => {
    const url = new URL(address);
    url.pathname += name;
    return url.href;
  };
  const source =
    options.eventSource ??
    (globalThis.EventSource
      ? (url: string) => new EventSource(url, { withCredentials: credentials === "include" })
      : false);

  let state: State = { status: "loading", list: null, error: null };
  let etag = "";
  let expires = 0;
  let closed = false;
  let paused = false;
  let failures = 0; // in a row
  let retry: number | undefined;
  let end: number | undefined;
  let hiding: number | undefined;
  let running: Promise<void> | undefined;
  let next: Promise<void> | undefined;
  let group = ""; // of pages that share a stream
  let leave: (() => void) | undefined;
  let settle: () => void;
  const ready = new Promise<void>((resolve) => {
    settle = resolve;
  });
  const listeners = new Set<() => void>();
  const answers = new Map<string, boolean>(); // :: question about one resource → last answer
  let waiting: { item: Item; resolve(answer: boolean): void }[] = [];

  const valid = () => (!closed && Date.now() < expires ? state.list : null);

  const become = (status: State["status"], list: List | null, error: Error | null) => {
    state = { status, list, error };
    for (const listener of [...listeners]) listener();
  };

  const send = async (url: string, more: HeaderMap, body?: string) => {
    const own = typeof headers === "function" ? await headers() : headers;
    return (options.fetch ?? fetch)(url, {
      ...(body ? { method: "POST", body } : null),
      headers: { accept: "application/json", ...own, ...more },
      credentials,
      // With a validator of our own the browser's cache must stay out of it: the 304 is ours.
      cache: more["if-none-match"] ? "no-store" : "no-cache",
      signal: AbortSignal.timeout(TIMEOUT),
    });
  };

  /** There is no list any more, and nothing to follow. */
  const drop = (error: Error | null) => {
    unfollow();
    clearTimeout(end);
    etag = "";
    for (const key of answers.keys()) answers.set(key, false);
    become("denied", null, error);
  };

  const accept = (list: List, tag: string, until: number) => {
    const old = state.list;
    etag = tag;
    expires = until;
    failures = 0;
    clearTimeout(end);
    // A little before the list expires the credential may have been renewed; ask, and let it go if not.
    const left = expires - Date.now();
    const early = Math.min(30_000, left / 10);
    end = later(() => {
      void refresh();
      end = later(() => drop(state.error), early);
    }, left - early);
    const same = old?.subject.id === list.subject.id && old.subject.type === list.subject.type;
    if (!same) for (const key of answers.keys()) answers.set(key, false);
    if (state.status !== "ready" || old?.version !== list.version) become("ready", list, null);
    else if (old !== list) state = { status: "ready", list, error: null };
    if (old?.version !== list.version) void check([...answers.keys()].map(itemOf));
    follow(list);
  };

  const load = async () => {
    clearTimeout(retry);
    try {
      // A header that a script sets costs a request of another origin a preflight: there the browser's cache asks.
      const ask = etag && valid() && (!origin || origin === address.origin || headers);
      const response = await send(address.href, ask ? { "if-none-match": etag } : {});
      if (!response.ok && response.status !== 304) {
        const wait = Number(response.headers.get("retry-after")) || 0;
        throw Object.assign(new StatusError(response.status), { wait: wait * 1_000 });
      }
      const list = response.status === 304 ? state.list : listOf(await response.json());
      if (closed) return;
      if (!list) throw new StatusError(304);
      const get = (name: string) => response.headers.get(name) ?? "";
      const left = Date.parse(get("expires")) - (Date.parse(get("date")) || Date.now());
      accept(list, get("etag") || (list === state.list ? etag : ""), Date.now() + (left > 0 ? left : keep));
    } catch (cause) {
      if (closed) return;
      const error = cause as Error & { status?: number; wait?: number };
      if (error.status === 401 || error.status === 403) drop(error);
      else {
        if (valid()) become("stale", state.list, error);
        else drop(error);
        if (!paused) retry = later(refresh, Math.max(backoff(failures++), error.wait ?? 0));
      }
    } finally {
      settle();
    }
  };

  /** One request at a time, and one more for all who ask meanwhile: what it brings is not older than their question. */
  const refresh = (): Promise<void> => {
    if (closed) return ready;
    next ??= (running ?? Promise.resolve()).then(() => {
      running = next;
      next = undefined;
      return load();
    });
    return next;
  };

  /** The list that the event tells of may be here already. */
  const hear = (version: unknown) => {
    if (version !== state.list?.version) void refresh();
  };

  /** Pages of one user share one stream: the one that holds the lock has it, and passes on what it hears. */
  const follow = (list: List) => {
    const name = `gatehouse ${address} ${list.subject.type} ${list.subject.id}`;
    if (!source || paused || name === group) return;
    unfollow();
    group = name;
    const locks = globalThis.navigator?.locks;
    if (!locks || !globalThis.BroadcastChannel) {
      leave = listen(hear);
      return;
    }
    const channel = new BroadcastChannel(name);
    const abort = new AbortController();
    let last: unknown; // version that the stream told of; not undefined only where the stream is
    channel.onmessage = ({ data }) => {
      if (data?.joined) last !== undefined && channel.postMessage({ version: last });
      else hear(data?.version);
    };
    // What was told between our answer and our joining is told again.
    channel.postMessage({ joined: true });
    locks
      .request(name, { signal: abort.signal }, () => {
        if (abort.signal.aborted) return;
        const stop = listen((version) => {
          last = version;
          channel.postMessage({ version });
          hear(version);
        });
        return new Promise<void>((release) => {
          abort.signal.addEventListener("abort", () => {
            stop();
            release();
          });
        });
      })
      .catch(() => {}); // we left before it was our turn
    leave = () => {
      abort.abort();
      channel.close();
    };
  };

  const unfollow = () => {
    leave?.();
    leave = undefined;
    group = "";
  };

  /** Keeps a stream open, and tells of each version that it brings; of null, where a new list must be asked for. */
  const listen = (tell: (version: string | null) => void) => {
    let stream: EventStream | undefined;
    let timer: number | undefined;
    let tries = 0;
    let stopped = false;
    const open = () => {
      if (stopped || !source) return;
      const current = source(below("/events"));
      stream = current;
      const heard = (event: MessageEvent) => {
        clearTimeout(timer);
        tries = 0;
        let version = null;
        try {
          version = JSON.parse(event.data).version;
        } catch {}
        tell(version);
      };
      current.onopen = () => {
        timer = later(() => tell(null), QUIET);
      };
      current.addEventListener("permissions", heard);
      current.addEventListener("message", heard);
      current.addEventListener("expired", () => tell(null));
      current.onerror = () => {
        current.close(); // its own attempts know no bound and no chance
        clearTimeout(timer);
        timer = later(async () => {
          if (tries > 1) await refresh(); // to hear whether the credential still holds
          open();
        }, backoff(tries++));
      };
    };
    open();
    return () => {
      stopped = true;
      clearTimeout(timer);
      stream?.close();
    };
  };

  const itemOf = (key: string): Item => {
    const [action, type, id] = JSON.parse(key);
    return { action, resource: { type, id } };
  };

  const check = (items: readonly Item[]) =>
    Promise.all(
      items.map(
        (item) =>
          new Promise<boolean>((resolve) => {
            if (closed) resolve(false);
            else if (waiting.push({ item, resolve }) === 1) queueMicrotask(ask);
          }),
      ),
    );

  const ask = async () => {
    const all = waiting;
    const version = state.list?.version;
    waiting = [];
    // Equal questions are one.
    const asked = new Map(all.map(({ item }) => [keyOf(item.action, item.resource), false]));
    const keys = [...asked.keys()];
    for (let i = 0; i < keys.length; i += BATCH) {
      const some = keys.slice(i, i + BATCH);
      try {
        const body = JSON.stringify({ items: some.map(itemOf) });
        const response = await send(below("/check"), { "content-type": "application/json" }, body);
        if (!response.ok) throw new StatusError(response.status);
        const { results } = await response.json();
        some.forEach((key, j) => {
          asked.set(key, results[j] === true);
        });
      } catch {} // not knowing is no
    }
    let changed = false;
    for (const [key, answer] of asked) {
      changed ||= answer !== (answers.get(key) ?? false);
      answers.delete(key); // the oldest is first
      answers.set(key, answer);
      if (answers.size > REMEMBERED) for (const first of answers.keys()) if (answers.delete(first)) break;
    }
    if (changed && !closed) become(state.status, state.list, state.error);
    // The list has changed meanwhile, and with it perhaps what was answered before.
    if (version !== state.list?.version) void check(keys.map(itemOf));
    for (const { item, resolve } of all) resolve(asked.get(keyOf(item.action, item.resource)) === true);
  };

  const hydrate = (from: Dehydrated) => {
    if (closed || !(from.expires > Date.now())) return;
    for (const [key, answer] of from.answers) answers.set(key, answer);
    accept(listOf(from.list), from.etag, from.expires);
    settle();
  };

  const pause = () => {
    paused = true;
    unfollow();
  };
  const shown = () => {
    clearTimeout(hiding);
    if (page?.hidden) hiding = later(pause, HIDDEN);
    else if (paused || !source || state.status === "stale" || state.status === "denied") {
      paused = false;
      void refresh();
    }
  };
  // A page that is put aside with an open stream could not be brought back as it was.
  const watched = [
    [page, "visibilitychange", shown],
    [page && globalThis, "pagehide", pause],
    [page && globalThis, "pageshow", () => paused && shown()],
    [page && globalThis, "online", shown],
  ] as const;
  for (const [target, name, f] of watched) target?.addEventListener?.(name, f);

  if (options.initial) hydrate(options.initial);
  if (!state.list || (page && !source)) void refresh();

  return {
    get state() {
      return state;
    },
    ready,
    can: (action, resource) => {
      const list = valid();
      if (!list) return false;
      if (typeof resource !== "string") return answers.get(keyOf(action, resource)) === true;
      return Object.hasOwn(list.permissions, resource) && !!list.permissions[resource]?.includes(action);
    },
    check: check as Permissions<C>["check"],
    subscribe: (listener) => {
      const own = () => listener(); // a listener may subscribe twice
      listeners.add(own);
      return () => {
        listeners.delete(own);
      };
    },
    refresh,
    dehydrate: () => {
      const list = valid();
      return list && { list, etag, expires, answers: [...answers] };
    },
    hydrate,
    close: () => {
      closed = true;
      unfollow();
      for (const timer of [retry, end, hiding]) clearTimeout(timer);
      for (const [target, name, f] of watched) target?.removeEventListener?.(name, f);
      become("denied", null, null);
      listeners.clear();
      settle();
    },
  };
}
