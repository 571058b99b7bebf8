import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import {
  createPermissions,
  type Dehydrated,
  type Options,
  type StatusError,
} from "@gatehouse-authz/permissions";
import { fetchStream } from "@gatehouse-authz/permissions/stream";
import { startServer, until } from "./server.js";

/** Lets mocked time pass, and what it sets off come to its end. */
async function pass(t: TestContext, seconds: number) {
  for (let s = 0; s < seconds; s++) {
    t.mock.timers.tick(1_000);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

type Words = Record<string, string>;
const desk = { order: ["create", "list"], report: [] };
const open = (options: Options) => createPermissions<Words>({ eventSource: fetchStream(), ...options });

test("what the list does not say is denied", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url, eventSource: false });
  assert.equal(may.state.status, "loading");
  assert.equal(may.can("list", "order"), false);
  await may.ready;
  assert.equal(may.state.status, "ready");
  assert.equal(may.can("list", "order"), true);
  for (const [action, type] of [
    ["cancel", "order"],
    ["view", "report"],
    ["list", "invoice"],
    ["constructor", "__proto__"],
    ["length", "constructor"],
    ["", ""],
  ] as const)
    assert.equal(may.can(action, type), false, `${action} ${type}`);
  assert.equal(may.can("list", { type: "order", id: "42" }), false, "nobody has asked about order 42");
  may.close();
  assert.equal(may.can("list", "order"), false);
});

test("a list that has not changed is not sent again", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url, eventSource: false });
  await may.ready;
  const state = may.state;
  let changes = 0;
  may.subscribe(() => changes++);
  await may.refresh();
  assert.equal(server.requests[1]?.status, 304);
  assert.equal(may.state, state);
  assert.equal(changes, 0);
  server.change({ order: ["list"] });
  await may.refresh();
  assert.equal(server.requests[2]?.status, 200);
  assert.equal(changes, 1);
  assert.equal(may.can("create", "order"), false);
  may.close();
});

test("all who ask while a request runs share the next one", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url, eventSource: false });
  await Promise.all([may.refresh(), may.refresh(), may.refresh()]);
  assert.equal(server.count("GET /me/permissions"), 1);
  const first = may.refresh();
  await Promise.resolve();
  const rest = [may.refresh(), may.refresh()];
  await Promise.all([first, ...rest]);
  assert.equal(server.count("GET /me/permissions"), 3);
  may.close();
});

test("an event brings the new list", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url });
  await may.ready;
  await until(() => server.streams.size === 1, "stream");
  const changed = new Promise<void>((resolve) => may.subscribe(resolve));
  server.change({ order: ["list", "cancel"] });
  await changed;
  assert.equal(may.can("cancel", "order"), true);
  assert.equal(may.can("create", "order"), false);
  assert.equal(server.count("GET /me/permissions 200"), 2, "the first event told of what was there");
  may.close();
  await until(() => server.streams.size === 0, "the stream ends");
});

test("what changes between the list and the stream is not missed", async () => {
  await using server = await startServer(desk);
  let list = 0;
  const may = open({
    url: server.url,
    fetch: async (...args) => {
      const response = await fetch(...args);
      if (list++ === 0) server.change({ order: ["cancel"] });
      return response;
    },
  });
  await until(() => may.can("cancel", "order"), "the new list");
  may.close();
});

test("a stream that does not greet has the list asked for", async () => {
  await using server = await startServer(desk);
  server.greets = false;
  const may = open({ url: server.url });
  await until(() => server.count("GET /me/permissions 304") === 1, "the list asked for");
  may.close();
});

test("a stream that breaks is opened again", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url });
  await until(() => server.streams.size === 1, "stream");
  const [first] = server.streams;
  server.permissions = { order: ["cancel"] };
  server.version++;
  first?.destroy();
  await until(() => may.can("cancel", "order"), "the new list");
  assert.equal(server.streams.size, 1);
  may.close();
});

test("a stream says that the credential has expired", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url });
  await until(() => server.streams.size === 1, "stream");
  server.status = 401;
  for (const stream of server.streams) stream.write("event: expired\ndata: {}\n\n");
  await until(() => may.state.status === "denied", "denied");
  assert.equal(may.can("list", "order"), false);
  assert.equal((may.state.error as StatusError).status, 401);
  await until(() => server.streams.size === 0, "nothing to follow");
  server.status = 200;
  await may.refresh();
  assert.equal(may.can("list", "order"), true);
  await until(() => server.streams.size === 1, "the stream again");
  may.close();
});

test("a refused credential denies at once", async () => {
  for (const status of [401, 403]) {
    await using server = await startServer(desk);
    const may = open({ url: server.url, eventSource: false });
    await may.ready;
    server.status = status;
    await may.refresh();
    assert.equal(may.state.status, "denied");
    assert.equal(may.can("list", "order"), false);
    may.close();
  }
});

