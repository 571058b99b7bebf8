import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";
import { createPermissions } from "@gatehouse-authz/permissions";
import { fetchStream } from "@gatehouse-authz/permissions/stream";
import { startServer, until } from "./server.js";

// What a browser has and Node has not: locks, and a page that can be hidden.
class Locks {
  held = new Map<string, Promise<unknown>>();
  request(name: string, { signal }: { signal: AbortSignal }, f: () => unknown): Promise<unknown> {
    const before = this.held.get(name) ?? Promise.resolve();
    const turn = before.then(() => (signal.aborted ? Promise.reject(signal.reason) : f()));
    this.held.set(
      name,
      turn.catch(() => {}),
    );
    return turn;
  }
}
class Page extends EventTarget {
  hidden = false;
  show(shown: boolean) {
    this.hidden = !shown;
    this.dispatchEvent(new Event("visibilitychange"));
  }
}

const define = (name: string, value: unknown) =>
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });

beforeEach(() => define("navigator", { locks: new Locks() }));
afterEach(() => {
  for (const name of ["navigator", "document", "addEventListener", "removeEventListener"])
    Reflect.deleteProperty(globalThis, name);
});

const tab = (url: string) => createPermissions<Record<string, string>>({ url, eventSource: fetchStream() });

test("pages of one user share a stream", async () => {
  await using server = await startServer({ order: ["list"] });
  const tabs = [tab(server.url), tab(server.url), tab(server.url)];
  await Promise.all(tabs.map((t) => t.ready));
  await until(() => server.streams.size === 1, "stream");
  server.change({ order: ["cancel"] });
  await until(() => tabs.every((t) => t.can("cancel", "order")), "the new list in all");
  assert.equal(server.streams.size, 1);

  // The next takes over when the first goes.
  tabs[0]?.close();
  await until(() => server.count("GET /me/permissions/events") === 2 && server.streams.size === 1, "stream");
  server.change({ order: ["ship"] });
  await until(() => tabs.slice(1).every((t) => t.can("ship", "order")), "the new list in the rest");
  for (const t of tabs) t.close();
  await until(() => server.streams.size === 0, "no stream");
});

test("a page that joins late hears what was told before", async () => {
  await using server = await startServer({ order: ["list"] });
  const first = tab(server.url);
  await until(() => server.streams.size === 1, "stream");
  const second = createPermissions<Record<string, string>>({
    url: server.url,
    eventSource: fetchStream(),
    fetch: async (...args) => {
      const response = await fetch(...args);
      if (server.version === 1) {
        server.change({ order: ["cancel"] });
        await until(() => first.can("cancel", "order"), "the other page has heard");
      }
      return response;
    },
  });
  await until(() => second.can("cancel", "order"), "the new list");
  assert.equal(server.streams.size, 1);
  first.close();
  second.close();
});

test("pages of different users do not share", async () => {
  await using server = await startServer({ order: ["list"] });
  const alice = tab(server.url);
  await until(() => server.streams.size === 1, "stream");
  server.subject = { type: "user", id: "bob" };
  server.version++;
  const bob = tab(server.url);
  await until(() => server.streams.size === 2, "two streams");
  alice.close();
  bob.close();
});

test("a page whose user changes goes over to the stream of the new one", async () => {
  await using server = await startServer({ order: ["list"] });
  const may = tab(server.url);
  await until(() => server.streams.size === 1, "stream");
  server.subject = { type: "user", id: "bob" };
  server.version++;
  await may.refresh();
  await until(() => server.count("GET /me/permissions/events") === 2 && server.streams.size === 1, "stream");
  may.close();
});

test("without locks each page has its own stream", async () => {
  define("navigator", {});
  await using server = await startServer({ order: ["list"] });
  const tabs = [tab(server.url), tab(server.url)];
  await until(() => server.streams.size === 2, "two streams");
  for (const t of tabs) t.close();
});

test("a hidden page leaves the stream and asks when it is shown", async (t) => {
  const page = new Page();
  const target = new EventTarget();
  define("document", page);
  define("addEventListener", target.addEventListener.bind(target));
  define("removeEventListener", target.removeEventListener.bind(target));
  await using server = await startServer({ order: ["list"] });
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const turn = () => new Promise((resolve) => setImmediate(resolve));
  const so = async (f: () => boolean) => {
    for (let i = 0; i < 2_000 && !f(); i++) await turn();
    assert.ok(f());
  };
  const may = tab(server.url);
  await so(() => server.streams.size === 1);

  page.show(false);
  t.mock.timers.tick(29_000);
  page.show(true);
  t.mock.timers.tick(60_000);
  assert.equal(server.streams.size, 1, "a short while does not count");

  page.show(false);
  t.mock.timers.tick(30_000);
  await so(() => server.streams.size === 0);
  server.change({ order: ["cancel"] });
  page.show(true);
  await so(() => may.can("cancel", "order"));
  await so(() => server.streams.size === 1);

  // A page that is put aside, and brought back by "back".
  target.dispatchEvent(new Event("pagehide"));
  await so(() => server.streams.size === 0);
  target.dispatchEvent(new Event("pageshow"));
  await so(() => server.streams.size === 1);
  may.close();
});
