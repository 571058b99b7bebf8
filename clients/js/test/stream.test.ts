import assert from "node:assert/strict";
import { test } from "node:test";
import { fetchStream } from "@gatehouse-authz/permissions/stream";

/** Gives what a stream of these chunks dispatches, up to its end. */
async function heard(chunks: (string | Uint8Array)[], headers = { "content-type": "text/event-stream" }) {
  const events: string[] = [];
  await new Promise<void>((resolve) => {
    const stream = fetchStream({
      fetch: async () =>
        new Response(
          new ReadableStream({
            start(controller) {
              for (const c of chunks)
                controller.enqueue(typeof c === "string" ? new TextEncoder().encode(c) : c);
              controller.close();
            },
          }),
          { headers },
        ),
    })("https://desk.example/events");
    for (const name of ["message", "permissions", "expired"])
      stream.addEventListener(name, (e) => events.push(`${e.type} ${e.data} ${e.lastEventId}`));
    stream.onopen = () => events.push("open");
    stream.onerror = () => resolve();
  });
  return events;
}

test("events are read as the standard says", async () => {
  assert.deepEqual(
    await heard([
      ": a comment\n\n",
      'event: permissions\nid: 7\ndata: {"version":"7"}\n\n',
      "data\n\ndata:a\r\ndata: b\r\n\r\nretry: 5\n\nevent: expired\rdata:\r\rdata: cut off",
    ]),
    ["open", 'permissions {"version":"7"} 7', "message  7", "message a\nb 7", "expired  7"],
  );
});

test("it does not matter where the bytes are cut", async () => {
  const bytes = new TextEncoder().encode("event: permissions\r\nid: ü\r\ndata: {}\r\n\r\n");
  assert.deepEqual(await heard([...bytes].map((b) => Uint8Array.of(b))), ["open", "permissions {} ü"]);
});

test("what is no stream is an error", async () => {
  assert.deepEqual(await heard(["data: x\n\n"], { "content-type": "text/html" }), []);
});

test("an endless event is an error", async () => {
  assert.deepEqual(await heard([`data: ${"x".repeat(70_000)}`, "\n\n"]), ["open"]);
});