test("the last good list holds until it expires", async (t) => {
  t.mock.timers.enable({ apis: ["Date", "setTimeout"], now: Date.UTC(2026, 0, 1) });
  const answers: (Response | Error)[] = [];
  const may = open({
    url: "https://desk.example/t/orders/v1/me/permissions",
    eventSource: false,
    fetch: async () => {
      const answer = answers.shift() ?? new TypeError("unreachable");
      if (answer instanceof Error) throw answer;
      return answer;
    },
  });
  const list = (headers: Record<string, string>) =>
    new Response(
      JSON.stringify({ version: "1", subject: { type: "user", id: "a" }, permissions: { order: ["list"] } }),
      {
        headers: { "content-type": "application/json", etag: '"1"', ...headers },
      },
    );
  await may.ready;
  assert.equal(may.state.status, "denied", "there never was a list");

  // The clock of the server is an hour ahead: what counts is the difference.
  answers.push(list({ date: "Thu, 01 Jan 2026 01:00:00 GMT", expires: "Thu, 01 Jan 2026 01:10:00 GMT" }));
  await may.refresh();
  assert.equal(may.can("list", "order"), true);
  await may.refresh();
  assert.equal(may.state.status, "stale");
  assert.equal(may.can("list", "order"), true);
  await pass(t, 599);
  assert.equal(may.can("list", "order"), true);
  await pass(t, 1);
  assert.equal(may.can("list", "order"), false);
  assert.equal(may.state.status, "denied");
  assert.equal(may.dehydrate(), null);

  // Without a word from the server, or with one that says nothing, it holds for five minutes.
  for (const headers of [{}, { expires: "0" }, { expires: "Thu, 01 Jan 1970 00:00:00 GMT" }]) {
    answers.push(list(headers as Record<string, string>));
    await may.refresh();
    await pass(t, 299);
    assert.equal(may.can("list", "order"), true);
    await pass(t, 1);
    assert.equal(may.can("list", "order"), false);
  }
  may.close();
});

test("a credential that is renewed in time keeps the list", async (t) => {
  t.mock.timers.enable({ apis: ["Date", "setTimeout"], now: 0 });
  let asked = 0;
  const may = open({
    url: "https://desk.example/",
    eventSource: false,
    fetch: async () => {
      asked++;
      return Response.json({ version: "1", subject: { id: "a" }, permissions: { order: ["list"] } });
    },
  });
  await may.ready;
  for (let i = 0; i < 10; i++) {
    await pass(t, 280);
    assert.equal(may.can("list", "order"), true);
  }
  assert.equal(asked, 11);
  may.close();
});

test("what fails is tried again, later each time and never in step", async (t) => {
  t.mock.timers.enable({ apis: ["Date", "setTimeout"], now: 0 });
  const times: number[] = [];
  const may = open({
    url: "https://desk.example/",
    eventSource: false,
    fetch: async () => {
      times.push(Date.now());
      return new Response("", { status: 503, headers: times.length === 4 ? { "retry-after": "90" } : {} });
    },
  });
  await may.ready;
  for (let s = 0; s < 4_000; s++) {
    t.mock.timers.tick(100);
    await new Promise((resolve) => setImmediate(resolve));
  }
  const waits = times.slice(1).map((time, i) => time - (times[i] ?? 0));
  const between = (i: number, low: number, high: number) =>
    assert.ok((waits[i] ?? 0) >= low && (waits[i] ?? 0) <= high + 100, `wait ${i} is ${waits[i]}`);
  between(0, 500, 1_000);
  between(1, 1_000, 2_000);
  between(2, 2_000, 4_000);
  between(3, 90_000, 90_000);
  between(6, 30_000, 60_000);
  may.close();
});

test("an answer that is no list changes nothing", async () => {
  const good = { version: "1", subject: { type: "user", id: "a" }, permissions: { order: ["list"] } };
  for (const bad of [
    "<html>",
    "null",
    "[]",
    '"x"',
    JSON.stringify({ ...good, version: 1 }),
    JSON.stringify({ ...good, subject: null }),
    JSON.stringify({ ...good, permissions: null }),
    JSON.stringify({ ...good, permissions: { order: "list" } }),
  ]) {
    let body = JSON.stringify(good);
    const may = open({
      url: "https://desk.example/",
      eventSource: false,
      fetch: async () => new Response(body),
    });
    await may.ready;
    body = bad;
    await may.refresh();
    assert.equal(may.state.status, "stale", bad);
    assert.equal(may.can("list", "order"), true);
    may.close();
  }
});

test("single resources are asked in one request and asked again when the list changes", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url });
  await may.ready;
  server.instances.add("order/1/ship").add("order/2/ship");
  const item = (id: string) => ({ action: "ship", resource: { type: "order", id } });
  const [some, more] = await Promise.all([
    may.check([item("1"), item("3"), item("1")]),
    may.check([item("2")]),
  ]);
  assert.deepEqual([some, more], [[true, false, true], [true]]);
  assert.deepEqual(JSON.parse(server.requests.find((r) => r.method === "POST")?.body ?? ""), {
    items: [item("1"), item("3"), item("2")],
  });
  assert.equal(may.can("ship", { type: "order", id: "1" }), true);
  assert.equal(may.can("ship", { type: "order", id: "3" }), false);

  server.instances.delete("order/1/ship");
  server.instances.add("order/3/ship");
  await until(() => server.streams.size === 1, "stream");
  server.change({ order: [] });
  await until(() => may.can("ship", { type: "order", id: "3" }), "the new answers");
  assert.equal(may.can("ship", { type: "order", id: "1" }), false);

  server.status = 500;
  assert.deepEqual(await may.check([item("3")]), [false], "not knowing is no");
  assert.equal(may.can("ship", { type: "order", id: "3" }), false);
  may.close();
});

test("many questions are several requests", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url, eventSource: false });
  await may.ready;
  for (let i = 0; i < 250; i += 2) server.instances.add(`order/${i}/ship`);
  const ids = Array.from({ length: 250 }, (_, i) => `${i}`);
  const answers = await may.check(ids.map((id) => ({ action: "ship", resource: { type: "order", id } })));
  assert.deepEqual(
    answers,
    ids.map((_, i) => i % 2 === 0),
  );
  assert.equal(server.count("POST /me/permissions/check 200"), 3);
  may.close();
});

test("answers of one user are not those of the next", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url, eventSource: false });
  server.instances.add("order/1/ship");
  await may.ready;
  await may.check([{ action: "ship", resource: { type: "order", id: "1" } }]);
  server.instances.clear();
  server.subject = { type: "user", id: "bob" };
  server.change({ order: ["list"] });
  await may.refresh();
  assert.equal(may.can("ship", { type: "order", id: "1" }), false);
  may.close();
});

test("a page rendered on a server hands its list to the browser", async () => {
  await using server = await startServer(desk);
  const there = open({ url: server.url, eventSource: false, headers: { cookie: "session=a" } });
  await there.ready;
  const handed = JSON.parse(JSON.stringify(there.dehydrate())) as Dehydrated;
  there.close();
  assert.equal(server.requests[0]?.headers.cookie, "session=a");

  const here = open({ url: server.url, initial: handed });
  await here.ready;
  assert.equal(here.can("list", "order"), true);
  await until(() => server.streams.size === 1, "stream");
  assert.equal(server.count("GET /me/permissions "), 1, "it is not asked for again");
  await here.refresh();
  assert.equal(server.count("GET /me/permissions 304"), 1);
  here.close();

  const late = open({ url: server.url, initial: { ...handed, expires: Date.now() - 1 } });
  assert.equal(late.can("list", "order"), false);
  await late.ready;
  assert.equal(late.can("list", "order"), true);
  late.close();
});

test("headers are made for each request", async () => {
  await using server = await startServer(desk);
  let n = 0;
  const headers = async () => ({ authorization: `Bearer ${++n}` });
  const may = createPermissions<Words>({ url: server.url, headers, eventSource: fetchStream({ headers }) });
  await until(() => server.streams.size === 1, "stream");
  await may.check([{ action: "ship", resource: { type: "order", id: "1" } }]);
  assert.deepEqual(
    server.requests.map((r) => r.headers.authorization),
    ["Bearer 1", "Bearer 2", "Bearer 3"],
  );
  assert.match(server.requests[1]?.headers.accept ?? "", /text\/event-stream/);
  may.close();
});

test("the addresses beside the list keep its query", async () => {
  const asked: string[] = [];
  const may = createPermissions<Words>({
    url: "https://desk.example/t/orders/v1/me/permissions?resource=order",
    eventSource: (url) => {
      asked.push(url);
      return { onopen: null, onerror: null, addEventListener() {}, close() {} };
    },
    fetch: async (url) => {
      asked.push(String(url));
      return Response.json({ version: "1", subject: { id: "a" }, permissions: {} });
    },
  });
  await may.ready;
  await may.check([{ action: "a", resource: { type: "t", id: "1" } }]);
  assert.deepEqual(asked, [
    "https://desk.example/t/orders/v1/me/permissions?resource=order",
    "https://desk.example/t/orders/v1/me/permissions/events?resource=order",
    "https://desk.example/t/orders/v1/me/permissions/check?resource=order",
  ]);
  may.close();
});

test("nothing happens after close", async () => {
  await using server = await startServer(desk);
  const may = open({ url: server.url });
  const running = may.refresh();
  may.close();
  await Promise.all([running, may.ready, may.refresh()]);
  assert.equal(may.can("list", "order"), false);
  assert.equal(may.state.list, null);
  assert.deepEqual(await may.check([{ action: "a", resource: { type: "t", id: "1" } }]), [false]);
  assert.equal(server.streams.size, 0);
});
